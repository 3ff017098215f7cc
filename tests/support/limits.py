"""Proxies that share limits, on virtual time: real `Limiter`s, their messages through the wire format and a network that can be cut."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mesh.apikey import ApiKey
from mesh.documents import Document
from mesh.errors import QuotaSpent, RateLimited
from mesh.link.frames import Frame, encode_control, parse_control
from proxy.limits.counters import Counters
from proxy.limits.limiter import WAIT, Limiter
from proxy.limits.stash import Hold
from proxy.openai import Call, parse_call
from tests.support.virtual_time import VirtualClock, VirtualLoop

HEADER_BYTES = 9
SILENT_S = 2.8
"""After so long without a sign a link is down (`LinkConfig.silent_s`)."""


def call_of(size_bytes: int = 200, *, max_tokens: int | None = 100, model: str = "m", path: str = "/v1/chat/completions") -> Call:
    body = f'{{"model":"{model}","messages":[{{"role":"user","content":"{"x" * size_bytes}"}}]'
    body += f',"max_tokens":{max_tokens}}}' if max_tokens is not None else "}"
    return parse_call(path, body.encode())


def key_of(name: str = "k", *, project: str = "p", **limits: Any) -> ApiKey:
    return ApiKey(
        id=name.encode().ljust(8, b"\0")[:8],
        project=project,
        roles=frozenset({"invoker"}),
        not_before=0.0,
        expires=1e12,
        kid="keys-1",
        **limits,
    )


@dataclass(eq=False)
class Seat:
    """One proxy. ``admitted`` is when requests were let in and what they cost, ``refused`` when some were not."""

    index: int
    node_id: bytes
    limiter: Limiter
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    admitted: list[tuple[float, float]] = field(default_factory=list)
    refused: list[tuple[float, str]] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    alive: bool = True
    closed: bool = False
    """Takes no more requests."""
    running: int = 0
    spans: list[tuple[float, float]] = field(default_factory=list)
    """When each request that was let in began and ended."""
    stands_still: bool = False
    unread: list[Callable[[], None]] = field(default_factory=list)


class Floor:
    """Proxies, each linked with each. ``latency_s`` is one way. Sent frames are counted in ``bytes_sent`` and ``frames``."""

    def __init__(self, loop: VirtualLoop, count: int, *, latency_s: float = 0.002, seed: int = 1) -> None:
        self.loop = loop
        self.latency_s = latency_s
        self.rng = random.Random(seed)
        self.clock = VirtualClock(loop)
        self.seats: list[Seat] = []
        self.document: Document | None = None
        """Limits that every proxy knows, also those that come later."""
        self.gone: list[Seat] = []
        self.boots: dict[int, int] = {}
        self.cuts: set[frozenset[int]] = set()
        self.links: set[frozenset[int]] = set()
        self.queues: dict[tuple[Seat, Seat], deque[Callable[[], None]]] = {}
        self.held: dict[frozenset[int], list[Callable[[], None]]] = {}
        """What was sent over a connection on which nothing passes, for when it does again."""
        self.frames = 0
        self.bytes_sent = 0
        for _ in range(count):
            self.add()

    # -- who is there

    def add(self, *, at: int | None = None, counters: Counters | None = None) -> Seat:
        """A proxy starts, in the place of ``at`` if it was there before."""
        index = len(self.seats) if at is None else at
        node_id = random.Random(index).randbytes(32)
        boot = int(self.clock.wall() * 1000) + 1

        def send(peer: bytes, kind: Frame, fields: dict[str, Any]) -> None:
            self._send(seat, peer, kind, fields)

        seat = Seat(index, node_id, Limiter(node_id, boot, send=send, clock=self.clock, counters=counters))
        seat.limiter.listed = lambda: [other.node_id for other in self.seats if other.alive and other.limiter.shares.serving]
        self.boots[index] = boot
        if self.document is not None:
            seat.limiter.take_document(self.document)
        if at is None:
            self.seats.append(seat)
        else:
            self.gone.append(self.seats[at])
            self.seats[at] = seat
        seat.tasks.append(self.loop.create_task(seat.limiter.run()))
        for other in self.seats:
            if other.alive and other is not seat and frozenset({index, other.index}) not in self.cuts:
                self._link(seat, other)
        seat.limiter.shares.looked = True
        return seat

    async def settled(self) -> None:
        """Wait until every proxy has its share and all believe in the same owners."""
        async with asyncio.timeout(120):
            while not all(seat.limiter.shares.entitled and len(seat.limiter.shares.members) == self.standing for seat in self.up()):
                await asyncio.sleep(0.1)
        await asyncio.sleep(4)

    def up(self) -> list[Seat]:
        return [seat for seat in self.seats if seat.alive]

    @property
    def standing(self) -> int:
        return len(self.up())

    def kill(self, seat: Seat) -> None:
        """kill -9: the kernel closes its connections."""
        seat.alive = False
        for task in seat.tasks:
            task.cancel()
        for other in self.up():
            self._unlink(seat, other)

    async def pause(self, seat: Seat, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later: what was sent to it until its peers gave it up is read then."""
        seat.stands_still = True
        seat.tasks.pop().cancel()
        await asyncio.sleep(min(seconds, SILENT_S))
        lost = [other for other in self.up() if seconds > SILENT_S and frozenset({seat.index, other.index}) in self.links]
        for other in lost:
            self._unlink(seat, other)
        await asyncio.sleep(max(0.0, seconds - SILENT_S))
        seat.stands_still = False
        unread, seat.unread = seat.unread, []
        for read in unread:
            read()
        if not seat.alive:
            return
        seat.tasks.append(self.loop.create_task(seat.limiter.run()))
        for other in lost:
            pair = frozenset({seat.index, other.index})
            if other.alive and other in self.seats and pair not in self.cuts and pair not in self.links:
                self._link(seat, other)

    async def stop(self, seat: Seat) -> None:
        """SIGTERM: it says good-bye and drains for a moment."""
        seat.limiter.leave()
        for other in self.up():
            other.limiter.serves(seat.node_id, False)
        await asyncio.sleep(0.3)
        seat.closed = True
        while seat.running:
            await asyncio.sleep(0.1)
        seat.limiter.finish()
        await asyncio.sleep(self.latency_s)
        self.kill(seat)

    def cut(self, one: Seat, other: Seat) -> None:
        """Nothing passes between two any more; their link is down once both have noticed."""
        pair = frozenset({one.index, other.index})
        self.cuts.add(pair)
        self.loop.call_later(SILENT_S, lambda: pair in self.cuts and self._unlink(one, other))

    def split(self, side: Iterable[Seat]) -> None:
        inside = {seat.index for seat in side}
        for one, other in itertools.combinations(self.up(), 2):
            if (one.index in inside) != (other.index in inside):
                self.cut(one, other)

    def heal(self) -> None:
        for pair in list(self.cuts):
            self.cuts.discard(pair)
            one, other = (self.seats[index] for index in pair)
            if not one.alive or not other.alive:
                continue
            if pair not in self.links:
                self._link(one, other)
            for deliver in self.held.pop(pair, ()):
                deliver()

    def _link(self, one: Seat, other: Seat) -> None:
        self.links.add(frozenset({one.index, other.index}))
        one.limiter.up(other.node_id, self.boots[other.index], serving=True)
        other.limiter.up(one.node_id, self.boots[one.index], serving=True)

    def _unlink(self, one: Seat, other: Seat) -> None:
        pair = frozenset({one.index, other.index})
        if pair in self.links:
            self.links.discard(pair)
            self.held.pop(pair, None)
            for here, there in ((one, other), (other, one)):
                if here.stands_still:
                    here.unread.append(partial(here.limiter.down, there.node_id))
                elif here.alive:
                    here.limiter.down(there.node_id)

    def _send(self, seat: Seat, peer: bytes, kind: Frame, fields: dict[str, Any]) -> None:
        other = next((one for one in self.seats if one.node_id[:8] == peer), None)
        if other is None or not seat.alive:
            return
        pair = frozenset({seat.index, other.index})
        frame = encode_control(kind, 0, fields)
        self.frames += 1
        self.bytes_sent += len(frame)
        if pair not in self.links:
            return

        def deliver() -> None:
            if other.stands_still and pair in self.links:
                other.unread.append(partial(other.limiter.on_frame, seat.node_id, kind, parse_control(frame[HEADER_BYTES:])))
            elif pair in self.cuts and pair in self.links:
                self.held.setdefault(pair, []).append(deliver)
            elif other.alive and seat in self.seats and other in self.seats and pair in self.links:
                other.limiter.on_frame(seat.node_id, kind, parse_control(frame[HEADER_BYTES:]))

        queue = self.queues.setdefault((seat, other), deque())  # timers of one moment come in any order, frames of a link do not
        queue.append(deliver)
        self.loop.call_later(self.latency_s, lambda: queue.popleft()())

    # -- requests

    async def request(self, seat: Seat, key: ApiKey, call: Call, *, cost: float | None = None) -> Hold | None:
        """One request; None if it was refused. ``cost`` is what is noted of it, one by default."""
        began = self.loop.time()
        try:
            hold = seat.limiter.enter(key, call)
            if hold is WAIT:
                hold = await seat.limiter.wait(key, call)
        except RateLimited as error:
            seat.refused.append((self.loop.time(), error.code))
            return None
        seat.admitted.append((self.loop.time(), 1.0 if cost is None else cost))
        seat.waited_s.append(self.loop.time() - began)
        assert not isinstance(hold, str)
        return hold

    async def load(
        self,
        keys: Sequence[ApiKey],
        call: Call,
        *,
        rate: float,
        seconds: float,
        weights: Sequence[float] | None = None,
        usage: tuple[int, int] | None = None,
        takes_s: float = 0.0,
    ) -> None:
        """Requests at ``rate`` a second over all proxies, by ``weights``, with Poisson arrivals. ``usage`` is what each really uses."""
        weights = list(weights or [1.0] * len(self.seats))
        sums = list(itertools.accumulate(weights))
        end = self.loop.time() + seconds
        tasks: set[asyncio.Task[None]] = set()
        while True:
            await asyncio.sleep(self.rng.expovariate(rate))
            if self.loop.time() > end:
                break
            seat = self.seats[bisect.bisect(sums, self.rng.random() * sums[-1])]
            if not seat.alive or seat.closed:
                continue
            task = self.loop.create_task(self._one(seat, self.rng.choice(keys), call, usage, takes_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _one(self, seat: Seat, key: ApiKey, call: Call, usage: tuple[int, int] | None, takes_s: float) -> None:
        hold = await self.request(seat, key, call, cost=float(sum(usage)) if usage else None)
        if hold is None:
            return
        began = self.loop.time()
        seat.running += 1
        if takes_s:
            await asyncio.sleep(takes_s * self.rng.uniform(0.5, 1.5))
        seat.running -= 1
        if usage:
            hold.settle(*usage)
        hold.end()
        seat.spans.append((began, self.loop.time()))

    # -- what came of it

    def all_admitted(self) -> list[tuple[float, float]]:
        return sorted(entry for seat in (*self.seats, *self.gone) for entry in seat.admitted)


def most_in_window(events: Sequence[tuple[float, float]], window_s: float) -> float:
    """The largest sum of costs of any window."""
    most = total = 0.0
    first = 0
    for at, cost in events:
        total += cost
        while events[first][0] <= at - window_s:
            total -= events[first][1]
            first += 1
        most = max(most, total)
    return most


def zipf(count: int, exponent: float = 1.0) -> list[float]:
    return [1 / (rank + 1) ** exponent for rank in range(count)]


__all__ = ["Floor", "QuotaSpent", "Seat", "call_of", "key_of", "most_in_window", "zipf"]
