"""Which worker gets a request. Pure: change the policy here and nowhere else.

The cost of a worker is the prefill work, in tokens, that stands between the request and its first token there::

    (prompt tokens not in its cache  +  prefill tokens queued ahead) × how slow it is  +  requests outstanding, for its size  +  KV pressure

What a worker has outstanding is what other proxies gave it, as it pushed that itself a moment ago, plus what this proxy gave it, which
is counted here and always exact. Ties go to the worker that a session hashes to, else by chance, so that many proxies do not all pick
the same one. A prefix or a session attracts only as long as its worker is not crowded: a hot prefix spreads before it queues.

With many candidates only some are looked at: those that hold most of the prompt, the session's own, and a few at random. The best of a few
is nearly as good as the best of all, and proxies that decide on the same slightly old loads do not herd.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from heapq import nlargest
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

LOOKED_AT = 16
"""Up to so many candidates are all looked at; of more, the `BEST_HOLDERS`, the session's own, and `SAMPLED` others."""
BEST_HOLDERS = 8
SAMPLED = 8

FULL_TOKENS = 65_536
"""What a worker's whole concurrency in use costs, in tokens of prefill: at 500 requests, 131 tokens for each."""
KV_PRESSURE_FROM = 0.9
"""Above this share of used KV cache an engine starts to preempt; at 1.0 that counts like twice the worker's concurrency in use."""
KV_PRESSURE_TOKENS = 2 * FULL_TOKENS
CROWDED_FACTOR, CROWDED_SLACK = 2.0, 4
"""Bounded load: above ``factor`` × the mean outstanding requests + ``slack``, what a worker has cached no longer attracts."""
SLOWER = 1.5
"""A worker that computes prompts so much slower than the fastest pays for it. Less is chance, and ties are worth keeping."""
SESSION_TOKENS = 256
"""How many tokens of extra work a session's own worker is worth: two blocks, since what it has computed is known exactly."""


class Candidate(Protocol):
    """What the choice looks at. ``elsewhere`` is work given by others, in requests; ``in_flight`` this proxy's own.

    ``rank`` is the node's number for rendezvous hashing, 64 bits; ``rate`` its prefill in tokens/s, 0 if it is not known.
    """

    @property
    def node_id(self) -> bytes: ...
    @property
    def rank(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def elsewhere(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def kv_use(self) -> float: ...
    @property
    def max_concurrency(self) -> int: ...

    def queued_tokens(self, now: float) -> float:
        """Prefill still to be done there, whoever gave it."""
        ...


C = TypeVar("C", bound=Candidate)

NONE_CACHED: Mapping[Any, int] = {}


class Wish(NamedTuple):
    """What a request asks of the choice. ``avoid`` holds the node ids that already failed it.

    ``tokens`` is the prompt's estimated length, 0 for one too short to matter; ``cached`` how much of it each candidate holds, in tokens:
    its keys must be among the candidates. ``session`` is 64 bits that a session always hashes to, 0 for none; ``now`` is monotonic
    seconds; ``turn`` counts requests.
    """

    model: str
    avoid: frozenset[bytes] = frozenset()
    tokens: int = 0
    cached: Mapping[Any, int] = NONE_CACHED
    now: float = 0.0
    session: int = 0
    turn: int = 0


class Choice(NamedTuple, Generic[C]):
    """The chosen worker, and why: one word of `REASONS`, how many tokens it has cached, what it costs, and from how many."""

    worker: C
    reason: str
    cached: int = 0
    cost: float = 0.0
    of: int = 1


REASONS = ("only", "prefix", "session", "load", "spread", "turn", "hash")
"""``only`` candidate left; most of the ``prefix``; the ``session``'s own; least ``load``; ``spread`` away from a crowded or queueing
holder of the prefix; its ``turn``; by its ``hash``."""

Policy = Callable[[Sequence[C], Wish, random.Random], "Choice[C] | None"]


def choose(candidates: Sequence[C], wish: Wish, rng: random.Random) -> Choice[C] | None:
    """The candidate with the least cost, or None if none is left."""
    pool = _pool(candidates, wish, rng)
    if not pool:
        return None
    if len(pool) == 1:
        return Choice(pool[0], "only", wish.cached.get(pool[0], 0))
    cached, tokens, session, now = wish.cached, wish.tokens, wish.session, wish.now
    fastest = max(candidate.rate for candidate in pool)
    crowded_from = _crowded_from(pool) if cached or session else 0.0
    own = max(pool, key=lambda candidate: _affinity(candidate, session)) if session else None
    best: list[C] = []
    least = float("inf")
    for candidate in pool:
        outstanding = candidate.in_flight + candidate.elsewhere
        work = candidate.queued_tokens(now) + tokens
        if outstanding <= crowded_from:
            work -= cached.get(candidate, 0)
            if candidate is own:
                work -= SESSION_TOKENS
        if work > 0 and candidate.rate * SLOWER < fastest and candidate.rate:
            work *= fastest / candidate.rate
        value = work + outstanding * FULL_TOKENS / (candidate.max_concurrency or 1)
        if candidate.kv_use > KV_PRESSURE_FROM:
            value += (candidate.kv_use - KV_PRESSURE_FROM) / (1 - KV_PRESSURE_FROM) * KV_PRESSURE_TOKENS
        if value < least:
            best, least = [candidate], value
        elif value == least:
            best.append(candidate)
    winner = own if own in best else best[0] if len(best) == 1 else best[int(rng.random() * len(best))]
    assert winner is not None
    held = cached.get(winner, 0)
    return Choice(winner, _reason(winner, own, held, cached), held, least, len(candidates))


def least_loaded(candidates: Sequence[C], wish: Wish, rng: random.Random) -> Choice[C] | None:
    """The one with the least to do, whatever it has cached."""
    return choose(candidates, wish._replace(cached=NONE_CACHED, session=0), rng)


def power_of_two(candidates: Sequence[C], wish: Wish, rng: random.Random) -> Choice[C] | None:
    """The less loaded of two at random."""
    left = _allowed(candidates, wish)
    return least_loaded(rng.sample(left, 2) if len(left) > 2 else left, wish, rng)


def round_robin(candidates: Sequence[C], wish: Wish, rng: random.Random) -> Choice[C] | None:
    """Each in turn."""
    left = _allowed(candidates, wish)
    return Choice(left[wish.turn % len(left)], "turn", of=len(left)) if left else None


def consistent_hash(candidates: Sequence[C], wish: Wish, rng: random.Random) -> Choice[C] | None:
    """The one a session hashes to, or the next in its order if that one is crowded; without a session, the least loaded."""
    if not wish.session:
        return least_loaded(candidates, wish, rng)
    left = _allowed(candidates, wish)
    if not left:
        return None
    bound = _crowded_from(left)
    quiet = [candidate for candidate in left if candidate.in_flight + candidate.elsewhere <= bound]
    return Choice(max(quiet or left, key=lambda candidate: _affinity(candidate, wish.session)), "hash", of=len(left))


POLICIES: Mapping[str, Policy[Any]] = {
    "prefix": choose,
    "least-loaded": least_loaded,
    "power-of-two": power_of_two,
    "round-robin": round_robin,
    "consistent-hash": consistent_hash,
}


def _allowed(candidates: Sequence[C], wish: Wish) -> Sequence[C]:
    if not wish.avoid:
        return candidates
    return [candidate for candidate in candidates if candidate.node_id not in wish.avoid]


def _pool(candidates: Sequence[C], wish: Wish, rng: random.Random) -> Sequence[C]:
    """Who is looked at. Distinct."""
    left = _allowed(candidates, wish)
    if len(left) <= LOOKED_AT:
        return left
    picked = {left[int(rng.random() * len(left))]: None for _ in range(SAMPLED)}
    if wish.cached:
        holders = nlargest(BEST_HOLDERS, wish.cached.items(), key=lambda item: item[1])
        picked.update({candidate: None for candidate, _ in holders if candidate.node_id not in wish.avoid})
    if wish.session:
        picked[max(left, key=lambda candidate: _affinity(candidate, wish.session))] = None
    return list(picked)


def _crowded_from(pool: Sequence[C]) -> float:
    outstanding = sum(candidate.in_flight + candidate.elsewhere for candidate in pool)
    return CROWDED_FACTOR * outstanding / len(pool) + CROWDED_SLACK


def _affinity(candidate: Candidate, session: int) -> int:
    """Rendezvous hashing: the candidate with the highest number is the session's own, on every proxy (SplitMix64's finalizer)."""
    mixed = (candidate.rank ^ session) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    return ((mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF) >> 16


def _reason(winner: C, own: C | None, held: int, cached: Mapping[Any, int]) -> str:
    if cached and held < max(cached.values()):
        return "spread"
    if held:
        return "prefix"
    return "session" if winner is own else "load"
