"""Whose word counts for which part of a limit, so that all proxies together never allow more than the whole. Pure: time is an argument.

Every proxy that counts has one equal share of every limit. It lends its share of a bucket to the bucket's *owner*, the proxy that comes
first for it by rendezvous hashing among those that are linked and serve; the owner hands out tokens from all the shares that it has been
lent. A loan is renewed with every beat and ends by itself, so an owner that dies holds nobody's share for long, and a proxy that is cut off
has its own share and no more.

Two rules make the sum come out. *A share is in one place at a time*: when a proxy believes in a new owner, the old one must have said that
it knows, or its loan must have ended, before the new one may use the share. *Whoever counts is counted*: a newcomer has no share before all
the proxies it knows of count it, and one that goes without a good-bye is counted on until more than half of those that it counted have
missed it for so long that it, missing them, has given up its share by itself.

Identities are the first 8 bytes of node ids. Times are monotonic seconds of this process; stamps on the wire are its milliseconds, and only
ever come back to where they were made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mesh.claims import read_bool, read_bytes, read_int

BEAT_S = 0.5
LOAN_S = 3.0
"""A loan ends so long after the beat that renewed it. Clocks may run apart by `DRIFT` in that time."""
DRIFT = 1.01
SILENT_S = 20.0
"""A proxy that has had no word with half of the others for so long gives up its share…"""
MISSED_S = 25.0
"""…and one that more than half have missed for so long is no longer counted."""
MET_S = 60.0
"""A newcomer waits so long for a proxy that it has met and that is out of reach."""
TURN_S = 10.0
MAX_PROXIES = 1_024
ID_BYTES = 8

Ids = tuple[bytes, ...]


def rank(bucket: bytes, members: Iterable[bytes]) -> list[bytes]:
    """Members by their claim to a bucket, the owner first and its heir second (highest random weight, Thaler and Ravishankar 1998)."""
    return sorted(members, key=lambda member: hashlib.blake2b(member + bucket, digest_size=8).digest(), reverse=True)


@dataclass(slots=True, eq=False)
class _Peer:
    """Another proxy, as it last spoke. ``lent_until`` is when its loan to this one ends."""

    linked: bool = False
    linked_at: float = float("-inf")
    serving: bool = False
    beating: bool = False
    heard_at: float = float("-inf")
    stamp: int = 0
    echoed_at: float = float("-inf")
    sent_at: float = float("-inf")
    sent_version: int = 0
    acked: int = 0
    told: int = 0
    """The newest version that it has ever acked."""
    version: int = 0
    wants: bool = False
    sure: bool = False
    leaving: bool = False
    lends: bool = False
    lent_until: float = float("-inf")
    members: Ids = ()
    former: Ids = ()
    held: frozenset[bytes] = frozenset()
    counted: frozenset[bytes] = frozenset()
    missed: frozenset[bytes] = frozenset()

    @property
    def reached_at(self) -> float:
        """When this proxy certainly reached it for the last time; of one that has only just been met, when it was met."""
        return self.echoed_at if self.echoed_at >= 0 else self.linked_at


@dataclass(slots=True, eq=False)
class Shares:
    """One proxy's view. `beat` and `on_beat` are what proxies say to each other; `tick` lets time pass.

    ``since`` is when a fraction may last have grown.
    """

    me: bytes
    now: float
    serving: bool = True
    looked: bool = False
    """The directory has been asked who else there is."""
    peers: dict[bytes, _Peer] = field(default_factory=dict)
    listed: frozenset[bytes] = frozenset()
    """Proxies that the directory lists: a newcomer waits for them."""
    counted: frozenset[bytes] = frozenset()
    entitled: bool = False
    since: float = 0.0
    members: Ids = ()
    _former: Ids = ()
    _held: frozenset[bytes] = frozenset()
    _lapses: dict[bytes, float] = field(default_factory=dict)
    _history: list[tuple[int, frozenset[bytes]]] = field(default_factory=list)
    """Whom this proxy counted, by the version since which it did, as far back as somebody may still believe."""
    _unsure: dict[bytes, float] = field(default_factory=dict)
    _counted_version: int = 1
    _wants: bool = False
    _wanted_version: int = 0
    _version: int = 1
    _members_version: int = 1
    _missed: frozenset[bytes] = frozenset()
    _lenders: frozenset[bytes] = frozenset()
    _stopped_at: float = float("-inf")
    _stopped_version: int = 0
    _ready_at: float = 0.0
    _ticked_at: float = 0.0
    _owners: dict[bytes, tuple[bytes, bytes]] = field(default_factory=dict)
    _elsewhere: dict[tuple[Ids, bytes], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.members = (self.me,)
        self.counted = frozenset({self.me})
        self._history.append((self._version, self.counted))
        self.since = self._ready_at = self._ticked_at = self.now

    # -- who is there

    def up(self, peer: bytes, now: float, *, serving: bool) -> None:
        """A link to a proxy came up. What it said before counts no more; when it was last spoken to does."""
        new = _Peer(linked=True, linked_at=now, serving=serving)
        if (old := self.peers.get(peer)) is not None:
            new.heard_at, new.echoed_at, new.sent_at = old.heard_at, old.echoed_at, old.sent_at
            new.counted, new.told = old.counted, old.told
        self.peers[peer] = new

    def serves(self, peer: bytes, serving: bool) -> None:
        known = self.peers.get(peer)
        if known is not None:
            known.serving = serving

    def down(self, peer: bytes) -> None:
        known = self.peers.get(peer)
        if known is not None:
            known.linked = known.beating = False

    def leave(self, now: float) -> None:
        """This proxy is about to stop: it owns nothing and lends nothing from now on, and is not counted once everybody knows."""
        self.serving = self.looked = False
        self._give_up(now)

    # -- owners and fractions

    def owner(self, bucket: bytes) -> bytes:
        """Whom to ask for a bucket."""
        return self._first_two(bucket)[0]

    def heir(self, bucket: bytes) -> bytes:
        """Who would be the owner if the owner were gone; the owner itself where there is nobody else."""
        return self._first_two(bucket)[1]

    def fraction(self, bucket: bytes, now: float) -> float:
        """How much of a bucket's limit this proxy may hand out: the sum of the shares that are here, its own and those lent to it."""
        whole = 0.0
        if self.entitled and now - self._ticked_at <= LOAN_S and self._mine(bucket, now):
            whole = 1 / len(self.counted)
        for peer in self.peers.values():
            if now < peer.lent_until and peer.lends and peer.counted and self._lent(peer, bucket):
                whole += 1 / len(peer.counted)
        return min(1.0, whole)

    def _mine(self, bucket: bytes, now: float) -> bool:
        """Whether this proxy's own share of the bucket is its own to use."""
        if self.owner(bucket) != self.me:
            return False
        before = self._owner_in(self._former, bucket) if self._former else self.me
        return before == self.me or before not in self._held or now >= self._lapses[before]

    def _lent(self, peer: _Peer, bucket: bytes) -> bool:
        """Whether a peer's share of the bucket has been lent to this proxy."""
        if peer.members == self.members and not peer.former:
            return self.owner(bucket) == self.me
        if self._owner_in(peer.members, bucket) != self.me:
            return False
        before = self._owner_in(peer.former, bucket) if peer.former else self.me
        return before == self.me or before not in peer.held

    def _owner_in(self, members: Ids, bucket: bytes) -> bytes:
        if members == self.members:
            return self.owner(bucket)
        found = self._elsewhere.get((members, bucket))
        if found is None:
            if len(self._elsewhere) > 65_536:
                self._elsewhere.clear()
            found = self._elsewhere[members, bucket] = rank(bucket, members)[0] if members else b""
        return found

    def _first_two(self, bucket: bytes) -> tuple[bytes, bytes]:
        found = self._owners.get(bucket)
        if found is None:
            if len(self._owners) > 65_536:
                self._owners.clear()
            ranked = rank(bucket, self.members)
            found = self._owners[bucket] = ranked[0], ranked[1 % len(ranked)]
        return found

    # -- what proxies tell each other

    def beat(self, peer: bytes, now: float) -> dict[str, Any]:
        """What to tell a linked proxy now. Lists go along only where they have changed since the last time."""
        known = self.peers[peer]
        fields: dict[str, Any] = {
            "t": int(now * 1000),
            "echo": known.stamp,
            "v": self._version,
            "ack": known.version,
            "want": self._wants,
            "bye": not self.serving,
            "lend": self.entitled,
            "sure": not self._unsure,
        }
        if known.sent_version != self._version:
            fields |= {"of": b"".join(self.members), "all": b"".join(sorted(self.counted)), "gone": b"".join(sorted(self._missed))}
            if self._former:
                fields |= {"was": b"".join(self._former), "held": b"".join(sorted(self._held))}
            known.sent_version = self._version
        known.sent_at = now
        return fields

    @property
    def share(self) -> float:
        """Its own part of every limit."""
        return 1 / len(self.counted) if self.entitled else 0.0

    @property
    def missed(self) -> frozenset[bytes]:
        """Those that count and have not been heard of for `MISSED_S`."""
        return self._missed

    @property
    def version(self) -> int:
        """Of what `beat` tells."""
        return self._version

    def on_beat(self, peer: bytes, fields: Mapping[str, Any], now: float) -> bool:
        """Take what a linked proxy says; True if it waits to hear that it was heard. Raises `MalformedEnvelope`."""
        known = self.peers[peer]
        stamp, echo = read_int(fields, "t"), read_int(fields, "echo")
        version, acked = read_int(fields, "v"), read_int(fields, "ack")
        wants, lends, sure = read_bool(fields, "want"), read_bool(fields, "lend"), read_bool(fields, "sure")
        if now - self._ticked_at > LOAN_S:
            self._reach(now)  # this process stood still: what it hears now does not undo that it was out of reach
        before = (known.lends, known.version, now < known.lent_until)
        self.now = max(self.now, now)
        if "of" in fields:
            known.members, known.counted, known.missed = (
                _ids(fields, "of"),
                frozenset(_ids(fields, "all")),
                frozenset(_ids(fields, "gone")),
            )
            known.former = _ids(fields, "was") if "was" in fields else ()
            known.held = frozenset(_ids(fields, "held")) if "was" in fields else frozenset()
            known.version = version
        known.beating, known.heard_at, known.stamp = True, now, stamp
        known.acked = max(known.acked, min(acked, self._version))
        known.told = max(known.told, known.acked)
        known.wants, known.lends, known.sure, known.leaving = wants, lends, sure, read_bool(fields, "bye")
        # A loan is counted from a moment that was certainly before the lender sent it: when this process sent what the lender echoes.
        if 0 < echo <= int(now * 1000):
            known.echoed_at = max(known.echoed_at, echo / 1000)
            known.lent_until = known.echoed_at + LOAN_S if version == known.version else float("-inf")
        if before != (known.lends, known.version, now < known.lent_until):
            self._changed(now)
        self._count(peer, known, now)
        self._settle(now)
        self._assure(now)
        return "of" in fields

    def _count(self, peer: bytes, known: _Peer, now: float) -> None:
        """Whoever wants to be counted is; whoever says good-bye is not."""
        if known.wants and peer not in self.counted and len(self.counted) < MAX_PROXIES:
            # Until all that were lent a larger share of less have heard, the newcomer cannot be sure of being counted.
            self._recount(self.counted | {peer}, now)
            self._counted_version = self._version
            self._unsure = {other: one.sent_at + LOAN_S * DRIFT for other, one in self.peers.items()}
        elif not known.wants and peer in self.counted:
            self._recount(self.counted - {peer}, now)

    def _recount(self, counted: frozenset[bytes], now: float) -> None:
        self.counted = counted
        self._bump()
        self._history.append((self._version, counted))
        self._changed(now)

    # -- as time passes

    def tick(self, now: float) -> bool:
        """Once every `BEAT_S` or so. True if who owns what has changed: what owners must know is to be told before the next beat."""
        stood_still, self.now, self._ticked_at = now - self._ticked_at > LOAN_S, now, now
        lenders = frozenset(peer for peer, known in self.peers.items() if known.lends and now < known.lent_until)
        if not lenders <= self._lenders:
            self._changed(now)
        self._lenders = lenders
        self._settle(now)
        self._assure(now)
        self._reach(now)
        if not stood_still:  # else what the others said meanwhile is still to be read
            self._miss(now)
        self._enter(now)
        kept = self.counted.union(self.members, self._lapses)
        self.peers = {peer: known for peer, known in self.peers.items() if known.linked or peer in kept or now - known.sent_at < MET_S}
        return self._regroup(now)

    def _regroup(self, now: float) -> bool:
        """Believe in other owners, one change at a time."""
        wish = {peer for peer, known in self.peers.items() if known.linked and known.beating and known.serving}
        if self.serving or not wish:
            wish.add(self.me)
        members = tuple(sorted(wish))
        if members == self.members or self._former:
            return False
        self._bump()
        self._members_version = self._version
        self._lapses = {peer: known.sent_at + LOAN_S * DRIFT for peer, known in self.peers.items() if peer in self.members}
        self._held = frozenset(peer for peer, end in self._lapses.items() if now < end)
        self._former = self.members if self._held else ()
        self.members = members
        self._owners.clear()
        self._elsewhere.clear()
        self._changed(now)
        return True

    def _settle(self, now: float) -> None:
        """Former owners that know, or whose loan has ended, hold nothing any more."""
        if not self._former:
            return
        held = frozenset(peer for peer in self._held if now < self._lapses[peer] and not self._knows(peer, self._members_version))
        if held != self._held:
            self._held = held
            self._former = self._former if held else ()
            self._bump()
            self._changed(now)

    def _assure(self, now: float) -> None:
        if self._unsure:
            self._unsure = {peer: end for peer, end in self._unsure.items() if now < end and not self._knows(peer, self._counted_version)}

    def _knows(self, peer: bytes, version: int) -> bool:
        """Whether a peer has heard what was so at a version."""
        known = self.peers.get(peer)
        return known is not None and known.acked >= version

    def _give_up(self, now: float) -> None:
        """The share is void and lent to nobody; it is counted on until nobody can believe otherwise."""
        if self.entitled:
            self._stopped_at = now
        self.entitled = False
        self._bump()
        self._stopped_version = self._version
        self._changed(now)

    def _reach(self, now: float) -> None:
        """Give up the share where more than half of the others are out of reach: of those counted now, and of those that somebody who is
        out of reach may think are counted, since they judge by that."""
        near = {peer for peer, known in self.peers.items() if now - known.reached_at < SILENT_S} | {self.me}
        told = min((self.peers[peer].told for peer in self.counted - {self.me}), default=self._version)
        while len(self._history) > 1 and self._history[1][0] <= told:
            self._history.pop(0)
        if self.entitled and any(2 * len(near & counted) < len(counted) for _, counted in self._history):
            self._give_up(now)

    def _miss(self, now: float) -> None:
        """Stop counting those that more than half of the proxies they counted have missed: they have given up their share."""
        missed = frozenset(peer for peer in self.counted - {self.me} if now - self.peers[peer].heard_at >= MISSED_S)
        if missed != self._missed:
            self._missed = missed
            self._bump()
        for peer in missed:
            theirs = self.peers[peer].counted
            judges = [other for other in theirs - {peer} if other == self.me or peer in self._told_missed(other)]
            if 2 * len(judges) > len(theirs):
                self._missed -= {peer}
                self._recount(self.counted - {peer}, now)

    def _told_missed(self, peer: bytes) -> frozenset[bytes]:
        known = self.peers.get(peer)
        return known.missed if known is not None and known.linked else frozenset()

    def _enter(self, now: float) -> None:
        """A newcomer counts itself in once everybody it knows of is within reach, and has its share once all of them count it."""
        if self.entitled:
            return
        linked = {peer: known for peer, known in self.peers.items() if known.linked}
        if self._wants and (self._stopped_version or not self.counted - {self.me} <= set(linked)):
            told = all(known.acked >= self._stopped_version for known in linked.values())
            if told or now >= self._stopped_at + LOAN_S * DRIFT:
                self._wants, self._stopped_version = False, 0
                self._bump()
            return
        if not self.looked:
            return
        if not self._wants:
            if any(not known.beating and now - known.linked_at < LOAN_S for known in linked.values()):
                return  # it may have a lot to say
            others = frozenset(peer for peer, known in linked.items() if known.wants)
            met = {peer for peer, known in self.peers.items() if not known.leaving and now - known.heard_at < MET_S}
            known_of = self.listed.union(others, met, *(linked[peer].counted for peer in others)) - {self.me}
            if not known_of <= {peer for peer, known in linked.items() if known.beating}:
                self._ready_at = now
                return
            # Of several newcomers one goes first, so that the next is counted by it and not each by itself.
            if now - self._ready_at < TURN_S and any(
                peer < self.me and not known.wants and not known.leaving for peer, known in linked.items()
            ):
                return
            self._wants, self._stopped_version = True, 0
            self._recount(others | {self.me}, now)
            self._wanted_version = self._version
        others = self.counted - {self.me}
        if all(self._counts_me(peer) and self.peers[peer].counted <= self.counted for peer in others):
            self.entitled = True
            self._changed(now)

    def _counts_me(self, peer: bytes) -> bool:
        known = self.peers[peer]
        return known.sure and self.me in known.counted and self._knows(peer, self._wanted_version)

    def _bump(self) -> None:
        self._version += 1

    def _changed(self, now: float) -> None:
        self.since = max(self.since, now)


def _ids(fields: Mapping[str, Any], name: str) -> Ids:
    joined = read_bytes(fields, name, max_len=MAX_PROXIES * ID_BYTES)
    return tuple(joined[at : at + ID_BYTES] for at in range(0, len(joined) - ID_BYTES + 1, ID_BYTES))
