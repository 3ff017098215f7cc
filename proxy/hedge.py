"""Hedging: a request that has had no byte for a while is given to a second worker too, and whichever speaks first goes on.

The client, its place in its project's limits and its receipt's end are one; what is doubled is the engines' work, so it is off by default
and counts against the retry budget. Until one has claimed the client nothing of either reaches it; then the other is cancelled, and its
receipt says that it was outrun.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from aiohttp import web

from mesh.errors import MeshError, ProtocolError
from proxy.downstream import Downstream
from proxy.fleet import Worker
from proxy.metering import Noted
from proxy.openai import Call
from proxy.route import Plan

OUTRUN = "outrun"
"""In a receipt: another worker answered the same request sooner."""
HEDGED = "hedged"
"""Among the reasons of retries: a second worker was asked."""
UNSAFE = frozenset({"responses"})
"""Tasks whose engine may keep something of a request: asked twice, it would keep it twice."""

Try = Callable[[Plan, Worker, Downstream], Coroutine[Any, Any, None]]


class Lane(Downstream):
    """The client, as one of two attempts sees it: nothing is written before the race is won."""

    __slots__ = ("_claim", "_client", "_held", "_won")

    def __init__(self, client: Downstream, claim: Callable[[], None]) -> None:
        super().__init__(client.request, client.transport, keep_alive=True)
        self._client = client
        self._claim = claim
        self._held: tuple[Mapping[str, Any], str] | None = None
        self._won = False

    @property
    def is_stream(self) -> bool:
        return self._client.is_stream

    @property
    def bytes_sent(self) -> int:
        return self._client.bytes_sent

    def prepare(self, head: Mapping[str, Any], headers: str) -> None:
        super().prepare(head, headers)  # for what it refuses
        self._held = head, headers

    def write(self, data: bytes) -> None:
        self._win()
        self._client.write(data)
        self.pieces = self._client.pieces

    def finish(self) -> None:
        self._win()
        self._client.finish()

    def response(self) -> web.StreamResponse:
        return self._client.response()

    def _win(self) -> None:
        if self._won:
            return
        if self._held is None:
            raise ProtocolError("an answer before its HEAD")
        self._client.prepare(*self._held)
        self._won = True
        self._claim()


class Hedge:
    """One request's race. ``attempt`` is what tries one worker; ``second`` plans another attempt, None where there is none to be had."""

    def __init__(self, after_s: float, attempt: Try, second: Callable[[], Plan | None]) -> None:
        self._after_s = after_s
        self._attempt = attempt
        self._second = second
        self.failed: list[tuple[Worker, MeshError]] = []
        """Who failed beside the one that `run` speaks of."""
        self._runners: list[tuple[Plan, asyncio.Task[None]]] = []
        self._winner: asyncio.Task[None] | None = None

    async def run(self, plan: Plan, worker: Worker, client: Downstream, noted: Noted) -> None:
        """As ``attempt``; afterwards ``plan`` is about the worker that went on, or the first if neither did, and so is what is raised."""
        first = self._start(plan, worker, client)
        try:
            await asyncio.wait({first}, timeout=self._after_s)
            other = self._second() if self._winner is None and not first.done() else None
            if other is not None and other.choice is not None:
                await self._race(plan, first, other, client)
                if self._winner is not None:
                    self._outran(noted, worker if self._winner is not first else other.choice.worker)
            await (self._winner or first)
        finally:
            for _, task in self._runners:
                task.cancel()
            await asyncio.gather(*(task for _, task in self._runners), return_exceptions=True)

    async def _race(self, plan: Plan, first: asyncio.Task[None], other: Plan, client: Downstream) -> None:
        """Until the one that has claimed the client is done with it, or both have failed."""
        assert other.choice is not None
        second = self._start(other, other.choice.worker, client)
        pending = {first, second}
        while pending and (self._winner is None or not self._winner.done()):
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for each, task, spoken_of in ((plan, first, self._winner is not second), (other, second, self._winner is second)):
            error = None if spoken_of or not task.done() or task.cancelled() else task.exception()
            if isinstance(error, MeshError) and each.choice is not None:
                self.failed.append((each.choice.worker, error))
        if self._winner is second:
            plan.choice, plan.passage, plan.expected = other.choice, other.passage, other.expected

    def _start(self, plan: Plan, worker: Worker, client: Downstream) -> asyncio.Task[None]:
        task: asyncio.Task[None]

        def claim() -> None:
            self._winner = task
            for _, other in self._runners:
                if other is not task:
                    other.cancel()

        task = asyncio.get_running_loop().create_task(self._attempt(plan, worker, Lane(client, claim)))
        self._runners.append((plan, task))
        return task

    def _outran(self, noted: Noted, loser: Worker) -> None:
        for note in noted.notes:
            if note.worker == loser.node_id and note.status == "cancelled":
                note.status = OUTRUN


def may_hedge(call: Call) -> bool:
    """Whether a call may be computed twice."""
    return call.task not in UNSAFE
