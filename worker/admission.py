"""How many requests the engine gets at once, and how many may wait for that, in which order. Pure bookkeeping around futures.

Three priorities share the slots by weight, so that none starves; within a priority the projects take turns by the work they ask
for, so that one project's thousand requests do not stand before another's one; within a project it is first come, first served.
This is start-time fair queueing (Goyal, Vin, Cheng 1996) on two levels: whoever has been served least for its weight is next, and one
that comes back from idling does not get what it did not use.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict
from enum import IntEnum
from types import TracebackType

from mesh.errors import Overloaded

Turn = asyncio.Future[None]


class Priority(IntEnum):
    """As it travels in OPEN: the lower, the sooner."""

    INTERACTIVE = 0
    STANDARD = 1
    BATCH = 2


WEIGHTS = {Priority.INTERACTIVE: 16.0, Priority.STANDARD: 4.0, Priority.BATCH: 1.0}
"""While all three wait, of 21 equal requests so many are interactive, standard, batch."""

REMEMBERED = 1_024
"""Projects of which nothing waits, but which have been served more than their turn."""


class _Project:
    """The waiting requests of one project in one priority."""

    __slots__ = ("served", "turns")

    def __init__(self, served: float) -> None:
        self.served = served
        self.turns: OrderedDict[Turn, float] = OrderedDict()


class _Class:
    """The waiting requests of one priority. The heap holds each project once, by how much it has been served."""

    __slots__ = ("_clock", "_gone", "_heap", "_order", "_projects", "served", "waiting", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.served = 0.0
        self.waiting = 0
        self._clock = 0.0
        self._order = 0
        self._projects: dict[str, _Project] = {}
        self._gone: dict[str, float] = {}
        self._heap: list[tuple[float, int, str]] = []

    def put(self, turn: Turn, project: str, cost: float) -> None:
        queue = self._projects.get(project)
        if queue is None:
            queue = self._projects[project] = _Project(max(self._clock, self._gone.pop(project, 0.0)))
            self._push(project, queue)
        queue.turns[turn] = cost
        self.waiting += 1

    def take(self) -> tuple[Turn, float]:
        """The next turn and its cost; there must be one."""
        served, _, project = heapq.heappop(self._heap)
        queue = self._projects[project]
        turn, cost = queue.turns.popitem(last=False)
        self.waiting -= 1
        self._clock = served
        queue.served += cost
        self._keep(project, queue)
        return turn, cost

    def remove(self, turn: Turn, project: str) -> bool:
        """Whether it was still waiting."""
        queue = self._projects.get(project)
        if queue is None or queue.turns.pop(turn, None) is None:
            return False
        self.waiting -= 1
        if not queue.turns:
            self._heap = [entry for entry in self._heap if entry[2] != project]
            heapq.heapify(self._heap)
            self._forget(project, queue)
        return True

    def crowds_out(self, project: str) -> bool:
        """Whether another project has so many more waiting than this one that it should give way."""
        own = len(self._projects[project].turns) if project in self._projects else 0
        return any(len(queue.turns) > own + 1 for queue in self._projects.values())

    def shed(self) -> Turn:
        """Take the newest turn of the project that has most waiting; there must be one."""
        project = max(self._projects, key=lambda name: len(self._projects[name].turns))
        turn = next(reversed(self._projects[project].turns))
        self.remove(turn, project)
        return turn

    def _keep(self, project: str, queue: _Project) -> None:
        if queue.turns:
            self._push(project, queue)
        else:
            self._forget(project, queue)

    def _forget(self, project: str, queue: _Project) -> None:
        """Nothing of it waits. How far it is ahead is remembered, or one that always has one request waiting would always be next."""
        del self._projects[project]
        self._gone[project] = queue.served
        if len(self._gone) > REMEMBERED:
            self._gone = {name: served for name, served in self._gone.items() if served > self._clock}
        if len(self._gone) > REMEMBERED:
            del self._gone[next(iter(self._gone))]

    def _push(self, project: str, queue: _Project) -> None:
        self._order += 1
        heapq.heappush(self._heap, (queue.served, self._order, project))


class Admission:
    """At most ``limit`` requests run and at most ``queue_limit`` wait.

    The rest are turned away: the lowest priority first, then whose project has most waiting.
    """

    def __init__(self, *, limit: int, queue_limit: int) -> None:
        self._limit = limit
        self._queue_limit = queue_limit
        self._classes = {priority: _Class(weight) for priority, weight in WEIGHTS.items()}
        self._clock = 0.0
        self._idle = asyncio.Event()
        self._idle.set()
        self.running = 0
        self.waiting = 0

    def slot(self, priority: Priority = Priority.INTERACTIVE, project: str = "", *, cost: float = 1.0) -> _Slot:
        """Hold a slot for the length of an ``async with``. ``cost`` is the request's share of its project's turn, more than 0.

        Raises `Overloaded` if the queue is full, or fills up with more urgent requests, or other projects', while this one waits.
        """
        return _Slot(self, priority, project, cost)

    async def idle(self) -> None:
        """Return once nothing runs or waits."""
        await self._idle.wait()

    def check(self, priority: Priority = Priority.INTERACTIVE, project: str = "") -> None:
        """Raises `Overloaded` if a request that comes now would be turned away.

        In a full queue what is less urgent gives way, and of equal urgency the project that has most waiting: to one that has less.
        """
        full = (self.running >= self._limit or self.waiting) and self.waiting >= self._queue_limit
        if not full or any(self._classes[lower].waiting for lower in Priority if lower > priority):
            return
        if not self._classes[priority].crowds_out(project):
            raise _full()

    async def take(self, priority: Priority, project: str, cost: float) -> None:
        """As `slot`, without its end: that is `release`."""
        self.check(priority, project)
        self._idle.clear()
        if self.running < self._limit and not self.waiting:
            self.running += 1
            return
        turn: Turn = asyncio.get_running_loop().create_future()
        if self.waiting >= self._queue_limit:
            self._shed()
        queue = self._classes[priority]
        if not queue.waiting:
            queue.served = max(queue.served, self._clock)
        queue.put(turn, project, cost)
        self.waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if queue.remove(turn, project):
                self.waiting -= 1
                self._settle()
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self.release()  # the slot had been handed over already
            raise

    def _shed(self) -> None:
        """Turn the newest of the lowest priority away, of the project that has most there."""
        lowest = max(priority for priority, queue in self._classes.items() if queue.waiting)
        turn = self._classes[lowest].shed()
        self.waiting -= 1
        if not turn.done():
            turn.set_exception(_full())

    def release(self) -> None:
        """Hand the slot to whose turn it is, or give it up."""
        while self.waiting:
            queue = min((queue for queue in self._classes.values() if queue.waiting), key=lambda queue: queue.served)
            turn, cost = queue.take()
            self.waiting -= 1
            if not turn.done():
                self._clock = queue.served
                queue.served += cost / queue.weight
                turn.set_result(None)
                return
        self.running -= 1
        self._settle()

    def _settle(self) -> None:
        if not self.running and not self.waiting:
            self._idle.set()


class _Slot:
    """One request's hold on a slot."""

    __slots__ = ("_admission", "_asked")

    def __init__(self, admission: Admission, priority: Priority, project: str, cost: float) -> None:
        self._admission = admission
        self._asked = (priority, project, cost)

    async def __aenter__(self) -> None:
        await self._admission.take(*self._asked)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._admission.release()


def _full() -> Overloaded:
    return Overloaded("This worker is at its limit of concurrent requests and its queue is full", retry_after_s=1.0)
