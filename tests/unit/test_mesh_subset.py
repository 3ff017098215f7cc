"""The subset rule: deterministic, balanced, stable."""

from __future__ import annotations

import random
from collections import Counter

from mesh.subset import MIN_COPIES, copies_for, subset


def ids(prefix: str, count: int) -> list[bytes]:
    rng = random.Random(prefix)
    return [rng.randbytes(32) for _ in range(count)]


WORKERS, PROXIES = ids("worker", 4_000), ids("proxy", 16)


def links(workers: list[bytes], proxies: list[bytes], size: int) -> dict[bytes, set[bytes]]:
    return {proxy: set(subset(workers, proxy, proxies, size=size)) for proxy in proxies}


def test_few_workers_are_linked_by_all() -> None:
    few = WORKERS[:100]
    assert all(chosen == set(few) for chosen in links(few, PROXIES, 500).values())


def test_every_worker_has_the_same_number_of_proxies_and_at_least_three() -> None:
    chosen = links(WORKERS, PROXIES, 500)
    covered = Counter(worker for workers in chosen.values() for worker in workers)
    assert set(covered) == set(WORKERS)
    assert set(covered.values()) == {MIN_COPIES}


def test_proxies_carry_about_the_same() -> None:
    sizes = [len(workers) for workers in links(WORKERS, PROXIES, 1_000).values()]
    assert max(sizes) < 1.15 * min(sizes)


def test_the_order_in_which_a_proxy_learns_of_things_does_not_matter() -> None:
    shuffled_workers, shuffled_proxies = list(WORKERS), list(PROXIES)
    random.Random(1).shuffle(shuffled_workers)
    random.Random(2).shuffle(shuffled_proxies)
    one = subset(WORKERS, PROXIES[0], PROXIES, size=500)
    shuffled_proxies.remove(PROXIES[0])
    other = subset(shuffled_workers, PROXIES[0], shuffled_proxies, size=500)
    assert set(one) == set(other)


def test_a_worker_that_leaves_moves_nobody_else() -> None:
    before = links(WORKERS, PROXIES, 500)
    after = links(WORKERS[1:], PROXIES, 500)
    assert all(after[proxy] == before[proxy] - {WORKERS[0]} for proxy in PROXIES)


def test_a_proxy_that_leaves_moves_only_its_share() -> None:
    before, after = links(WORKERS, PROXIES, 500), links(WORKERS, PROXIES[1:], 500)
    for proxy in PROXIES[1:]:
        assert before[proxy] <= after[proxy]
    moved = sum(len(after[proxy] - before[proxy]) for proxy in PROXIES[1:])
    assert moved == len(before[PROXIES[0]])


def test_copies_follow_from_sizes() -> None:
    assert copies_for(0, 8, size=100) == 8
    assert copies_for(100, 8, size=100) == 8
    assert copies_for(10_000, 8, size=5_000) == 4
    assert copies_for(10_000, 8, size=10) == MIN_COPIES
    assert copies_for(10_000, 2, size=10) == 2
