"""Collecting the records under one key from several holders without fetching each record from each of them.

The first reply of a node brings a few records and a fingerprint of all it holds. One holder is then asked for everything; the
others, where their fingerprints differ from what is in hand, for what is not in hand yet. So a key with 128 records costs one
copy of them and a few differences, and what one holder withholds another adds. Fingerprints leave pulses out: as long as every record in
hand will last, nobody is asked whether its owner has confirmed it since, and when one will not, the holders are asked for all of them, one
after the other until each lasts: mostly the first is enough.

Holders differ for good: not every owner takes the same nodes for the nearest. What a holder lacks of the records in hand is one number, the
difference of the fingerprints; while it is the one at which that holder last had no news, it is not asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import msgpack

from mesh.clock import Clock
from mesh.dht.keys import rank
from mesh.dht.peers import PeerMemory
from mesh.dht.protocol import MAX_TAGS, MeshProtocol, Op, name_of, parse_found, tag_of
from mesh.dht.routing import Contact
from mesh.dht.rpc import Reply
from mesh.errors import MalformedEnvelope, TrustError
from mesh.pulse import Pulse
from mesh.records import Record

Accept = Callable[[bytes, float, Pulse, bytes], Record | None]
"""Takes a record's bytes, what remains of its life in seconds, its pulse, and who gave it. Returns the record, or None if it is bad."""

_MAX_PAGES = 16
_PATIENCE = 3


class Collector:
    """The records of one look-up. ``known`` are records in hand: only newer ones are fetched, where it can be as patches.

    ``lasting_s`` is how much life a record must have left for nobody to be asked about it; with some in hand only those that ``is_near``
    are asked for differences. ``lacks`` is by node what it lacked when it last had no news; it is kept up to date. ``on_change`` is called
    whenever what `go_on` says may have changed.
    """

    def __init__(
        self,
        protocol: MeshProtocol,
        memory: PeerMemory,
        clock: Clock,
        *,
        key: bytes,
        accept: Accept,
        known: Iterable[Record],
        lasting_s: float,
        is_near: Callable[[Contact], bool],
        lacks: dict[bytes, int],
        on_change: Callable[[], None],
    ) -> None:
        self._protocol = protocol
        self._memory = memory
        self._clock = clock
        self._key = key
        self._accept = accept
        self._lasting_s = lasting_s
        self._is_near = is_near
        self._lacks = lacks
        self._on_change = on_change
        self._newest: dict[bytes, tuple[tuple[int, int, int], Record]] = {}
        self._bases: dict[bytes, bytes] = {}
        self._mark = 0
        self._waiting: dict[Contact, bytes] = {}
        self._fetching: dict[Contact, asyncio.TimerHandle] = {}
        self._whole = False
        self._stopped = False
        self._news = 0
        self._last = b""
        self.records: dict[bytes, int] = {}
        """Good records by the id of the node that gave them."""
        self.holders: list[Contact] = []
        self.full = False
        for record in known:
            self._note(record)
        self.knows_some = bool(self._newest)
        """Whether first replies need not bring records: what is new will be fetched by its difference."""

    def go_on(self) -> bool:
        """Fetch from whoever should be asked now; returns whether it is worth waiting for more."""
        self._start()
        return bool(self._fetching)

    def stop(self) -> None:
        self._stopped = True
        for timer in self._fetching.values():
            timer.cancel()
        self._fetching.clear()
        self._waiting.clear()

    def first(self, contact: Contact, body: list[Any]) -> object:
        """Take in the first reply of a node; returns the contacts in it. Raises a `TrustError`."""
        contacts, more, mark = self._take(contact, body)
        if more:
            self._waiting[contact] = mark
            self._start()
        return contacts

    def rest(self, contact: Contact, bodies: list[list[Any]]) -> None:
        """Take in further parts of a first reply; a bad one is that peer's loss."""
        for body in bodies:
            try:
                self._take(contact, body)
            except TrustError as error:
                self._refuse(contact, error)

    def _take(self, contact: Contact, body: list[Any]) -> tuple[object, bool, bytes]:
        if len(body) != 6 or not isinstance(body[4], list) or not isinstance(body[5], bytes):
            raise MalformedEnvelope("bad reply to a look-up")
        contacts, _, full, more, items, mark = body
        self.full = self.full or full is True
        for item in items:
            remaining_s, data, pulse = parse_found(item, self._bases)
            record = self._accept(data, remaining_s, pulse, contact.id)
            if record is not None:
                self._last = max(self._last, rank(record.node_id))
                self._note(record)
                self.records[contact.id] = self.records.get(contact.id, 0) + 1
        if contact.id in self.records and contact not in self.holders:
            self.holders.append(contact)
        return contacts, more is True, mark

    def _note(self, record: Record) -> None:
        known = self._newest.get(record.node_id)
        order = (*record.order, record.pulse)
        if known is None or order > known[0]:
            self._newest[record.node_id] = (order, record)
            self._bases[name_of(record)] = record.signed
            self._mark ^= int.from_bytes(name_of(record)) ^ (int.from_bytes(name_of(known[1])) if known is not None else 0)
            self._news += 1

    def _in_hand(self) -> list[Record]:
        return [record for _, record in self._newest.values()]

    def _lacking(self, mark: bytes) -> int:
        """What a holder with this fingerprint has not got, or has and we have not: 0 if that is nothing."""
        return int.from_bytes(mark) ^ self._mark

    def _all_last(self) -> bool:
        until = self._clock.wall() + self._lasting_s
        return all(record.expires > until for record in self._in_hand())

    def _start(self) -> None:
        """Fetch from one holder first; once that is done, from all that may have news, and while some record will not last, from the others
        too: at once, or with some known one after the other."""
        if not self._waiting or (self._fetching and not self._whole):
            return
        lasting = self._all_last()
        for contact, mark in list(self._waiting.items()):
            lacking = self._lacking(mark)
            without_news = lacking in (0, self._lacks.get(contact.id, 0))
            if lasting and without_news:
                del self._waiting[contact]
            elif not self.knows_some or (self._is_near(contact) and not (without_news and self._fetching)):
                del self._waiting[contact]
                self._fetch(contact, 0, b"")
                if not self._whole:
                    return

    def _fetch(self, contact: Contact, page: int, after: bytes) -> None:
        likely = sorted(self._in_hand(), key=lambda record: rank(record.node_id))[:MAX_TAGS]  # whom a full key keeps
        have = b"".join(map(tag_of, likely))
        body = msgpack.packb([self._key, after, 0, have, 0])
        self._protocol.ask(contact.address, Op.FIND_VALUE, body, partial(self._on_reply, contact, page), node_id=contact.id)
        patience_s = _PATIENCE * self._memory.patience_s(contact.id)
        loop = asyncio.get_running_loop()
        self._fetching[contact] = loop.call_later(patience_s, self._late, contact)

    def _late(self, contact: Contact) -> None:
        if self._fetching.pop(contact, None) is not None:
            self._start()
            self._on_change()

    def _on_reply(self, contact: Contact, page: int, reply: Reply | None) -> None:
        if self._stopped:
            return
        timer = self._fetching.pop(contact, None)
        if timer is not None:
            timer.cancel()
        after = None if reply is None else self._digest(contact, reply)
        if after is not None and page < _MAX_PAGES:
            self._fetch(contact, page + 1, after)
        elif reply is not None:
            self._whole = True
        self._start()
        self._on_change()

    def _digest(self, contact: Contact, reply: Reply) -> bytes | None:
        """Take in a fetched page; returns where to go on with this holder, if it pays."""
        before, more, mark = self._news, False, b""
        self._last = b""
        for body in reply.bodies:
            try:
                _, many, mark = self._take(contact, body)
                more = more or many
            except TrustError as error:
                self._refuse(contact, error)
                return None
        if self._news == before:
            if reply.complete:
                self._lacks[contact.id] = self._lacking(mark)
            return None
        if not reply.complete:
            return b""
        return self._last if more else None

    def _refuse(self, contact: Contact, error: TrustError) -> None:
        self._protocol.counts.refuse(f"reply_{error.code}", contact, now=self._clock.monotonic())
