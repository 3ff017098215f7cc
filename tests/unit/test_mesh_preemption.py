"""Notices of preemption: a file that comes to exist, a command that succeeds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mesh import preemption
from mesh.errors import ConfigError
from mesh.preemption import until_noticed
from worker.config import WorkerConfig


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "FILE_EVERY_S", 0.01)
    monkeypatch.setattr(preemption, "COMMAND_EVERY_S", 0.01)


async def test_file_is_a_notice_once_it_exists(tmp_path: Path) -> None:
    notice = tmp_path / "notice"
    waiting = asyncio.create_task(until_noticed("", notice))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    notice.touch()
    assert await asyncio.wait_for(waiting, 10) == str(notice)


async def test_command_is_a_notice_once_it_succeeds_and_not_while_it_fails_or_is_missing(tmp_path: Path) -> None:
    notice = tmp_path / "notice"
    waiting = asyncio.create_task(until_noticed(f"test -e {notice}", tmp_path / "never"))
    missing = asyncio.create_task(until_noticed("/no/such/program", None))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    notice.touch()
    assert await asyncio.wait_for(waiting, 10) == "test"
    assert not missing.done()
    missing.cancel()


async def test_command_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preemption, "COMMAND_PATIENCE_S", 0.05)
    started = tmp_path / "started"
    waiting = asyncio.create_task(until_noticed(f"sh -c 'echo x >> {started}; exec sleep 60'", None))
    while not started.exists() or len(started.read_text().split()) < 2:
        await asyncio.sleep(0.01)
    assert not waiting.done(), "tried again, and no notice"
    waiting.cancel()


def test_command_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="command line"):
        WorkerConfig(home=tmp_path, model=("x",), preemption_command="curl 'half")
