"""Keeping our own record with its holders.

A refresh is one datagram to each remembered holder: a fresh record, or in a large mesh, while nothing changes, a pulse of the one that
all of them have. Only when holders are lost, or say that others stand nearer to the key,
is the network walked again, and then behind the refresh, not before it. A new key goes at once to the nodes of our own table that stand
nearest to it, if the table can know them; the walk that finds whom it does not know follows.

`publish` returns once so many holders have accepted each key; the others are heard behind its back.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from math import ceil

import msgpack

from mesh.clock import Clock
from mesh.dht.config import DirectoryConfig
from mesh.dht.keys import MAX_LEVEL, indexes, shard_of
from mesh.dht.patch import base_of, encode_patch
from mesh.dht.peers import PeerMemory
from mesh.dht.protocol import EMPTY, KEY_START_BYTES, MeshProtocol, Op
from mesh.dht.routing import Contact
from mesh.dht.rpc import Reply
from mesh.dht.storage import Verdict, ends_sooner, is_material
from mesh.dht.tasks import Tasks
from mesh.pulse import MAX_PULSE, NO_PULSE, Pulse
from mesh.records import Record, directory_key

_KEYS_PER_STORE = 2
_MAX_GIVEN = 256
_REFRESH_SHARE = 0.55
"""Of a record's life; with `mesh.dht.crawl._LASTING` less than all of it, so that a holder has a newer one before a reader asks."""
_YOUNG_S = 30.0
_UNHURRIED_WALKS = 5
"""In a large mesh walks are so many times rarer: who stands nearer is heard of from holders."""
_GOOD = (Verdict.ACCEPTED, Verdict.WITHDRAWN)

Walk = Callable[[bytes], Awaitable[list[Contact]]]
"""From a key to the nodes nearest to it."""
Guess = Callable[[bytes, int], list[Contact]]
"""The same, so many, from the table alone; none if it cannot know them."""
MakePulse = Callable[[Record, int], Pulse]
"""The pulse of a record of ours after so many seconds."""
Hold = Callable[[Record, Pulse], None]
"""Keeps our own copy as the holders have it: the record, or what we hold with a later pulse."""


@dataclass(slots=True, eq=False)
class _Place:
    """One key our record stands under, with ``most`` holders. ``wanted`` is how many of them the last walk could find."""

    key: bytes
    most: int
    holders: dict[bytes, Contact] = field(default_factory=dict)
    full: set[bytes] = field(default_factory=set)
    """Who had no room when it was asked last."""
    refused: Contact | None = None
    """The last one that had no room."""
    wanted: int = 0
    walked_at: float = float("-inf")
    patience_s: float = 0.0
    """From one walk to the next; so many times more in a large mesh: `_UNHURRIED_WALKS`."""
    walk_at: float = float("inf")
    """Somebody has said that others stand nearer: so long may the next walk wait."""
    walking: bool = False
    guessed: bool = False
    """Its holders come from our table, and none of them has contradicted yet."""
    rounds: int = 0
    gave: dict[bytes, tuple[Contact, float]] = field(default_factory=dict)
    """Whoever took a record of ours, and until when (monotonic) they may still hold it."""

    @property
    def goal(self) -> int:
        return int.from_bytes(self.key)

    def ordered(self) -> list[Contact]:
        """The holders, nearest first."""
        goal = self.goal
        return sorted(self.holders.values(), key=lambda contact: contact.long_id ^ goal)


@dataclass(slots=True, eq=False)
class _Index:
    """A (kind, name) pair we publish under, and how deep: see `mesh.dht.keys`."""

    kind: str
    name: str
    level: int = 0
    retry_at: float = float("inf")


class Publisher:
    """Stores one node's own records; `publish` may be called as often as the owner likes."""

    def __init__(
        self,
        protocol: MeshProtocol,
        memory: PeerMemory,
        config: DirectoryConfig,
        clock: Clock,
        rng: random.Random,
        tasks: Tasks,
        walk: Walk,
        guess: Guess,
        make_pulse: MakePulse,
        hold: Hold,
    ) -> None:
        self._protocol = protocol
        self._memory = memory
        self._config = config
        self._clock = clock
        self._rng = rng
        self._tasks = tasks
        self._walk = walk
        self._guess = guess
        self._make_pulse = make_pulse
        self._hold = hold
        self._patched = (b"", b"", b"")
        self._places: dict[bytes, _Place] = {}
        self._indexes: dict[tuple[str, str], _Index] = {}
        self._record: Record | None = None
        self._sending: Record | None = None
        """What the last round began with: an earlier round gives way to it."""
        self._base: Record | None = None
        """What all holders were given last, if nobody has missed it."""
        self._given: OrderedDict[bytes, bytes] = OrderedDict()
        self._sent_at = float("-inf")
        self._called_at = float("-inf")
        self._accepted = 0
        self._calm_at = float("inf")
        self.unhurried = False
        """Whether a record that says nothing new may wait until a good part of its life has passed: set in a large mesh."""
        self.depth = 0
        """The level down to which the nodes of a large mesh fill the keys of a role."""

    def holders(self) -> dict[bytes, list[Contact]]:
        """By key, who is remembered to hold our record."""
        return {place.key: list(place.holders.values()) for place in self._places.values()}

    def contact_added(self, contact: Contact) -> None:
        """A node joined our table: where it stands nearer to a key than a holder does, it becomes one."""
        if self._record is None or not self._record.alive(self._clock.wall()):
            return
        for place in self._places.values():
            goal, most = int.from_bytes(place.key), place.most
            ordered = place.ordered()
            if contact.id in place.holders or place.full or not place.wanted:
                continue
            if len(ordered) < most or contact.long_id ^ goal < ordered[most - 1].long_id ^ goal:
                place.holders = {holder.id: holder for holder in ordered[: most - 1]} | {contact.id: contact}
                place.guessed = True
                work = self._store_at(self._record, contact, [place], {place.key: 0})
                self._tasks.start(work, name="directory newcomer")

    async def walk_again(self) -> None:
        """The network has changed at large: look for the holders of every key now."""
        if self._record is not None and self._record.alive(self._clock.wall()):
            await asyncio.gather(*(self._refill(self._record, place) for place in self._current(self._record)))

    async def publish(self, record: Record) -> int:
        """Store a signed record; returns how many holders have accepted it so far under each of its keys (the least of them)."""
        former, self._record = self._record, record
        now = self._clock.monotonic()
        pause_s, self._called_at = now - self._called_at, now
        if former is not None and not is_material(former, record) and self._is_calm():
            wait_s = self._sent_at + _REFRESH_SHARE * (record.expires - record.issued) - now
            if 0 < wait_s <= pause_s:
                self._tasks.start(self._refresh_in(wait_s), name="directory refresh")
            if wait_s > 0:
                return self._accepted
        return await self._refresh(record, former)

    async def _refresh_in(self, wait_s: float) -> None:
        """In a large mesh a record that says nothing new goes out when a good part of its life has passed, not when its owner calls."""
        sent_at = self._sent_at
        await self._clock.sleep(wait_s)
        if self._record is not None and self._sent_at == sent_at:
            await self._refresh(self._record, self._record)

    async def _refresh(self, record: Record, former: Record | None) -> int:
        pulse = NO_PULSE
        if former is None or is_material(former, record):
            for place in self._places.values():
                place.rounds = 0  # news goes to every holder
        elif self._is_calm():
            pulse = self._pulse()
        if not pulse.n:
            self._base = record
        self._sending = record
        self._hold(record, pulse)
        self._sent_at = self._clock.monotonic()
        enough: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        whole = self._tasks.start(self._publish(record, pulse, None if ends_sooner(former, record) else enough), name="directory publish")
        if whole is None:
            return 0
        await asyncio.wait({whole, enough}, return_when=asyncio.FIRST_COMPLETED)
        self._accepted = enough.result() if enough.done() else whole.result()
        return self._accepted

    def _pulse(self) -> Pulse:
        """Of the record that every holder has, as long as it can have any."""
        base = self._base
        if base is None or not base.anchor:
            return NO_PULSE
        n = ceil(self._clock.wall() - base.issued)
        holders = (node_id for place in self._current(base) for node_id in place.holders)
        if not 0 < n <= MAX_PULSE or any(self._given.get(node_id) != base.signed for node_id in holders):
            return NO_PULSE
        return self._make_pulse(base, n)

    def _is_calm(self) -> bool:
        """In a large mesh, but not while a key is new: its holders are found one round after the other then."""
        return self.unhurried and self._clock.monotonic() >= self._calm_at

    async def _publish(self, record: Record, pulse: Pulse, enough: asyncio.Future[int] | None) -> int:
        """All of it; with a pulse, that goes to the holders instead of the record.

        ``enough`` is set earlier, once each index has its quorum. A good-bye has none: every holder should hear it before its node is gone.
        """
        wanted = {pair: self._indexes.setdefault(pair, _Index(*pair)) for pair in indexes(record)}
        gone = [pair for pair in self._indexes if pair not in wanted]
        withdrawn = [place for pair in gone for place in self._withdraw(self._indexes.pop(pair), record)]
        below = {index: self._below(index, record) for index in wanted.values()}
        ahead = [place for places in below.values() for place in places]
        places = [self._place(index, record, index.level) for index in wanted.values()]
        await self._settle(places + ahead)
        accepted = await self._store(record, places + withdrawn + ahead, pulse, [place.key for place in places], enough)
        for place in withdrawn:
            self._places.pop(place.key, None)
        for index in wanted.values():
            if index.level and not pulse.n and self._clock.monotonic() >= index.retry_at:
                index.retry_at = self._next_ascent()
                self._tasks.start(self._try_up(index, record), name="directory try up")
        deeper = [index for index in wanted.values() if self._go_deeper(index, record)]
        if deeper:
            accepted |= await self._publish_deeper(record, deeper, accepted)
        for index, places_below in below.items():
            for place in places_below[index.level :]:
                self._places.pop(place.key, None)
        self._repair(record, self._current(record))
        return min((accepted.get(self._key(index, record), 0) for index in wanted.values()), default=0)

    async def _publish_deeper(self, record: Record, deeper: list[_Index], offered: Container[bytes] = ()) -> dict[bytes, int]:
        """Down to where there is room; what was ``offered`` already is not again."""
        accepted: dict[bytes, int] = {}
        while deeper and self._sending is record:
            places = [self._place(index, record, index.level) for index in deeper if self._key(index, record) not in offered]
            await self._settle(places)
            accepted |= await self._store(record, places)
            deeper = [index for index in deeper if self._go_deeper(index, record)]
        return accepted

    def _key(self, index: _Index, record: Record, level: int | None = None) -> bytes:
        """The key at ``level``, by default that where the record stands now."""
        return directory_key(index.kind, index.name, shard_of(record.node_id, index.level if level is None else level))

    def _place(self, index: _Index, record: Record, level: int) -> _Place:
        """Spares are for what few have: below the first level there are hundreds of others, and who looks finds them."""
        key = self._key(index, record, level)
        return self._places.setdefault(key, _Place(key, self._config.holders + (0 if level else self._config.spares)))

    def _below(self, index: _Index, record: Record) -> list[_Place]:
        """Of a role that is new to us, in a large mesh: the places we may be sent to. Being turned away first takes twice as long."""
        if index.kind != "role" or self._key(index, record) in self._places:
            return []
        return [self._place(index, record, level) for level in range(1, self.depth + 1)]

    def _current(self, record: Record) -> list[_Place]:
        """The places that refreshes go to: not those of levels above, where holders were full."""
        keys = (self._key(index, record) for index in self._indexes.values())
        return [self._places[key] for key in keys if key in self._places]

    def _withdraw(self, index: _Index, record: Record) -> list[_Place]:
        keys = [self._key(index, record, level) for level in range(index.level + 1)]
        return [self._places[key] for key in keys if key in self._places]

    def _go_deeper(self, index: _Index, record: Record) -> bool:
        """Most holders of this level are full: the record goes one level down (and stays with those that took it)."""
        place = self._places[self._key(index, record)]
        if index.level >= MAX_LEVEL or not place.full or len(place.full) < len(place.holders):
            return False
        index.level += 1
        index.retry_at = self._next_ascent()
        return True

    async def _try_up(self, index: _Index, record: Record) -> None:
        """Ask one holder of the level above whether there is room again; if so, the next refresh goes there. Whoever turned us away last is
        asked, until it does not answer."""
        level = index.level - 1
        above = self._places.get(self._key(index, record, level))
        if above is None:
            return
        asked = above.refused or next(iter(await self._walk(above.key)), None)
        if asked is None:
            return
        above.refused, accepted = None, {above.key: 0}
        await self._store_at(record, asked, [above], accepted)
        if accepted[above.key] and index.level == level + 1:
            index.level = level
            above.full.clear()

    async def _settle(self, places: list[_Place]) -> None:
        """Give each place holders: those we know of, or else those a walk finds."""
        if not all(place.holders for place in places):
            self._calm_at = self._clock.monotonic() + _YOUNG_S
        for place in places:
            if not place.holders and (guessed := self._guess(place.key, place.most)):
                place.holders = {contact.id: contact for contact in guessed}
                place.wanted = len(guessed)
                place.guessed = True
                self._note_walk(place)
        await asyncio.gather(*(self._find_holders(place) for place in places if not place.holders))

    async def _find_holders(self, place: _Place) -> list[Contact]:
        """Walk to the key; returns who became a holder."""
        if place.walking:
            return []
        place.walking = True
        try:
            found = (await self._walk(place.key))[: place.most]
        finally:
            place.walking = False
        fresh = [contact for contact in found if contact.id not in place.holders]
        if found:
            place.holders = {contact.id: contact for contact in found}
            place.full &= place.holders.keys()
        place.wanted = len(place.holders)
        place.guessed = False
        self._note_walk(place)
        return fresh

    def _note_walk(self, place: _Place) -> None:
        place.walked_at, place.walk_at = self._clock.monotonic(), float("inf")
        place.patience_s = self._config.walk_interval_s * self._rng.uniform(0.75, 1.25)

    def _must_walk(self, place: _Place) -> bool:
        """Holders are lost, or somebody stands nearer, or it is long since anybody looked."""
        now, rarely = self._clock.monotonic(), _UNHURRIED_WALKS if self.unhurried else 1
        lost = len(place.holders) < min(place.wanted, self._config.holders)
        return lost or now >= min(place.walk_at, place.walked_at + rarely * place.patience_s)

    def _next_ascent(self) -> float:
        return self._clock.monotonic() + self._config.ascend_interval_s * self._rng.uniform(0.5, 1.5)

    def _due(self, place: _Place) -> list[Contact]:
        """The holders of this round: the nearest each time, the spares every other time unless rounds are rare; of news, whoever may hold
        an older record."""
        ordered = place.ordered()
        place.rounds += 1
        if place.rounds == 1:
            now = self._clock.monotonic()
            place.gave = {node_id: (contact, until) for node_id, (contact, until) in place.gave.items() if until > now}
            return ordered + [contact for contact, _ in place.gave.values() if contact.id not in place.holders]
        return ordered if self.unhurried or place.rounds % 2 else ordered[: self._config.holders]

    async def _store(
        self,
        record: Record,
        places: Iterable[_Place],
        pulse: Pulse = NO_PULSE,
        keys: Iterable[bytes] = (),
        enough: asyncio.Future[int] | None = None,
    ) -> dict[bytes, int]:
        """Send the record to the holders of ``places``; returns acceptances by key once it is clear enough. ``enough`` is set as soon as
        each of ``keys`` has its quorum.

        One datagram for each turn of the event loop, the nearest holders first: the first have answered before the last is written to.
        """
        accepted: dict[bytes, int] = {}
        due: list[list[tuple[Contact, _Place]]] = []
        for place in places:
            accepted[place.key] = 0
            due.append([(contact, place) for contact in self._due(place)])
        by_holder: dict[bytes, tuple[Contact, list[_Place]]] = {}
        for contact, place in _in_turn(due):
            by_holder.setdefault(contact.id, (contact, []))[1].append(place)
        quorum = self._config.publish_quorum

        def is_enough() -> bool:
            return all(count >= quorum for count in accepted.values())

        async def store_at(contact: Contact, some: list[_Place]) -> None:
            await self._store_at(record, contact, some, accepted, pulse)
            if enough is not None and not enough.done() and (least := min(map(accepted.__getitem__, keys), default=0)) >= quorum:
                enough.set_result(least)

        patience_s = max((self._memory.patience_s(node_id) for node_id in by_holder), default=0.0)
        until = self._clock.monotonic() + patience_s
        waiting = set[asyncio.Task[None]]()
        for contact, theirs in by_holder.values():
            if self._sending is not record:
                break  # a newer one is under way
            for some in _chunks(theirs):
                task = self._tasks.start(store_at(contact, some), name="directory store")
                if task is not None:
                    waiting.add(task)
                await asyncio.sleep(0)
        if waiting:
            _, waiting = await asyncio.wait(waiting, timeout=max(0.0, until - self._clock.monotonic()))
        while waiting and not is_enough():
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return accepted

    async def _store_at(
        self, record: Record, contact: Contact, places: list[_Place], accepted: dict[bytes, int], pulse: Pulse = NO_PULSE
    ) -> None:
        """One datagram to one holder."""
        kept = pulse.n > 0 and await self._keep(contact, places, accepted, pulse)
        if kept:
            return
        reply = await self._send(record, contact, [place.key for place in places])
        verdicts, nearer = _read_store_reply(reply, len(places))
        for place, verdict, others in zip(places, verdicts, nearer, strict=True):
            if verdict in _GOOD:
                self._give(contact.id, record)
                self._note_holder(place, contact, record)
                place.full.discard(contact.id)
                accepted[place.key] += 1
                self._hear_of_nearer(place, contact, others)
            elif verdict is Verdict.FULL:
                self._give(contact.id, record)  # under another key it may have taken it
                place.full.add(contact.id)
                place.refused = contact
                place.holders.pop(contact.id, None)
            elif verdict is None:
                place.holders.pop(contact.id, None)

    async def _keep(self, contact: Contact, places: list[_Place], accepted: dict[bytes, int], pulse: Pulse) -> bool:
        """A pulse instead of a record; False if the holder should rather be sent one."""
        starts = b"".join(place.key[:KEY_START_BYTES] for place in places)
        reply = await self._protocol.request(contact.address, Op.PULSE, msgpack.packb([*pulse, starts]), node_id=contact.id)
        nearer = _read_pulse_reply(reply, len(places))
        if nearer is None or self._base is None:
            return False
        for place, others in zip(places, nearer, strict=True):
            self._note_holder(place, contact, self._base)
            accepted[place.key] += 1
            self._hear_of_nearer(place, contact, others)
        return True

    def _hear_of_nearer(self, place: _Place, contact: Contact, others: int) -> None:
        """A holder knows so many nodes nearer to the key than itself: too many for a holder, or more than we thought of."""
        if others > self._config.holders + self._config.spares:
            place.walk_at = float("-inf")
        elif place.guessed and others > sum(one.long_id ^ place.goal < contact.long_id ^ place.goal for one in place.holders.values()):
            place.guessed = False
            place.walk_at = self._clock.monotonic() + self._config.refresh_s * self._rng.uniform(0.1, 0.9)

    def _note_holder(self, place: _Place, contact: Contact, record: Record) -> None:
        now = self._clock.monotonic()
        if len(place.gave) > _MAX_GIVEN:
            place.gave = {node_id: held for node_id, held in place.gave.items() if held[1] > now}
        place.gave[contact.id] = (contact, now + record.expires - record.issued)

    async def _send(self, record: Record, contact: Contact, keys: list[bytes]) -> Reply | None:
        """As a patch to what this holder took last, or else whole; after an introduction, where it does not know us any more."""
        former = self._given.get(contact.id, b"")
        for _ in range(3):
            if self._protocol.sessions.by_node(contact.id) is None:
                await self._protocol.request(contact.address, Op.PING, EMPTY, node_id=contact.id)
                if self._protocol.sessions.by_node(contact.id) is None:
                    return None
            patched = former and former != record.signed
            base, data = (base_of(former), self._patch(former, record.signed)) if patched else (b"", record.signed)
            body = msgpack.packb([keys, self._remaining_ms(record), base, data])
            reply = await self._protocol.request(contact.address, Op.STORE, body, node_id=contact.id)
            if reply is not None and Verdict.UNKNOWN_BASE in _read_store_reply(reply, len(keys))[0]:
                former = b""
                continue
            if reply is not None or self._protocol.sessions.by_node(contact.id) is not None:
                return reply
        return None

    def _patch(self, former: bytes, data: bytes) -> bytes:
        """Most holders took the same record last."""
        if self._patched[:2] != (former, data):
            self._patched = (former, data, encode_patch(former, data))
        return self._patched[2]

    def _remaining_ms(self, record: Record) -> int:
        return max(0, int((record.expires - self._clock.wall()) * 1000))

    def _give(self, holder: bytes, record: Record) -> None:
        if self._base is None or record.order > self._base.order:
            self._base, self._sent_at = None, float("-inf")  # it has a newer one than the others: all get one next time, and soon
        self._given[holder] = record.signed
        self._given.move_to_end(holder)
        if len(self._given) > _MAX_GIVEN:
            self._given.popitem(last=False)

    def _repair(self, record: Record, places: list[_Place]) -> None:
        """Walk again, behind the refresh, for keys that lost holders or whose time has come."""
        for place in places:
            if not place.walking and self._must_walk(place):
                self._tasks.start(self._refill(record, place), name="directory refill")

    async def _refill(self, record: Record, place: _Place) -> None:
        fresh = await self._find_holders(place)
        current = self._record if self._record is not None and self._record.order >= record.order else record
        await asyncio.gather(*(self._store_at(current, contact, [place], {place.key: 0}) for contact in fresh))
        sending = self._sending or current
        deeper = [index for index in self._indexes.values() if self._key(index, sending) == place.key and self._go_deeper(index, sending)]
        await self._publish_deeper(sending, deeper)


def _in_turn(due: list[list[tuple[Contact, _Place]]]) -> Iterator[tuple[Contact, _Place]]:
    """The nearest holder of each place, then the second of each, and so on."""
    for row in zip_longest(*due):
        yield from (each for each in row if each is not None)


def _chunks(places: list[_Place]) -> list[list[_Place]]:
    return [places[at : at + _KEYS_PER_STORE] for at in range(0, len(places), _KEYS_PER_STORE)]


def _read_pulse_reply(reply: Reply | None, count: int) -> list[int] | None:
    """How many nodes it knows nearer to each key, if it has kept the record."""
    if reply is None or not reply.bodies or len(reply.bodies[0]) != 2:
        return None
    verdict, nearer = reply.bodies[0]
    if verdict != Verdict.ACCEPTED or not isinstance(nearer, list) or len(nearer) != count:
        return None
    return nearer if all(type(others) is int for others in nearer) else None


def _read_store_reply(reply: Reply | None, count: int) -> tuple[list[Verdict | None], list[int]]:
    """Verdicts and ranks from a holder; None for each verdict that did not come or makes no sense."""
    nothing: tuple[list[Verdict | None], list[int]] = [None] * count, [0] * count
    if reply is None or not reply.bodies or len(reply.bodies[0]) != 2:
        return nothing
    verdicts, nearer = reply.bodies[0]
    if not isinstance(verdicts, list) or not isinstance(nearer, list) or len(verdicts) != count or len(nearer) != count:
        return nothing
    try:
        return [Verdict(value) for value in verdicts], [int(value) for value in nearer]
    except (ValueError, TypeError):
        return nothing
