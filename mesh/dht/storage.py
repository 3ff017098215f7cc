"""What a node holds for the mesh: by key, the newest record of each owner.

* A record is verified before it is kept, and the highest ``(boot, seq)`` of its owner wins, under every key at once.
* An expired record never comes back: the highest order seen of each owner outlives every copy of its records.
* A pulse of its owner makes the record that is here live longer.
* A record offered under a key it no longer names takes its owner out of that key: so a worker withdraws.
* Everything is bounded: records, records per key, records one peer may place for others.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from heapq import heappop, heappush
from typing import Any

from kademlia.storage import IStorage

from mesh.claims import CLOCK_SKEW_S
from mesh.dht.config import DirectoryConfig
from mesh.dht.keys import AllowedKeys, indexes, rank
from mesh.dht.patch import base_of, encode_patch
from mesh.dht.verify import Claim, Verifier, lifetime_s, peek
from mesh.errors import Expired, TrustError
from mesh.pulse import NO_PULSE, Pulse
from mesh.records import MAX_LIFETIME_S, Record

TAG_BYTES = 6
NAME_BYTES = 5
_OVERHANG = 1.5
_FORMERS = 2
_EARLIER_S = 0.5


class Verdict(IntEnum):
    """What became of an offered record; also its code on the wire."""

    ACCEPTED = 0
    WITHDRAWN = 1
    FULL = 2
    STALE = 3
    EXPIRED = 4
    FORGED = 5
    WRONG_KEY = 6
    OVER_QUOTA = 7
    UNKNOWN_BASE = 8


@dataclass(slots=True)
class _Highest:
    """The newest order seen of an owner, when that record ends, and when even this may be forgotten."""

    order: tuple[int, int]
    ends: float
    until: float


@dataclass(slots=True, kw_only=True)
class Held:
    """A record held. ``ends`` is monotonic seconds; ``keys`` are those it is listed under here."""

    record: Record
    claim: Claim
    ends: float
    source: bytes
    allowed: AllowedKeys
    keys: dict[bytes, None] = field(default_factory=dict)
    formers: tuple[tuple[bytes, bytes], ...] = ()
    """Name and bytes of the records before this one, the newest first: what a patch may build on."""
    pulse: Pulse = NO_PULSE
    name: bytes = b""
    patches: dict[bytes, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = name_of(self.record)

    @property
    def tag(self) -> bytes:
        return self.name + bytes((self.pulse.n,))

    def base(self, name: bytes) -> bytes | None:
        """This record's bytes, or a former's, by their short name."""
        signed = (self.record.signed, *(data for _, data in self.formers))
        return next((data for data in signed if base_of(data) == name), None)

    def patch_for(self, tags: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
        """The name of a former record that an asker has, and the patch from it to this one."""
        for name, former in self.formers:
            if _has(tags, name):
                if name not in self.patches:
                    self.patches[name] = encode_patch(former, self.record.signed)
                return name, self.patches[name]
        return None

    def is_known(self, tags: Mapping[bytes, int]) -> bool:
        """Whether an asker has this very record, if not its last pulse."""
        return _has(tags, self.name)


class RecordStore(IStorage):  # type: ignore[misc]
    """``now`` is monotonic seconds, ``wall`` the mesh's time."""

    def __init__(self, verifier: Verifier, config: DirectoryConfig) -> None:
        self._verifier = verifier
        self._config = config
        self._held: dict[bytes, Held] = {}
        self._index: dict[bytes, list[tuple[bytes, bytes]]] = {}
        self._overflowing: dict[bytes, float] = {}
        self._highest: OrderedDict[bytes, _Highest] = OrderedDict()
        self._placed: Counter[bytes] = Counter()
        self._ends: list[tuple[float, bytes]] = []
        self.verdicts: Counter[Verdict] = Counter()
        self.on_change: Callable[[Held, Held | None, bool], None] = lambda held, former, material: None

    def __len__(self) -> int:
        return len(self._held)

    def held(self, node_id: bytes) -> Held | None:
        return self._held.get(node_id)

    def offer(self, data: bytes, keys: Sequence[bytes], *, remaining_s: float, source: bytes, now: float, wall: float) -> list[Verdict]:
        """Take in a record that ``source`` offers under ``keys``; one verdict for each key. Never raises."""
        self.expire(now)
        former: Held | None = None
        held: Held | None = None
        verdict = Verdict.FORGED
        try:
            claim = peek(data)
            former = self._held.get(claim.node_id)
            verdict, held = self._take(data, claim, former, remaining_s, source, now, wall)
        except Expired:
            verdict = Verdict.EXPIRED
        except TrustError:
            verdict = Verdict.FORGED
        verdicts = [verdict if held is None else self._list(held, former, key, now) for key in keys]
        self.verdicts.update(verdicts)
        if held is not None and not held.keys:
            self._drop(held)
        if held is not None and held is not former:
            self.on_change(held, former, former is None or is_material(former.record, held.record))
        return verdicts

    def _take(
        self, data: bytes, claim: Claim, former: Held | None, remaining_s: float, source: bytes, now: float, wall: float
    ) -> tuple[Verdict, Held | None]:
        left_s = lifetime_s(claim, remaining_s, now=wall)
        if former is not None and former.record.signed == data:
            if source == claim.node_id and now + left_s > former.ends:
                self._prolong(former, now + left_s)
            return Verdict.ACCEPTED, former
        highest = self._highest.get(claim.node_id)
        if highest is not None and (claim.order < highest.order or (former is not None and claim.order == highest.order)):
            return Verdict.STALE, None
        if highest is not None and claim.order == highest.order:
            left_s = min(left_s, highest.ends - now)
        if left_s <= 0:
            return Verdict.EXPIRED, None
        if former is None and not self._room_for(claim.node_id, source):
            return Verdict.OVER_QUOTA, None
        record = self._verifier.record(data, claim, now=wall)
        same = former is not None and list(indexes(former.record)) == list(indexes(record))
        allowed = former.allowed if former is not None and same else AllowedKeys(record)
        held = Held(record=record, claim=claim, ends=now + left_s, source=source, allowed=allowed)
        self._replace(held, former)
        return Verdict.ACCEPTED, held

    def keep(self, owner: bytes, pulse: Pulse, *, now: float, wall: float) -> Verdict:
        """A pulse from the owner itself, just now: what it placed here lives on. Never raises."""
        self.expire(now)
        verdict = self._keep(self._held.get(owner), pulse, now, wall)
        self.verdicts[verdict] += 1
        return verdict

    def _keep(self, held: Held | None, pulse: Pulse, now: float, wall: float) -> Verdict:
        if held is None or not held.record.anchor:
            return Verdict.UNKNOWN_BASE
        if pulse.n < held.pulse.n:
            return Verdict.STALE
        try:
            self._verifier.record(held.record.signed, held.claim, now=wall, pulse=pulse)
        except Expired:
            return Verdict.EXPIRED
        except TrustError:
            return Verdict.UNKNOWN_BASE  # of another record, as far as we can tell: then the owner sends that
        left_s = lifetime_s(held.claim, MAX_LIFETIME_S, now=wall, pulse_s=pulse.n)
        held.pulse = pulse
        if now + left_s > held.ends:
            self._prolong(held, now + left_s)
        return Verdict.ACCEPTED

    def _prolong(self, held: Held, ends: float) -> None:
        """Its owner itself says so: a relayed copy may have come first, with less time left than the owner gives it."""
        held.ends = ends
        self._remember(held.record.node_id, held.record.order, ends)
        heappush(self._ends, (ends, held.record.node_id))

    def _room_for(self, owner: bytes, source: bytes) -> bool:
        if len(self._held) >= self._config.max_records:
            return False
        return source == owner or self._placed[source] < self._config.max_stores_per_peer

    def _replace(self, held: Held, former: Held | None) -> None:
        node_id = held.record.node_id
        if former is not None:
            held.formers = ((former.name, former.record.signed), *former.formers)[:_FORMERS]
            self._unplace(former)
            for key in former.keys:
                if key in held.allowed:
                    held.keys[key] = None
                else:
                    self._unlist(key, node_id)
        self._held[node_id] = held
        if held.source != node_id:
            self._placed[held.source] += 1
        self._remember(node_id, held.record.order, held.ends)
        heappush(self._ends, (held.ends, node_id))

    def _remember(self, node_id: bytes, order: tuple[int, int], ends: float) -> None:
        """The tombstone: kept until no copy of an older record can be alive anywhere."""
        self._highest[node_id] = _Highest(order, ends, ends + MAX_LIFETIME_S + 2 * CLOCK_SKEW_S)
        self._highest.move_to_end(node_id)
        if len(self._highest) > 4 * self._config.max_records:
            self._highest.popitem(last=False)

    def _list(self, held: Held, former: Held | None, key: bytes, now: float) -> Verdict:
        node_id = held.record.node_id
        if key not in held.allowed:
            return Verdict.WITHDRAWN if former is not None and key in former.keys else Verdict.WRONG_KEY
        entry = (rank(node_id), node_id)
        listed = self._index.setdefault(key, [])
        if len(listed) >= self._config.shard_size and entry > listed[self._config.shard_size - 1]:
            self._overflowing[key] = now + 3 * self._config.ascend_interval_s
            return Verdict.FULL
        if key not in held.keys:
            insort(listed, entry)
            held.keys[key] = None
            if len(listed) > self._config.shard_size * _OVERHANG:
                self._evict(key, listed[-1][1])
        return Verdict.ACCEPTED

    def _evict(self, key: bytes, node_id: bytes) -> None:
        """Newcomers of lower rank leave the last no place, not even until it has found one in a sub-key."""
        self._unlist(key, node_id)
        held = self._held[node_id]
        held.keys.pop(key, None)
        if not held.keys:
            self._drop(held)

    def _unlist(self, key: bytes, node_id: bytes) -> None:
        listed = self._index.get(key, [])
        at = bisect_left(listed, (rank(node_id), node_id))
        if at < len(listed) and listed[at][1] == node_id:
            del listed[at]
        if not listed:
            self._index.pop(key, None)

    def _unplace(self, held: Held) -> None:
        if held.source != held.record.node_id:
            self._placed[held.source] -= 1
            if self._placed[held.source] <= 0:
                del self._placed[held.source]

    def _drop(self, held: Held) -> None:
        node_id = held.record.node_id
        if self._held.get(node_id) is not held:
            return
        del self._held[node_id]
        self._unplace(held)
        for key in held.keys:
            self._unlist(key, node_id)

    def expire(self, now: float) -> int:
        """Drop what has ended, and tombstones nobody needs any more; returns how many records ended."""
        ended = 0
        while self._ends and self._ends[0][0] <= now:
            _, node_id = heappop(self._ends)
            held = self._held.get(node_id)
            if held is not None and held.ends <= now:
                self._drop(held)
                ended += 1
        while self._highest:
            node_id, highest = next(iter(self._highest.items()))
            if highest.until > now:
                break
            del self._highest[node_id]
        if len(self._overflowing) > self._config.max_records:
            self._overflowing = {key: until for key, until in self._overflowing.items() if until > now}
        return ended

    def live(self, key: bytes, now: float, *, after: bytes = b"") -> Iterator[Held]:
        """The live records under a key, by rank, beginning after the rank ``after``."""
        listed = self._index.get(key, [])
        start = bisect_right(listed, (after, b"\xff" * 33)) if after else 0
        for at in range(start, len(listed)):
            held = self._held.get(listed[at][1])
            if held is not None and held.ends > now:
                yield held

    def count(self, key: bytes) -> int:
        return len(self._index.get(key, ()))

    def is_full(self, key: bytes, now: float) -> bool:
        """Whether somebody may stand under the sub-keys: there is no room here, or whoever was sent there need not have asked since."""
        return self.count(key) >= self._config.shard_size or self._overflowing.get(key, 0.0) > now

    def keys(self) -> list[bytes]:
        return list(self._index)

    # kademlia's storage interface; its own callers are all replaced

    def __setitem__(self, key: bytes, value: Any) -> None:
        raise TypeError("records are offered, not set")

    def __getitem__(self, key: bytes) -> list[Held]:
        return [self._held[node_id] for _, node_id in self._index[key]]

    def get(self, key: bytes, default: Any = None) -> Any:
        return self[key] if key in self._index else default

    def iter_older_than(self, seconds_old: float) -> Iterator[tuple[bytes, Any]]:
        return iter(())

    def __iter__(self) -> Iterator[tuple[bytes, list[Held]]]:
        return iter([(key, self[key]) for key in self._index])


def name_of(record: Record) -> bytes:
    """A short name for a record: three bytes of the node id, one of boot, one of seq."""
    return record.node_id[8:11] + bytes((record.boot & 0xFF, record.seq & 0xFF))


def tag_of(record: Record) -> bytes:
    """Its name and its pulse, for saying "I have this or a newer one"."""
    return name_of(record) + bytes((record.pulse,))


def covered(tag: bytes, tags: Mapping[bytes, int]) -> bool:
    """Whether an asker with ``tags`` (by their first four bytes, the last two) has this record or a newer one of the same boot."""
    last = tags.get(tag[:4])
    return last is not None and (last - int.from_bytes(tag[4:])) % 65_536 < 32_768


def _has(tags: Mapping[bytes, int], name: bytes) -> bool:
    last = tags.get(name[:4])
    return last is not None and last >> 8 == name[4]


def ends_sooner(former: Record | None, record: Record) -> bool:
    """Whether its owner takes back what it said: a good-bye."""
    return former is not None and record.expires + _EARLIER_S < former.expires


def is_material(former: Record, record: Record) -> bool:
    """Whether a newer record says anything but "still here": what watchers are told at once. An early end is news too."""
    if ends_sooner(former, record):
        return True
    return (former.state, former.boot, former.models, former.addresses, former.capability, former.api) != (
        record.state,
        record.boot,
        record.models,
        record.addresses,
        record.capability,
        record.api,
    )
