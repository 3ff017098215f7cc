"""Liars inside, strangers outside: nothing forged gets in, nothing true is kept from those who look for it."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

import msgpack
import pytest

from mesh.dht.address import Address
from mesh.dht.protocol import EMPTY, Op
from mesh.dht.rpc import COOKIE, INTRO, MAC, RESET
from mesh.dht.session import mac
from mesh.dht.storage import Verdict
from mesh.pulse import MAX_PULSE, PULSE_BYTES
from mesh.records import Record, model_key, role_key, seal_record
from mesh.trust import Role
from tests.support.authority import make_mesh
from tests.support.byzantine import LIES, Liar
from tests.support.strangers import Outsider, bombard, overhear, refusals
from tests.support.swarm import PORT, Swarm, simulate, with_config
from tests.support.virtual_time import WALL_START

STORM_KINDS = 10
"""Kinds of bad stores that `storm` sends."""


async def with_liars(swarm: Swarm, *, honest: int, liars: int, look_ups: int) -> None:
    """Every honest worker serves a model of its own, so each look-up has one right answer."""
    await swarm.bootstrap(2)
    fleet = await swarm.grow(Role.WORKER, honest + liars, over_s=2.0)
    bad = fleet[honest:]
    crooks = [Liar(node, bad, LIES[at % len(LIES)], swarm.rng) for at, node in enumerate(bad)]
    for at, worker in enumerate(fleet[:honest]):
        worker.models = (f"model-{at}",)
        worker.announce()
    await asyncio.sleep(20.0)
    real = {worker.node_id: worker for worker in fleet[:honest]}
    right = 0

    async def look_up(at: int) -> None:
        nonlocal right
        wanted = fleet[at % honest]
        asker = swarm.rng.choice(fleet[:honest])
        records = await asker.running.find_model(wanted.models[0])
        assert all(record.node_id in real and record.models[0].name == wanted.models[0] for record in records)
        right += [record.node_id for record in records] == [wanted.node_id]

    for first in range(0, look_ups, 20):
        await asyncio.gather(*(look_up(at) for at in range(first, min(first + 20, look_ups))))
    told = sum((crook.told for crook in crooks), Counter[str]())
    for lie in ("withheld", "forged", "replayed", "faked contacts", "babbled", "eclipsed", "stores dropped"):
        assert told[lie] > 0, lie
    assert right >= look_ups * 0.999, f"{right} of {look_ups}; lies told: {dict(told)}"


def test_with_a_fifth_of_members_lying_look_ups_are_right() -> None:
    simulate(lambda swarm: with_liars(swarm, honest=64, liars=16, look_ups=200), seed=31)


@pytest.mark.large
@pytest.mark.timeout(900)
def test_with_a_fifth_of_many_members_lying_look_ups_are_right() -> None:
    simulate(lambda swarm: with_liars(swarm, honest=400, liars=100, look_ups=5_000), seed=32)


def test_a_stranger_gets_not_one_byte() -> None:
    async def scenario(swarm: Swarm) -> None:
        overheard = await overhear(swarm, 10, for_s=5.0)
        stranger = await bombard(swarm, overheard, 6_000)
        assert stranger.received == 0
        refused = refusals(swarm.nodes)
        assert refused["refused_unsealed"] > 3_000
        assert refused["refused_replayed"] > 0

    simulate(scenario, seed=33)


def test_a_stranger_gets_nothing_for_sending_to_one_what_was_said_to_another() -> None:
    """What it overheard is sealed and new to whoever gets it now. Only a newcomer's first word, said to a bootstrap node, names nobody."""

    async def scenario(swarm: Swarm) -> None:
        overheard = await overhear(swarm, 10, for_s=3.0)
        stranger = Outsider(swarm.network)
        sent = 0
        for target, data in overheard:
            for node in swarm.nodes:
                if node.address != target:
                    stranger.send(data, node.address)
                    sent += 1
            if sent % 500 < 10:
                await asyncio.sleep(0.05)
        await asyncio.sleep(2.0)
        assert refusals(swarm.nodes)["refused_unsealed"] > 0.9 * sent
        assert stranger.received == 0

    simulate(scenario, seed=62)


def test_a_stranger_cannot_make_a_node_take_anothers_address_for_its_own() -> None:
    """It sends a node's own datagrams back to it, in the name of the bootstrap node."""

    async def scenario(swarm: Swarm) -> None:
        (first,) = await swarm.bootstrap(1)
        (worker,) = await swarm.grow(Role.WORKER, 1)
        overheard: list[bytes] = []

        def reflect(source: tuple[str, int], target: tuple[str, int], data: bytes) -> None:
            if source[0] == worker.address:
                overheard.append(data)

        swarm.network.tap = reflect
        await worker.crash()
        await worker.boot()
        await asyncio.sleep(3.0)
        swarm.network.tap = None
        for data in overheard:
            swarm.network.send((first.address, PORT), (worker.address, PORT), data)
        await asyncio.sleep(1.0)
        assert len(overheard) > 2
        assert not worker.running.node.is_own(Address(first.address, PORT))

    simulate(scenario, seed=63)


def test_another_mesh_and_this_one_do_not_mix() -> None:
    async def scenario(swarm: Swarm) -> None:
        (first,) = await swarm.bootstrap(1)
        other = make_mesh(now=WALL_START)
        stranger = swarm.add(Role.WORKER)
        stranger.identity = other.identity(Role.WORKER, now=WALL_START)
        await stranger.boot()
        assert not await stranger.running.joined(timeout_s=10.0)
        assert swarm.network.bytes_in[stranger.address] == 0
        assert first.running.stats()["refused_unsealed"] > 0

    simulate(scenario, seed=34)


def test_a_member_with_another_meshs_membership_enters_no_table() -> None:
    """The seal key has leaked: the membership still stands in the way."""

    async def scenario(swarm: Swarm) -> None:
        (first,) = await swarm.bootstrap(1)
        other = make_mesh(now=WALL_START)
        thief = swarm.add(Role.WORKER)
        foreign = other.identity(Role.WORKER, now=WALL_START)
        foreign.credentials = replace(foreign.credentials, network_keys=first.identity.credentials.network_keys)
        thief.identity = foreign
        await thief.boot()
        assert not await thief.running.joined(timeout_s=10.0)
        assert first.running.peers() == []
        assert swarm.network.bytes_in[thief.address] == 0

    simulate(scenario, seed=35)


async def storm(swarm: Swarm, *, each: int) -> Counter[str]:
    """One member stores every kind of bad record at one holder, as fast as it is let. Returns the verdicts on each kind."""
    await swarm.bootstrap(1)
    victim, attacker, owner = await swarm.grow(Role.WORKER, 3)
    good = owner.record()
    other = make_mesh(now=WALL_START)
    foreign = other.identity(Role.WORKER, now=WALL_START)
    store, rng = victim.running.node.store, swarm.rng
    assert await owner.running.publish(good) >= 2
    newer = owner.record()
    assert await owner.running.publish(newer) >= 2
    now = owner.clock.wall()

    def flipped() -> bytes:
        at = rng.randrange(len(newer.signed))
        return newer.signed[:at] + bytes((newer.signed[at] ^ 1 << rng.randrange(8),)) + newer.signed[at + 1 :]

    def signed(record: Record, **changes: object) -> bytes:
        changed = replace(record, **changes)  # type: ignore[arg-type]
        return seal_record(changed, owner.identity.key, owner.identity.credentials.membership).signed

    expired = signed(good, issued=now - 100, expires=now - 80, seq=10**6)
    elsewhere = seal_record(newer, foreign.key, foreign.credentials.membership).signed
    stolen = seal_record(newer, attacker.identity.key, owner.identity.credentials.membership).signed
    kinds = {
        "forged": flipped,
        "replayed": lambda: good.signed,
        "rolled back": lambda: signed(good, boot=good.boot - 1_000, seq=10**9),
        "expired": lambda: expired,
        "of another mesh": lambda: elsewhere,
        "with another's membership": lambda: stolen,
        "oversized": lambda: newer.signed + bytes(1_001 - len(newer.signed)),
        "random": lambda: rng.randbytes(rng.randrange(1, 1_000)),
    }
    address = attacker.running.node.table.get(victim.node_id)
    assert address is not None
    protocol = attacker.running.node.protocol
    before = {held.record.node_id: held.record.order for held in store.live(role_key(Role.WORKER), victim.clock.monotonic())}
    verdicts: Counter[str] = Counter()
    for name, make in kinds.items():
        for _ in range(each):
            body = msgpack.packb([[role_key(Role.WORKER)], 20_000, b"", make()])
            reply = await protocol.request(address.address, Op.STORE, body, node_id=victim.node_id)
            verdicts[f"{name}: {Verdict(reply.bodies[0][0][0]).name if reply is not None else 'no answer'}"] += 1
    newer = owner.record()
    before[owner.node_id] = newer.order
    assert await owner.running.publish(newer) >= 2
    for _ in range(each):
        body = msgpack.packb([[model_key("another")], 20_000, b"", newer.signed])
        reply = await protocol.request(address.address, Op.STORE, body, node_id=victim.node_id)
        verdicts[f"mis-keyed: {Verdict(reply.bodies[0][0][0]).name if reply is not None else 'no answer'}"] += 1
    assert await attacker.publish() >= 2
    before[attacker.node_id] = (attacker.boot_ms, attacker.seq)
    for at in range(each):
        body = msgpack.packb([1 + at % MAX_PULSE, rng.randbytes(PULSE_BYTES), b""])
        reply = await protocol.request(address.address, Op.PULSE, body, node_id=victim.node_id)
        verdicts[f"made-up pulse: {Verdict(reply.bodies[0][0]).name if reply is not None else 'no answer'}"] += 1
    assert not any("ACCEPTED" in verdict or "WITHDRAWN" in verdict for verdict in verdicts), verdicts
    after = {held.record.node_id: held.record.order for held in store.live(role_key(Role.WORKER), victim.clock.monotonic())}
    assert all(before.get(node_id) == order for node_id, order in after.items())
    assert store.count(model_key("another")) == 0
    assert len(store) <= len(before)
    return verdicts


async def brew(swarm: Swarm, each: int) -> None:
    verdicts = await storm(swarm, each=each)
    assert len(verdicts) >= STORM_KINDS
    assert sum(verdicts.values()) == STORM_KINDS * each


def test_no_bad_record_is_stored_whatever_is_wrong_with_it() -> None:
    simulate(lambda swarm: brew(swarm, 100), seed=36)


@pytest.mark.large
def test_a_hundred_thousand_bad_records_leave_nothing() -> None:
    simulate(lambda swarm: brew(swarm, 10_000), seed=37)


def test_a_flooding_member_is_held_to_its_rate_and_its_share() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.bootstrap(1)
        victim, attacker, asker = await swarm.grow(Role.WORKER, 3)
        protocol = attacker.running.node.protocol
        contact = attacker.running.node.table.get(victim.node_id)
        assert contact is not None
        session = attacker.running.node.sessions.by_node(victim.node_id)
        assert session is not None
        for _ in range(10):
            for _ in range(1_000):
                protocol.echo(session, contact.address, Op.PROOF, EMPTY)
            await asyncio.sleep(0.1)
        stats = victim.running.stats()
        assert stats["refused_rate"] > 5_000
        assert await asker.publish() >= 2
        await asyncio.sleep(2.0)
        for at in range(swarm.config.max_stores_per_peer + 50):
            sybil = swarm.mesh.identity(Role.WORKER, now=WALL_START)
            fake = replace(attacker.record(), node_id=sybil.node_id, seq=at)
            record = seal_record(fake, sybil.key, sybil.credentials.membership)
            body = msgpack.packb([[role_key(Role.WORKER)], 20_000, b"", record.signed])
            protocol.request(contact.address, Op.STORE, body, node_id=victim.node_id)
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.0)
        assert victim.running.stats()["store_over_quota"] >= 50
        assert len(victim.running.node.store) <= swarm.config.max_stores_per_peer + 1

    simulate(scenario, seed=38, config=with_config(max_stores_per_peer=60))


def test_members_that_send_nonsense_cost_nothing_but_a_count() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.bootstrap(1)
        victim, attacker = await swarm.grow(Role.WORKER, 2)
        await asyncio.sleep(1.0)
        node, rng = attacker.running.node, swarm.rng
        contact = node.table.get(victim.node_id)
        session = node.sessions.by_node(victim.node_id)
        assert contact is not None
        assert session is not None

        def anything(depth: int = 0) -> Any:
            kinds: list[Any] = [None, True, -1, 2**63, 1.5, "text", rng.randbytes(rng.randrange(40)), bytes(32), role_key(Role.WORKER)]
            if depth < 3:
                kinds += [[anything(depth + 1) for _ in range(rng.randrange(6))], {"a": 1}]
            return rng.choice(kinds)

        clock = attacker.clock
        for at in range(3_000):
            kind = rng.choice(list(Op)) if at % 3 else rng.randrange(256)
            body = rng.randbytes(rng.randrange(60)) if at % 5 == 0 else msgpack.packb([anything() for _ in range(rng.randrange(7))])
            flags = rng.choice([MAC, MAC, MAC | COOKIE, INTRO, 0, RESET, 255])
            header = node.protocol.sealer.header(node.protocol.sealer.next_counter(), clock.wall())
            plain = bytes((int(kind), flags)) + node.time.stamp().to_bytes(4) + body
            sealed = node.protocol.sealer.seal(header, plain + mac(session.key, header, plain), clock.wall(), to=victim.node_id)
            node.protocol.transport.sendto(sealed[:1_200], contact.address)
            await asyncio.sleep(0.005)
        await asyncio.sleep(1.0)
        stats = victim.running.stats()
        assert stats["refused_malformed_envelope"] > 500
        assert len(victim.running.node.store) == 0
        assert await attacker.publish() >= 1

    simulate(scenario, seed=39)
