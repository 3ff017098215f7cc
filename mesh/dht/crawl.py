"""A look-up: find the nodes nearest to a key, and what they hold under it.

* Sliding: each path keeps `alpha` requests in flight; one that is late by its peer's own standard no longer counts, so a dead
  node costs one usual round trip and no round waits for its slowest.
* Disjoint: a node is asked by one path, and a path knows only what its own nodes told it. A liar spoils one path.
* What a path learns from a peer whose other hints proved worthless goes to the end of the queue.
* Done when on every path the nearest `width` nodes not known dead have answered; or at the deadline, with what there is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from heapq import nsmallest
from typing import Any

import msgpack

from mesh.clock import Clock
from mesh.dht.config import DirectoryConfig
from mesh.dht.peers import PeerMemory
from mesh.dht.protocol import MeshProtocol, Op, parse_found
from mesh.dht.routing import Contact, parse_contacts
from mesh.dht.rpc import Reply
from mesh.errors import TrustError

_MAX_CANDIDATES = 256
_MAX_HOPS_LOGGED = 200
_MAX_PAGES = 16
_WORTHLESS_AFTER = 3

Accept = Callable[[bytes, float, bytes], bytes | None]
"""Takes a record's bytes, what remains of its life in seconds, and who gave it. Returns its rank, or None if it does not hold."""


class Fate(Enum):
    """What became of a node that was asked."""

    WAITING = auto()
    LATE = auto()
    ANSWERED = auto()
    FAILED = auto()


@dataclass(slots=True, kw_only=True)
class Hop:
    """One request of a look-up, as `mesh lookup` shows it."""

    contact: Contact
    path: int
    asked_s: float
    fate: Fate = Fate.WAITING
    took_s: float = 0.0
    records: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """``nearest``: who answered, nearest first. ``full``: somebody says the key has overflowed. ``complete``: before the deadline."""

    key: bytes
    nearest: list[Contact]
    holders: list[Contact]
    full: bool
    complete: bool
    elapsed_s: float
    hops: list[Hop]


@dataclass(slots=True, eq=False)
class _Path:
    number: int
    candidates: dict[bytes, Contact] = field(default_factory=dict)
    tellers: dict[bytes, bytes] = field(default_factory=dict)
    in_flight: int = 0


class Crawl:
    """One look-up; `run` it once. With ``accept`` it also collects records."""

    def __init__(
        self,
        protocol: MeshProtocol,
        memory: PeerMemory,
        config: DirectoryConfig,
        clock: Clock,
        *,
        key: bytes,
        accept: Accept | None = None,
        width: int | None = None,
    ) -> None:
        self._protocol = protocol
        self._memory = memory
        self._config = config
        self._clock = clock
        self._key = key
        self._goal = int.from_bytes(key)
        self._accept = accept
        self._width = width or config.read_width
        self._hops: dict[bytes, Hop] = {}
        self._paths: list[_Path] = []
        self._worthless: dict[bytes, int] = {}
        self._full = False
        self._holders: list[Contact] = []
        self._began = clock.monotonic()
        self._timers: dict[bytes, asyncio.TimerHandle] = {}
        self._done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def run(self, seeds: Sequence[Contact], *, timeout_s: float) -> Outcome:
        """Look up, beginning at ``seeds``, for at most ``timeout_s``."""
        seeds = sorted(seeds, key=self._distance)
        count = max(1, min(self._config.paths, len(seeds)))
        self._paths = [_Path(number) for number in range(count)]
        for at, contact in enumerate(seeds):
            self._paths[at % count].candidates[contact.id] = contact
        deadline = asyncio.get_running_loop().call_later(timeout_s, self._finish, False)
        self._pump()
        try:
            complete = await self._done
        finally:
            deadline.cancel()
            for timer in self._timers.values():
                timer.cancel()
            self._finish(False)
        answered = [hop.contact for hop in self._hops.values() if hop.fate is Fate.ANSWERED]
        return Outcome(
            key=self._key,
            nearest=sorted(answered, key=self._distance),
            holders=self._holders,
            full=self._full,
            complete=complete,
            elapsed_s=self._clock.monotonic() - self._began,
            hops=list(self._hops.values())[:_MAX_HOPS_LOGGED],
        )

    def _distance(self, contact: Contact) -> int:
        return contact.long_id ^ self._goal

    def _finish(self, complete: bool) -> None:
        if not self._done.done():
            self._done.set_result(complete)

    def _pump(self) -> None:
        """Ask whoever should be asked now; finish when there is nobody left to ask or wait for."""
        if self._done.done():
            return
        waiting = False
        for path in self._paths:
            waiting = self._pump_path(path) or waiting
        if not waiting and not self._wants_latecomers():
            self._finish(True)

    def _wants_latecomers(self) -> bool:
        """With too few answers even a late node is worth its whole deadline."""
        fates = [hop.fate for hop in self._hops.values()]
        return fates.count(Fate.ANSWERED) < self._config.holders and Fate.LATE in fates

    def _pump_path(self, path: _Path) -> bool:
        """True while the path has something to wait for."""
        waiting = False
        for contact in self._frontier(path):
            hop = self._hops.get(contact.id)
            if hop is None:
                if path.in_flight >= self._config.alpha:
                    return True
                self._ask(contact, path)
                waiting = True
            elif hop.fate is Fate.WAITING:
                waiting = True
        return waiting

    def _frontier(self, path: _Path) -> list[Contact]:
        """The nearest nodes that count: asked ones that failed or are late do not, nor those that keep silent lately."""
        now = self._clock.monotonic()

        def counts(contact: Contact) -> bool:
            hop = self._hops.get(contact.id)
            if hop is not None:
                return hop.fate in (Fate.WAITING, Fate.ANSWERED)
            teller = path.tellers.get(contact.id)
            if teller is not None and self._worthless.get(teller, 0) >= _WORTHLESS_AFTER:
                return False
            return not self._memory.shunned(contact.id, now)

        return nsmallest(self._width, filter(counts, path.candidates.values()), key=self._distance)

    def _ask(self, contact: Contact, path: _Path) -> None:
        hop = self._hops[contact.id] = Hop(contact=contact, path=path.number, asked_s=self._clock.monotonic() - self._began)
        path.in_flight += 1
        if self._accept is None:
            future = self._protocol.request(contact.address, Op.FIND_NODE, msgpack.packb([self._key]), node_id=contact.id)
        else:
            body = msgpack.packb([self._key, b"", True])
            future = self._protocol.request(contact.address, Op.FIND_VALUE, body, node_id=contact.id)
        patience_s = self._memory.patience_s(contact.id)
        self._timers[contact.id] = asyncio.get_running_loop().call_later(patience_s, self._late, hop, path)
        future.add_done_callback(partial(self._on_reply, hop, path, 0))

    def _late(self, hop: Hop, path: _Path) -> None:
        if hop.fate is Fate.WAITING:
            hop.fate = Fate.LATE
            path.in_flight -= 1
            self._pump()

    def _on_reply(self, hop: Hop, path: _Path, page: int, future: asyncio.Future[Reply | None]) -> None:
        if future.cancelled() or self._done.done():
            return
        reply = future.result()
        more = reply is not None and self._digest(hop, path, reply)
        if reply is not None and more and page < _MAX_PAGES:
            self._ask_more(hop, path, page + 1, more)
            return
        if hop.fate is Fate.WAITING:
            path.in_flight -= 1
        self._timers.pop(hop.contact.id).cancel()
        hop.took_s = self._clock.monotonic() - self._began - hop.asked_s
        if reply is None and not hop.records:
            hop.fate = Fate.FAILED
            self._blame(path, hop.contact)
        else:
            hop.fate = Fate.ANSWERED
        self._pump()

    def _ask_more(self, hop: Hop, path: _Path, page: int, after: bytes) -> None:
        """The next page from the same node. A node that is delivering is not late."""
        self._timers[hop.contact.id].cancel()
        if hop.fate is Fate.LATE:
            hop.fate = Fate.WAITING
            path.in_flight += 1
        patience_s = 2 * self._memory.patience_s(hop.contact.id)
        self._timers[hop.contact.id] = asyncio.get_running_loop().call_later(patience_s, self._late, hop, path)
        body = msgpack.packb([self._key, b"" if after == _FROM_START else after, False])
        future = self._protocol.request(hop.contact.address, Op.FIND_VALUE, body, node_id=hop.contact.id)
        future.add_done_callback(partial(self._on_reply, hop, path, page))

    def _blame(self, path: _Path, contact: Contact) -> None:
        teller = path.tellers.get(contact.id)
        if teller is not None:
            self._worthless[teller] = self._worthless.get(teller, 0) + 1

    def _digest(self, hop: Hop, path: _Path, reply: Reply) -> bytes:
        """Take in a reply, part by part; a bad one is that peer's loss. Returns where to go on, or nothing."""
        more = b""
        for body in reply.bodies:
            try:
                more = self._digest_part(hop, path, body) or more
            except TrustError as error:
                self._protocol.counts.refuse(f"reply_{error.code}", hop.contact, now=self._clock.monotonic())
                return b""
        return more

    def _digest_part(self, hop: Hop, path: _Path, body: list[Any]) -> bytes:
        if self._accept is None:
            self._learn(path, hop.contact, body[0] if body else b"")
            return b""
        if len(body) != 5 or not isinstance(body[4], list):
            return b""
        contacts, count, full, more, items = body
        self._learn(path, hop.contact, contacts)
        self._full = self._full or full is True
        last = b""
        for item in items:
            remaining_s, data = parse_found(item)
            found = self._accept(data, remaining_s, hop.contact.id)
            if found is not None:
                last = max(last, found)
                hop.records += 1
        if items and hop.contact not in self._holders and last:
            self._holders.append(hop.contact)
        if more is not True:
            return b""
        return last or (_FROM_START if not hop.records and count else b"")

    def _learn(self, path: _Path, teller: Contact, data: object) -> None:
        for contact in parse_contacts(data, limit=self._config.k):
            if contact.id == self._protocol.own_id or contact.id in path.candidates or len(path.candidates) >= _MAX_CANDIDATES:
                continue
            path.candidates[contact.id] = contact
            path.tellers[contact.id] = teller.id


_FROM_START = b"\x00"
"""Asks for the first page again: the first reply had no room for a record."""
