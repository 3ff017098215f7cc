"""The supervisor over real processes: an engine that loads, crashes, wedges, will not die, and a worker that is killed.

The engine is the stand-in, started the way vLLM is (`vllm_command`).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shlex
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from mesh.errors import EngineError
from tests.support.fake_engine import FakeEngine, Misbehaviour, Mode
from tests.support.processes import gone
from worker.engine import EngineKind, EngineSpec, Readiness, Stage, Supervisor, Task, Timing, TokenIds, make_engine
from worker.engine.child import reserve_port

FAKE = Path(__file__).parents[1] / "support" / "fake_engine.py"
ROOT = Path(__file__).parents[2]
HASTY = Timing(health_every_s=0.1, suspicion_s=0.02, probe_deadline_s=1.0, backoff_first_s=0.05, grace_s=1.0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a Hugging Face model; the stand-in does not read it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def spec(model: Path, tmp_path: Path) -> Callable[..., EngineSpec]:
    def build(*args: str, **fields: object) -> EngineSpec:
        command = shlex.join([sys.executable, str(FAKE)])
        base = {"source": str(model), "served_name": "fake", "cache_dir": tmp_path / "cache", "vllm_command": command}
        return EngineSpec(kind=EngineKind.VLLM, args=args, **(base | fields))  # type: ignore[arg-type]

    return build


class Watch:
    """Every readiness a supervisor told of, and a way to wait for one."""

    def __init__(self) -> None:
        self.seen: list[Readiness] = []
        self._more = asyncio.Event()

    def __call__(self, readiness: Readiness) -> None:
        self.seen.append(readiness)
        self._more.set()

    async def until(self, true_of: Callable[[Readiness], bool]) -> Readiness:
        """The first readiness told from here on, or the latest now, of which it is true."""
        checked = max(0, len(self.seen) - 1)
        while True:
            for readiness in self.seen[checked:]:
                checked += 1
                if true_of(readiness):
                    return readiness
            self._more.clear()
            await self._more.wait()

    def stages(self) -> list[Stage]:
        return [readiness.stage for readiness in self.seen]


@asynccontextmanager
async def supervised(spec: EngineSpec, state_dir: Path, timing: Timing = HASTY) -> AsyncIterator[tuple[Supervisor, Watch]]:
    watch = Watch()
    supervisor = Supervisor(make_engine(spec), state_dir=state_dir, rng=random.Random(1), timing=timing, on_change=watch)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(supervisor.run())
        try:
            yield supervisor, watch
        finally:
            await supervisor.stop()


async def ask(supervisor: Supervisor, method: str, path: str, body: object = None) -> dict[str, object]:
    assert supervisor.base_url is not None
    headers = dict(supervisor.engine.headers)
    async with (
        aiohttp.ClientSession(headers=headers) as client,
        client.request(method, supervisor.base_url + path, json=body) as response,
    ):
        answer = await response.json()
        assert isinstance(answer, dict)
        return answer


def told(supervisor: Supervisor, name: str) -> int:
    """A number the engine printed as JSON, latest first."""
    for line in reversed(supervisor.log_tail):
        if line.startswith("{") and name in (said := json.loads(line)):
            return int(said[name])
    raise AssertionError(f"the engine did not print {name}: {supervisor.log_tail}")


async def test_engine_goes_through_the_stages_and_is_ready_after_real_answers(spec: Callable[..., EngineSpec], tmp_path: Path) -> None:
    async with supervised(spec(), tmp_path) as (supervisor, watch):
        await supervisor.wait_ready()
        assert watch.stages() == [Stage.LOADING, Stage.WARMING, Stage.READY]
        times = [entry.at_s for entry in supervisor.readiness.history]
        assert times == sorted(times)
        (served,) = supervisor.models
        assert served.name == "fake"
        assert served.tasks == frozenset(Task)
        assert served.context_tokens == 4_096
        assert served.digest is not None
        stats = await ask(supervisor, "GET", "/stats")
        assert served.token_ids is TokenIds.VLLM
        assert stats["finished"] == len(Task) + 1, "one more to see whether it tells token ids"
        assert supervisor.load is not None
        assert supervisor.load.running == 0
    assert watch.stages()[-1] is Stage.DRAINING
    assert supervisor.base_url is None
    assert "127.0.0.1" in (tmp_path / "engine.log").read_text()


async def test_engine_only_its_worker_may_use_refuses_others(spec: Callable[..., EngineSpec], tmp_path: Path) -> None:
    async with supervised(spec(), tmp_path) as (supervisor, _):
        await supervisor.wait_ready()
        async with aiohttp.ClientSession() as stranger, stranger.get(f"{supervisor.base_url}/v1/models") as response:
            assert response.status == 401


async def test_engine_killed_is_told_of_at_once_and_comes_back(spec: Callable[..., EngineSpec], tmp_path: Path) -> None:
    async with supervised(spec(), tmp_path) as (supervisor, watch):
        await supervisor.wait_ready()
        os.kill(told(supervisor, "pid"), signal.SIGKILL)
        down = await watch.until(lambda readiness: not readiness.is_ready)
        assert down.stage is Stage.STARTING
        explained = await watch.until(lambda readiness: "SIGKILL" in (readiness.reason or ""))
        assert explained.restarts == 1
        await supervisor.wait_ready()
        assert supervisor.readiness.restarts == 1


async def test_engine_whose_process_was_stopped_is_known_to_be(spec: Callable[..., EngineSpec], tmp_path: Path) -> None:
    async with supervised(spec(), tmp_path) as (supervisor, _):
        assert not supervisor.halted
        await supervisor.wait_ready()
        assert not supervisor.halted
        for number, halted in ((signal.SIGSTOP, True), (signal.SIGCONT, False)):
            os.kill(told(supervisor, "pid"), number)
            async with asyncio.timeout(30):
                while supervisor.halted is not halted:
                    await asyncio.sleep(0.01)


async def test_engine_wedged_is_restarted_after_three_silent_checks(spec: Callable[..., EngineSpec], tmp_path: Path) -> None:
    hasty = Timing(health_every_s=0.1, suspicion_s=0.02, probe_deadline_s=0.2, backoff_first_s=0.05, grace_s=0.5)
    async with supervised(spec(), tmp_path, hasty) as (supervisor, watch):
        await supervisor.wait_ready()
        wedged = told(supervisor, "pid")
        os.kill(wedged, signal.SIGSTOP)
        down = await watch.until(lambda readiness: not readiness.is_ready)
        assert "3 health checks" in (down.reason or "")
        await gone(wedged)  # SIGTERM cannot end a stopped process; SIGKILL after the grace did
        await supervisor.wait_ready()
        assert told(supervisor, "pid") != wedged


async def test_engine_that_never_gets_ready_counts_as_failed_with_its_last_words(spec: Callable[..., EngineSpec], tmp_path: Path) -> None:
    crashing = spec("--load-s", "0", "--crash-after-s", "0")
    hasty = Timing(suspicion_s=0.02, backoff_first_s=0.01, backoff_max_s=0.05, lives_allowed=3, warm_deadline_s=1)
    async with supervised(crashing, tmp_path, hasty) as (supervisor, watch):
        failed = await watch.until(lambda readiness: readiness.stage is Stage.FAILED)
        assert "told to crash" in (failed.reason or "")
        assert failed.restarts == 3
        with pytest.raises(EngineError, match="told to crash"):
            await supervisor.wait_ready()
        await watch.until(lambda readiness: readiness.stage is Stage.LOADING and readiness.restarts > 3)  # tried on


async def test_engine_that_loads_too_long_is_given_up_on(spec: Callable[..., EngineSpec], tmp_path: Path) -> None:
    hasty = Timing(suspicion_s=0.02, load_deadline_s=0.5, backoff_first_s=0.01, lives_allowed=1, grace_s=0.5)
    async with supervised(spec("--load-s", "600"), tmp_path, hasty) as (_, watch):
        failed = await watch.until(lambda readiness: readiness.stage is Stage.FAILED)
        assert "not loaded after 0.5 s" in (failed.reason or "")


async def test_engine_program_that_cannot_run_is_told_of(spec: Callable[..., EngineSpec], tmp_path: Path, model: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("not a program")
    program.chmod(0o755)
    async with supervised(spec(vllm_command=str(program)), tmp_path) as (_, watch):
        down = await watch.until(lambda readiness: "could not be started" in (readiness.reason or ""))
        assert "cannot start" in (down.reason or "")


async def test_draining_engine_that_crashes_is_not_restarted(spec: Callable[..., EngineSpec], tmp_path: Path) -> None:
    async with supervised(spec(), tmp_path) as (supervisor, watch):
        await supervisor.wait_ready()
        supervisor.drain()
        assert supervisor.base_url is not None  # what runs may finish
        group = supervisor.pid
        assert group is not None
        os.kill(told(supervisor, "pid"), signal.SIGKILL)
        await gone(group)
    assert watch.stages().count(Stage.LOADING) == 1
    assert supervisor.readiness.stage is Stage.DRAINING


async def test_stop_ends_an_engine_deaf_to_sigterm_and_what_it_left_in_another_session(
    spec: Callable[..., EngineSpec], tmp_path: Path
) -> None:
    async with supervised(spec("--deaf-to-sigterm", "--grandchild", "session"), tmp_path) as (supervisor, _):
        await supervisor.wait_ready()
        pids = [told(supervisor, "pid"), told(supervisor, "grandchild")]
    for pid in pids:
        await gone(pid)


async def test_stop_while_a_crashed_engine_is_cleared_up_leaves_nothing(spec: Callable[..., EngineSpec], tmp_path: Path) -> None:
    async with supervised(spec("--grandchild", "session"), tmp_path) as (supervisor, watch):
        await supervisor.wait_ready()
        grandchild = told(supervisor, "grandchild")
        os.kill(told(supervisor, "pid"), signal.SIGKILL)
        supervisor.suspect()
        await watch.until(lambda readiness: not readiness.is_ready)
    await gone(grandchild)


async def test_cancelled_supervisor_leaves_no_engine(spec: Callable[..., EngineSpec], tmp_path: Path) -> None:
    supervisor = Supervisor(make_engine(spec()), state_dir=tmp_path, timing=HASTY)
    running = asyncio.create_task(supervisor.run())
    async with asyncio.timeout(20):
        await supervisor.wait_ready()
    pid = told(supervisor, "pid")
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    await gone(pid)


WORKER = """
import asyncio, sys
from pathlib import Path
from worker.engine import *
async def main(source, command, state, where):
    spec = EngineSpec(kind=EngineKind.VLLM, source=source, served_name="fake", vllm_command=command,
                      cache_dir=Path(state), args=("--grandchild", where, "--deaf-to-sigterm"))
    supervisor = Supervisor(make_engine(spec), state_dir=Path(state), timing=Timing(grace_s=0.5))
    async with asyncio.TaskGroup() as group:
        group.create_task(supervisor.run())
        await supervisor.wait_ready()
        print(supervisor.pid, *supervisor.log_tail, sep="\\n", flush=True)
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("where", "also_launcher"),
    [("session", False), ("group", False), ("group", True)],
    ids=["child in another session", "child in its group", "launcher killed, too"],
)
async def test_worker_killed_leaves_no_engine_behind(where: str, also_launcher: bool, model: Path, tmp_path: Path) -> None:
    command = shlex.join([sys.executable, str(FAKE)])
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WORKER, str(model), command, str(tmp_path), where),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert worker.stdout is not None
    async with asyncio.timeout(30):
        said = b""
        while b'"pid"' not in said:
            said += await worker.stdout.readline()
        lines = said.decode().splitlines()
        launcher = next(int(line) for line in lines if line.isdigit())
        printed = [json.loads(line) for line in lines if line.startswith("{")]
        engine = next(line["pid"] for line in printed if "pid" in line)
        grandchild = next(line["grandchild"] for line in printed if "grandchild" in line)
        worker.kill()
        if also_launcher:
            os.kill(launcher, signal.SIGKILL)
        await worker.wait()
    await gone(launcher)
    await gone(engine)
    await gone(grandchild)


async def test_launcher_killed_takes_the_engine_along_and_the_worker_starts_another(
    spec: Callable[..., EngineSpec], tmp_path: Path
) -> None:
    async with supervised(spec(), tmp_path) as (supervisor, watch):
        await supervisor.wait_ready()
        launcher, engine = supervisor.pid, told(supervisor, "pid")
        assert launcher is not None
        os.kill(launcher, signal.SIGKILL)
        await gone(engine)
        await watch.until(lambda readiness: readiness.restarts == 1)
        await supervisor.wait_ready()
        assert supervisor.pid != launcher


# ------------------------------------------------------------------------------------------------------ external engines


def external(url: str, **fields: object) -> EngineSpec:
    return EngineSpec(kind=EngineKind.EXTERNAL, url=url, **fields)  # type: ignore[arg-type]


async def test_external_engine_lost_is_told_of_and_comes_back_by_itself(tmp_path: Path) -> None:
    first = FakeEngine()
    await first.start()
    async with supervised(external(first.url + "/v1"), tmp_path) as (supervisor, watch):
        await supervisor.wait_ready()
        assert [served.name for served in supervisor.models] == ["fake"]
        await first.stop()
        supervisor.suspect()
        await watch.until(lambda readiness: not readiness.is_ready)
        waiting = await watch.until(lambda readiness: readiness.reason == "nobody listens there")
        assert waiting.stage is Stage.LOADING
        async with FakeEngine(port=first.port):
            await watch.until(lambda readiness: readiness.is_ready)


async def test_external_engine_that_hangs_is_not_ready_after_three_checks(tmp_path: Path) -> None:
    hasty = Timing(health_every_s=0.1, suspicion_s=0.02, probe_deadline_s=0.1)
    async with FakeEngine() as engine, supervised(external(engine.url), tmp_path, hasty) as (supervisor, watch):
        await supervisor.wait_ready()
        engine.misbehave(Misbehaviour(mode=Mode.DEAF))
        down = await watch.until(lambda readiness: not readiness.is_ready)
        assert "3 health checks" in (down.reason or "")
        engine.misbehave(None)
        await watch.until(lambda readiness: readiness.is_ready)


async def test_engine_that_is_sick_for_a_moment_stays_ready(tmp_path: Path) -> None:
    patient = Timing(health_every_s=0.1, suspicion_s=0.02, failures_allowed=1_000)
    async with FakeEngine() as engine, supervised(external(engine.url), tmp_path, patient) as (supervisor, watch):
        await supervisor.wait_ready()
        engine.misbehave(Misbehaviour(mode=Mode.SICK))
        before = engine.stats.health_checks
        await engine.until(lambda stats: stats.health_checks >= before + 3)
        assert supervisor.readiness.is_ready
        engine.misbehave(None)
        await engine.until(lambda stats: stats.health_checks >= before + 6)
        assert watch.stages().count(Stage.READY) == 1


async def test_external_engine_with_a_key_is_asked_with_it(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("sesame\n")
    async with FakeEngine(api_key="sesame") as engine:
        async with supervised(external(engine.url, api_key_file=secret), tmp_path) as (supervisor, _):
            await supervisor.wait_ready()
        async with supervised(external(engine.url), tmp_path, Timing(lives_allowed=1)) as (supervisor, watch):
            failed = await watch.until(lambda readiness: readiness.stage is Stage.FAILED)
            assert "refused the key" in (failed.reason or "")


async def test_external_engine_without_the_model_says_what_it_has(tmp_path: Path) -> None:
    timing = Timing(lives_allowed=1)
    async with (
        FakeEngine(model="there") as engine,
        supervised(external(engine.url, source="missing"), tmp_path, timing) as (_, watch),
    ):
        failed = await watch.until(lambda readiness: readiness.stage is Stage.FAILED)
        assert failed.reason == "the engine does not serve 'missing'; it lists there"


async def test_engine_that_answers_nonsense_to_the_warm_up_is_not_ready(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        engine.misbehave(Misbehaviour(mode=Mode.WRONG_TYPE))
        async with supervised(external(engine.url), tmp_path, Timing(lives_allowed=1)) as (_, watch):
            failed = await watch.until(lambda readiness: readiness.stage is Stage.FAILED)
            assert failed.reason == "the engine answers no request for 'fake'"
        assert Stage.READY not in watch.stages()


async def test_reserved_ports_are_never_given_out_twice() -> None:
    held = [reserve_port() for _ in range(50)]
    ports = {item.getsockname()[1] for item in held}
    assert len(ports) == 50
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(held[0].getsockname())
        server.listen()
    for item in held:
        item.close()
