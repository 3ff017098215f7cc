"""The Kademlia protocol of the mesh: ping, find node, find value, store, and watch.

Names and roles are `kademlia`'s; what travels is ours: proven contacts, signed records with what remains of their lives, verdicts.
Bodies are msgpack lists:

=========== =================================================== ==========================================================
request     body                                                reply
=========== =================================================== ==========================================================
PING        []                                                  []
FIND_NODE   [target, how many]                                  [contacts]
FIND_VALUE  [key, rank after which to go on, contacts wanted,   [contacts, records held, full, more, [records], fingerprint],
            tags of the records in hand, parts wanted]          in parts
STORE       [[keys], remaining ms, base, record or patch]       [[verdicts], [nodes known nearer to each key than this one]]
WATCH       [[keys], lease ms]                                  [lease ms]
PULSE       [n, proof, first bytes of at most 4 keys]           [verdict, [nodes known nearer to each key than this one]]
NOTICE      [remaining ms, record]                              none
PROOF       [] and the cookie                                   none
=========== =================================================== ==========================================================
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from typing import Any

import msgpack
from kademlia.protocol import KademliaProtocol

from mesh.clock import Clock
from mesh.dht.address import Address, is_loopback
from mesh.dht.config import DirectoryConfig
from mesh.dht.counts import Counts
from mesh.dht.mesh_time import MeshTime
from mesh.dht.patch import apply_patch
from mesh.dht.peers import PeerMemory
from mesh.dht.routing import ID_BYTES, Contact, Table, encode_contacts
from mesh.dht.rpc import Request, SealedRpc
from mesh.dht.session import Session, Sessions
from mesh.dht.storage import NAME_BYTES, TAG_BYTES, Held, RecordStore, Verdict, covered, name_of, tag_of
from mesh.errors import MalformedEnvelope
from mesh.pulse import MAX_PULSE, NO_PULSE, PULSE_BYTES, Pulse
from mesh.records import MAX_RECORD_BYTES

MAX_KEYS = 4
KEY_START_BYTES = 2
_CONTACTS_WITH_RECORDS = 8
_RECORDS_FRAME_BYTES = 48
_FEW_RECORDS = 8
_PATCH, _PULSE, _SAME = 1, 2, 4
MAX_TAGS = 170
_MAX_WATCHED_KEYS = 1_024
_MAX_WATCHERS = 256
_RIVAL_SILENT = 5
"""Probe intervals of silence after which a contact may have to make room for somebody who is heard from."""
_RIVAL_EVERY = 2
"""One such contact is pinged in so many probe intervals: in a large mesh nearly everybody who writes stands in no table."""


class Op(IntEnum):
    """Kinds of requests."""

    PING = 1
    FIND_NODE = 2
    FIND_VALUE = 3
    STORE = 4
    WATCH = 5
    NOTICE = 6
    PROOF = 7
    DOC_OFFER = 8
    DOC_GET = 9
    DOC_LIST = 10
    PULSE = 11


class MeshProtocol(SealedRpc, KademliaProtocol):  # type: ignore[misc]
    """Answers for this node. A node that does not serve answers pings and takes notices only; see `SealedRpc` for ``welcomes``."""

    def __init__(
        self,
        *,
        clock: Clock,
        config: DirectoryConfig,
        sessions: Sessions,
        memory: PeerMemory,
        time: MeshTime,
        counts: Counts,
        own_id: bytes,
        table: Table,
        store: RecordStore,
        serve: bool,
        welcomes: bool,
    ) -> None:
        SealedRpc.__init__(
            self,
            clock=clock,
            config=config,
            sessions=sessions,
            memory=memory,
            time=time,
            counts=counts,
            own_id=own_id,
            welcomes=welcomes,
        )
        self.router = table
        self.storage = store
        self._serve = serve
        self.source_node = table.node
        self.watchers = Watchers()
        self._no_rival_until = float("-inf")
        self.on_notice: Callable[[bytes, float, bytes], None] = lambda data, remaining_s, source: None
        self.on_own_address: Callable[[Address], None] = lambda address: None
        self.handlers = {Op.PING: self.rpc_ping}
        self.notices = {Op.NOTICE: self.rpc_notice, Op.PROOF: self.rpc_ping}
        if serve:
            self.handlers |= {
                Op.FIND_NODE: self.rpc_find_node,
                Op.FIND_VALUE: self.rpc_find_value,
                Op.STORE: self.rpc_store,
                Op.PULSE: self.rpc_pulse,
                Op.WATCH: self.rpc_watch,
            }

    # hooks of the transport

    def on_proven(self, session: Session, address: Address) -> None:
        if not session.serve:
            return
        now = self.clock.monotonic()
        rival = self.router.seen(session.node_id, address, now)
        if rival is None or now - rival.seen <= _RIVAL_SILENT * self.config.probe_interval_s or now < self._no_rival_until:
            return
        self._no_rival_until = now + _RIVAL_EVERY * self.config.probe_interval_s
        self.probe(rival)

    def on_failed(self, node_id: bytes, failures: int) -> None:
        contact = self.router.get(node_id)
        if contact is None or not failures:
            return
        if failures >= 2:
            self.router.remove(node_id)
        else:
            self.probe(contact)  # one lost exchange proves nothing; a second in a row does

    def on_cookie(self, session: Session, address: Address) -> None:
        if self._serve:
            self.echo(session, address, Op.PROOF, EMPTY)

    def on_self(self, address: Address) -> None:
        self.on_own_address(address)

    def probe(self, contact: Contact) -> None:
        """Find out whether it is still there; the answer, or the silence, takes care of itself."""
        self.request(contact.address, Op.PING, EMPTY, node_id=contact.id)

    # what peers may ask

    def rpc_ping(self, request: Request) -> list[list[Any]]:
        return [[]]

    def rpc_find_node(self, request: Request) -> list[list[Any]]:
        target, count = _fields(request, 2)
        if type(count) is not int or count < 1:
            raise MalformedEnvelope("bad count")
        return [[self._contacts(request, _key(target), min(count, self.config.k), request.room - 8)]]

    def rpc_find_value(self, request: Request) -> list[list[Any]]:
        key, after, contacts_wanted, have, parts_wanted = _fields(request, 5)
        if not isinstance(after, bytes) or len(after) > ID_BYTES or type(parts_wanted) is not int or type(contacts_wanted) is not int:
            raise MalformedEnvelope("bad look-up")
        now = self.clock.monotonic()
        room = request.room - _RECORDS_FRAME_BYTES
        wanted = max(0, min(contacts_wanted, _CONTACTS_WITH_RECORDS))
        contacts = self._contacts(request, _key(key), wanted, room) if wanted else b""
        most = request.parts if not wanted else min(request.parts, max(0, parts_wanted))
        known = parse_tags(have)
        if wanted and self.storage.count(key) > _FEW_RECORDS:
            most = min(most, 1)
        parts: list[list[bytes]] = [[]]
        left, more, names = room - len(contacts) if most else 0, False, []
        for held in self.storage.live(key, now, after=after):
            names.append(held.name)
            if more or covered(held.tag, known):
                continue
            item = encode_found(held, known, now)
            size = len(item) + 3
            if size > left:
                if len(parts) >= most or size > room:
                    more = True
                    continue
                parts.append([])
                left = room
            parts[-1].append(item)
            left -= size
        full, mark = self.storage.is_full(key, now), fingerprint(names)
        return [[contacts if at == 0 else b"", len(names), full, more, items, mark] for at, items in enumerate(parts)]

    def rpc_store(self, request: Request) -> list[list[Any]]:
        keys, remaining_ms, base, data = _fields(request, 4)
        if not isinstance(keys, list) or not 1 <= len(keys) <= MAX_KEYS or not isinstance(data, bytes):
            raise MalformedEnvelope("bad store")
        if type(remaining_ms) is not int or remaining_ms < 0 or len(data) > MAX_RECORD_BYTES or not isinstance(base, bytes):
            raise MalformedEnvelope("bad store")
        keys = [_key(key) for key in keys]
        request.require_proof()
        verdicts = self._offer(request, keys, remaining_ms, base, data)
        for verdict in verdicts:
            self.counts.add(f"store_{verdict.name.lower()}")
        if Verdict.FORGED in verdicts:
            self.counts.refuse("forged_record", request.address, now=self.clock.monotonic())
        return [[[int(verdict) for verdict in verdicts], [self._nearer_known(key, request.node_id) for key in keys]]]

    def _offer(self, request: Request, keys: list[bytes], remaining_ms: int, base: bytes, data: bytes) -> list[Verdict]:
        """``base`` names the asker's own former record that ``data`` is a patch to, or is empty."""
        if base:
            held = self.storage.held(request.node_id)
            former = held.base(base) if held is not None else None
            if former is None:
                return [Verdict.UNKNOWN_BASE] * len(keys)
            data = apply_patch(former, data)
        verdicts: list[Verdict] = self.storage.offer(
            data,
            keys,
            remaining_s=remaining_ms / 1000,
            source=request.node_id,
            now=self.clock.monotonic(),
            wall=self.time.now(),
        )
        return verdicts

    def rpc_pulse(self, request: Request) -> list[list[Any]]:
        """Of the record that the asker itself placed here last: "still so"."""
        n, proof, starts = _fields(request, 3)
        pulse = _pulse(n, proof)
        if not isinstance(starts, bytes) or len(starts) > MAX_KEYS * KEY_START_BYTES:
            raise MalformedEnvelope("bad pulse")
        request.require_proof()
        verdict = self.storage.keep(request.node_id, pulse, now=self.clock.monotonic(), wall=self.time.now())
        self.counts.add(f"store_{verdict.name.lower()}")
        held = self.storage.held(request.node_id)
        if verdict is not Verdict.ACCEPTED or held is None:
            return [[int(verdict), []]]
        keys = {key[:KEY_START_BYTES]: key for key in held.keys}
        asked = [keys.get(starts[at : at + KEY_START_BYTES]) for at in range(0, len(starts), KEY_START_BYTES)]
        return [[int(verdict), [0 if key is None else self._nearer_known(key, request.node_id) for key in asked]]]

    def rpc_watch(self, request: Request) -> list[list[Any]]:
        keys, lease_ms = _fields(request, 2)
        if not isinstance(keys, list) or len(keys) > 16 or type(lease_ms) is not int or lease_ms < 0:
            raise MalformedEnvelope("bad watch")
        request.require_proof()
        lease_s = min(lease_ms / 1000, self.config.watch_lease_s)
        until = self.clock.monotonic() + lease_s
        for key in keys:
            self.watchers.add(_key(key), request.node_id, request.address, until)
        return [[int(lease_s * 1000)]]

    def rpc_notice(self, request: Request) -> list[list[Any]]:
        remaining_ms, data = _fields(request, 2)
        if type(remaining_ms) is not int or remaining_ms < 0 or not isinstance(data, bytes) or len(data) > MAX_RECORD_BYTES:
            raise MalformedEnvelope("bad notice")
        self.on_notice(data, remaining_ms / 1000, request.node_id)
        return []

    def push(self, held: Held, keys: dict[bytes, None]) -> None:
        """Tell whoever watches one of ``keys`` about a record."""
        now = self.clock.monotonic()
        body: bytes | None = None
        for node_id, address in self.watchers.of(keys, now):
            session = self.sessions.by_node(node_id)
            if session is None or node_id == held.source:
                continue
            if body is None:
                body = msgpack.packb([max(0, int((held.ends - now) * 1000)), held.record.signed])
            self.counts.add("notices")
            self.notify(session, address, Op.NOTICE, body)

    def _contacts(self, request: Request, target: bytes, count: int, room: int) -> bytes:
        """The nearest contacts that answer, but not the asker, and no loopback address for anybody elsewhere."""
        asker, failing, local = request.node_id, self.memory.failing, is_loopback(request.address.host)

        def fit(contact: Contact) -> bool:
            return contact.id != asker and not failing(contact.id) and (local or not is_loopback(contact.address.host))

        return encode_contacts(self.router.nearest(target, count, accept=fit), room)

    def _nearer_known(self, key: bytes, owner: bytes) -> int:
        """How many nodes we know that stand nearer to the key than we: whether we are one of its holders."""
        goal = int.from_bytes(key)
        own = self.router.node.long_id ^ goal
        nearest = self.router.nearest(key, self.config.holders + self.config.spares + 1)
        return sum(contact.long_id ^ goal < own and contact.id != owner and not self.memory.failing(contact.id) for contact in nearest)


EMPTY = msgpack.packb([])

__all__ = ["EMPTY", "MAX_TAGS", "MeshProtocol", "Op", "Watchers", "encode_found", "fingerprint", "name_of", "parse_found", "tag_of"]


class Watchers:
    """Who wants to hear of changes under a key, and until when. Bounded: keys, and watchers per key."""

    def __init__(self) -> None:
        self._by_key: OrderedDict[bytes, OrderedDict[bytes, tuple[Address, float]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(watchers) for watchers in self._by_key.values())

    def add(self, key: bytes, node_id: bytes, address: Address, until: float) -> None:
        watchers = self._by_key.setdefault(key, OrderedDict())
        watchers[node_id] = (address, until)
        watchers.move_to_end(node_id)
        if len(watchers) > _MAX_WATCHERS:
            watchers.popitem(last=False)
        self._by_key.move_to_end(key)
        if len(self._by_key) > _MAX_WATCHED_KEYS:
            self._by_key.popitem(last=False)

    def of(self, keys: dict[bytes, None], now: float) -> list[tuple[bytes, Address]]:
        """Each watcher of any of ``keys`` once."""
        found: dict[bytes, Address] = {}
        for key in keys:
            watchers = self._by_key.get(key)
            if watchers is None:
                continue
            for node_id, (address, until) in list(watchers.items()):
                if until <= now:
                    del watchers[node_id]
                else:
                    found[node_id] = address
            if not watchers:
                del self._by_key[key]
        return list(found.items())


def encode_found(held: Held, known: Mapping[bytes, int], now: float) -> bytes:
    """What remains of a record's life in ms, and the record: whole, or as a patch to one the asker has."""
    remaining = max(0, min(65_535, int((held.ends - now) * 1000))).to_bytes(2)
    form, pulse = 0, b""
    if held.pulse.n:
        form, pulse = _PULSE, bytes((held.pulse.n,)) + held.pulse.proof
    if known and held.is_known(known):
        return remaining + bytes((form | _SAME,)) + pulse + held.name
    patched = held.patch_for(known) if known else None
    if patched is None:
        return remaining + bytes((form,)) + pulse + held.record.signed
    return remaining + bytes((form | _PATCH,)) + pulse + patched[0] + patched[1]


def parse_found(item: object, bases: Mapping[bytes, bytes]) -> tuple[float, bytes, Pulse]:
    """The inverse, from outside: remaining seconds, the record's bytes, its pulse. ``bases`` are records by name. Raises
    `MalformedEnvelope`."""
    if not isinstance(item, bytes) or not 3 < len(item) <= 4 + PULSE_BYTES + MAX_RECORD_BYTES:
        raise MalformedEnvelope("bad record in a reply")
    remaining_s, form, data, pulse = int.from_bytes(item[:2]) / 1000, item[2], item[3:], NO_PULSE
    if form & _PULSE:
        pulse, data = _pulse(data[0], data[1 : 1 + PULSE_BYTES]), data[1 + PULSE_BYTES :]
    if not form & (_PATCH | _SAME):
        return remaining_s, data, pulse
    former = bases.get(data[:NAME_BYTES])
    if former is None:
        raise MalformedEnvelope("in terms of a record we do not have")
    return remaining_s, former if form & _SAME else apply_patch(former, data[NAME_BYTES:]), pulse


def fingerprint(names: Iterable[bytes]) -> bytes:
    """One short value for a set of records, whatever their order and their pulses."""
    total = 0
    for name in names:
        total ^= int.from_bytes(name)
    return total.to_bytes(NAME_BYTES)


def parse_tags(data: object) -> dict[bytes, int]:
    """The tags of records an asker has in hand: see `covered`. Raises `MalformedEnvelope`."""
    if not isinstance(data, bytes) or len(data) % TAG_BYTES or len(data) > MAX_TAGS * TAG_BYTES:
        raise MalformedEnvelope("bad tags")
    return {data[at : at + 4]: int.from_bytes(data[at + 4 : at + TAG_BYTES]) for at in range(0, len(data), TAG_BYTES)}


def _fields(request: Request, count: int) -> list[Any]:
    if len(request.body) != count:
        raise MalformedEnvelope(f"expected {count} fields")
    return request.body


def _pulse(n: object, proof: object) -> Pulse:
    if type(n) is not int or not 0 < n <= MAX_PULSE or not isinstance(proof, bytes) or len(proof) != PULSE_BYTES:
        raise MalformedEnvelope("bad pulse")
    return Pulse(n, proof)


def _key(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) != ID_BYTES:
        raise MalformedEnvelope("a key has 32 bytes")
    return value
