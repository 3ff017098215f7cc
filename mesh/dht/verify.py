"""Is this record what it says, now? Signature, membership, time; each verdict once."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from mesh.claims import CLOCK_SKEW_S, read_int
from mesh.dht.introduction import Introduction, parse_introduction
from mesh.envelope import SIGNATURE_BYTES, parse_payload, signer_of
from mesh.errors import BadSignature, Expired, MalformedEnvelope
from mesh.membership import MembershipCache
from mesh.pulse import NO_PULSE, Pulse, follows
from mesh.records import MAX_LIFETIME_S, MAX_RECORD_BYTES, Record, member_until, parse_record
from mesh.trust import key_id


class Claim(NamedTuple):
    """What a record says of itself, unverified: to choose what is worth verifying, and for nothing else."""

    node_id: bytes
    order: tuple[int, int]
    issued: float
    expires: float


def peek(data: bytes) -> Claim:
    """Read the claim. Raises `MalformedEnvelope`."""
    if len(data) > MAX_RECORD_BYTES:
        raise MalformedEnvelope(f"{len(data)} bytes, more than the {MAX_RECORD_BYTES} allowed")
    signer = signer_of(data)
    payload = parse_payload(data[2 + len(signer) : -SIGNATURE_BYTES])
    return Claim(
        node_id=key_id(signer),
        order=(read_int(payload, "boot"), read_int(payload, "seq")),
        issued=read_int(payload, "iat") / 1000,
        expires=read_int(payload, "exp") / 1000,
    )


@dataclass(slots=True)
class _Known:
    """A good record and its latest good pulse, at first its anchor."""

    record: Record
    pulse: Pulse
    member_until: float = 0.0

    def over(self, now: float) -> bool:
        return now >= self.record.expires + self.pulse.n + CLOCK_SKEW_S

    def check(self, pulse: Pulse, now: float) -> None:
        """Raises `BadSignature` unless its owner made this pulse, `Expired` if it is a member no longer."""
        self.member_until = self.member_until or member_until(self.record)
        if now >= self.member_until + CLOCK_SKEW_S:
            raise Expired("the membership has expired")
        if pulse == self.pulse:
            return
        if not follows(pulse, self.pulse if pulse.n > self.pulse.n else Pulse(0, self.record.anchor)):
            raise BadSignature("the pulse is not this record's")
        if pulse.n > self.pulse.n:
            self.pulse = pulse


class Verifier:
    """Verifies records and remembers good ones by their bytes: those that may still come, and at most ``size`` of them.

    Every node signs a new one each few seconds, so all that were ever good would be megabytes of what nobody sends any more. Fewer than
    there are live nodes, and a proxy would verify each record anew with each reading of its view: 20,000 are some 40 MB.
    """

    def __init__(self, members: MembershipCache, *, size: int = 20_000) -> None:
        self._members = members
        self._size = size
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._introductions: OrderedDict[bytes, Introduction] = OrderedDict()
        self.verified = 0

    def __len__(self) -> int:
        """How many records it remembers."""
        return len(self._known)

    def forget(self) -> None:
        """Drop every verdict: the keyset has changed."""
        self._known.clear()
        self._introductions.clear()

    def introduction(self, data: bytes, *, now: float) -> Introduction:
        """The verified introduction. Raises a `TrustError`."""
        known = self._introductions.get(data)
        if known is not None and now < known.member.expires:
            return known
        introduction = self._introductions[data] = parse_introduction(data, self._members, now=now)
        if len(self._introductions) > self._size:
            self._introductions.popitem(last=False)
        return introduction

    def record(self, data: bytes, claim: Claim, *, now: float, pulse: Pulse = NO_PULSE) -> Record:
        """The verified record. Raises a `TrustError`. With a pulse, which is verified too, it is judged as of so many seconds ago.

        Its owner's clock may be off by `CLOCK_SKEW_S` either way; how long the record counts here is `lifetime_s`, whatever
        ``expires`` says.
        """
        signed_at = now - pulse.n
        if signed_at >= claim.expires + CLOCK_SKEW_S:
            raise Expired("the record has expired")
        known = self._known.get(data)
        if known is None:
            as_of = signed_at if signed_at < claim.expires else signed_at - CLOCK_SKEW_S
            record = parse_record(data, self._members, now=as_of)
            known = _Known(record, Pulse(0, record.anchor))
            self.verified += 1
        if pulse.n:
            known.check(pulse, now)
            self._known.pop(data, None)
        if data not in self._known:
            self._known[data] = known
            while self._known and (len(self._known) > self._size or next(iter(self._known.values())).over(now)):
                self._known.popitem(last=False)
        return known.record


def lifetime_s(claim: Claim, remaining_s: float, *, now: float, pulse_s: int = 0) -> float:
    """How much longer a record counts, on our own clock; not positive if it is over. ``pulse_s`` is what its pulse adds.

    Lifetimes are handed on as what remains, so clocks need not agree: whoever passes a record on says how long it still has.
    That word is bounded by the lifetime its owner signed and by its owner's expiry plus the skew allowed, so no liar can
    stretch it further.
    """
    return min(remaining_s, claim.expires - claim.issued, MAX_LIFETIME_S, claim.expires + pulse_s + CLOCK_SKEW_S - now)
