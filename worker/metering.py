"""What the worker writes down: a receipt of every attempt that got a slot at its engine, and how long it kept a model ready.

The engine's own count of tokens is what counts. Where it did not come to that, because the client left or the engine broke, the worker's
count of what it had passed on by then does, and the receipt says so.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from mesh.clock import Clock
from mesh.errors import MeshError, Overloaded, WorkerError
from mesh.ledger import Ledger
from mesh.receipts import Kind, Receipt
from mesh.trust import Role
from worker.engine import ModelSpec, Task
from worker.usage import Usage

UPTIME_EVERY_S = 60.0
"""A stretch of readiness is written down in pieces of this length: a crash costs at most one of them."""
AT_MOST_OFF_MS = 3_600_000
"""A proxy's clock that is further from this one's is not believed."""
RETRY_AFTER_S = 5.0


class Counted(Protocol):
    """A stream of events that knows what its engine said of usage."""

    usage: Usage

    @property
    def so_far(self) -> Usage: ...


class Tally:
    """One attempt, as it goes. A context manager: what it ends with is the receipt's status.

    ``engine_ms`` is known once the engine's answer is complete. Of an answer in one piece, ``usage`` and ``length`` are known before
    its first byte leaves.
    """

    __slots__ = ("_answer", "_asked", "_clock", "_ledger", "_started", "engine_ms", "events", "length", "sent", "stream", "usage")

    def __init__(self, ledger: Ledger | None, clock: Clock, asked: Mapping[str, Any]) -> None:
        self._ledger = ledger
        self._clock = clock
        self._asked = asked
        self._started = clock.monotonic()
        self.stream: Counted | None = None
        self.usage: Usage | None = None
        self.length = 0
        self.engine_ms = 0
        self.events = 0
        self.sent = 0

    def passed(self, whole: bytes) -> None:
        """Events have gone to the proxy."""
        self.sent += len(whole)
        self.events += whole.count(b"\n\n")

    def passed_one(self, event: bytes) -> None:
        """As `passed`, of what is known to be one."""
        self.sent += len(event)
        self.events += 1

    def __enter__(self) -> Tally:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._ledger is not None:
            self._ledger.add(self.receipt(_status(error)))

    def receipt(self, status: str) -> Receipt:
        """What there is to say when it ends with ``status``."""
        asked, took_ms = self._asked, round((self._clock.monotonic() - self._started) * 1000)
        queue_ms: int = asked["queue_ms"]
        usage, own_count = self._counted(complete=status == "ok")
        return Receipt(
            **asked,
            side=Role.WORKER,
            prompt=usage.prompt,
            cached=usage.cached,
            completion=usage.completion,
            reasoning=usage.reasoning,
            resumed=usage.resumed,
            events=self.events,
            size_bytes=self.sent,
            engine_ms=self.engine_ms or took_ms,
            took_ms=queue_ms + took_ms,
            done=int(self._clock.wall() * 1000),
            status=status,
            own_count=own_count,
        )

    def _counted(self, *, complete: bool) -> tuple[Usage, bool]:
        """Tokens, and whether they are the worker's own count of what had been passed on."""
        usage = self.usage if self.stream is None else self.stream.usage
        if self.stream is None and usage is not None and self.length and self.sent < self.length:
            return Usage(prompt=usage.prompt, cached=usage.cached, completion=usage.completion * self.sent // self.length), True
        if usage is not None and (usage.prompt or usage.completion):
            return usage, False
        if self.stream is not None and ((so_far := self.stream.so_far).completion or so_far.resumed):
            return so_far, False
        if complete and self.stream is None:
            return Usage(), False
        opening = 1 if self._asked["task"] == Task.CHAT else 0  # a chat's first event names the role and holds no token
        return Usage(completion=max(0, self.events - opening)), True


class Meter:
    """Makes tallies. ``ledger`` None: nothing is kept."""

    def __init__(self, ledger: Ledger | None, *, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock

    def check(self) -> None:
        """Raises `Overloaded` while what requests use could not be written down."""
        if self._ledger is not None and self._ledger.full:
            raise Overloaded("This worker cannot write down what requests use right now", retry_after_s=RETRY_AFTER_S)

    def tally(
        self,
        *,
        request_id: str,
        attempt: int,
        at: int,
        proxy: bytes,
        project: str,
        key: bytes,
        endpoint: str = "",
        task: str,
        asked: str,
        model: ModelSpec,
        queue_s: float,
    ) -> Tally:
        """An attempt that has got its slot. ``at``: when its request came, by the proxy's clock in ms; 0 if it did not say."""
        now = int(self._clock.wall() * 1000)
        about = {
            "id": request_id,
            "attempt": attempt,
            "at": at if abs(at - now) <= AT_MOST_OFF_MS else now,
            "peer": proxy,
            "project": project,
            "key": key,
            "endpoint": endpoint,
            "model": model.name,
            "digest": model.digest or "",
            "adapter": asked if asked in model.adapters else "",
            "task": task,
            "queue_ms": round(queue_s * 1000),
        }
        return Tally(self._ledger, self._clock, about)


class Uptime:
    """Meters the time in which the engine is ready: what a warm replica costs, asked or not."""

    def __init__(self, ledger: Ledger, *, gpus: int, clock: Clock, rng: random.Random) -> None:
        self._ledger = ledger
        self._gpus = gpus
        self._clock = clock
        self._rng = rng
        self._models: tuple[ModelSpec, ...] = ()
        self._since: tuple[float, float] | None = None

    def ready(self, models: Sequence[ModelSpec]) -> None:
        """The engine serves these now; none: it is not ready."""
        if tuple(models) != self._models:
            self._book()
            self._models = tuple(models)
        if models and self._since is None:
            self._since = (self._clock.wall(), self._clock.monotonic())

    async def run(self) -> None:
        """A task for the life of the process."""
        try:
            while True:
                await self._clock.sleep(UPTIME_EVERY_S)
                models = self._models
                self.ready(())
                self.ready(models)
        except asyncio.CancelledError:
            self.ready(())
            raise

    def _book(self) -> None:
        if self._since is None:
            return
        (wall, monotonic), self._since = self._since, None
        took_ms = round((self._clock.monotonic() - monotonic) * 1000)
        if took_ms <= 0:
            return
        first = self._models[0]
        self._ledger.add(
            Receipt(
                id=f"up_{self._rng.getrandbits(96):024x}",
                attempt=0,
                at=int(wall * 1000),
                side=Role.WORKER,
                kind=Kind.UPTIME,
                model=first.name,
                digest=first.digest or "",
                gpus=self._gpus,
                took_ms=took_ms,
                done=int(self._clock.wall() * 1000),
            )
        )


def _status(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    if isinstance(error, MeshError):
        return error.code
    return "cancelled" if isinstance(error, asyncio.CancelledError) else WorkerError.code
