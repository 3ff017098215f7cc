"""Proxies linked with each other and with workers: who hears what, who is routed to, what one may ask of another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from mesh.errors import InvalidRequest
from mesh.link.frames import Frame, encode_control
from mesh.records import State
from mesh.trust import Role
from proxy.fleet import Fleet
from proxy.peers import ByRole, Proxies
from tests.support.authority import make_mesh
from tests.support.pipe import Party, Sink, StreamLoop, run_streams
from tests.support.virtual_time import WALL_START

MESH = make_mesh(now=WALL_START)
IDENTITIES = {
    name: MESH.identity(role, now=WALL_START)
    for name, role in (("alice", Role.PROXY), ("bob", Role.PROXY), ("carol", Role.PROXY), ("worker", Role.WORKER))
}


class Front(Party):
    """A proxy's links, owned as in `proxy.node`."""

    def __init__(self, loop: StreamLoop, name: str, folder: Path) -> None:
        self.heard: list[bytes] = []
        self.fleet = Fleet(on_record=lambda record: self.heard.append(record.node_id))
        self.proxies = Proxies(on_record=lambda record: self.heard.append(record.node_id))
        owner = ByRole({Role.WORKER: self.fleet, Role.PROXY: self.proxies})
        super().__init__(loop, IDENTITIES[name], folder / name, accept=(Role.WORKER, Role.PROXY), owner=owner)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.005)


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Callable[[Front, Front, Party, StreamLoop], Awaitable[None]]], None]:
    """Run a scenario with proxies alice and bob, linked with each other and with one worker."""

    def run(scenario: Callable[[Front, Front, Party, StreamLoop], Awaitable[None]]) -> None:
        async def main(loop: StreamLoop) -> None:
            alice, bob = Front(loop, "alice", tmp_path), Front(loop, "bob", tmp_path)
            worker = Party(loop, IDENTITIES["worker"], tmp_path / "worker", accept=(Role.PROXY,))
            for number, party in enumerate((alice, bob, worker)):
                await party.start(f"10.0.0.{number + 1}")
            alice.peers.want(bob.record())
            bob.peers.want(alice.record())
            alice.peers.want(worker.record())
            worker.peers.want(bob.record())
            await until(lambda: len(alice.peers.links) == len(bob.peers.links) == len(worker.peers.links) == 2)
            await asyncio.sleep(5)
            await scenario(alice, bob, worker, loop)
            for party in (alice, bob, worker):
                await party.peers.stop()

        run_streams(main)

    return run


def test_each_peer_is_where_its_role_belongs(play: Callable[..., None]) -> None:
    async def scenario(alice: Front, bob: Front, worker: Party, loop: StreamLoop) -> None:
        for one, other in ((alice, bob), (bob, alice)):
            assert set(one.fleet.workers) == {worker.node_id}
            assert set(one.proxies.linked) == {other.node_id}
            assert [found.node_id for found in one.fleet.candidates("fake", "chat")] == [worker.node_id]
            assert set(one.heard) == {worker.node_id, other.node_id}

    play(scenario)


def test_proxies_that_dialled_each_other_keep_one_link(play: Callable[..., None]) -> None:
    async def scenario(alice: Front, bob: Front, worker: Party, loop: StreamLoop) -> None:
        assert len(alice.peers._open) == len(bob.peers._open) == 2
        assert alice.link_to(bob).dialled != bob.link_to(alice).dialled

    play(scenario)


def test_request_to_a_proxy_is_refused_and_the_link_stays(play: Callable[..., None]) -> None:
    async def scenario(alice: Front, bob: Front, worker: Party, loop: StreamLoop) -> None:
        sink = Sink()
        sink.stream = alice.link_to(bob).open({"id": "r", "task": "chat", "model": "fake"}, sink)
        await until(lambda: sink.errors)
        assert [type(error) for error in sink.errors] == [InvalidRequest]
        assert not alice.link_to(bob).closed

    play(scenario)


@pytest.mark.parametrize("kind", [Frame.LOAD, Frame.PREFIX])
def test_proxy_that_speaks_as_a_worker_loses_its_link(play: Callable[..., None], kind: Frame) -> None:
    async def scenario(alice: Front, bob: Front, worker: Party, loop: StreamLoop) -> None:
        link = alice.link_to(bob)
        link.write(encode_control(kind, 0, {"run": 0, "wait": 0, "yours": 0}))
        await until(lambda: link.closed)
        assert set(bob.fleet.workers) == {worker.node_id}

    play(scenario)


def test_proxy_serves_while_it_is_ready_and_not_draining(play: Callable[..., None]) -> None:
    async def scenario(alice: Front, bob: Front, worker: Party, loop: StreamLoop) -> None:
        seen = alice.proxies.linked[bob.node_id]
        assert (seen.record.state, seen.serving) == (State.READY, True)
        newer = bob.record()
        bob.peers.broadcast(Frame.RECORD, {"rec": newer.signed})
        await until(lambda: seen.record.order == newer.order)
        bob.peers.broadcast(Frame.DRAIN, {})
        await until(lambda: not seen.serving)

    play(scenario)


def test_proxy_that_is_gone_is_forgotten_and_found_again(play: Callable[..., None]) -> None:
    async def scenario(alice: Front, bob: Front, worker: Party, loop: StreamLoop) -> None:
        before = alice.link_to(bob)
        for ends in loop.pipes:
            if {ends[0].protocol, ends[1].protocol} == {before, bob.link_to(alice)}:
                ends[0].lose()
        await until(lambda: before.closed and bob.node_id not in alice.proxies.linked)
        await until(lambda: bob.node_id in alice.proxies.linked and alice.node_id in bob.proxies.linked)
        assert alice.link_to(bob) is not before

    play(scenario)
