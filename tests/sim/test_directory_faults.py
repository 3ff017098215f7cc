"""What networks and machines do to a directory: slow nodes, distance, NAT, IPv6, lost disks. Each fault shows that it happened."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from mesh.dht.address import Address
from mesh.dht.protocol import EMPTY, Op
from mesh.trust import Role
from tests.sim.test_directory_swarm import found, ids, known, ready_mesh
from tests.support.network import Conditions
from tests.support.swarm import PORT, SimNode, Swarm, simulate, with_config


async def took(swarm: Swarm, asker: SimNode) -> float:
    """How long a look-up of all workers takes."""
    began = swarm.loop.time()
    await found(asker)
    return swarm.loop.time() - began


def test_nodes_that_answer_seconds_late_hold_nobody_up() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 24)
        for node in swarm.rng.sample(fleet, 5):
            node.host.slow_s = 2.0
        for proxy in front:
            assert await took(swarm, proxy) < 1.0
            assert await found(proxy) == ids(fleet)
        await asyncio.sleep(8.0)
        for proxy in front:
            assert await took(swarm, proxy) < 1.0
            assert await found(proxy) >= {node.node_id for node in fleet if not node.host.slow_s}
        assert swarm.network.fired["slowed"] > 50

    simulate(scenario, seed=71)


def test_nodes_all_over_the_world_find_each_other_and_know_who_is_far() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.bootstrap(2)
        fleet = [worker for region in range(6) for worker in await swarm.grow(Role.WORKER, 5, region=region)]
        (proxy,) = await swarm.grow(Role.PROXY, 1)
        for worker in fleet:
            worker.announce()
        await asyncio.sleep(10.0)
        assert await found(proxy) == ids(fleet)
        rtt = {peer.node_id: peer.rtt_s for peer in proxy.running.peers()}
        near = min(rtt[worker.node_id] for worker in fleet[:5] if worker.node_id in rtt)
        far = max(rtt[worker.node_id] for worker in fleet[15:20] if worker.node_id in rtt)
        assert far > 2 * near, "the other side of the ring is two and a half times as far"

    simulate(scenario, seed=72)


def test_what_a_nat_does_not_let_in_is_not_missed() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, _ = await ready_mesh(swarm, 20)
        hidden = swarm.add(Role.PROXY, serve=False)
        hidden.host.nat = True
        await hidden.boot()
        assert await hidden.running.joined(timeout_s=5.0)
        hidden.running.watch(Role.WORKER, lambda record: None, interval_s=5.0)
        await asyncio.sleep(5.0)
        (late,) = await swarm.grow(Role.WORKER, 1)
        protocol = late.running.node.protocol
        assert await protocol.request(Address(hidden.address, PORT), Op.PING, EMPTY, node_id=hidden.node_id) is None
        assert swarm.network.fired["nat_refused"] > 0
        await late.publish()
        await asyncio.sleep(0.5)
        assert known(hidden) == ids(fleet) | {late.node_id}, "holders push to whoever watches, through the NAT that it keeps open"

    simulate(scenario, seed=73)


def lose(disk: Path) -> None:
    assert list(disk.iterdir()), "there was something to lose"
    shutil.rmtree(disk)
    disk.mkdir()


@pytest.mark.parametrize("lost", [False, True])
def test_a_node_comes_back_whether_or_not_its_disk_does(lost: bool, tmp_path: Path) -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 20)
        (worker,) = await swarm.grow(Role.WORKER, 1, state_dir=tmp_path)
        worker.announce()
        await asyncio.sleep(10.0)
        await worker.crash()
        if lost:
            lose(tmp_path)
        await asyncio.sleep(5.0)
        await worker.boot()
        assert bool(worker.running.node._remembered) is not lost
        assert await worker.running.joined(timeout_s=5.0)
        worker.announce()
        await asyncio.sleep(2.0)
        for proxy in front:
            (record,) = [record for record in proxy.running.known(Role.WORKER) if record.node_id == worker.node_id]
            assert record.boot == worker.boot_ms
        assert await found(worker) == ids(fleet) | {worker.node_id}

    simulate(scenario, seed=74)


def test_a_bootstrap_node_that_lost_everything_knows_the_mesh_after_one_recheck() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, _ = await ready_mesh(swarm, 12, bootstraps=1)
        first = swarm.nodes[0]
        await first.crash()
        await asyncio.sleep(10.0)
        await first.boot()
        assert first.running.peers() == []
        await asyncio.sleep(swarm.config.bootstrap_recheck_s)
        assert len(first.running.peers()) >= 12
        assert await found(first) == ids(fleet)

    simulate(scenario, seed=75, config=with_config(bootstrap_recheck_s=15.0))


def test_a_mesh_on_ipv6_is_a_mesh() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.bootstrap(1, ipv6=True)
        fleet = await swarm.grow(Role.WORKER, 20, ipv6=True)
        (proxy,) = await swarm.grow(Role.PROXY, 1, ipv6=True)
        for worker in fleet:
            worker.announce()
        await asyncio.sleep(6.0)
        assert await found(proxy) == ids(fleet)
        assert all(":" in peer.address.removesuffix(f":{PORT}") for peer in proxy.running.peers())
        assert swarm.network.fired["oversized"] == 0

    simulate(scenario, seed=76)


def test_one_subnet_full_of_members_is_a_small_part_of_every_table() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, _ = await ready_mesh(swarm, 10)
        for number in range(30):
            crowd = swarm.add(Role.WORKER, address=f"77.7.7.{number + 1}")
            await crowd.boot()
        await asyncio.sleep(5.0)
        for node in fleet:
            mine = [peer for peer in node.running.peers() if peer.address.startswith("77.7.7.")]
            assert 0 < len(mine) <= swarm.config.subnet_limit

    simulate(scenario, seed=77)


async def fails(swarm: Swarm) -> None:
    await swarm.bootstrap(1)
    await swarm.grow(Role.WORKER, 5)
    raise AssertionError(f"{swarm.network.trace} at {swarm.seed}")


def test_a_failed_run_names_its_seed_and_runs_again_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Conditions(loss=0.05)
    with pytest.raises(AssertionError) as first:
        simulate(fails, seed=78, conditions=bad)
    assert any("MESH_SIM_SEED=78" in note for note in first.value.__notes__)
    monkeypatch.setenv("MESH_SIM_SEED", "78")
    with pytest.raises(AssertionError) as again:
        simulate(fails, seed=1, conditions=bad)
    assert str(again.value) == str(first.value)
