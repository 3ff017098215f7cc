"""Watches the engine's pulse: tells proxies when it stops, asks the engine for a token, gives it up at last."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import structlog

from mesh.clock import Clock
from worker.admission import Admission
from worker.engine import EngineKind, EngineLoad
from worker.pulse import Pulse

log = structlog.get_logger(__name__)

LOOK_S = 0.5
STALL_S = {EngineKind.LLAMACPP: 300.0}
STALL_OTHERS_S = 30.0
"""On processors alone, one step of a large model over a long prompt takes minutes."""


class Patient(Protocol):
    """What is asked of the engine's keeper (`worker.engine.Supervisor`)."""

    @property
    def base_url(self) -> str | None: ...
    @property
    def load(self) -> EngineLoad | None: ...
    @property
    def halted(self) -> bool: ...

    proofs: int
    heard_at: float

    def doubt(self) -> None: ...
    def condemn(self, reason: str) -> None: ...


class Vitals:
    """``on_change`` hears when the engine is stuck or moves again, ``give_up`` ends what it was asked when it is condemned."""

    def __init__(
        self,
        engine: Patient,
        pulse: Pulse,
        admission: Admission,
        *,
        stall_s: float,
        on_change: Callable[[], None],
        give_up: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._pulse = pulse
        self._admission = admission
        self._stall_s = stall_s
        self._on_change = on_change
        self._give_up = give_up
        self._clock = clock
        self._condemned = False

    async def run(self) -> None:
        """A task for as long as the worker runs."""
        while True:
            await self._clock.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        pulse, engine, now = self._pulse, self._engine, self._clock.monotonic()
        was_stuck, was_halted = pulse.stuck, pulse.halted
        if engine.base_url is None:
            pulse.reset(now)
            self._condemned = False
        else:
            load = engine.load
            steps: Hashable = load.steps if load is not None else None
            work = self._admission.running - pulse.held
            if pulse.look(now, work=work, steps=steps, proofs=engine.proofs, heard_at=engine.heard_at):
                engine.doubt()
            pulse.halted = pulse.stuck and engine.halted
            if pulse.quiet_s > self._stall_s:
                reason = f"the engine made no step for {pulse.quiet_s:.0f} s"
                if not self._condemned:
                    log.error("engine.condemned", reason=reason, running=self._admission.running)
                self._condemned = True
                engine.condemn(reason)
                self._give_up(reason)  # also what comes until the engine has ended
        if pulse.stuck != was_stuck:
            log.log(30 if pulse.stuck else 20, "engine.stuck" if pulse.stuck else "engine.moves", quiet_s=round(pulse.quiet_s, 1))
        if pulse.halted and not was_halted:
            log.error("engine.halted", reason="a process of the engine has been stopped (SIGSTOP or a debugger)")
        if (pulse.stuck, pulse.halted) != (was_stuck, was_halted):
            self._on_change()


def stall_s(asked_s: float, kind: str) -> float:
    """How long an engine may make no step before it is given up."""
    return asked_s or STALL_S.get(EngineKind(kind), STALL_OTHERS_S)
