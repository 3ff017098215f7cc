"""A thousand nodes, fifty milliseconds apart. Slow: run with ``-m large``; figures are printed with ``-s``."""

from __future__ import annotations

import asyncio
from functools import partial
from statistics import quantiles

import pytest

from mesh.records import Record
from mesh.trust import Role
from tests.support.swarm import SimNode, Swarm, simulate

pytestmark = pytest.mark.large


async def crowd(swarm: Swarm, workers: int, *, proxies: int = 8) -> tuple[list[SimNode], list[SimNode]]:
    """A mesh of ``workers`` that came one by one within 20 s, each with a model of its own."""
    await swarm.bootstrap(3)
    front = await swarm.grow(Role.PROXY, proxies)
    fleet = [swarm.add(Role.WORKER) for _ in range(workers)]
    for proxy in front:
        proxy.running.watch(Role.WORKER, lambda record: None, interval_s=5.0)
    for at, worker in enumerate(fleet):
        worker.models = (f"model-{at}",)
        await worker.boot()
        worker.announce_when_joined()
        await asyncio.sleep(20.0 / workers)
    await asyncio.sleep(15.0)
    return fleet, front


def known(proxy: SimNode) -> set[bytes]:
    return {record.node_id for record in proxy.running.known(Role.WORKER)}


async def time_to_be_routable(swarm: Swarm, front: list[SimNode], samples: int) -> list[float]:
    """Workers that have joined become ready, ten a second: how long until every proxy knows of each."""
    late = await swarm.grow(Role.WORKER, samples, over_s=samples / 20)
    await asyncio.sleep(2.0)
    loop = swarm.loop
    heard: dict[bytes, dict[bytes, float]] = {worker.node_id: {} for worker in late}

    def hear(proxy: SimNode, record: Record) -> None:
        if record.node_id in heard:
            heard[record.node_id].setdefault(proxy.node_id, loop.time())

    for proxy in front:
        proxy.running.watch(Role.WORKER, partial(hear, proxy), interval_s=5.0)
    began: dict[bytes, float] = {}
    for worker in late:
        began[worker.node_id] = loop.time()
        worker.announce()
        await asyncio.sleep(0.1)
    while not all(len(times) == len(front) for times in heard.values()):
        assert loop.time() - max(began.values()) < 30.0
        await asyncio.sleep(0.1)
    return [max(heard[node_id].values()) - at for node_id, at in began.items()]


AT_ONCE = 32
"""Look-ups under way at one moment, all over the mesh: so the rest of the world is simulated for less long."""


async def look_ups(swarm: Swarm, askers: list[SimNode], wanted: list[SimNode], count: int) -> tuple[list[float], int]:
    """Look single workers' models up; returns the times taken and how many were found."""
    took: list[float] = []
    hits = 0

    async def one() -> None:
        nonlocal hits
        target, asker = swarm.rng.choice(wanted), swarm.rng.choice(askers)
        began = swarm.loop.time()
        records = await asker.running.find_model(target.models[0])
        took.append(swarm.loop.time() - began)
        hits += [record.node_id for record in records] == [target.node_id]

    for at in range(0, count, AT_ONCE):
        await asyncio.gather(*(one() for _ in range(min(AT_ONCE, count - at))))
    return took, hits


def show(name: str, took: list[float]) -> tuple[float, float]:
    cuts = quantiles(took, n=100)
    print(f"{name}: p50 {cuts[49] * 1000:.0f} ms, p99 {cuts[98] * 1000:.0f} ms, worst {max(took) * 1000:.0f} ms of {len(took)}")
    return cuts[49], cuts[98]


def test_a_thousand_nodes_healthy_and_with_thirty_percent_dead() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await crowd(swarm, 1_000)
        print(f"proxies know {[len(known(proxy)) for proxy in front]} of 1000")
        p50, p99 = show("ready to routable at 8 proxies", await time_to_be_routable(swarm, front, 100))
        assert p50 <= 0.3
        assert p99 <= 1.0
        show("look-up, healthy", (await look_ups(swarm, [*fleet, *front], fleet, 300))[0])
        await swarm.crash(swarm.rng.sample(fleet, 300))
        alive = [worker for worker in fleet if worker.alive]
        took, hits = await look_ups(swarm, [*alive, *front], alive, 1_000)
        _, p99 = show("look-up, 30% just died", took)
        print(f"found {hits} of 1000 living workers")
        assert hits >= 999
        assert p99 <= 0.5 + swarm.network.conditions.rtt_s
        _, p99 = show("ready to routable, 30% dead", await time_to_be_routable(swarm, front, 100))
        assert p99 <= 2.0

    simulate(scenario, seed=41)
