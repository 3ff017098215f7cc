"""Documents among many nodes: written once, kept by many, never rolled back."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import msgpack
import pytest

from mesh.authority import KEYS_KID
from mesh.dht.address import Address
from mesh.dht.protocol import Op
from mesh.dht.routing import Contact
from mesh.dht.rpc import Request
from mesh.documents import MAX_BODY_BYTES, Document, next_version, seal_document
from mesh.errors import DirectoryError
from mesh.trust import Role
from tests.support.byzantine import FalseHolder
from tests.support.network import Conditions
from tests.support.swarm import PORT, SimNode, Swarm, simulate, with_config


def write(swarm: Swarm, former: Document | None, body: bytes, *, name: str = "chat") -> Document:
    now = swarm.nodes[0].clock.wall()
    version = next_version(former, kind="endpoint", name=name, body=body, now=now)
    return seal_document(version, swarm.mesh.keys_issuer, KEYS_KID)


async def settled(swarm: Swarm, workers: int = 30) -> tuple[list[SimNode], list[SimNode]]:
    await swarm.bootstrap(2)
    fleet = await swarm.grow(Role.WORKER, workers)
    front = await swarm.grow(Role.PROXY, 2)
    await asyncio.sleep(2.0)
    return fleet, front


@pytest.mark.parametrize("size", [0, 500, 5_000, MAX_BODY_BYTES])
def test_a_document_of_any_size_is_read_everywhere(size: int) -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await settled(swarm)
        document = write(swarm, None, swarm.rng.randbytes(size))
        assert await fleet[0].running.put_document(document) >= 3
        for reader in (fleet[7], *front):
            assert await reader.running.get_document("endpoint", "chat") == document
        assert await front[0].running.get_document("endpoint", "nothing") is None

    simulate(scenario, seed=51)


def test_a_large_document_gets_through_a_bad_network() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await settled(swarm)
        document = write(swarm, None, swarm.rng.randbytes(MAX_BODY_BYTES))
        assert await fleet[0].running.put_document(document) >= 3
        assert await front[0].running.get_document("endpoint", "chat") == document
        assert swarm.network.fired["lost"] > 10

    simulate(scenario, seed=52, conditions=Conditions(loss=0.05, reordering=0.05, duplication=0.02))


def test_of_two_writers_one_wins_and_the_other_hears_of_it() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await settled(swarm)
        first = write(swarm, None, b"first")
        await fleet[0].running.put_document(first)
        results = await asyncio.gather(
            fleet[1].running.put_document(write(swarm, first, b"alice")),
            fleet[2].running.put_document(write(swarm, first, b"bob")),
            return_exceptions=True,
        )
        assert sum(isinstance(result, int) for result in results) <= 1
        assert all(isinstance(result, int | DirectoryError) for result in results)
        newest = await front[0].running.get_document("endpoint", "chat")
        assert newest is not None
        third = write(swarm, newest, b"third")
        assert await fleet[3].running.put_document(third) >= 3
        assert await front[1].running.get_document("endpoint", "chat") == third
        with pytest.raises(DirectoryError):
            await fleet[4].running.put_document(write(swarm, first, b"late"))

    simulate(scenario, seed=53)


def test_the_last_versions_can_be_read_back() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await settled(swarm)
        version: Document | None = None
        for number in range(1, 5):
            version = write(swarm, version, str(number).encode())
            await fleet[0].running.put_document(version)
        history = await front[0].running.document_history("endpoint", "chat")
        assert [listed.seq for listed in history] == [4, 3, 2, 1]
        old = await front[0].running.get_document("endpoint", "chat", seq=2)
        assert old is not None
        assert old.body == b"2"

    simulate(scenario, seed=54)


def test_a_document_outlives_its_writer_and_its_holders() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await settled(swarm, 40)
        document = write(swarm, None, b"kept")
        await fleet[0].running.put_document(document)
        await fleet[0].crash()
        for _ in range(8):
            await asyncio.sleep(60.0)
            holders = [node for node in swarm.living(Role.WORKER) if node.running.node.documents.newest(document.key) is not None]
            await swarm.crash(holders[:2])
        assert await front[0].running.get_document("endpoint", "chat") == document

    simulate(scenario, seed=55, config=with_config(document_offer_s=30.0))


def test_a_proxy_that_was_offline_refuses_to_go_back(tmp_path: Path) -> None:
    """Everybody else has forgotten; the old version is all the network offers."""

    async def scenario(swarm: Swarm) -> None:
        fleet, _ = await settled(swarm, 10)
        (proxy,) = await swarm.grow(Role.PROXY, 1, state_dir=tmp_path)
        first = write(swarm, None, b"one")
        second = write(swarm, first, b"two")
        for document in (first, second):
            await fleet[0].running.put_document(document)
        assert await proxy.running.get_document("endpoint", "chat") == second
        await proxy.crash()
        for node in swarm.living():
            await node.crash()
            await node.boot()
        await asyncio.sleep(20.0)
        assert await fleet[0].running.put_document(first) >= 3, "nobody here remembers better"
        await proxy.boot()
        assert await proxy.running.joined(timeout_s=5.0)
        assert await proxy.running.get_document("endpoint", "chat") == second
        await asyncio.sleep(5.0)
        assert proxy.running.node.documents.newest(first.key) == second
        await asyncio.sleep(200.0)
        assert await fleet[3].running.get_document("endpoint", "chat") == second, "and the proxy has brought it back"

    simulate(scenario, seed=56, config=with_config(document_offer_s=30.0))


def test_a_watcher_hears_of_each_new_version() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await settled(swarm, 20)
        heard: list[int] = []
        front[0].running.watch_document("endpoint", "chat", lambda document: heard.append(document.seq), interval_s=5.0)
        version = write(swarm, None, b"one")
        await fleet[0].running.put_document(version)
        await asyncio.sleep(6.0)
        await fleet[0].running.put_document(write(swarm, version, b"two"))
        await asyncio.sleep(6.0)
        assert heard == [1, 2]

    simulate(scenario, seed=57)


def fails(document: Document) -> None:
    raise RuntimeError("a listener's fault is not the directory's")


def test_what_a_node_takes_in_it_tells_of_lists_and_passes_on() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, (alice, bob) = await settled(swarm, 20)
        heard: list[Document] = []
        alice.running.on_document(heard.append)
        alice.running.on_document(fails)
        first, other = write(swarm, None, b"one"), write(swarm, None, b"", name="other")
        second = write(swarm, first, bytes(2_000))
        assert [alice.running.accept_document(document.signed) for document in (first, second, first, second)] == [True, True, False, False]
        assert not alice.running.accept_document(second.signed[:-1] + bytes([second.signed[-1] ^ 1]))
        assert not alice.running.accept_document(b"")
        await fleet[0].running.put_document(other)
        assert await alice.running.get_document("endpoint", "other") == other
        assert heard == [first, second, other]
        assert alice.running.held_documents("endpoint") == [second, other]
        assert alice.running.held_documents("limits") == []
        assert alice.running.stats()["refused_document_malformed_envelope"] == 1
        assert alice.running.stats()["refused_document_bad_signature"] == 1
        await asyncio.sleep(90.0)
        assert await bob.running.get_document("endpoint", "chat") == second, "its holder has offered it to the directory"

    simulate(scenario, seed=58, config=with_config(document_offer_s=30.0))


def test_holders_that_boast_and_cheat_spoil_nothing() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, front = await settled(swarm, 32)
        first = write(swarm, None, bytes(2_000))
        nearest = sorted(fleet, key=lambda node: int.from_bytes(node.node_id) ^ int.from_bytes(first.key))
        cheats = [FalseHolder(node, first, swarm.rng) for node in nearest[:2]]
        second = write(swarm, first, bytes(3_000))
        writer = nearest[-1].running
        for document in (first, second):
            assert await writer.put_document(document) >= 3
        for reader in (*front, *nearest[10:]):
            assert await reader.running.get_document("endpoint", "chat") == second
            assert [version.seq for version in await reader.running.document_history("endpoint", "chat")] in ([2, 1], [2])
        told = sum((cheat.told for cheat in cheats), start=Counter[str]())
        assert min(told[lie] for lie in ("dropped", "boasted", "old", "garbage", "nothing", "no end")) > 0, told

    simulate(scenario, seed=59)


def test_two_versions_with_one_number_are_settled_by_the_holders_and_by_nobody_else() -> None:
    """Three members that have seen the version that lost pass it round; then the holders themselves are split and become one."""

    async def scenario(swarm: Swarm) -> None:
        fleet, front = await settled(swarm, 30)
        won, lost = write(swarm, None, b"won"), write(swarm, None, b"lost")
        nearest = sorted(fleet, key=lambda node: int.from_bytes(node.node_id) ^ int.from_bytes(won.key))
        await nearest[-1].running.put_document(won)
        stray, *sybils = nearest[5], *nearest[-4:-1]
        for node in sybils:
            assert node.running.accept_document(lost.signed)
        assert stray.running.accept_document(lost.signed)
        await asyncio.sleep(300.0)
        held = Counter(node.running.node.documents.newest(won.key) for node in fleet)
        assert held[lost] == 0, "who held it has looked and found itself outvoted"
        assert held[won] >= 5
        assert sum(node.running.stats().get("document_conflict", 0) for node in fleet) > 0, "it was offered"
        assert await front[0].running.get_document("endpoint", "chat") == won

    simulate(scenario, seed=60, config=with_config(document_offer_s=30.0))


def test_a_member_that_offers_what_nobody_signed_costs_little() -> None:
    async def scenario(swarm: Swarm) -> None:
        fleet, _ = await settled(swarm, 10)
        flooder, victim = fleet[0].running.node, fleet[1]
        contact = Contact(victim.node_id, Address(victim.address, PORT))
        served: Counter[str] = Counter()

        def serve(request: Request) -> list[list[object]]:
            served["gets"] += 1
            return [[7, digest, 60_000, request.body[2], bytes(900)] for digest in digests[:1]]

        flooder.protocol.handlers[Op.DOC_GET] = serve
        digests = [swarm.rng.randbytes(32) for _ in range(400)]
        for at, digest in enumerate(digests):
            data = swarm.rng.randbytes(600) if at % 2 else b""
            body = msgpack.packb([swarm.rng.randbytes(32), 7, digest, None, data])
            reply = await flooder.protocol.request(contact.address, Op.DOC_OFFER, body, node_id=contact.id)
            assert reply is not None
        await asyncio.sleep(30.0)
        assert 0 < served["gets"] < 200, "a few large ones were looked into, and then no more"
        assert len(victim.running.node.documents) == 0
        assert victim.running.stats()["refused_document_malformed_envelope"] >= 200
        document = write(swarm, None, bytes(9_000))
        assert await fleet[2].running.put_document(document) >= 3
        assert await victim.running.get_document("endpoint", "chat") == document

    simulate(scenario, seed=61)
