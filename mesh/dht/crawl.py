"""A look-up: find the nodes nearest to a key, and what they hold under it.

* Sliding: each path keeps `alpha` requests in flight; one that is late by its peer's own standard no longer counts, so a dead
  node costs one usual round trip and no round waits for its slowest. After it, more are asked at once than are needed.
* Disjoint: beside the main path, which follows every hint, run a few that share nothing. A node belongs to the path that first
  heard of it, and a path knows only what its own nodes told it: a liar spoils the main path and one other.
* What a path learns from a peer whose other hints proved worthless goes to the end of the queue.
* One request for each turn of the event loop, the nearest first, and that one alone where it answers within milliseconds: the first
  answer is read before the last question is sent, and whatever else the process does never waits for a volley.
* Done when the nearest `width` nodes not known dead have answered; or at the deadline, with what there is.
"""

from __future__ import annotations

import asyncio
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial

import msgpack

from mesh.clock import Clock
from mesh.dht.collect import Accept, Collector
from mesh.dht.config import DirectoryConfig
from mesh.dht.peers import PeerMemory
from mesh.dht.protocol import MeshProtocol, Op
from mesh.dht.routing import Contact, parse_contacts
from mesh.dht.rpc import Reply
from mesh.errors import TrustError
from mesh.records import Record

_MAX_CANDIDATES = 256
_MAX_HOPS_LOGGED = 200
_SOON_S = 0.02
"""Where the nearest usually answers within this, nobody else is asked before it has, or this is over: the first answer comes sooner.

Several times what it takes where all are near, so that it holds on a busy machine too: questions sent too soon make it busier."""
_FIRST_PARTS = 3
_CONTACTS, _CONTACTS_AGAIN = 8, 3
"""Asked of each node; fewer in a large mesh where the key was read a moment ago, and only those who came since can be news."""
_LASTING = 0.4
"""The share of its life that a record in hand must have left: it lasts until the next sweep, and no refresh that is on time is missed."""
_WORTHLESS_AFTER = 3


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
    """``nearest``: who answered, nearest first. ``heard``: everybody that was spoken of. ``full``: somebody says the key has overflowed.
    ``complete``: before the deadline."""

    key: bytes
    nearest: list[Contact]
    heard: list[Contact]
    holders: list[Contact]
    full: bool
    complete: bool
    elapsed_s: float
    hops: list[Hop]


class _Path:
    """What one path has been told of, nearest first, and by whom."""

    def __init__(self, number: int, width: int, alpha: int) -> None:
        self.number = number
        self.width = width
        self.alpha = alpha
        self.tellers: dict[bytes, bytes] = {}
        self.in_flight = 0
        self.late = 0
        self._order: list[int] = []
        self._contacts: list[Contact] = []

    def append(self, contact: Contact, distance: int) -> None:
        """One to begin with, which nobody told us of, farther than those before."""
        self._order.append(distance)
        self._contacts.append(contact)
        self.tellers[contact.id] = b""

    def add(self, contact: Contact, distance: int, teller: bytes) -> None:
        if contact.id in self.tellers or (len(self._order) >= _MAX_CANDIDATES and distance >= self._order[-1]):
            return
        at = bisect(self._order, distance)
        self._order.insert(at, distance)
        self._contacts.insert(at, contact)
        self.tellers[contact.id] = teller
        if len(self._order) > _MAX_CANDIDATES:
            self._order.pop()
            del self.tellers[self._contacts.pop().id]

    def __iter__(self) -> Iterator[Contact]:
        return iter(self._contacts)


class Crawl:
    """One look-up; `run` it once. With ``accept`` it also collects records.

    ``sparing``, with some in hand: from the nearest alone, and of no more of them than there are holders. It costs less than half to read a
    large view again, and two halves of a mesh that meet again find each other's records some ten seconds later.
    """

    def __init__(
        self,
        protocol: MeshProtocol,
        memory: PeerMemory,
        config: DirectoryConfig,
        clock: Clock,
        *,
        key: bytes,
        accept: Accept | None = None,
        known: Iterable[Record] = (),
        lacks: dict[bytes, int],
        width: int | None = None,
        sparing: bool = False,
    ) -> None:
        self._protocol = protocol
        self._memory = memory
        self._config = config
        self._clock = clock
        self._key = key
        self._goal = int.from_bytes(key)
        self._collector: Collector | None = None
        if accept is not None:
            self._collector = Collector(
                protocol,
                memory,
                clock,
                key=key,
                accept=accept,
                known=known,
                lasting_s=_LASTING * config.record_ttl_s,
                is_near=self._is_near if sparing else lambda contact: True,
                lacks=lacks,
                on_change=self._wait_a_turn,
            )
        self._contacts_again = _CONTACTS_AGAIN if sparing else _CONTACTS
        again = sparing and self._collector is not None and self._collector.knows_some
        self._width = width or (config.holders if again else config.read_width)
        self._hops: dict[bytes, Hop] = {}
        self._paths: list[_Path] = []
        self._main = _Path(-1, 0, 0)
        self._belongs: dict[bytes, _Path] = {}
        self._worthless: dict[bytes, int] = {}
        self._began = clock.monotonic()
        self._timers: dict[bytes, asyncio.TimerHandle] = {}
        self._asked_now = False
        self._first: Sequence[Contact] = ()
        self._seeds: Callable[[], Sequence[Contact]] = tuple
        self._told: list[tuple[Contact, object]] = []
        self._turn: asyncio.Handle | None = None
        self._done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def run(self, first: Sequence[Contact], seeds: Callable[[], Sequence[Contact]], *, timeout_s: float) -> Outcome:
        """Look up, for at most ``timeout_s``, beginning at ``seeds``, nearest first. The ``first`` of them is asked before anything else
        is done; if there is none, nobody is."""
        self._first, self._seeds = first, seeds
        loop = asyncio.get_running_loop()
        timers = [loop.call_later(timeout_s, self._finish, False)]
        if first:
            self._ask(first[0], self._main)
            answers_soon = 0.0 < self._memory.rtt_s(first[0].id) < _SOON_S
            timers.append(loop.call_later(_SOON_S if answers_soon else 0.0, self._wait_a_turn))
        else:
            self._finish(True)
        try:
            complete = await self._done
        finally:
            if self._turn is not None:
                self._turn.cancel()
            for timer in (*timers, *self._timers.values()):
                timer.cancel()
            self._finish(False)
            if self._collector is not None:
                self._collector.stop()
        answered = [hop.contact for hop in self._hops.values() if hop.fate is Fate.ANSWERED]
        return Outcome(
            key=self._key,
            nearest=sorted(answered, key=self._distance),
            heard=list(self._main),
            holders=self._collector.holders if self._collector is not None else [],
            full=self._collector is not None and self._collector.full,
            complete=complete,
            elapsed_s=self._clock.monotonic() - self._began,
            hops=self._report(),
        )

    def _lay_out(self) -> None:
        """The main path with all seeds, and the others with a share each."""
        seeds = self._seeds() or self._first
        count = min(self._config.paths, len(seeds))
        self._paths = [_Path(number, -(-self._width // count), self._config.alpha) for number in range(count)]
        self._main.width, self._main.alpha = self._width, self._config.alpha * count
        for at, contact in enumerate(seeds):
            path, distance = self._paths[at % count], self._distance(contact)
            self._belongs[contact.id] = path
            path.append(contact, distance)
            self._main.append(contact, distance)
        self._belongs.setdefault(self._first[0].id, self._paths[0])

    def _report(self) -> list[Hop]:
        hops = list(self._hops.values())[:_MAX_HOPS_LOGGED]
        if self._collector is not None:
            for hop in hops:
                hop.records = self._collector.records.get(hop.contact.id, 0)
        return hops

    def _distance(self, contact: Contact) -> int:
        return contact.long_id ^ self._goal

    def _finish(self, complete: bool) -> None:
        if not self._done.done():
            self._done.set_result(complete)

    def _pump(self) -> None:
        """Ask whoever should be asked first; finish when there is nobody left to ask or wait for."""
        if self._done.done():
            return
        if not self._paths:
            self._lay_out()
        for teller, contacts in self._told:
            self._learn(teller, contacts)
        self._told.clear()
        self._asked_now = False
        waiting = False
        for path in (self._main, *self._paths):
            waiting = self._pump_path(path) or waiting
            if self._asked_now:
                self._wait_a_turn()
                return
        busy = self._collector is not None and self._collector.go_on()
        if not waiting and not busy and not self._wants_latecomers():
            self._finish(True)

    def _wait_a_turn(self) -> None:
        """Pump with the next turn of the loop."""
        if self._turn is None and not self._done.done():
            self._turn = asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._turn = None
        self._pump()

    def _wants_latecomers(self) -> bool:
        """With too few answers even a late node is worth its whole deadline."""
        fates = [hop.fate for hop in self._hops.values()]
        return fates.count(Fate.ANSWERED) < self._config.holders and Fate.LATE in fates

    def _pump_path(self, path: _Path) -> bool:
        """Ask at most one; true while the path has something to wait for.

        Each node that kept this path waiting lets it ask one more than it needs: where many have just died, the next to be tried may be
        dead too, and waiting for one after the other is what makes a look-up slow.
        """
        waiting = False
        for place, contact in enumerate(self._frontier(path, path.width + min(path.late, path.alpha))):
            hop = self._hops.get(contact.id)
            needed = place < path.width
            if hop is None:
                if path.in_flight >= path.alpha:
                    return waiting or needed
                self._ask(contact, path)
                self._asked_now = True
                return True
            elif hop.fate is Fate.WAITING:
                waiting = waiting or needed
        return waiting

    def _frontier(self, path: _Path, most: int) -> list[Contact]:
        """The nearest nodes that count: asked ones that failed or are late do not, nor those that keep silent lately."""
        now = self._clock.monotonic()
        found: list[Contact] = []
        for contact in path:
            hop = self._hops.get(contact.id)
            if hop is not None:
                if hop.fate is Fate.LATE or hop.fate is Fate.FAILED:
                    continue
            elif self._worthless.get(path.tellers[contact.id], 0) >= _WORTHLESS_AFTER or self._memory.shunned(contact.id, now):
                continue
            found.append(contact)
            if len(found) == most:
                break
        return found

    def _is_near(self, contact: Contact) -> bool:
        """Whether it is one of the holders as far as we know: what those farther have, these have too, and newer."""
        return any(near.id == contact.id for near in self._frontier(self._main, self._config.holders))

    def _ask(self, contact: Contact, path: _Path) -> None:
        hop = self._hops[contact.id] = Hop(contact=contact, path=path.number, asked_s=self._clock.monotonic() - self._began)
        path.in_flight += 1
        if self._collector is None:
            op, body = Op.FIND_NODE, msgpack.packb([self._key, max(self._width, self._config.read_width)])
        else:
            contacts, parts = (self._contacts_again, 0) if self._collector.knows_some else (_CONTACTS, _FIRST_PARTS)
            op, body = Op.FIND_VALUE, msgpack.packb([self._key, b"", contacts, b"", parts])
        self._protocol.ask(contact.address, op, body, partial(self._on_reply, hop, path), node_id=contact.id)
        patience_s = self._memory.patience_s(contact.id)
        self._timers[contact.id] = asyncio.get_running_loop().call_later(patience_s, self._late, hop, path)

    def _late(self, hop: Hop, path: _Path) -> None:
        if hop.fate is Fate.WAITING:
            hop.fate = Fate.LATE
            path.in_flight -= 1
            path.late += 1
            self._wait_a_turn()

    def _on_reply(self, hop: Hop, path: _Path, reply: Reply | None) -> None:
        if self._done.done():
            return
        if hop.fate is Fate.WAITING:
            path.in_flight -= 1
        self._timers.pop(hop.contact.id).cancel()
        hop.took_s = self._clock.monotonic() - self._began - hop.asked_s
        hop.fate = Fate.FAILED if reply is None else Fate.ANSWERED
        if reply is None:
            self._blame(hop.contact)
        else:
            self._digest(hop, reply)
        self._wait_a_turn()

    def _blame(self, contact: Contact) -> None:
        teller = self._main.tellers.get(contact.id)
        if teller:
            self._worthless[teller] = self._worthless.get(teller, 0) + 1

    def _digest(self, hop: Hop, reply: Reply) -> None:
        """Take in a reply; a bad one is that peer's loss."""
        body = reply.bodies[0]
        try:
            if self._collector is None:
                self._told.append((hop.contact, body[0] if body else b""))
            else:
                self._told.append((hop.contact, self._collector.first(hop.contact, body)))
                self._collector.rest(hop.contact, reply.bodies[1:])
        except TrustError as error:
            self._refuse(hop.contact, error)

    def _learn(self, teller: Contact, data: object) -> None:
        path = self._belongs[teller.id]
        try:
            contacts = parse_contacts(data, limit=self._config.k)
        except TrustError as error:
            self._refuse(teller, error)
            return
        for contact in contacts:
            if contact.id != self._protocol.own_id:
                self._hear(path, contact, teller.id)

    def _refuse(self, teller: Contact, error: TrustError) -> None:
        self._protocol.counts.refuse(f"reply_{error.code}", teller, now=self._clock.monotonic())

    def _hear(self, path: _Path, contact: Contact, teller: bytes) -> None:
        distance = self._distance(contact)
        self._main.add(contact, distance, teller)
        if self._belongs.setdefault(contact.id, path) is path:
            path.add(contact, distance, teller)
