"""Keeps one engine running: starts it, proves that it answers, notices when it does not, starts it again.

    starting → downloading → loading → warming → ready → draining
        ↑__________________________________________|          failed: several lives in a row never got ready

A life of an engine is one child process (or, for an external engine, one unbroken time of answering). It is ready only
after a real request of each kind of task was tried and at least one was answered. It ends when the process exits, when
it stays silent for several health checks, or when it takes too long to load; then the readiness says so at once and,
after a growing pause, the next life begins. Requests are none of this module's business: the gateway sends them to
`base_url` while `readiness.is_ready`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import structlog

from mesh.clock import Clock, SystemClock
from mesh.errors import EngineError, ModelSourceError
from worker.engine.base import Command, Engine, EngineLoad, ModelSpec, Readiness, Stage, Task
from worker.engine.child import ChildExited, describe_exit, is_halted, reserve_port, running
from worker.engine.logfile import EngineLog
from worker.engine.probe import Probe, Refused, session
from worker.models import ResolvedModel

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How patient a supervisor is."""

    health_every_s: float = 1.0
    suspicion_s: float = 0.1
    """The least time between two health checks, however often somebody calls `suspect`; also the pace while loading."""
    probe_deadline_s: float = 5.0
    failures_allowed: int = 3
    """An engine is down after this many failed checks: at the latest after 3 × (1 s + 5 s)."""
    load_deadline_s: float = 900.0
    warm_deadline_s: float = 180.0
    grace_s: float = 10.0
    """From SIGTERM to SIGKILL."""
    backoff_first_s: float = 0.5
    backoff_max_s: float = 60.0
    stable_after_s: float = 30.0
    """A life that was ready for this long makes the ones before it forgotten."""
    lives_allowed: int = 5
    """Lives in a row that never got ready before the engine counts as failed; it is tried on all the same."""


@dataclass(frozen=True, kw_only=True)
class Lives:
    """How the last lives of an engine ended: how many crashed since the last stable one, and how many of the latest
    never got ready."""

    crashed: int = 0
    unready: int = 0

    def after(self, ready_for_s: float | None, timing: Timing) -> Lives:
        """The count after another life, which was ready for so long, or never."""
        is_stable = ready_for_s is not None and ready_for_s >= timing.stable_after_s
        return Lives(
            crashed=1 if is_stable else self.crashed + 1,
            unready=self.unready + 1 if ready_for_s is None else 0,
        )

    def pause_s(self, timing: Timing, rng: random.Random) -> float:
        """How long to wait before the next life: doubling from backoff_first_s to backoff_max_s, with up to half of it
        taken off at random, so that workers that failed together do not come back together."""
        full_s = min(timing.backoff_max_s, timing.backoff_first_s * 2.0 ** min(max(self.crashed - 1, 0), 32))
        return full_s * rng.uniform(0.5, 1.0)


class Supervisor:
    """Runs one engine until told to stop.

    `run()` belongs into the caller's task group; it returns after `stop()` and raises only when cancelled. `on_change`
    is called in the loop with every new readiness, `on_progress` with (bytes done, bytes in all or None) while the
    model is prepared. The engine's output goes to `state_dir/engine.log`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        state_dir: Path,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        timing: Timing | None = None,
        on_change: Callable[[Readiness], None] | None = None,
        on_progress: Callable[[int, int | None], None] | None = None,
    ) -> None:
        self.engine = engine
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()
        self._timing = timing or Timing()
        self._on_change = on_change
        self._on_progress = on_progress or (lambda done_bytes, total_bytes: None)
        self._log = EngineLog(state_dir / "engine.log")
        self._stopping = asyncio.Event()
        self._finished = asyncio.Event()
        self._finished.set()
        self._suspected = asyncio.Event()
        self._condemned = ""
        self._doubted = False
        self.proofs = 0
        """Tokens that the engine gave because it was doubted."""
        self.heard_at = 0.0
        """When its last good health check was, on the monotonic clock."""
        self._changed = asyncio.Event()
        self._base_url: str | None = None
        self._models: tuple[ModelSpec, ...] = ()
        self._load: EngineLoad | None = None
        self._pid: int | None = None
        self._ready_at_s: float | None = None
        self.readiness = Readiness.begin(self._clock.wall())

    # ------------------------------------------------------------------------------------------------- what others ask

    @property
    def base_url(self) -> str | None:
        """Where the engine answers (`/v1/…` follows); None while it does not run. Another port after a restart."""
        return self._base_url

    @property
    def models(self) -> tuple[ModelSpec, ...]:
        """What it serves, with the tasks that were proven to work; empty until it was ready once."""
        return self._models

    @property
    def load(self) -> EngineLoad | None:
        """Its load as it told it last, about a second ago; None while it does not tell."""
        return self._load

    @property
    def log_tail(self) -> tuple[str, ...]:
        """The last lines of the engine's output."""
        return tuple(self._log.tail)

    @property
    def pid(self) -> int | None:
        """The engine's process group; None while it does not run or runs elsewhere."""
        return self._pid

    @property
    def halted(self) -> bool:
        """Whether one of its processes has been stopped; looks at every process of this machine. False of one that runs elsewhere."""
        return self._pid is not None and is_halted(self._pid)

    async def wait_ready(self) -> None:
        """Return when the engine is ready. The caller sets the deadline. Raises EngineError when it has failed, or is
        draining or stopped."""
        while not self.readiness.is_ready:
            if self.readiness.stage in (Stage.FAILED, Stage.DRAINING):
                raise EngineError(self.readiness.reason or f"the engine is {self.readiness.stage}")
            await self._changed.wait()

    def suspect(self) -> None:
        """Somebody saw the engine misbehave: check its health now instead of at the next second."""
        self._suspected.set()

    def doubt(self) -> None:
        """Somebody thinks that it computes nothing any more: ask it for a token at the next check, and count it in `proofs`."""
        self._doubted = True

    def condemn(self, reason: str) -> None:
        """End this life of the engine: it runs, but is of no use."""
        self._condemned = reason
        self._suspected.set()

    def drain(self) -> None:
        """No new requests from here on; the engine goes on with what it has until `stop()`, and is not restarted."""
        self._enter(Stage.DRAINING)

    async def stop(self) -> None:
        """End the engine (SIGTERM, after the grace SIGKILL) and return when it is gone and `run()` is over."""
        self.drain()
        self._stopping.set()
        await self._finished.wait()

    # -------------------------------------------------------------------------------------------------------- its lives

    async def run(self) -> None:
        """Keep the engine alive until `stop()`."""
        self._finished.clear()
        try:
            async with session(self.engine) as client:
                await first_of(self._live_on(client), self._stopping.wait())
        finally:
            self._log.close()
            self._finished.set()

    async def _live_on(self, client: aiohttp.ClientSession) -> None:
        """Life after life, until it is drained."""
        lives = Lives()
        while self.readiness.stage is not Stage.DRAINING:
            self._ready_at_s = None
            is_hopeless = False
            try:
                await self._live(client)
                reason = "the engine ended"
            except EngineError as error:
                reason, is_hopeless = error.message, isinstance(error, ModelSourceError)
            except OSError as error:
                reason = f"the engine cannot be run: {error}"
            ready_for_s = None if self._ready_at_s is None else self._clock.monotonic() - self._ready_at_s
            lives = lives.after(ready_for_s, self._timing)
            pause_s = lives.pause_s(self._timing, self._rng)
            self._down(reason, is_hopeless or lives.unready >= self._timing.lives_allowed, pause_s)
            await self._clock.sleep(pause_s)
        await self._stopping.wait()

    def _down(self, reason: str, has_failed: bool, pause_s: float) -> None:
        log.warning("engine.down", reason=reason, retry_in_s=round(pause_s, 2), failed=has_failed)
        self.readiness = self.readiness.restarted()
        self._enter(Stage.FAILED if has_failed else Stage.STARTING, reason)

    async def _live(self, client: aiohttp.ClientSession) -> None:
        """One life. Ends by raising EngineError with the reason."""
        if self.engine.needs_fetch:
            self._enter(Stage.DOWNLOADING)
        model = await self.engine.prepare(self._on_progress)
        self._enter(Stage.LOADING)
        with reserve_port() as held:
            port = held.getsockname()[1]
            command = self.engine.command(model, port)
            base_url = self.engine.base_url(port)
            probe = Probe(self.engine, base_url, client, self._timing.probe_deadline_s)
            if command is None:
                await self._reporting_loss(self._serve(probe, base_url, model, load_deadline_s=None))
            else:
                serve = self._serve(probe, base_url, model, load_deadline_s=self._timing.load_deadline_s)
                await self._live_in_child(command, port, serve)

    async def _live_in_child(self, command: Command, port: int, serve: Coroutine[Any, Any, None]) -> None:
        try:
            async with running(command, self._log, self._timing.grace_s) as child:
                log.info("engine.started", program=command.argv[0], pid=child.pid, port=port)
                self._pid = child.pid
                await self._reporting_loss(first_of(child.until_exit(), serve))
        except ChildExited as error:
            # Told now and not before: only here all of the last output has been read.
            raise EngineError(describe_exit(error.status, self._log.tail)) from error
        finally:
            self._pid = None
            serve.close()

    async def _reporting_loss(self, life: Coroutine[Any, Any, None]) -> None:
        """Tell of the end of a life at once; clearing up after it can take as long as the grace."""
        try:
            await life
        except EngineError as error:
            self._base_url = self._load = None
            self._enter(Stage.STARTING, error.message)
            raise
        finally:
            self._base_url = self._load = None

    # --------------------------------------------------------------------------------------------- from loading to down

    async def _serve(self, probe: Probe, base_url: str, model: ResolvedModel | None, *, load_deadline_s: float | None) -> None:
        """See a started engine through its stages. Never returns; raises EngineError when it is down."""
        await self._until_loaded(probe, load_deadline_s)
        models = self.engine.models(model, await probe.listing())
        self._enter(Stage.WARMING)
        self._models = await self._prove(probe, models)
        self._base_url = base_url
        self._ready_at_s = self._clock.monotonic()
        self._load = await probe.load()
        self._enter(Stage.READY)
        await self._watch(probe)

    async def _until_loaded(self, probe: Probe, deadline_s: float | None) -> None:
        """Return once the engine is healthy. One that runs elsewhere (no deadline) is waited for as long as it takes,
        asked less often, and what is wrong with it is told."""
        every_s = self._timing.health_every_s if deadline_s is None else self._timing.suspicion_s
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    try:
                        return await probe.health()
                    except EngineError as error:
                        if deadline_s is None:
                            self._enter(Stage.LOADING, error.message)
                    await self._clock.sleep(every_s)
        except TimeoutError as error:
            raise EngineError(f"the engine was not loaded after {deadline_s:g} s") from error

    async def _prove(self, probe: Probe, models: tuple[ModelSpec, ...]) -> tuple[ModelSpec, ...]:
        """The models with the tasks that really work. Raises EngineError when one of them can do nothing."""
        try:
            async with asyncio.timeout(self._timing.warm_deadline_s):
                return tuple([await self._proven(probe, model) for model in models])
        except TimeoutError as error:
            raise EngineError(f"the engine gave no first answer in {self._timing.warm_deadline_s:g} s") from error

    async def _proven(self, probe: Probe, model: ModelSpec) -> ModelSpec:
        tasks = await _proven_tasks(probe, model)
        wanted = self.engine.spec.token_ids and Task.COMPLETIONS in tasks
        return replace(model, tasks=tasks, token_ids=await probe.token_ids(model.engine_name) if wanted else None)

    async def _watch(self, probe: Probe) -> None:
        """Check the engine's health for as long as it has it."""
        failures = 0
        self._doubted, self._condemned = False, ""
        self.heard_at = self._clock.monotonic()
        while True:
            await self._clock.sleep(self._timing.suspicion_s)
            await first_of(self._clock.sleep(self._timing.health_every_s - self._timing.suspicion_s), self._suspected.wait())
            self._suspected.clear()
            if self._condemned:
                raise EngineError(self._condemned)
            try:
                await probe.health()
            except Refused as error:
                raise EngineError("the engine has stopped listening") from error
            except EngineError as error:
                failures += 1
                log.warning("engine.unwell", reason=error.message, failures=failures)
                if failures >= self._timing.failures_allowed:
                    raise EngineError(f"the engine failed {failures} health checks: {error.message}") from error
            else:
                failures, self.heard_at = 0, self._clock.monotonic()
                self._load = await probe.load()
                if self._doubted and not self._condemned:
                    self._doubted = False
                    self.proofs += await self._gives_a_token(probe)

    async def _gives_a_token(self, probe: Probe) -> bool:
        model = self._models[0]
        try:
            async with asyncio.timeout(self._timing.probe_deadline_s):
                return await probe.answers(min(model.tasks, key=list(Task).index), model.engine_name)
        except (TimeoutError, EngineError):
            return False

    def _enter(self, stage: Stage, reason: str | None = None) -> None:
        entered = self.readiness.enter(stage, self._clock.wall(), reason)
        if entered is self.readiness:
            return
        self.readiness = entered
        log.info("engine.stage", stage=str(stage), reason=reason)
        self._changed.set()
        self._changed = asyncio.Event()
        if self._on_change is not None:
            self._on_change(entered)


async def _proven_tasks(probe: Probe, model: ModelSpec) -> frozenset[Task]:
    """Those of the model's tasks that it answers. Raises EngineError when there are none."""
    proven, complaints = set(), []
    for task in sorted(model.tasks, key=list(Task).index):
        try:
            if await probe.answers(task, model.engine_name):
                proven.add(task)
        except Refused:
            raise
        except EngineError as error:
            complaints.append(error.message)
    if not proven:
        told = f": {complaints[0]}" if complaints else ""
        raise EngineError(f"the engine answers no request for {model.engine_name!r}{told}")
    if complaints:
        log.warning("engine.task_left_out", model=model.name, reason=complaints[0])
    return frozenset(proven)


async def first_of(*jobs: Coroutine[Any, Any, Any]) -> None:
    """Run jobs together until one ends; the others are cancelled and waited for. Raises what the ended one raised."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if task in ended:
            task.result()
