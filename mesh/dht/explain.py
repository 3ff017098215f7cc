"""Looking into the directory for a person: a look-up with everything that came of it, and who answers right now.

An ordinary look-up takes each record from the first who has it and drops what does not hold. This one goes the same way, then reads
every holder on its own and keeps what it says, good or bad, so that a person sees who holds what and what is wrong with it.
Nothing here is on a request's path; whoever calls it bounds how often.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgpack

from mesh.dht.address import Address, is_dialable, normalise
from mesh.dht.crawl import Hop
from mesh.dht.exchange import Standing
from mesh.dht.keys import MAX_LEVEL, AllowedKeys, level_of, rank, sub_shards
from mesh.dht.node import DhtNode
from mesh.dht.protocol import EMPTY, Op, parse_found
from mesh.dht.routing import Contact
from mesh.dht.verify import peek
from mesh.documents import Document
from mesh.errors import Expired, MalformedEnvelope, TrustError
from mesh.pulse import Pulse
from mesh.records import Record, directory_key

MAX_KEYS = 9
"""A key and its eight sub-keys: where there are more, the rest is not read and the answer says so."""
MAX_PAGES = 16
MAX_FOUND = 4_096
MAX_PROBED = 64
_AT_ONCE = 16
_RESOLVE_S = 2.0

GOOD, OLDER, EXPIRED, WRONG_KEY = "good", "older", "expired", "wrong_key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A node near the key and what it handed out. ``rtt_s`` is None if it did not answer; our own store is a holder too."""

    shard: int
    node_id: bytes
    address: str
    records: int
    complete: bool
    took_s: float
    own: bool = False


@dataclass(slots=True, kw_only=True)
class Found:
    """One version of a node's record, what is wrong with it, if anything, and who handed it out.

    ``verdict``: ``good``, ``older`` (a newer one is known), ``expired``, ``wrong_key`` (it does not belong there), or the code of the
    `TrustError` it failed with. ``record`` is None where it could not be verified; ``node_id`` and ``order`` are then only claimed.
    """

    node_id: bytes
    order: tuple[int, int]
    verdict: str
    reason: str = ""
    record: Record | None = None
    holders: dict[bytes, None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """``hops`` have the shard they were about. ``complete``: every key was read before the deadline and none was left out."""

    kind: str
    name: str
    hops: list[tuple[int, Hop]]
    holders: list[Holder]
    found: list[Found]
    complete: bool
    crawl_s: float
    took_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Whether somebody answers. ``node_id`` is None for an address alone; ``rtt_s`` None if nothing came back; ``error`` says more."""

    node_id: bytes | None
    address: str
    rtt_s: float | None
    error: str = ""


class _Reading:
    """What has been found so far, each version once."""

    def __init__(self, node: DhtNode) -> None:
        self._node = node
        self.found: dict[tuple[bytes, tuple[int, int], str], Found] = {}

    def take(self, key: bytes, data: bytes, remaining_s: float, pulse: Pulse, holder: bytes) -> None:
        if len(self.found) >= MAX_FOUND:
            return
        one = self._judge(key, data, remaining_s, pulse)
        known = self.found.setdefault((one.node_id, one.order, one.verdict), one)
        known.holders[holder] = None
        if known.record is not None and one.record is not None and one.record.expires > known.record.expires:
            known.record = one.record

    def add(self, key: bytes, record: Record, holder: bytes) -> None:
        """A record that has been verified."""
        verdict = GOOD if key in AllowedKeys(record) else WRONG_KEY
        one = Found(node_id=record.node_id, order=record.order, verdict=verdict, record=record)
        self.found.setdefault((one.node_id, one.order, one.verdict), one).holders[holder] = None

    def _judge(self, key: bytes, data: bytes, remaining_s: float, pulse: Pulse) -> Found:
        try:
            claim = peek(data)
        except TrustError as error:
            return Found(node_id=b"", order=(0, 0), verdict=error.code, reason=error.message)
        try:
            record = self._node.check(data, remaining_s, pulse)
        except Expired as error:
            return Found(node_id=claim.node_id, order=claim.order, verdict=EXPIRED, reason=error.message)
        except TrustError as error:
            return Found(node_id=claim.node_id, order=claim.order, verdict=error.code, reason=error.message)
        verdict = GOOD if key in AllowedKeys(record) else WRONG_KEY
        if not record.alive(self._node.clock.wall()):
            verdict = EXPIRED
        return Found(node_id=record.node_id, order=record.order, verdict=verdict, record=record)

    def settled(self) -> list[Found]:
        """With the verdict ``older`` for whatever is not its node's newest; by node, the newest first."""
        newest: dict[bytes, tuple[int, int]] = {}
        for one in self.found.values():
            if one.record is not None and one.verdict == GOOD:
                newest[one.node_id] = max(newest.get(one.node_id, one.order), one.order)
        for one in self.found.values():
            if one.verdict == GOOD and one.order < newest[one.node_id]:
                one.verdict = OLDER
        return sorted(self.found.values(), key=lambda one: (one.node_id, -one.order[0], -one.order[1]))


async def explain(node: DhtNode, kind: str, name: str, *, timeout_s: float) -> Explained:
    """Look up an index now, ``("model", NAME)`` or ``("role", ROLE)``, and read all its holders. Raises nothing for what peers do."""
    began = node.clock.monotonic()
    reading = _Reading(node)
    hops: list[tuple[int, Hop]] = []
    holders: list[Holder] = []
    crawl_s, complete, shards, done = 0.0, True, [0], 0
    while shards and done < MAX_KEYS:
        left_s = timeout_s - (node.clock.monotonic() - began)
        if left_s <= 0:
            break
        wave, shards = shards[: MAX_KEYS - done], shards[MAX_KEYS - done :]
        done += len(wave)
        parts = await asyncio.gather(*(_explain_key(node, reading, kind, name, shard, left_s) for shard in wave))
        for shard, part in zip(wave, parts, strict=True):
            hops += [(shard, hop) for hop in part.hops]
            holders += part.holders
            complete = complete and part.complete
            crawl_s += part.crawl_s
            if part.full and level_of(shard) < MAX_LEVEL:
                shards += sub_shards(shard)
    return Explained(
        kind=kind,
        name=name,
        hops=hops,
        holders=holders,
        found=reading.settled(),
        complete=complete and not shards,
        crawl_s=crawl_s,
        took_s=node.clock.monotonic() - began,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    hops: list[Hop]
    holders: list[Holder]
    full: bool
    complete: bool
    crawl_s: float


async def _explain_key(node: DhtNode, reading: _Reading, kind: str, name: str, shard: int, timeout_s: float) -> _Part:
    key = directory_key(kind, name, shard)
    now = node.clock.monotonic()
    deadline = now + timeout_s
    own = [node.local(held) for held in node.store.live(key, now)]
    outcome = await node.crawl(
        key, accept=lambda data, remaining_s, pulse, source: _accept(node, data, remaining_s, pulse), timeout_s=timeout_s
    )
    left_s = max(0.0, deadline - node.clock.monotonic())
    nearest = outcome.nearest[: node.config.read_width]
    # A crawl also hears of records farther out than the holders that are read below; whoever gave some is read as well.
    readable = list({contact.id: contact for contact in (*nearest, *outcome.holders)}.values())
    holders = await asyncio.gather(*(_read_holder(node, reading, key, shard, contact, left_s) for contact in readable))
    for record in own:
        reading.add(key, record, node.identity.node_id)
    if own:
        holders.append(
            Holder(shard=shard, node_id=node.identity.node_id, address="", records=len(own), complete=True, took_s=0.0, own=True)
        )
    return _Part(
        hops=outcome.hops,
        holders=holders,
        full=outcome.full or node.store.is_full(key, node.clock.monotonic()),
        complete=outcome.complete,
        crawl_s=outcome.elapsed_s,
    )


def _accept(node: DhtNode, data: bytes, remaining_s: float, pulse: Pulse) -> Record | None:
    try:
        return node.check(data, remaining_s, pulse)
    except TrustError:
        return None  # what is wrong with it is told when its holder is read


async def _read_holder(node: DhtNode, reading: _Reading, key: bytes, shard: int, contact: Contact, timeout_s: float) -> Holder:
    """All that one node hands out under the key, page by page."""
    began = node.clock.monotonic()
    records, complete = 0, False
    try:
        async with asyncio.timeout(timeout_s):
            after: bytes | None = b""
            for _ in range(MAX_PAGES):
                body = msgpack.packb([key, after, 0, b"", 0])
                reply = await node.protocol.request(contact.address, Op.FIND_VALUE, body, node_id=contact.id)
                if reply is None:
                    break
                count, after = _digest(reading, key, contact, reply.bodies)
                records += count
                if after is None:
                    complete = reply.complete
                    break
    except (TimeoutError, TrustError):
        pass  # the entry says that it is not complete
    took_s = node.clock.monotonic() - began
    return Holder(shard=shard, node_id=contact.id, address=str(contact.address), records=records, complete=complete, took_s=took_s)


def _digest(reading: _Reading, key: bytes, contact: Contact, bodies: Sequence[list[object]]) -> tuple[int, bytes | None]:
    """Take in one page; returns how many records it had and where to go on, None if that was all. Raises `MalformedEnvelope`."""
    count, last, more = 0, b"", False
    for body in bodies:
        if len(body) != 6 or not isinstance(body[4], list):
            raise MalformedEnvelope("bad reply to a look-up")
        more = more or body[3] is True
        for item in body[4]:
            remaining_s, data, pulse = parse_found(item, {})
            reading.take(key, data, remaining_s, pulse, contact.id)
            count += 1
            try:
                last = max(last, rank(peek(data).node_id))
            except TrustError:
                continue
    return count, last if more and last else None


async def probe(node: DhtNode, contacts: Iterable[Contact]) -> list[Probe]:
    """Ask each of at most `MAX_PROBED` peers for a sign of life; who keeps silent is asked once more."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(contact: Contact) -> Probe:
        async with gate:
            rtt_s = await _ping(node, contact.address, contact.id)
        return Probe(node_id=contact.id, address=str(contact.address), rtt_s=rtt_s)

    return list(await asyncio.gather(*(one(contact) for contact in list(contacts)[:MAX_PROBED])))


async def knock(node: DhtNode) -> list[Probe]:
    """Whether each bootstrap node we were told of answers, at any of its addresses. Our own address counts as answered."""
    return list(await asyncio.gather(*(_knock(node, host, port) for host, port in node.bootstraps[:_AT_ONCE])))


async def _knock(node: DhtNode, host: str, port: int) -> Probe:
    name = str(Address(host, port))
    try:
        async with asyncio.timeout(_RESOLVE_S):
            entries = await asyncio.get_running_loop().getaddrinfo(host, port)
    except TimeoutError:
        return Probe(node_id=None, address=name, rtt_s=None, error="its name could not be resolved in time")
    except OSError as error:
        return Probe(node_id=None, address=name, rtt_s=None, error=f"its name could not be resolved: {error.strerror or error}")
    addresses = dict.fromkeys(normalise(str(entry[4][0]), int(entry[4][1])) for entry in entries)
    dialable = [address for address in addresses if is_dialable(*address)][:4]
    times = await asyncio.gather(*(_ping(node, address, None) for address in dialable))
    answered = [rtt_s for rtt_s in times if rtt_s is not None]
    if any(node.is_own(address) for address in dialable):
        answered.append(0.0)
    return Probe(node_id=None, address=name, rtt_s=min(answered, default=None), error="" if answered else "no answer over UDP")


async def compare_documents(node: DhtNode, most: int) -> list[Standing]:
    """How the documents this node holds compare with what their nearest nodes list: at most ``most``, those signed last."""
    held = sorted(node.documents, key=lambda document: document.issued, reverse=True)[:most]
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(document: Document) -> Standing:
        async with gate:
            return await node.exchange.compare(document)

    return list(await asyncio.gather(*(one(document) for document in held)))


async def _ping(node: DhtNode, address: Address, node_id: bytes | None) -> float | None:
    for _ in range(2):
        reply = await node.protocol.request(address, Op.PING, EMPTY, node_id=node_id)
        if reply is not None:
            return reply.rtt_s
    return None
