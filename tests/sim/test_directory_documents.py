"""Documents among many nodes: written once, kept by many, never rolled back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mesh.authority import KEYS_KID
from mesh.documents import MAX_BODY_BYTES, Document, next_version, seal_document
from mesh.errors import DirectoryError
from mesh.trust import Role
from tests.support.network import Conditions
from tests.support.swarm import SimNode, Swarm, simulate, with_config


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
