"""A revocation reaches every proxy through the directory alone: on a good network, a bad one, and after a partition has healed.

There are no links here, so this is the slow way; over links it takes a round trip (tests/unit/test_mesh_bulletin.py).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from mesh.authority import KEYS_KID
from mesh.bulletin import watch_documents
from mesh.documents import Document, next_version, seal_document
from mesh.freshness import follow_revocations
from mesh.revocations import KIND, NAME, NONE, RevocationList, encode_revocations
from mesh.trust import Role
from tests.support.network import Conditions
from tests.support.swarm import SimNode, Swarm, simulate

PROXIES = 8


class World:
    """Eight proxies and some workers; each proxy follows the list as in `proxy.node`, but for its links."""

    def __init__(self, swarm: Swarm, front: list[SimNode]) -> None:
        self.swarm = swarm
        self.front = front
        self.lists = {node.node_id: RevocationList() for node in front}
        for node in front:
            follow_revocations(node.running, self.lists[node.node_id])
            swarm.loop.create_task(watch_documents(node.running, node.clock, random.Random(swarm.rng.random())))

    def seq(self, node: SimNode) -> int:
        return self.lists[node.node_id].newest.seq

    async def revoke(self, node: SimNode, former: Document | None) -> Document:
        now = node.clock.wall()
        revoked = NONE.with_key(self.swarm.rng.randbytes(8), end=now + 86_400)
        document = next_version(former, kind=KIND, name=NAME, body=encode_revocations(revoked), now=now)
        document = seal_document(document, self.swarm.mesh.keys_issuer, KEYS_KID)
        await node.running.put_document(document)
        return document


async def world(swarm: Swarm) -> World:
    await swarm.bootstrap(2)
    await swarm.grow(Role.WORKER, 30)
    front = await swarm.grow(Role.PROXY, PROXIES)
    await asyncio.sleep(5.0)
    return World(swarm, front)


async def until(condition: Callable[[], bool], *, within_s: float) -> float:
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not condition():
        assert loop.time() - began < within_s, f"not within {within_s} s"
        await asyncio.sleep(0.05)
    return loop.time() - began


@pytest.mark.parametrize("conditions", [Conditions(), Conditions(loss=0.1, reordering=0.05, duplication=0.02)], ids=["good", "bad"])
def test_every_proxy_has_the_list_within_a_minute_without_any_link(conditions: Conditions) -> None:
    async def scenario(swarm: Swarm) -> None:
        there = await world(swarm)
        first = await there.revoke(there.front[0], None)
        await until(lambda: all(there.seq(node) == 1 for node in there.front), within_s=60.0)
        await there.revoke(there.front[5], first)
        await until(lambda: all(there.seq(node) == 2 for node in there.front), within_s=60.0)

    simulate(scenario, seed=71, conditions=conditions)


@pytest.mark.parametrize("seed", [72])
def test_a_minute_after_a_partition_has_healed_the_cut_off_proxies_have_the_list(seed: int) -> None:
    async def scenario(swarm: Swarm) -> None:
        there = await world(swarm)
        away = there.front[:3]
        workers = [node for node in swarm.living(Role.WORKER)][:10]
        swarm.network.partition({node.address: 1 for node in (*away, *workers)})
        await asyncio.sleep(5.0)
        await there.revoke(there.front[7], None)
        await until(lambda: all(there.seq(node) == 1 for node in there.front[3:]), within_s=60.0)
        await asyncio.sleep(600.0)
        assert all(there.seq(node) == 0 for node in away), "the fault: they are cut off"
        swarm.network.partition({})
        took = await until(lambda: all(there.seq(node) == 1 for node in away), within_s=60.0)
        print(f"seed {seed}: {took:.1f} s after the partition had healed")

    simulate(scenario, seed=seed)


def test_a_bootstrap_node_that_says_it_is_nowhere_confirms_nothing_and_does_no_harm() -> None:
    async def scenario(swarm: Swarm) -> None:
        there = await world(swarm)
        proxy, stranger = there.front[0], swarm.add(Role.BOOTSTRAP)
        proxy.running.watch(Role.BOOTSTRAP, lambda record: None, interval_s=60.0)
        document = await there.revoke(proxy, None)
        for address in ("nonsense", "boot.example.org:7600", "[::1", "1.2.3.4:99999", ""):
            record = replace(stranger.record(), addresses=(address,))
            proxy.running.observe(record)
            assert proxy.running.node.contact_of(record) is None
            await proxy.running.confirm_document(document)

    simulate(scenario, seed=75)
