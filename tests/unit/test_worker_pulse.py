"""When an engine counts as stuck, when it does not though it is quiet, and what is done about it."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass, field

import pytest

from tests.support.clocks import StoppedClock
from worker.admission import Admission
from worker.engine import EngineLoad
from worker.pulse import DEAF_S, LEARNS, PATIENCE_S, Pulse
from worker.vitals import STALL_OTHERS_S, Vitals, stall_s


class Bed:
    """A pulse that is looked at twice a second; the engine's health check is good every second unless ``deaf``."""

    def __init__(self) -> None:
        self.pulse = Pulse()
        self.pulse.reset(0.0)
        self.now = 0.0
        self.steps: Hashable = None
        self.work = self.proofs = 0
        self.deaf = False
        self.heard_at = 0.0

    def pass_s(self, seconds: float, *, steps: bool = False, signs: bool = False) -> float | None:
        """Let time pass; how long until it was stuck."""
        for tick in range(round(seconds / 0.5)):
            self.now += 0.5
            if not self.deaf and tick % 2:
                self.heard_at = self.now
            if steps:
                self.steps = ("step", self.now)
            self.pulse.signs += signs
            if self.pulse.look(self.now, work=self.work, steps=self.steps, proofs=self.proofs, heard_at=self.heard_at):
                return (tick + 1) * 0.5
        return None


@pytest.fixture
def bed() -> Bed:
    return Bed()


def test_engine_that_makes_no_step_with_work_to_do_is_stuck_within_seconds(bed: Bed) -> None:
    bed.steps, bed.work = ("step", 1), 3
    bed.pass_s(20, steps=True)
    took_s = bed.pass_s(20)
    assert took_s is not None
    assert PATIENCE_S < took_s <= PATIENCE_S + 1


def test_long_prompt_is_no_wedge_as_long_as_the_engine_counts_steps(bed: Bed) -> None:
    bed.work = 1
    assert bed.pass_s(120, steps=True) is None


def test_tokens_of_any_request_are_a_sign_for_all(bed: Bed) -> None:
    bed.steps, bed.work = (1,), 5
    assert bed.pass_s(60, signs=True) is None


def test_engine_that_tells_nothing_owes_nothing_until_a_stream_has_begun(bed: Bed) -> None:
    bed.work = 1
    assert bed.pass_s(120) is None
    bed.pulse.begun = 1
    bed.pulse.signs += 1
    assert bed.pass_s(20) == PATIENCE_S + 1


def test_stream_that_waits_for_its_client_owes_nothing(bed: Bed) -> None:
    bed.work, bed.pulse.begun, bed.pulse.held = 1, 1, 1
    assert bed.pass_s(60) is None


def test_idle_engine_speaks_by_its_health_check(bed: Bed) -> None:
    bed.steps = (1,)
    assert bed.pass_s(600) is None
    bed.deaf = True
    took_s = bed.pass_s(20)
    assert took_s is not None
    assert took_s <= DEAF_S + 1


def test_work_that_comes_after_a_long_rest_gets_all_the_patience(bed: Bed) -> None:
    bed.steps = (1,)
    bed.pass_s(60)
    bed.work = 1
    took_s = bed.pass_s(20)
    assert took_s is not None
    assert took_s > PATIENCE_S


def test_stuck_engine_stays_so_though_its_work_was_taken_away_until_it_gives_a_token(bed: Bed) -> None:
    bed.steps, bed.work = (1,), 1
    bed.pass_s(20)
    bed.work = 0
    assert bed.pass_s(5) == 0.5
    assert bed.pulse.stuck
    bed.proofs += 1
    assert bed.pass_s(5) is None


def test_quiet_that_was_work_after_all_teaches_patience(bed: Bed) -> None:
    bed.steps, bed.work = (1,), 1
    bed.pass_s(20)
    while bed.pulse.quiet_s < 10:
        bed.pass_s(0.5)
    bed.pass_s(0.5, steps=True)
    assert not bed.pulse.stuck
    assert bed.pulse.patience_s >= LEARNS * 10
    assert bed.pass_s(14) is None


@dataclass
class Engine:
    """What `Vitals` asks of the supervisor."""

    base_url: str | None = "http://127.0.0.1:1"
    load: EngineLoad | None = field(default_factory=lambda: EngineLoad(running=1, waiting=0, steps=(1,)))
    proofs: int = 0
    heard_at: float = 0.0
    halted: bool = False
    doubts: int = 0
    condemned: list[str] = field(default_factory=list)

    def doubt(self) -> None:
        self.doubts += 1

    def condemn(self, reason: str) -> None:
        self.condemned.append(reason)


async def test_stuck_engine_is_told_doubted_and_at_last_condemned() -> None:
    clock, engine, pulse, admission = StoppedClock(100.0), Engine(), Pulse(), Admission(limit=4, queue_limit=0)
    told: list[bool] = []
    given_up: list[str] = []
    vitals = Vitals(
        engine, pulse, admission, stall_s=10.0, on_change=lambda: told.append(pulse.stuck), give_up=given_up.append, clock=clock
    )
    pulse.reset(clock.now)
    async with admission.slot():
        while clock.now < 105:
            clock.now += 0.5
            vitals.look()
        assert told == [True]
        assert engine.doubts
        assert not engine.condemned
        while clock.now < 111:
            clock.now += 0.5
            vitals.look()
        assert engine.condemned
        assert engine.condemned == given_up
        assert "no step for 10 s" in given_up[0]
        assert told == [True], "it stays stuck until it has ended"
        engine.base_url = None
        vitals.look()
        assert told == [True, False]
        await asyncio.sleep(0)


async def test_quiet_engine_whose_process_was_stopped_is_told_to_be_halted_and_a_long_step_is_not() -> None:
    clock, engine, pulse, admission = StoppedClock(100.0), Engine(), Pulse(), Admission(limit=4, queue_limit=0)
    told: list[tuple[bool, bool]] = []
    vitals = Vitals(
        engine,
        pulse,
        admission,
        stall_s=60.0,
        on_change=lambda: told.append((pulse.stuck, pulse.halted)),
        give_up=lambda reason: None,
        clock=clock,
    )
    pulse.reset(clock.now)

    def look(seconds: float) -> None:
        until = clock.now + seconds
        while clock.now < until:
            clock.now += 0.5
            vitals.look()

    async with admission.slot():
        engine.halted = True
        look(2)
        assert told == [], "stopped for a moment, and nobody has missed anything yet"
        look(2)
        assert told == [(True, True)]
        engine.halted = False
        pulse.signs += 1
        look(1)
        assert told[1:] == [(False, False)]
        look(20)
        assert told[2:] == [(True, False)], "a step may last: without a stopped process nobody knows"


def test_embedded_engine_on_processors_gets_more_time_unless_told_otherwise() -> None:
    assert stall_s(0, "vllm") == stall_s(0, "external") == STALL_OTHERS_S
    assert stall_s(0, "llamacpp") == 300
    assert stall_s(7.5, "llamacpp") == 7.5
