"""A hundred nodes of the real directory: they join, publish and find each other, on good networks and bad."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mesh.dht.address import Address
from mesh.dht.crawl import Outcome
from mesh.dht.keys import rank, shard_of
from mesh.dht.routing import Contact, distance
from mesh.records import State, model_key, role_key
from mesh.trust import Role
from tests.support.network import Conditions
from tests.support.swarm import MODEL, PORT, SimNode, Swarm, simulate, with_config


async def ready_mesh(swarm: Swarm, workers: int, *, proxies: int = 2, bootstraps: int = 2) -> tuple[list[SimNode], list[SimNode]]:
    """A mesh whose workers have announced themselves and whose proxies watch."""
    await swarm.bootstrap(bootstraps)
    fleet = await swarm.grow(Role.WORKER, workers, over_s=2.0)
    front = await swarm.grow(Role.PROXY, proxies)
    for worker in fleet:
        worker.announce()
    for proxy in front:
        proxy.running.watch(Role.WORKER, lambda record: None, interval_s=5.0)
    await asyncio.sleep(6.0)
    return fleet, front


def ids(nodes: list[SimNode]) -> set[bytes]:
    return {node.node_id for node in nodes}


def known(proxy: SimNode) -> set[bytes]:
    return {record.node_id for record in proxy.running.known(Role.WORKER)}


async def found(proxy: SimNode) -> set[bytes]:
    return {record.node_id for record in await proxy.running.find_role(Role.WORKER)}


async def until(condition: object, *, within_s: float) -> float:
    """Wait in virtual time until ``condition()`` holds; returns how long it took."""
    assert callable(condition)
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not condition():
        assert loop.time() - began < within_s, f"not within {within_s} s"
        await asyncio.sleep(0.01)
    return loop.time() - began


def test_a_hundred_nodes_join_publish_and_find_each_other() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 100, proxies=4)
        for proxy in front:
            assert await found(proxy) == ids(fleet)
            assert known(proxy) == ids(fleet)
            models = await proxy.running.find_model(MODEL)
            assert {record.node_id for record in models} == ids(fleet)
        assert all(len(node.running.peers()) >= 20 for node in swarm.nodes)
        assert swarm.network.fired["oversized"] == 0

    simulate(scenario, seed=11)


def test_whoever_joins_meets_somebody_in_every_part_of_the_mesh() -> None:
    async def scenario(swarm: Swarm) -> None:
        await ready_mesh(swarm, 60)
        await asyncio.sleep(15.0)
        met = [{peer.node_id[0] >> 6 for peer in node.running.peers()} for node in swarm.nodes]
        assert all(parts == {0, 1, 2, 3} for parts in met), f"{sum(4 - len(parts) for parts in met)} of {4 * len(met)} are unknown"

    simulate(scenario, seed=28, config=with_config(k=6))


def test_a_worker_that_becomes_ready_is_routable_at_every_proxy_at_once() -> None:
    async def scenario(swarm: Swarm) -> None:
        _, front = await ready_mesh(swarm, 60, proxies=4)
        (late,) = await swarm.grow(Role.WORKER, 1)
        await late.publish()
        took_s = await until(lambda: all(late.node_id in known(proxy) for proxy in front), within_s=1.0)
        assert took_s < 0.3

    simulate(scenario, seed=12)


def test_same_seed_same_trace_and_another_seed_another() -> None:
    async def scenario(swarm: Swarm) -> None:
        _, front = await ready_mesh(swarm, 30)
        await found(front[0])

    bad = Conditions(loss=0.02, duplication=0.02, reordering=0.05)
    one, two, other = (simulate(scenario, seed=seed, conditions=bad).network.trace for seed in (13, 13, 14))
    assert one == two
    assert one != other


def test_a_lossy_reordering_duplicating_network_costs_nobody() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 60)
        for proxy in front:
            await until(lambda proxy=proxy: known(proxy) == ids(fleet), within_s=10.0)
            assert await found(proxy) == ids(fleet)
        for fault in ("lost", "duplicated", "reordered"):
            assert swarm.network.fired[fault] > 100, fault
        assert sum(node.running.stats().get("refused_replayed", 0) for node in swarm.nodes) > 0

    simulate(scenario, seed=15, conditions=Conditions(loss=0.05, duplication=0.05, reordering=0.1))


def test_a_third_of_all_nodes_dying_at_once_loses_no_living_worker() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 100, proxies=4)
        victims = swarm.rng.sample(fleet, 33)
        await swarm.crash(victims)
        living = ids([node for node in fleet if node.alive])
        for proxy in front:
            began = swarm.loop.time()
            assert await found(proxy) >= living
            assert swarm.loop.time() - began < 1.0
        await asyncio.sleep(swarm.config.record_ttl_s)
        for proxy in front:
            assert known(proxy) == await found(proxy) == living

    simulate(scenario, seed=16)


async def partition_and_heal(swarm: Swarm, workers: int, *, for_s: float) -> None:
    fleet, front = await ready_mesh(swarm, workers, proxies=4)
    half = {node.address: at % 2 for at, node in enumerate(swarm.nodes)}
    swarm.network.partition(half)
    await asyncio.sleep(for_s)
    assert swarm.network.fired["partitioned"] > 0
    for proxy in front:
        reachable = {node.node_id for node in fleet if half[node.address] == half[proxy.address]}
        assert known(proxy) == reachable
    swarm.network.heal()
    took_s = await until(lambda: all(known(proxy) == ids(fleet) for proxy in front), within_s=10.0)
    print(f"one view {took_s:.2f} s after healing")


def test_in_a_large_mesh_pulses_keep_what_is_steady_and_nothing_else() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 60)
        await asyncio.sleep(40.0)
        living = ids(fleet)
        for _ in range(160):
            assert all(known(proxy) == living for proxy in front), "a steady worker never leaves the view"
            await asyncio.sleep(0.25)
        pulsed = [record.pulse for proxy in front for record in proxy.running.known(Role.WORKER)]
        assert sum(pulse > 0 for pulse in pulsed) > 0.5 * len(pulsed)
        changed, killed = fleet[0], fleet[1:10]
        changed.models = ("another",)
        await changed.publish()
        assert await until(lambda: len([r for r in front[0].running.known(Role.WORKER) if r.serves("another")]) == 1, within_s=1.0) < 0.3
        await swarm.crash(killed)
        living -= ids(killed)
        await until(lambda: all(known(proxy) == living for proxy in front), within_s=swarm.config.record_ttl_s + 1.0)
        for _ in range(80):
            assert all(known(proxy) == living for proxy in front), "holders died too, and nobody else left; nobody came back"
            await asyncio.sleep(0.5)

    simulate(scenario, seed=23, config=with_config(large_mesh=50))


def test_in_a_quiet_large_mesh_nobody_signs_anew_and_pulses_come_when_they_are_due() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, _ = await ready_mesh(swarm, 60)
        await asyncio.sleep(45.0)
        heard: dict[bytes, dict[tuple[int, int], set[int]]] = {worker.node_id: {} for worker in fleet}
        for _ in range(240):
            await asyncio.sleep(0.25)
            for node in swarm.nodes:
                for held in node.running.node.store.live(role_key(Role.WORKER), node.clock.monotonic()):
                    heard[held.record.node_id].setdefault(held.record.order, set()).add(held.pulse.n)
        assert all(len(orders) == 1 for orders in heard.values()), "a record was signed anew"
        steps = [late - early for orders in heard.values() for pulses in orders.values() for early, late in pairwise(sorted(pulses))]
        assert len(steps) >= 4 * len(fleet)
        assert {10, 11, 12} >= set(steps), "0.55 of twenty seconds, in whole ones"

    simulate(scenario, seed=23, config=with_config(large_mesh=50))


@pytest.mark.parametrize(("shard_size", "ascend_interval_s"), [(24, 300.0), (12, 20.0)])
def test_pulses_keep_what_stands_under_sub_keys_too(shard_size: int, ascend_interval_s: float) -> None:
    """Longer than who was turned away waits to ask again; and while many ask again."""

    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 60)
        for _ in range(180):
            await asyncio.sleep(1.0)
            assert all(known(proxy) == ids(fleet) for proxy in front), "nobody leaves the view when all has become quiet"
        assert await found(front[0]) == ids(fleet)
        records = [record for proxy in front for record in proxy.running.known(Role.WORKER)]
        assert sum(record.pulse > 0 for record in records) > 0.7 * len(records)

    simulate(scenario, seed=24, config=with_config(large_mesh=50, shard_size=shard_size, ascend_interval_s=ascend_interval_s))


def test_a_newcomer_to_a_full_key_need_not_be_turned_away_first() -> None:
    async def scenario(swarm: Swarm) -> None:
        _, front = await ready_mesh(swarm, 60, proxies=4)
        took_s = []
        late = await swarm.grow(Role.WORKER, 20)
        await asyncio.sleep(10.0)
        for worker in late:
            worker.announce()
            took_s.append(await until(lambda worker=worker: all(worker.node_id in known(proxy) for proxy in front), within_s=5.0))
        assert sorted(took_s)[15] < 0.2, took_s

    simulate(scenario, seed=1, config=with_config(large_mesh=50, shard_size=12))


def test_whoever_went_to_a_sub_key_comes_back_when_there_is_room_though_who_sent_it_there_has_died() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, _ = await ready_mesh(swarm, 60)
        alive = fleet[50:]

        def above() -> list[bool]:
            holders = (worker.running.node.publisher.holders().get(role_key(Role.WORKER), []) for worker in alive)
            return [len(some) >= swarm.config.holders for some in holders]

        assert not all(above())
        await swarm.crash(fleet[:50])
        await until(lambda: all(above()), within_s=150.0)

    simulate(scenario, seed=24, config=with_config(shard_size=12, ascend_interval_s=30.0))


def test_a_partition_heals_into_one_view() -> None:
    simulate(lambda swarm: partition_and_heal(swarm, 40, for_s=90.0), seed=17)


def test_who_failed_and_speaks_again_is_asked_again_at_once() -> None:
    """Else each half of a healed mesh passes over the other half's nodes in look-ups for as long as they had been failing."""

    async def scenario(swarm: Swarm) -> None:
        fleet, _ = await ready_mesh(swarm, 10)
        cut_off, other = fleet[:2]
        memory = other.running.node.memory
        swarm.network.partition({node.address: int(node is cut_off) for node in swarm.nodes})
        await asyncio.sleep(40.0)
        assert memory.failing(cut_off.node_id)
        swarm.network.heal()
        cut_off.running.node.protocol.probe(Contact(other.node_id, Address(other.address, PORT)))
        await asyncio.sleep(0.4)
        assert not memory.failing(cut_off.node_id)

    simulate(scenario, seed=22)


@pytest.mark.large
def test_a_partition_of_ten_minutes_heals_into_one_view() -> None:
    simulate(lambda swarm: partition_and_heal(swarm, 100, for_s=600.0), seed=17)


def test_a_worker_that_cannot_be_reached_serves_and_is_in_no_table() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 30)
        hidden = swarm.add(Role.WORKER, serve=False)
        hidden.host.nat = True
        await hidden.boot()
        assert await hidden.running.joined(timeout_s=5.0)
        assert await hidden.publish() >= 3
        await asyncio.sleep(0.5)
        assert all(hidden.node_id in known(proxy) for proxy in front)
        (record,) = [record for record in front[0].running.known(Role.WORKER) if record.node_id == hidden.node_id]
        assert record.outbound_only
        for node in (*fleet, *front):
            assert hidden.node_id not in {peer.node_id for peer in node.running.peers()}

    simulate(scenario, seed=18)


def test_a_nat_that_changes_the_port_costs_one_round_trip() -> None:
    async def scenario(swarm: Swarm) -> None:
        await ready_mesh(swarm, 30)
        hidden = swarm.add(Role.WORKER, serve=False)
        await hidden.boot()
        assert await hidden.running.joined(timeout_s=5.0)
        assert await hidden.publish() >= 3
        swarm.network.rebind((hidden.address, 7400))
        assert await hidden.publish() >= 3
        assert swarm.network.fired["rebound"] == 1

    simulate(scenario, seed=19)


def test_clocks_half_a_minute_off_are_tolerated() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.bootstrap(2)
        fleet = []
        for at in range(45):
            fleet += await swarm.grow(Role.WORKER, 1, over_s=0.05, skew_s=(-30.0, 0.0, 30.0)[at % 3])
        front = [
            *await swarm.grow(Role.PROXY, 1, skew_s=-30.0),
            *await swarm.grow(Role.PROXY, 1, skew_s=30.0),
            *await swarm.grow(Role.PROXY, 1),
        ]
        for worker in fleet:
            worker.announce()
        await asyncio.sleep(30.0)
        for proxy in front:
            assert await found(proxy) == ids(fleet)
        gone = fleet[:6]
        await swarm.crash(gone)
        await asyncio.sleep(swarm.config.record_ttl_s + 1.0)
        for proxy in front:
            assert await found(proxy) == ids(fleet[6:])

    simulate(scenario, seed=20)


def test_a_proxy_restarted_with_every_bootstrap_down_finds_its_workers(tmp_path: Path) -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, _ = await ready_mesh(swarm, 30)
        (proxy,) = await swarm.grow(Role.PROXY, 1, state_dir=tmp_path)
        await asyncio.sleep(5.0)
        await proxy.crash()
        await swarm.crash(node for node in swarm.nodes if node.identity.role == Role.BOOTSTRAP)
        await asyncio.sleep(60.0)
        await proxy.boot()
        assert await proxy.running.joined(timeout_s=5.0)
        assert await found(proxy) == ids(fleet)

    simulate(scenario, seed=21)


def test_a_worker_restarted_under_its_id_is_current_at_once() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 30)
        worker = fleet[0]
        await worker.crash()
        await asyncio.sleep(1.0)
        await worker.boot()
        assert await worker.running.joined(timeout_s=5.0)
        worker.announce()
        boot_ms = worker.boot_ms

        def current() -> bool:
            records = [record for record in front[0].running.known(Role.WORKER) if record.node_id == worker.node_id]
            return [record.boot for record in records] == [boot_ms]

        await until(current, within_s=2.0)

    simulate(scenario, seed=22)


def test_a_draining_worker_leaves_its_models_at_once_and_its_role_with_its_record() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 30)
        leaver = fleet[0]
        leaver.state = State.DRAINING
        await leaver.publish()
        models = await front[0].running.find(model_key(MODEL))
        assert leaver.node_id not in {record.node_id for record in models}
        await leaver.shut_down()
        await asyncio.sleep(swarm.config.record_ttl_s + 1.0)
        assert leaver.node_id not in known(front[0]) | await found(front[0])

    simulate(scenario, seed=23)


def test_isolated_nodes_knock_until_a_bootstrap_node_opens() -> None:
    async def scenario(swarm: Swarm) -> None:
        first = swarm.add(Role.BOOTSTRAP)
        swarm.network.names["bootstrap.example"] = [first.address]
        swarm.bootstraps += ["bootstrap.example:7400"]
        early = swarm.add(Role.WORKER)
        await early.boot()
        assert not await early.running.joined(timeout_s=60.0)
        await first.boot()
        assert await early.running.joined(timeout_s=20.0)

    simulate(scenario, seed=24)


def test_a_first_bootstrap_that_names_only_itself_has_joined() -> None:
    async def scenario(swarm: Swarm) -> None:
        first = swarm.add(Role.BOOTSTRAP)
        first.bootstraps = [f"{first.address}:7400"]
        await first.boot()
        assert await first.running.joined(timeout_s=5.0)

    simulate(scenario, seed=25)


def test_ghosts_are_gone_after_one_lifetime_and_never_come_back() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 20)
        killed: set[bytes] = set()
        for _ in range(30):
            victim = swarm.rng.choice(fleet)
            fleet.remove(victim)
            killed.add(victim.node_id)
            await victim.crash()
            fleet += await swarm.grow(Role.WORKER, 1, over_s=0.0)
            fleet[-1].announce()
            await asyncio.sleep(1.0)
        await asyncio.sleep(swarm.config.record_ttl_s)
        for _ in range(6):
            for proxy in front:
                assert not (await found(proxy) | known(proxy)) & killed
            await asyncio.sleep(10.0)
        assert known(front[0]) == ids(fleet)

    simulate(scenario, seed=26)


@pytest.mark.large
def test_thousand_nodes_thirty_percent_dead() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 1_000, proxies=8)
        await swarm.crash(swarm.rng.sample(fleet, 300))
        living = ids([node for node in fleet if node.alive])
        for proxy in front:
            assert await found(proxy) >= living

    simulate(scenario, seed=27)


def watch_walks(node: SimNode) -> list[bytes]:
    """The keys of every look-up of this node from now on."""
    keys: list[bytes] = []
    crawl = node.running.node.crawl

    def noted(key: bytes, **about: Any) -> Awaitable[Outcome]:
        keys.append(key)
        return crawl(key, **about)

    node.running.node.crawl = noted  # type: ignore[method-assign, assignment]
    return keys


def test_in_a_mesh_that_is_not_large_everybody_comes_to_know_everybody_and_then_walks_no_more() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 60)
        assert min(len(node.running.peers()) for node in fleet) < len(swarm.nodes) - 1, "they do not from the start"
        await asyncio.sleep(90.0)
        assert all(len(node.running.peers()) == len(swarm.nodes) - 1 for node in swarm.nodes)
        walked = [watch_walks(worker) for worker in fleet[:10]]
        for worker in fleet[:10]:
            worker.models = (*worker.models, "another")
            assert await worker.publish() >= 3
        found = await front[0].running.find_model("another")
        assert {record.node_id for record in found} == ids(fleet[:10])
        await asyncio.sleep(20.0)
        assert not any(model_key("another") in keys for keys in walked), "nobody contradicted what the table says"

    simulate(scenario, seed=61)


def test_a_holder_that_knows_nearer_nodes_than_the_owner_does_sends_it_walking() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 60)
        await asyncio.sleep(60.0)
        owner, walked = fleet[0].running.node, watch_walks(fleet[0])
        key = model_key("another")
        nearest = min((node.node_id for node in swarm.nodes if node is not fleet[0]), key=lambda one: distance(one, key))
        owner.table.remove(nearest)
        seen = owner.table.seen
        owner.table.seen = lambda node_id, *about: None if node_id == nearest else seen(node_id, *about)  # type: ignore[method-assign]
        assert nearest not in {contact.id for contact in owner.guess(key, 7)}
        fleet[0].models = ("another",)
        await fleet[0].publish()
        assert key not in walked, "the first holders were a guess"
        await until(lambda: key in walked, within_s=15.0)
        await until(lambda: nearest in {contact.id for contact in owner.publisher.holders()[key]}, within_s=5.0)
        assert fleet[0].node_id in {record.node_id for record in await front[0].running.find_model("another")}

    simulate(scenario, seed=62)


def test_a_worker_whose_true_holders_turn_out_full_goes_down_to_a_sub_key() -> None:
    """It was taken in by nodes far from the key, which have room because nobody else asks them, and nobody reads there."""

    async def scenario(swarm: Swarm) -> None:
        _, front = await ready_mesh(swarm, 60)
        await asyncio.sleep(30.0)
        late = max(await swarm.grow(Role.WORKER, 4), key=lambda node: rank(node.node_id))  # one that a full key does not keep
        await asyncio.sleep(15.0)
        key, publisher = role_key(Role.WORKER), late.running.node.publisher
        farthest = max(swarm.nodes[:-4], key=lambda node: distance(node.node_id, key))
        contact = late.running.node.table.get(farthest.node_id)
        assert contact is not None
        publisher._guess = lambda guessed, count: [contact] if guessed == key else []
        late.announce()
        await asyncio.sleep(3.0)
        below = await front[0].running.find(role_key(Role.WORKER, shard_of(late.node_id, 1)))
        assert late.node_id in {record.node_id for record in below}

    simulate(scenario, seed=63, config=with_config(shard_size=8))


@pytest.mark.parametrize("turns", range(8))
def test_a_node_stopped_in_the_moment_its_bootstrap_is_resolved_ends(turns: int) -> None:
    """`asyncio.wait_for` of Python 3.11 swallows a cancellation that comes together with its result: the task went on, and who waited for
    it, for ever."""

    async def scenario(swarm: Swarm) -> None:
        await swarm.bootstrap()
        resolved, lookup = asyncio.Event(), swarm.loop.getaddrinfo

        async def slow(*args: Any, **how: Any) -> list[Any]:
            await resolved.wait()
            return await lookup(*args, **how)

        swarm.loop.getaddrinfo = slow  # type: ignore[method-assign]
        node = swarm.add(Role.WORKER)
        await node.boot()
        await asyncio.sleep(0.1)
        resolved.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(5.0):
            await node.shut_down()

    simulate(scenario, seed=19)


@pytest.mark.parametrize("nearest_is", ["as ever", "slow", "dead"])
def test_where_answers_come_within_milliseconds_the_nearest_is_asked_alone_but_not_waited_for_long(nearest_is: str) -> None:
    """``slow``: as on a busy machine, where the others would only make it busier."""

    async def scenario(swarm: Swarm) -> None:
        fleet, front = await ready_mesh(swarm, 30)
        await asyncio.sleep(30.0)
        key, node = model_key(MODEL), front[0].running.node
        nearest = next(each for each in fleet if each.node_id == node.seeds(key, 1)[0].id)
        nearest.host.up = nearest_is != "dead"
        nearest.host.slow_s = 0.012 if nearest_is == "slow" else 0.0
        hops = (await node.crawl(key, accept=None, timeout_s=1.0)).hops
        assert hops[0].contact.id == nearest.node_id
        assert hops[1].asked_s == pytest.approx(0.02 if nearest_is == "dead" else hops[0].took_s, abs=1e-6)
        assert hops[6].asked_s < hops[1].asked_s + 0.005, "the others at once"

    simulate(scenario, seed=23, conditions=Conditions(rtt_s=0.001))


def test_however_many_stand_in_no_table_one_silent_contact_is_pinged_in_two_probe_intervals() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, _ = await ready_mesh(swarm, 60)
        node, contact = fleet[0].running.node, Contact(fleet[0].node_id, Address(fleet[0].address, PORT))
        strangers = [other.running.node for other in fleet if node.table.get(other.node_id) is None and other is not fleet[0]]
        assert len(strangers) > 10
        pinged: list[bytes] = []
        node.protocol.probe = lambda silent: pinged.append(silent.id)  # type: ignore[method-assign]

        async def all_write() -> int:
            for known in node.table:
                known.seen = float("-inf")
            pinged.clear()
            for stranger in strangers:
                stranger.protocol.probe(contact)
            await asyncio.sleep(0.5)
            return len(pinged)

        assert [await all_write(), await all_write()] == [1, 0]
        await asyncio.sleep(2 * swarm.config.probe_interval_s)
        assert await all_write() == 1

    simulate(scenario, seed=24, config=with_config(k=2))


def test_in_a_large_mesh_a_view_in_hand_is_read_again_from_as_many_nodes_as_hold_it() -> None:
    async def scenario(swarm: Swarm) -> None:
        _, front = await ready_mesh(swarm, 60)
        await asyncio.sleep(20.0)
        node = front[0].running.node
        records = front[0].running.known(Role.WORKER)
        assert len(records) == 60
        fresh, again = [
            await node.crawl(role_key(Role.WORKER), accept=lambda *_: None, timeout_s=1.0, known=known) for known in ([], records)
        ]
        assert len(fresh.nearest) > swarm.config.read_width
        assert swarm.config.holders <= len(again.nearest) < swarm.config.read_width
        assert [one.id for one in again.nearest[: swarm.config.holders]] == [one.id for one in fresh.nearest[: swarm.config.holders]]

    simulate(scenario, seed=25, config=with_config(large_mesh=20))
