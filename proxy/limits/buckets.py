"""Buckets as their owner keeps them: what is left of a limit, who asks for it, who gets how much. Pure: the clock is an argument.

What is granted is debited at once. Together the owners of a bucket never grant more than its limit, because each counts only with the
``fraction`` of it that it holds the shares of (`proxy.limits.shares`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

FORGET_S = 3.0
"""An asker that has been silent for so long wants nothing; a bucket that nobody asks for is gone."""
WHOLE = 1 - 1e-9
AGAIN_S = 1.0
"""What has been handed out may come back, or be within reach again."""
SPARE, SPARE_S = 0.75, 1.0
HALF = 0.5 - 1e-9
ALONE = 0.01
"""Of its part of a budget, what a proxy may use that has lost more than half of the others."""


class Kind(IntEnum):
    """What a limit bounds. The number is the wire value."""

    RATE = 0
    """So much a second, and no more than a burst at once."""
    BUDGET = 1
    """So much in one day or month."""
    SLOTS = 2
    """So many at once."""


@dataclass(slots=True, kw_only=True)
class Ask:
    """What a proxy asks of a bucket's owner.

    ``limit`` and ``burst`` are what it knows of the limit, ``want`` what it could use, ``least`` what is of any use to it, ``demand`` what
    its clients want a second, ``back`` what it returns. Of a budget ``used`` is what it has used in all and ``ends`` (wall-clock seconds)
    when its day or month is over; ``held``, where it is not None, what it has in hand, for an owner that does not know.
    """

    bucket: bytes
    kind: Kind
    limit: float
    burst: float
    want: float = 0.0
    least: float = 0.0
    demand: float = 0.0
    back: float = 0.0
    used: float = 0.0
    held: float | None = None
    ends: float = 0.0


@dataclass(slots=True, kw_only=True)
class Grant:
    """What it gets: ``given`` now, ``left`` with the owner, and in how many seconds ``least`` could be had; 0 of a budget that is spent."""

    bucket: bytes
    given: float
    left: float
    wait_s: float


@dataclass(slots=True, eq=False)
class _Asker:
    limit: float
    burst: float
    demand: float
    at: float
    turn: float = 0.0
    """Of a rate that is wanted by more than it suffices for: what is this asker's by now."""
    out: float = 0.0
    """What it has been granted and has not given back; of a budget, nor used up."""
    used: float = 0.0


def fair_share(supply: float, demands: Iterable[float]) -> float:
    """The share at which those who want less get what they want and the others the same as each other (max-min fairness)."""
    waiting = sorted(demands)
    for number, demand in enumerate(waiting):
        equal = supply / (len(waiting) - number)
        if demand >= equal:
            return equal
        supply -= demand
    return float("inf")


@dataclass(slots=True, eq=False)
class Bucket:
    """One bucket at its owner. ``level`` is what may be granted now; ``at`` when that was so."""

    kind: Kind
    at: float
    level: float = 0.0
    fraction: float = 0.0
    askers: dict[bytes, _Asker] = field(default_factory=dict)
    fresh: bool = True
    full_at: float = 0.0
    """When a rate's bucket will be full again, and so as if nobody had ever asked."""
    ends: float = 0.0

    def ask(self, who: bytes, ask: Ask, *, fraction: float, since: float, used: float, own: bytes, now: float) -> Grant:
        """Take an ask of ``who``. ``since`` is when the fraction may last have grown, ``used`` what all have used of a budget."""
        asker = self.askers.get(who)
        if asker is None:
            asker = self.askers[who] = _Asker(ask.limit, ask.burst, ask.demand, now, used=ask.used)
        back = min(ask.back, asker.out)  # nobody gives back more than it was given
        if self.kind is not Kind.RATE:
            spent = max(0.0, ask.used - asker.used)
            asker.out = max(0.0, asker.out - back - spent) if ask.held is None else ask.held
        asker.limit, asker.burst, asker.demand, asker.used = ask.limit, ask.burst, ask.demand, ask.used
        # What is debited and not yet used is the same for all three; what it is taken from is not.
        judge = self.askers[own] if own in self.askers else min(self.askers.values(), key=lambda one: one.limit)
        limit, burst = judge.limit, judge.burst
        if self.kind is Kind.RATE:
            return self._rate(asker, ask, limit, burst, back, fraction=fraction, since=since, now=now)
        if self.kind is Kind.BUDGET:
            self._budget(limit, fraction=fraction, used=used, back=back)
        else:
            self.level = float(int(limit * fraction + 1e-9) - sum(one.out for one in self.askers.values()))
        self.at = asker.at = now
        self.ends = ask.ends
        for other in [other for other, one in self.askers.items() if one is not asker and not one.out and now - one.at > FORGET_S]:
            del self.askers[other]
        given = 0.0
        if ask.want > 0 and self.level >= ask.least:
            given = min(ask.want, max(ask.least, self.level / len(self.askers)))
            if self.kind is Kind.SLOTS:
                given = float(int(given))
            self.level -= given
            asker.out += given
        spent = self.kind is Kind.BUDGET and fraction >= WHOLE and limit - used < ask.least
        return Grant(bucket=ask.bucket, given=given, left=max(0.0, self.level), wait_s=0.0 if given or spent else AGAIN_S)

    def _rate(
        self, asker: _Asker, ask: Ask, limit: float, burst: float, back: float, *, fraction: float, since: float, now: float
    ) -> Grant:
        cap, rate = burst * fraction, limit * fraction
        passed = max(0.0, now - self.at)
        if self.fresh:  # nobody has been granted anything since this owner could have granted it
            self.level, self.fresh, self.fraction = min(cap, rate * (now - since)), False, fraction
        self.level = min(cap, self.level + back + min(rate, limit * self.fraction) * passed)
        self.at, self.fraction = now, fraction
        for other in [other for other, one in self.askers.items() if one is not asker and now - one.at > FORGET_S]:
            del self.askers[other]
        share = fair_share(rate, (one.demand for one in self.askers.values()))
        asker.turn = min(asker.turn + min(share, rate) * min(1.0, now - asker.at), max(min(share, rate), ask.least))
        asker.at = now
        # What nobody's turn can need goes to whoever asks first, or what is large to who has waited longest, and their turn comes later.
        spare = self.level - min(SPARE * cap, SPARE_S * rate)
        mine = self.level if share == float("inf") else min(self.level, max(asker.turn, spare))
        given = min(ask.want, mine)
        if given < ask.least:
            # What is larger than the bucket may have it when it is full, and leaves a debt that the others wait for as well.
            enough = min(ask.least, cap)
            turn = share == float("inf") or asker.turn >= enough or (spare >= 0 and asker.turn >= self._longest())
            given = ask.least if ask.want > 0 and rate > 0 and turn and self.level >= enough > 0 else 0.0
        self.level -= given
        asker.turn -= given
        asker.out += given - back
        self.full_at = now + (cap - self.level) / rate if rate > 0 else now
        wait_s = 0.0
        if given < ask.least:
            wait_s = max(min(ask.least, cap) - self.level, 0.0) / rate if rate > 0 else 1.0
            if share < rate:
                wait_s = max(wait_s, (min(ask.least, cap) - asker.turn) / share)
        return Grant(bucket=ask.bucket, given=max(0.0, given), left=max(0.0, self.level), wait_s=wait_s)

    def _longest(self) -> float:
        return max(one.turn for one in self.askers.values())

    def _budget(self, limit: float, *, fraction: float, used: float, back: float) -> None:
        """With all shares here, what is left is known. With some, it is their part of what was left when the others were last heard of.

        Less than half of the proxies can be given up by the others, who then use what is left without knowing what these did: so these
        use next to nothing.
        """
        left = limit - used - sum(one.out for one in self.askers.values())
        if fraction >= WHOLE:
            self.level = left
        elif abs(fraction - self.fraction) > 1e-9 or self.fresh:
            part = max(0.0, left) * fraction
            if fraction < HALF:
                part = min(part, limit * fraction * ALONE)
            self.level = part if self.fresh or self.fraction >= WHOLE else min(part, self.level + back)
        else:
            self.level += back
        self.fraction, self.fresh = fraction, False

    def lost(self, who: bytes) -> float:
        """A proxy is out of reach: its requests are over, and whatever it had of a budget may have been used. Returns the most that it may
        have used of one in all."""
        most = self.most(who)
        self.askers.pop(who, None)
        return most

    def most(self, who: bytes) -> float:
        """The most that an asker may have used of a budget in all by the time that it asks again; 0 of one that is not known."""
        asker = self.askers.get(who)
        return asker.used + asker.out if asker is not None and self.kind is Kind.BUDGET else 0.0

    def idle(self, now: float, wall: float) -> bool:
        """Whether the bucket can be forgotten: nobody asks, and one made anew would be the same."""
        if now - self.at <= FORGET_S or now < self.full_at:
            return False
        over = self.kind is Kind.RATE or (self.kind is Kind.BUDGET and wall > self.ends)
        return over or not any(one.out for one in self.askers.values())
