"""Which workers are trusted with requests. Pure: evidence in, standing out, time as an argument.

What a worker says of itself (its state, its load, that its engine stands still) and what its link shows (silence) are facts, and
`proxy.fleet` acts on them at once. This is about what has to be concluded: that a worker answers, but badly.

Down after evidence: three failed requests in a row, an answer five times slower than the others', a link that comes and goes. Up after
proof: once the hold-off is over, one request at a time is tried, and the first that succeeds ends the matter. Each ejection soon after
another doubles the hold-off. At most half of the workers of a model are ejected and never the last, so that requests which fail
everywhere cannot take the fleet away; what a client did wrong is no evidence at all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum
from statistics import median

FAILURES = 3
"""Failed requests in a row."""
HOLD_FIRST_S = 1.0
HOLD_SLOW_S = 10.0
"""The first hold-off of a slow worker: what slows a machine seldom ends in a second."""
HOLD_MOST_S = 60.0
FORGIVEN_S = 120.0
"""After so long in trust the next ejection counts as the first again."""
FLAPS_ALLOWED = 1
"""Losses of its link or its engine, within `FORGIVEN_S`, that cost no trust: anything may restart."""

SLOW_FACTOR = 5.0
SLOW_SLACK_S = 1.0
"""A first token that is late by less than this is no evidence, however quick the others are."""
RATE_MEMORY_S = 10.0
FIRST_MEMORY_S = 30.0
PAST_MEMORY_S = 600.0
LEAST_STREAM_S = 3.0
"""Seconds of streaming, all streams together, that make a rate evidence."""
LEAST_FIRSTS = 3.0
PROOF_STREAM_S = 2.0
MOST_KNOWN = 10_000
"""Beyond that the good past of workers is forgotten, linked or not; what they do from here on counts again."""


class Standing(StrEnum):
    """``trial``: one request at a time, until one succeeds."""

    TRUSTED = "trusted"
    TRIAL = "trial"
    EJECTED = "ejected"


class Cause(StrEnum):
    """Why a worker stopped getting requests. The last two are facts, not conclusions: they last as long as they hold."""

    FAILURES = "failures"
    SLOW = "slow"
    FLAPPING = "flapping"
    SILENT = "silent"
    STUCK = "stuck"


class Rate:
    """An amount per second, the past fading with ``memory_s``. Adding is cheap, since it is done for every answer; `evidence` reckons."""

    __slots__ = ("_at", "_memory_s", "_new_amount", "_new_seconds", "_old_amount", "_old_seconds")

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._old_amount = self._old_seconds = self._at = 0.0
        self._new_amount = self._new_seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        self._new_amount += amount
        self._new_seconds += seconds

    def evidence(self, now: float) -> float:
        """How much it rests on, in seconds (or samples, where each counts as one)."""
        fade = math.exp(min(0.0, self._at - now) / self._memory_s)
        self._old_amount = self._old_amount * fade + self._new_amount
        self._old_seconds = self._old_seconds * fade + self._new_seconds
        self._new_amount = self._new_seconds = 0.0
        self._at = now
        return self._old_seconds

    @property
    def value(self) -> float:
        """As of the last `evidence`."""
        return self._old_amount / self._old_seconds if self._old_seconds else 0.0


class Health:
    """What is known of one worker, also while it is not linked. ``reason`` is for people; empty in trust."""

    __slots__ = (
        "_flaps",
        "_level",
        "_since",
        "cause",
        "failures",
        "first",
        "past",
        "reason",
        "standing",
        "stream",
        "trials",
        "until",
        "whole",
    )

    def __init__(self) -> None:
        self.standing = Standing.TRUSTED
        self.cause: Cause | None = None
        self.reason = ""
        self.until = 0.0
        self.failures = 0
        self.trials = 0
        self._level = 0
        self._since = -math.inf
        self._flaps: list[float] = []
        self.past = Rate(PAST_MEMORY_S)
        self._begin_measuring()

    def _begin_measuring(self) -> None:
        self.stream = Rate(RATE_MEMORY_S)
        """Bytes a second of each stream that runs."""
        self.whole = Rate(RATE_MEMORY_S)
        """Tokens a second of answers that come as a whole."""
        self.first = Rate(FIRST_MEMORY_S)
        """Seconds from a slot at the engine to the first byte; each sample counts as one."""

    @property
    def in_service(self) -> bool:
        """Whether the next request may go there."""
        return self.standing is Standing.TRUSTED or (self.standing is Standing.TRIAL and not self.trials)

    def eject(self, cause: Cause, reason: str, *, now: float) -> None:
        if now - self._since > FORGIVEN_S and self.standing is Standing.TRUSTED:
            self._level = 0
        first_s = HOLD_SLOW_S if cause is Cause.SLOW else HOLD_FIRST_S
        self.until = now + min(HOLD_MOST_S, first_s * 2.0**self._level)
        self._level = min(self._level + 1, 16)
        self.standing, self.cause, self.reason, self.failures = Standing.EJECTED, cause, reason, 0

    def trust(self, *, now: float) -> None:
        self.standing, self.cause, self.reason, self.failures = Standing.TRUSTED, None, "", 0
        self._since = now

    def due(self, now: float) -> bool:
        """Its hold-off is over: it is on trial from here on."""
        if self.standing is not Standing.EJECTED or now < self.until:
            return False
        self.standing = Standing.TRIAL
        self._begin_measuring()
        return True

    def lost(self, now: float) -> int:
        """Its link or its engine went away; how often that happened lately."""
        self._flaps = [at for at in self._flaps if now - at < FORGIVEN_S] + [now]
        return len(self._flaps)


class Watch:
    """The health of all workers. ``ejections`` counts by cause. Methods that may change a standing return whether they did."""

    def __init__(self) -> None:
        self.ejections: Counter[Cause] = Counter()
        self._known: dict[bytes, Health] = {}

    def of(self, node_id: bytes) -> Health:
        health = self._known.get(node_id)
        if health is None:
            if len(self._known) >= MOST_KNOWN:
                self._known = {node: known for node, known in self._known.items() if known.standing is not Standing.TRUSTED}
            health = self._known[node_id] = Health()
        return health

    # -- evidence

    def succeeded(self, health: Health, *, now: float) -> bool:
        """A request was answered. One that is on trial for being slow has to be quick as well: `judge` says."""
        health.failures = 0
        if health.standing is not Standing.TRIAL or health.cause is Cause.SLOW:
            return False
        health.trust(now=now)
        return True

    def failed(self, health: Health, why: str, group: Sequence[Health], *, now: float) -> bool:
        """A request failed for no fault of its own. ``group``: the workers of the same model, this one among them."""
        health.failures += 1
        if health.standing is Standing.TRIAL:
            self._eject(health, Cause.FAILURES, f"failed on trial: {why}", now)
            return True
        if health.standing is Standing.EJECTED or health.failures < FAILURES or not may_eject(health, group):
            return False
        self._eject(health, Cause.FAILURES, f"{health.failures} failures in a row, the last: {why}", now)
        return True

    def lost(self, health: Health, *, now: float) -> bool:
        """Its link or its engine went away without having said so. Not capped: it is gone in any case."""
        times = health.lost(now)
        if times <= FLAPS_ALLOWED:
            return False
        self._eject(health, Cause.FLAPPING, f"went away {times} times within {FORGIVEN_S:.0f} s", now)
        return True

    def judge(self, group: Sequence[Health], *, now: float) -> bool:
        """Compare the workers of a model with each other, or one with its own past where no other has been busy."""
        changed = False
        for health in group:
            if health.standing is Standing.EJECTED:
                continue
            others = [other for other in group if other is not health]
            slower = _slower(health, others, now)
            on_trial = health.standing is Standing.TRIAL
            if slower >= SLOW_FACTOR and (on_trial or may_eject(health, group)):
                self._eject(health, Cause.SLOW, f"{slower:.0f} times slower than usual", now)
                changed = True
            elif on_trial and health.cause is Cause.SLOW and _has_proof(health, now):
                health.trust(now=now)
                changed = True
            elif health.stream.evidence(now) >= LEAST_STREAM_S:
                health.past.add(health.stream.value, 1.0)
        return changed

    def tick(self, healths: Iterable[Health], *, now: float) -> bool:
        """Let those whose hold-off is over be tried."""
        return any([health.due(now) for health in healths])

    def _eject(self, health: Health, cause: Cause, reason: str, now: float) -> None:
        health.eject(cause, reason, now=now)
        self.ejections[cause] += 1


def may_eject(health: Health, group: Sequence[Health]) -> bool:
    """At most half of a model's workers, and never the last."""
    out = sum(other.standing is not Standing.TRUSTED for other in group if other is not health)
    return out + 1 <= len(group) // 2


def _has_proof(health: Health, now: float) -> bool:
    return (
        health.stream.evidence(now) >= PROOF_STREAM_S
        or (health.whole.value > 0 and health.whole.evidence(now) > 0)
        or health.first.evidence(now) >= 1
    )


def _slower(health: Health, others: Sequence[Health], now: float) -> float:
    """How many times slower it is; 0 where nothing can be said."""
    on_trial = health.standing is Standing.TRIAL
    found = 0.0
    for name in ("stream", "whole"):
        own: Rate = getattr(health, name)
        if own.evidence(now) < (PROOF_STREAM_S if on_trial else LEAST_STREAM_S):
            continue
        usual = _usual([getattr(other, name) for other in others], LEAST_STREAM_S, now)
        if usual == 0.0 and name == "stream" and health.past.evidence(now) >= 1:
            usual = health.past.value
        if usual:
            found = max(found, usual / own.value if own.value else math.inf)
    if health.first.evidence(now) >= (0.5 if on_trial else LEAST_FIRSTS):
        usual = _usual([other.first for other in others], LEAST_FIRSTS, now)
        if usual and health.first.value > usual + SLOW_SLACK_S:
            found = max(found, health.first.value / usual)
    return min(found, 999.0)


def _usual(rates: Sequence[Rate], least: float, now: float) -> float:
    """The median of those that rest on enough; 0 where none does."""
    values = [rate.value for rate in rates if rate.evidence(now) >= least]
    return median(values) if values else 0.0
