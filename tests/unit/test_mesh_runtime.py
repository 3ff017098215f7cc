"""How a node process runs and ends. Signals are sent to this very process, so these stay few."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from mesh import runtime
from mesh.config import NodeConfig
from mesh.errors import ConfigError, EnrolError
from mesh.trust import Role


@dataclass(frozen=True, kw_only=True)
class Config(NodeConfig):
    role: ClassVar[Role] = Role.WORKER


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(home=tmp_path, log_level="error")


@pytest.fixture(autouse=True)
def _quick_close(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runtime, "CLOSING_S", 0.05)
    interval_s = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval_s)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_result_of_main_is_the_exit_code(config: Config) -> None:
    async def main(_stop: asyncio.Event) -> int:
        return 7

    assert runtime.run(main, config) == 7


def test_thread_that_computes_does_not_keep_the_loop_waiting_for_long(config: Config) -> None:
    async def main(_stop: asyncio.Event) -> int:
        return 0 if sys.getswitchinterval() <= 0.001 else 1

    assert runtime.run(main, config) == 0


def test_sigterm_sets_stop_and_the_node_finishes(config: Config) -> None:
    async def main(stop: asyncio.Event) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        return 0

    assert runtime.run(main, config) == 0


def test_node_that_does_not_finish_is_cancelled_after_its_drain_deadline(tmp_path: Path) -> None:
    cancelled = []

    async def main(stop: asyncio.Event) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(stop.is_set())
            raise
        return 0

    assert runtime.run(main, Config(home=tmp_path, drain_s=0.0, log_level="error")) == 1
    assert cancelled == [True]


@pytest.mark.parametrize(("error", "code"), [(ConfigError("x"), 2), (EnrolError("x"), 1), (RuntimeError("x"), 1)])
def test_error_becomes_an_exit_code_and_a_log_line(tmp_path: Path, error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    async def main(_stop: asyncio.Event) -> int:
        raise error

    assert runtime.run(main, Config(home=tmp_path, log_format="json")) == code
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["level"] == "error"


def test_error_inside_a_task_group_is_told_by_its_own_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def main(_stop: asyncio.Event) -> int:
        async def fail() -> None:
            raise EnrolError("the certificate ran out")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())
        return 0

    assert runtime.run(main, Config(home=tmp_path, log_format="json")) == 1
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["reason"] == "the certificate ran out"


def test_two_nodes_cannot_share_a_state_folder(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    async def main(_stop: asyncio.Event) -> int:
        second = await asyncio.to_thread(lambda: asyncio.run(_second(config)))
        return int(second)

    assert runtime.run(main, config) == 2


async def _second(config: Config) -> int:
    try:
        with runtime.sole_owner(config):
            return 0
    except ConfigError:
        return 2


def test_announcement_is_there_while_the_node_runs_and_gone_after(config: Config) -> None:
    async def main(_stop: asyncio.Event) -> int:
        runtime.announce(config, node_id=b"\x01" * 32, addresses=("127.0.0.1:1",), api="http://x")
        about = runtime.read_announced(config.state_dir)
        assert about is not None
        assert (about["role"], about["pid"], about["api"], about["id"]) == ("worker", os.getpid(), "http://x", "01" * 32)
        return 0

    assert runtime.run(main, config) == 0
    assert runtime.read_announced(config.state_dir) is None


def test_announcement_of_a_process_that_is_no_more_does_not_count(config: Config) -> None:
    config.state_dir.mkdir(parents=True)
    runtime.announce(config, node_id=b"\x01" * 32, addresses=())
    path = config.state_dir / runtime.NODE_FILE
    stale = json.loads(path.read_text()) | {"started": 1}
    path.write_text(json.dumps(stale))
    assert runtime.read_announced(config.state_dir) is None
    for broken in ("", "[]", "{}", '{"pid": "x", "started": null}', '{"pid": 1e99, "started": null}'):
        path.write_text(broken)
        assert runtime.read_announced(config.state_dir) is None


def test_process_start_names_this_process_and_no_dead_one() -> None:
    assert runtime.process_start(os.getpid()) == runtime.process_start(os.getpid())
    assert runtime.process_start(2**22 + 1) is None
