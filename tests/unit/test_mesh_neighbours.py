"""Whom a node links with, by what its directory knows."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import pytest

from mesh.directory import Directory
from mesh.neighbours import WORKERS_PER_MODEL, Neighbours
from mesh.records import ModelEntry, Record, State
from mesh.trust import Role
from tests.support.clocks import StoppedClock

RNG = random.Random(1)


def record(role: Role, model: str = "common", *, addresses: tuple[str, ...] = ("203.0.113.7:1",)) -> Record:
    models = (ModelEntry(name=model),) if role == Role.WORKER else ()
    return Record(
        node_id=RNG.randbytes(32),
        role=role,
        boot=1,
        seq=1,
        issued=0.0,
        expires=20.0,
        state=State.READY,
        addresses=addresses,
        models=models,
    )


@dataclass
class World:
    """What everybody's directory knows."""

    workers: list[Record] = field(default_factory=lambda: [record(Role.WORKER) for _ in range(1_000)])
    proxies: list[Record] = field(default_factory=lambda: [record(Role.PROXY) for _ in range(10)])

    def known(self, role: Role) -> list[Record]:
        return {Role.WORKER: self.workers, Role.PROXY: self.proxies}[role]

    def stats(self) -> dict[str, int]:
        return {"nodes_estimated": len(self.workers) + len(self.proxies)}

    def neighbours(self, of: Record, *, size: int = 100, outbound: bool = False, clock: StoppedClock | None = None) -> Neighbours:
        return Neighbours(
            of.node_id,
            of.role,
            cast(Directory, self),
            size=size,
            outbound_only=lambda: outbound,
            clock=clock or StoppedClock(),
        )


def test_each_worker_has_three_proxies_and_each_proxy_its_share() -> None:
    world = World()
    links: Counter[bytes] = Counter()
    for proxy in world.proxies:
        node = world.neighbours(proxy)
        ours = [worker.node_id for worker in world.workers if node.wants(worker)]
        assert 200 < len(ours) < 400
        assert node.shares()
        links.update(ours)
    assert set(links.values()) == {3}


def test_both_ends_choose_the_same_pairs() -> None:
    world = World()
    proxies = {proxy.node_id: world.neighbours(proxy) for proxy in world.proxies}
    for worker in world.workers[:50]:
        node = world.neighbours(worker)
        dialled = {proxy.node_id for proxy in world.proxies if node.wants(proxy)}
        assert dialled == {node_id for node_id, neighbours in proxies.items() if neighbours.wants(worker)}


def test_rare_models_are_linked_by_everybody_and_others_by_enough() -> None:
    world = World()
    rare = [record(Role.WORKER, "rare") for _ in range(5)]
    some = [record(Role.WORKER, "some") for _ in range(60)]
    world.workers += rare + some
    linked = []
    for proxy in world.proxies:
        node = world.neighbours(proxy)
        assert all(node.wants(worker) for worker in rare)
        linked.append(sum(node.wants(worker) for worker in some))
    assert sum(linked) / len(linked) >= WORKERS_PER_MODEL
    assert min(linked) >= WORKERS_PER_MODEL / 2


@pytest.mark.parametrize("size", [0, 1_000])
def test_where_there_is_room_for_all_all_are_wanted(size: int) -> None:
    world = World()
    node = world.neighbours(world.proxies[0], size=size)
    assert all(node.wants(worker) for worker in world.workers)


def test_a_worker_that_only_dials_out_dials_all_and_is_kept() -> None:
    world = World()
    hidden = record(Role.WORKER, addresses=())
    world.workers.append(hidden)
    outbound = world.neighbours(hidden, outbound=True)
    assert all(outbound.wants(proxy) for proxy in world.proxies)
    assert all(world.neighbours(proxy).keeps(hidden) for proxy in world.proxies)


def test_links_stay_while_a_number_wavers_and_go_when_the_mesh_has_grown() -> None:
    world, clock = World(), StoppedClock()
    node = world.neighbours(world.proxies[0], clock=clock)
    everybody, world.workers = world.workers, world.workers[:100]
    assert all(node.wants(worker) for worker in world.workers)
    assert not node.shares()
    world.workers = everybody
    clock.now += 10.0
    wanted = {worker.node_id for worker in world.workers if node.wants(worker)}
    kept = {worker.node_id for worker in world.workers if node.keeps(worker)}
    assert wanted < kept
    assert len(kept) < len(everybody) / 2


def test_proxies_want_every_proxy() -> None:
    world = World()
    node = world.neighbours(world.proxies[0])
    assert all(node.wants(proxy) for proxy in world.proxies)
