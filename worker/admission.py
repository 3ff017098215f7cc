"""How many requests the engine gets at once, and how many may wait for that. Pure bookkeeping around futures."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from mesh.errors import Overloaded


class Admission:
    """At most ``limit`` requests run; at most ``queue_limit`` wait, first come, first served; the rest are turned away."""

    def __init__(self, *, limit: int, queue_limit: int) -> None:
        self._limit = limit
        self._queue_limit = queue_limit
        self._queue: deque[asyncio.Future[None]] = deque()
        self._idle = asyncio.Event()
        self._idle.set()
        self.running = 0

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold a slot for the length of a block. Raises `Overloaded` if the queue is full too."""
        await self._take()
        try:
            yield
        finally:
            self._release()

    async def idle(self) -> None:
        """Return once nothing runs or waits."""
        await self._idle.wait()

    def check(self) -> None:
        """Raises `Overloaded` if a request that comes now would be turned away."""
        if (self.running >= self._limit or self._queue) and len(self._queue) >= self._queue_limit:
            raise Overloaded("This worker is at its limit of concurrent requests and its queue is full", retry_after_s=1.0)

    async def _take(self) -> None:
        self.check()
        self._idle.clear()
        if self.running < self._limit and not self._queue:
            self.running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release()  # the slot had been handed over already
            else:
                with contextlib.suppress(ValueError):  # a release in between has passed over it already
                    self._queue.remove(turn)
                self._settle()
            raise

    def _release(self) -> None:
        """Hand the slot to who waits longest, or give it up."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
        self._settle()

    def _settle(self) -> None:
        if not self.running and not self._queue:
            self._idle.set()
