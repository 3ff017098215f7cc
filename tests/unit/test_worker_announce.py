"""What a worker says of itself: in its record, and over its links."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mesh.clock import SystemClock
from mesh.link.frames import Frame
from mesh.link.peers import Peers
from mesh.records import Capability, Load, State
from tests.support.pipe import StreamLoop, run_streams
from worker.admission import Admission
from worker.announce import LOAD_EVERY_S, LoadPusher, about, kv_use, model_entries
from worker.config import WorkerConfig
from worker.engine import EngineLoad, ModelSpec, Readiness, Stage, Supervisor, Task
from worker.prefill import SURPRISE_TOKENS, Prefill, Prompt

MODEL = ModelSpec(
    name="m",
    engine_name="inner",
    tasks=frozenset({Task.COMPLETIONS, Task.CHAT}),
    context_tokens=4096,
    digest="sha256:ab",
    adapters=("legal",),
)


@dataclass
class StandInSupervisor:
    """What an announcement asks of the supervisor."""

    readiness: Readiness = field(default_factory=lambda: Readiness.begin(1.0))
    models: tuple[ModelSpec, ...] = ()
    load: EngineLoad | None = None


@dataclass(eq=False)
class StandInLink:
    streams: int
    last_incoming: int = 7
    sent: list[tuple[Frame, dict[str, Any]]] = field(default_factory=list)

    def send_control(self, kind: Frame, fields: dict[str, Any]) -> None:
        self.sent.append((kind, fields))


def as_supervisor(supervisor: StandInSupervisor) -> Supervisor:
    return cast(Supervisor, supervisor)


@pytest.fixture
def config(tmp_path: Path) -> WorkerConfig:
    return WorkerConfig(home=tmp_path, model=("some/model",), served_name=("m",))


@pytest.mark.parametrize("stage", Stage)
def test_every_stage_of_an_engine_is_a_state_of_its_record(config: WorkerConfig, stage: Stage) -> None:
    supervisor = StandInSupervisor(Readiness.begin(1.0).enter(stage, 2.0))
    said = about(config, as_supervisor(supervisor), Admission(limit=1, queue_limit=1), Capability())
    assert said.state == State(str(stage))


def test_reason_is_printable_and_short(config: WorkerConfig) -> None:
    readiness = Readiness.begin(1.0).enter(Stage.FAILED, 2.0, "no\nsuch\x00 \u2028model " + "x" * 500)
    said = about(config, as_supervisor(StandInSupervisor(readiness)), Admission(limit=1, queue_limit=1), Capability())
    assert said.reason.isprintable()
    assert said.reason.startswith("no such")
    assert len(said.reason) <= 120


def test_models_are_what_is_served_and_before_that_what_the_settings_promise(config: WorkerConfig) -> None:
    assert [(entry.name, entry.tasks) for entry in model_entries(config, ())] == [("m", ("chat", "completions"))]
    (entry,) = model_entries(config, (MODEL,))
    assert (entry.name, entry.tasks, entry.adapters) == ("m", ("chat", "completions"), ("legal",))
    assert (entry.digest, entry.context_tokens) == ("sha256:ab", 4096)


async def test_load_is_told_once_there_is_any(config: WorkerConfig) -> None:
    admission, supervisor = Admission(limit=1, queue_limit=1), StandInSupervisor()
    assert about(config, as_supervisor(supervisor), admission, Capability()).load == Load()
    async with admission.slot():
        assert about(config, as_supervisor(supervisor), admission, Capability()).load == Load(running=1)
    supervisor.load = EngineLoad(running=4, waiting=1, kv_use=0.5)
    assert about(config, as_supervisor(supervisor), admission, Capability()).load == Load(kv_use=0.5)


def test_unknown_kv_use_is_none_used() -> None:
    assert kv_use(as_supervisor(StandInSupervisor())) == 0.0
    assert kv_use(as_supervisor(StandInSupervisor(load=EngineLoad(running=1, waiting=0)))) == 0.0


def test_changes_of_load_within_a_moment_go_out_as_one_frame_to_each_link_with_its_own_share() -> None:
    async def scenario(loop: StreamLoop) -> None:
        admission = Admission(limit=2, queue_limit=5)
        pusher = LoadPusher(admission, as_supervisor(StandInSupervisor(load=EngineLoad(running=9, waiting=9, kv_use=0.25))))
        pusher.changed()
        await asyncio.sleep(2 * LOAD_EVERY_S)  # nobody is linked yet
        links = {b"a": StandInLink(2), b"b": StandInLink(0)}
        pusher.peers = cast(Peers, SimpleNamespace(links=links))
        async with admission.slot():
            for _ in range(10):
                pusher.changed()
            await asyncio.sleep(2 * LOAD_EVERY_S)
            pusher.changed()
        await asyncio.sleep(2 * LOAD_EVERY_S)
        prefill = {"pre": 0, "rate": 0, "last": 7}
        one = {"run": 1, "wait": 0, "kv": 0.25, "n": 1, **prefill}
        none = {"run": 0, "wait": 0, "kv": 0.25, "n": 2, **prefill}
        dump = (Frame.PREFIX, {"new": True})
        assert links[b"a"].sent == [dump, (Frame.LOAD, one | {"yours": 2}), (Frame.LOAD, none | {"yours": 2})]
        assert links[b"b"].sent == [dump, (Frame.LOAD, one | {"yours": 0}), (Frame.LOAD, none | {"yours": 0})]

    run_streams(scenario)


def test_prefill_enough_to_send_requests_elsewhere_is_told_at_once() -> None:
    async def scenario(loop: StreamLoop) -> None:
        prefill = Prefill(SystemClock())
        pusher = LoadPusher(Admission(limit=2, queue_limit=5), as_supervisor(StandInSupervisor()), prefill)
        alice, bob = StandInLink(1), StandInLink(0)
        pusher.peers = cast(Peers, SimpleNamespace(links={b"a": alice, b"b": bob}))

        async def told_after(tokens: int) -> list[int]:
            """What the other link hears at once of so much work that comes now."""
            bob.sent.clear()
            size = round(tokens / prefill.held.tokens_per_byte)
            prefill.arrive(alice, Prompt(chain=(), size_bytes=size, streamed=True))
            pusher.changed()
            await asyncio.sleep(LOAD_EVERY_S / 10)
            return [fields["pre"] > 0 for kind, fields in bob.sent if kind is Frame.LOAD]

        await told_after(0)  # the first change of all never waits
        assert await told_after(SURPRISE_TOKENS // 2) == []
        assert await told_after(SURPRISE_TOKENS) == [True]
        assert await told_after(SURPRISE_TOKENS) == [True]
        assert await told_after(SURPRISE_TOKENS // 2) == []
        await asyncio.sleep(2 * LOAD_EVERY_S)
        assert [kind for kind, _ in bob.sent] == [Frame.LOAD]

    run_streams(scenario)
