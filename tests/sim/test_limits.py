"""Limits over several proxies at three times what is allowed, skewed; with deaths and partitions; budgets and slots that are shared."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mesh.documents import Document
from mesh.limits import Limit, Limits, encode_limits
from tests.support.limits import Floor, Seat, call_of, key_of, most_in_window, zipf
from tests.support.virtual_time import VirtualLoop, run_virtual

RPS = 40.0
WINDOW_S = 60.0
WARM_S = 10.0


def owner_of(floor: Floor) -> Seat:
    """Who keeps the count of the one limit there is."""
    bucket = next(iter(floor.seats[0].limiter._stashes))
    first = floor.seats[0].limiter.shares.owner(bucket)
    return next(seat for seat in floor.seats if seat.node_id[:8] == first)


def shared(limit: Limit) -> Document:
    body = encode_limits(Limits(whole=limit))
    return Document(kind="limits", name="project:p", seq=1, previous=b"", issued=0.0, body=body)


async def with_budget(loop: VirtualLoop, proxies: int, budget: float, *, seed: int = 1) -> Floor:
    """Proxies that share a day's tokens and are settled."""
    floor = Floor(loop, proxies, seed=seed)
    floor.document = shared(Limit(tokens_per_day=budget))
    for seat in floor.seats:
        seat.limiter.take_document(floor.document)
    await floor.settled()
    return floor


@pytest.mark.parametrize("proxies", [2, 8])
def test_overloaded_and_skewed_limit_is_used_whole_and_never_exceeded(proxies: int) -> None:
    async def main(loop: VirtualLoop) -> None:
        floor = Floor(loop, proxies)
        await floor.settled()
        began = loop.time()
        await floor.load([key_of(rps=RPS)], call_of(), rate=3 * RPS, seconds=WARM_S + WINDOW_S, weights=zipf(proxies))
        events = floor.all_admitted()
        assert most_in_window(events, WINDOW_S) <= RPS * (WINDOW_S * 1.02 + 1)
        steady = [cost for at, cost in events if at >= began + WARM_S]
        assert sum(steady) >= 0.98 * RPS * WINDOW_S
        assert len(floor.seats[-1].admitted) >= 0.5 * sum(len(seat.admitted) for seat in floor.seats) / proxies, "all have a fair part"

    run_virtual(main)


async def killed(floor: Floor) -> None:
    floor.kill(owner_of(floor))


async def restarted(floor: Floor) -> None:
    owner = owner_of(floor)
    floor.kill(owner)
    await asyncio.sleep(2)
    floor.add(at=owner.index)


async def parted(floor: Floor) -> None:
    floor.split(floor.seats[:2])
    await asyncio.sleep(30)
    floor.heal()


async def paused(floor: Floor) -> None:
    await floor.pause(owner_of(floor), 8.0)


FAULTS: list[tuple[Callable[[Floor], Coroutine[Any, Any, None]], float]] = [(killed, 0.7), (restarted, 0.85), (parted, 0.9), (paused, 0.85)]


@pytest.mark.parametrize(("fault", "least"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_limit_holds_through_faults(fault: Callable[[Floor], Coroutine[Any, Any, None]], least: float) -> None:
    async def main(loop: VirtualLoop) -> None:
        floor = Floor(loop, 4)
        await floor.settled()
        began = loop.time()
        seconds = WARM_S + WINDOW_S
        loading = loop.create_task(floor.load([key_of(rps=RPS)], call_of(), rate=3 * RPS, seconds=seconds, weights=zipf(4)))
        await asyncio.sleep(WARM_S)
        await fault(floor)
        await loading
        events = floor.all_admitted()
        assert most_in_window(events, WINDOW_S) <= RPS * (WINDOW_S * 1.02 + 1)
        assert sum(cost for at, cost in events if at >= began + WARM_S) >= least * RPS * WINDOW_S

    run_virtual(main)


@pytest.mark.parametrize("fault", [None, killed, restarted, parted], ids=["no fault", "killed", "restarted", "parted"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_shared_budget_is_not_overshot(fault: Callable[[Floor], Coroutine[Any, Any, None]] | None, seed: int) -> None:
    budget = 200_000.0

    async def main(loop: VirtualLoop) -> None:
        floor = await with_budget(loop, 8, budget, seed=seed)
        load = floor.load([key_of()], call_of(max_tokens=400), rate=40, seconds=75, weights=zipf(8), usage=(60, 140), takes_s=1.0)
        loading = loop.create_task(load)
        await asyncio.sleep(8)
        if fault is not None:
            await fault(floor)
        await loading
        used = sum(cost for _, cost in floor.all_admitted())
        assert 0.85 * budget <= used <= budget
        codes = {code for seat in floor.seats for at, code in seat.refused if at > loop.time() - 5}
        assert "insufficient_quota" in codes, "and that is what clients hear in the end"

    run_virtual(main)


@pytest.mark.parametrize("after_s", [2, 12])
def test_a_proxy_that_is_cut_off_for_good_takes_nothing_beyond_a_budget(after_s: float) -> None:
    """The others give it up after 25 s and use all that is left; what it used meanwhile must not come on top."""
    budget = 200_000.0

    async def main(loop: VirtualLoop) -> None:
        floor = await with_budget(loop, 4, budget)
        load = floor.load([key_of()], call_of(max_tokens=400), rate=40, seconds=70, weights=zipf(4), usage=(60, 140), takes_s=1.0)
        loading = loop.create_task(load)
        await asyncio.sleep(after_s)
        floor.split([owner_of(floor)])
        await loading
        assert 0.9 * budget <= sum(cost for _, cost in floor.all_admitted()) <= 1.005 * budget

    run_virtual(main)


def test_slots_are_never_more_than_allowed_and_come_back_from_the_dead() -> None:
    async def main(loop: VirtualLoop) -> None:
        floor, slots = Floor(loop, 4), 20.0
        await floor.settled()
        key = key_of(concurrency=slots)
        await floor.load([key], call_of(), rate=60, seconds=20, weights=zipf(4), takes_s=1.0)
        changes = sorted(
            (moment, change) for seat in floor.seats for span in seat.spans for moment, change in zip(span, (1, -1), strict=True)
        )
        running = most = 0
        for _, change in changes:
            running += change
            most = max(most, running)
        assert 0.8 * slots <= most <= slots
        taken = 0
        for seat in (*floor.seats[:3], *floor.seats[:3]):
            await asyncio.sleep(2)
            taken += sum([await floor.request(seat, key, call_of()) is not None for _ in range(8)])
        assert taken == slots
        await asyncio.sleep(2)
        assert await floor.request(floor.seats[3], key, call_of()) is None
        floor.kill(floor.seats[0])
        await asyncio.sleep(40)
        assert await floor.request(floor.seats[3], key, call_of()) is not None, "a dead proxy's requests are over"

    run_virtual(main)
