"""A look-up in full, in a simulated network: every holder's word, and a verdict on each record."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from mesh.dht.explain import MAX_KEYS, Explained, explain, knock, probe
from mesh.dht.rpc import Request
from mesh.directory import DirectoryConfig
from mesh.records import directory_key
from mesh.trust import Role
from tests.support.byzantine import Liar
from tests.support.swarm import MODEL, PORT, SimNode, Swarm, simulate, with_config


async def small_mesh(swarm: Swarm, workers: int = 12) -> tuple[SimNode, list[SimNode], SimNode]:
    """A bootstrap node, workers that announce themselves, and a proxy."""
    (boot,) = await swarm.bootstrap(1)
    fleet = await swarm.grow(Role.WORKER, workers)
    (proxy,) = await swarm.grow(Role.PROXY, 1)
    for worker in fleet:
        worker.announce()
    await asyncio.sleep(6.0)
    return boot, fleet, proxy


async def look(proxy: SimNode, kind: str = "model", name: str = MODEL) -> Explained:
    return await explain(proxy.running.node, kind, name, timeout_s=5.0)


def by_nearness(fleet: list[SimNode]) -> list[SimNode]:
    """Nearest first to where all workers are found, so that whoever comes first is a holder."""
    goal = int.from_bytes(directory_key("role", "worker"))
    return sorted(fleet, key=lambda node: int.from_bytes(node.node_id) ^ goal)


def verdicts(explained: Explained) -> set[str]:
    return {one.verdict for one in explained.found}


def test_every_worker_is_found_with_its_holders_and_the_way_there() -> None:
    async def scenario(swarm: Swarm) -> None:
        _, fleet, proxy = await small_mesh(swarm)
        explained = await look(proxy)
        assert explained.complete
        assert {one.node_id for one in explained.found if one.verdict == "good"} == {worker.node_id for worker in fleet}
        assert all(len(one.holders) >= 5 for one in explained.found if one.verdict == "good")
        assert verdicts(explained) <= {"good", "older"}
        assert all(hop.fate.name == "ANSWERED" and hop.took_s > 0 for _, hop in explained.hops)
        assert all(holder.complete for holder in explained.holders)

    simulate(scenario, seed=31)


def test_dead_node_on_the_way_is_shown_as_such() -> None:
    async def scenario(swarm: Swarm) -> None:
        _, fleet, proxy = await small_mesh(swarm)
        await swarm.crash(fleet[:4])
        explained = await look(proxy)
        fates = {hop.contact.id: hop.fate.name for _, hop in explained.hops}
        dead = {worker.node_id for worker in fleet[:4]}
        assert dead & fates.keys(), "one of the dead was asked"
        assert not any(fates[node_id] == "ANSWERED" for node_id in dead & fates.keys())
        living = [fate for node_id, fate in fates.items() if node_id not in dead]
        assert set(living) <= {"ANSWERED", "WAITING"}, "one that was asked in a dead one's stead may not be needed in the end"
        assert living.count("ANSWERED") >= 5
        silent = await probe(proxy.running.node, proxy.running.node.table)
        assert {one.node_id for one in silent if one.rtt_s is None} == dead & {one.node_id for one in silent}

    simulate(scenario, seed=32)


def test_forged_expired_and_misplaced_records_get_their_verdict_and_name_who_gave_them() -> None:
    async def scenario(swarm: Swarm) -> None:
        _, fleet, proxy = await small_mesh(swarm)
        liar_node, first, second = by_nearness(fleet)[:3]
        past = second.record().signed
        await asyncio.sleep(120.0)
        genuine = first.record().signed
        forged = genuine[:-1] + bytes([genuine[-1] ^ 1])
        elsewhere = proxy.record().signed

        def lie(liar: Liar, request: Request) -> list[list[Any]]:
            liar.told["bad records"] += 1
            items = [(15_000).to_bytes(2) + b"\x00" + data for data in (forged, past, elsewhere, b"no record at all" * 8)]
            return liar.answer(items[:2]) + liar.answer(items[2:])

        liar = Liar(liar_node, [liar_node], lie, random.Random(1))
        explained = await look(proxy, "role", "worker")
        assert liar.told["bad records"], "the liar was asked"
        bad = {one.verdict: one for one in explained.found if one.verdict not in ("good", "older")}
        assert bad.keys() == {"bad_signature", "expired", "wrong_key", "malformed_envelope"}
        assert all(liar_node.node_id in one.holders for one in bad.values())
        assert bad["bad_signature"].node_id == first.node_id
        assert bad["expired"].node_id == second.node_id
        assert bad["bad_signature"].record is None
        live = {worker.node_id for worker in fleet if worker is not liar_node}
        assert live <= {one.node_id for one in explained.found if one.verdict == "good"}

    simulate(scenario, seed=33)


def test_copy_that_is_older_than_another_is_told_apart() -> None:
    async def scenario(swarm: Swarm) -> None:
        _, fleet, proxy = await small_mesh(swarm)
        near, owner = by_nearness(fleet)[:2]
        former = owner.record().signed
        await owner.publish()
        liar = Liar(near, [near], lambda liar, request: liar.answer([(9_000).to_bytes(2) + b"\x00" + former]), random.Random(1))
        explained = await look(proxy, "role", "worker")
        versions = [one for one in explained.found if one.node_id == owner.node_id]
        (good,) = (one for one in versions if one.verdict == "good")
        (older,) = (one for one in versions if liar.node.node_id in one.holders)
        assert (older.verdict, older.order < good.order) == ("older", True)

    simulate(scenario, seed=34)


def test_overflowed_key_is_followed_into_its_sub_keys() -> None:
    async def scenario(swarm: Swarm) -> None:
        _, fleet, proxy = await small_mesh(swarm, 24)
        explained = await look(proxy)
        assert {shard for shard, _ in explained.hops} == set(range(MAX_KEYS))
        assert {one.node_id for one in explained.found if one.verdict == "good"} == {worker.node_id for worker in fleet}

    config: DirectoryConfig = with_config(shard_size=8)
    simulate(scenario, seed=35, config=config)


def test_model_nobody_serves_has_a_path_and_no_records() -> None:
    async def scenario(swarm: Swarm) -> None:
        _, _, proxy = await small_mesh(swarm, 4)
        explained = await look(proxy, "model", "nothing")
        assert explained.found == []
        assert explained.hops
        assert explained.complete
        assert directory_key("model", "nothing") not in proxy.running.node.store.keys()  # noqa: SIM118 - not a mapping

    simulate(scenario, seed=36)


def test_bootstrap_nodes_are_knocked_at_one_by_one() -> None:
    async def scenario(swarm: Swarm) -> None:
        first, second = await swarm.bootstrap(2)
        (proxy,) = await swarm.grow(Role.PROXY, 1)
        assert [one.rtt_s is not None for one in await knock(proxy.running.node)] == [True, True]
        await first.crash()
        doors = {one.address: one for one in await knock(proxy.running.node)}
        assert doors[f"{first.address}:{PORT}"].rtt_s is None
        assert doors[f"{first.address}:{PORT}"].error
        assert doors[f"{second.address}:{PORT}"].rtt_s is not None

    simulate(scenario, seed=37)
