"""Which worker gets a request. Pure: change the policy here and nowhere else.

What a worker has outstanding is what other proxies gave it, as it pushed that itself a moment ago, plus what this proxy gave it, which
is counted here and always exact. The worker with the least outstanding work for its size wins; ties are broken by chance, so that
many proxies do not all pick the same one.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

KV_PRESSURE_FROM = 0.9
"""Above this share of used KV cache an engine starts to preempt; each percent above counts like one more request in ten."""


class Candidate(Protocol):
    """What the choice looks at. ``elsewhere`` is work given by others, in requests; ``in_flight`` this proxy's own."""

    @property
    def node_id(self) -> bytes: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def elsewhere(self) -> int: ...
    @property
    def kv_use(self) -> float: ...
    @property
    def max_concurrency(self) -> int: ...


C = TypeVar("C", bound=Candidate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a request asks of the choice. ``avoid`` holds the node ids that already failed it."""

    model: str
    avoid: frozenset[bytes] = frozenset()


def cost(candidate: Candidate) -> float:
    """Outstanding requests for each the worker can run at once, and KV pressure on top."""
    outstanding = candidate.in_flight + candidate.elsewhere
    pressure = max(0.0, candidate.kv_use - KV_PRESSURE_FROM) * 10
    return outstanding / max(1, candidate.max_concurrency) + pressure


def choose(candidates: Sequence[C], wish: Wish, rng: random.Random) -> C | None:
    """The candidate with the least cost, or None if none is left."""
    best: list[C] = []
    least = float("inf")
    for candidate in _allowed(candidates, wish):
        value = cost(candidate)
        if value < least:
            best, least = [candidate], value
        elif value == least:
            best.append(candidate)
    if not best:
        return None
    return best[0] if len(best) == 1 else rng.choice(best)


def _allowed(candidates: Sequence[C], wish: Wish) -> Iterable[C]:
    if not wish.avoid:
        return candidates
    return (candidate for candidate in candidates if candidate.node_id not in wish.avoid)
