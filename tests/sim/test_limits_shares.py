"""Shares of limits while links break and proxies die, restart, stand still and come: together they are never more than the whole."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.support.limits import Floor
from tests.support.virtual_time import VirtualLoop, run_virtual

BUCKETS = [random.Random(seed).randbytes(16) for seed in range(6)]
TROUBLE_S = 240


def whole(floor: Floor, bucket: bytes) -> float:
    """What all proxies together may hand out of a bucket right now."""
    now = floor.clock.monotonic()
    return sum(seat.limiter.shares.fraction(bucket, now) for seat in floor.up() if not seat.stands_still)


async def watch(floor: Floor, seen: list[float]) -> None:
    while True:
        for bucket in BUCKETS:
            seen.append(whole(floor, bucket))
            assert seen[-1] <= 1 + 1e-9, f"at {floor.loop.time():.2f} s"
        await asyncio.sleep(0.03)


async def trouble(floor: Floor, rng: random.Random) -> None:
    """Something goes wrong every few seconds, and most of it is mended again."""
    end = floor.loop.time() + TROUBLE_S
    while floor.loop.time() < end:
        await asyncio.sleep(rng.expovariate(1 / 4))
        up = floor.up()
        down = [seat for seat in floor.seats if not seat.alive]
        match rng.choice(("cut", "cut", "split", "kill", "start", "stop", "heal", "stand still", "join")):
            case "cut" if len(up) > 1:
                floor.cut(*rng.sample(up, 2))
            case "split":
                floor.split(rng.sample(up, rng.randrange(len(up) + 1)))
            case "kill" if len(up) > 2:
                floor.kill(rng.choice(up))
            case "start" if down:
                floor.add(at=rng.choice(down).index)
            case "stop" if len(up) > 2:
                await floor.stop(rng.choice(up))
            case "stand still":
                await floor.pause(rng.choice(up), rng.uniform(0.5, 40))
            case "join" if len(floor.seats) < 9:
                floor.add()
            case "heal":
                floor.heal()


@pytest.mark.parametrize("seed", [0, 33, 106, 190])  # each found a mistake once
def test_shares_never_add_up_to_more_than_the_whole(seed: int) -> None:
    async def main(loop: VirtualLoop) -> None:
        rng = random.Random(seed)
        floor, seen = Floor(loop, rng.randrange(2, 7), latency_s=rng.choice((0.001, 0.05, 0.4)), seed=seed), list[float]()
        watching = loop.create_task(watch(floor, seen))
        await trouble(floor, rng)
        assert not watching.done() or watching.result() is None
        floor.heal()
        for seat in floor.seats:
            if not seat.alive:
                floor.add(at=seat.index)
        await asyncio.sleep(60)
        watching.cancel()
        assert [round(whole(floor, bucket), 9) for bucket in BUCKETS] == [1.0] * len(BUCKETS), "all is whole again"
        assert min(seen) < 0.5, "the trouble was real"

    run_virtual(main)
