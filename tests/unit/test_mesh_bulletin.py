"""Documents over links: pushed, announced, made good; and what a hostile peer gets for its trouble."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from mesh.authority import KEYS_KID
from mesh.bulletin import ACCOUNT_S, BURST, LINK_BYTES, MAX_LISTED, WHOLE_BYTES, Bulletin
from mesh.documents import Document, next_version, seal_document
from mesh.link.frames import Frame
from mesh.trust import KEYSET_KIND, Role, seal_keyset
from tests.support.authority import make_mesh
from tests.support.pipe import Party, StreamLoop, run_streams
from tests.support.shelf import Shelf
from tests.support.virtual_time import WALL_START

MESH = make_mesh(now=WALL_START)
IDENTITIES = {
    name: MESH.identity(role, now=WALL_START)
    for name, role in (("alice", Role.PROXY), ("bob", Role.PROXY), ("carol", Role.PROXY), ("worker", Role.WORKER))
}


def write(former: Document | None = None, body: bytes = b"", *, kind: str = "limits", name: str = "default", project: str = "") -> Document:
    version = next_version(former, kind=kind, name=name, project=project, body=body, now=WALL_START)
    return seal_document(version, MESH.keys_issuer, KEYS_KID)


class Node(Party):
    """A node with documents; its links are a real `Peers`, over pipes."""

    def __init__(self, loop: StreamLoop, name: str, folder: Path) -> None:
        accept = (Role.WORKER, Role.PROXY) if name != "worker" else (Role.PROXY,)
        super().__init__(loop, IDENTITIES[name], folder / name, accept=accept)
        self.shelf = Shelf(MESH.trust(), self.clock)
        self.tasks: list[asyncio.Task[None]] = []
        self.agreed: list[bytes] = []
        self.bulletin = Bulletin(
            self.shelf,
            role=self.identity.role,
            links=lambda: self.peers.links.values(),
            start=lambda work: self.tasks.append(loop.create_task(work)),
            clock=self.clock,
            rng=random.Random(1),
        )
        self.bulletin.on_agreed = lambda link: self.agreed.append(link.node_id)
        self.peers.board = self.bulletin
        self.tasks.append(loop.create_task(self.bulletin.keep()))

    def holds(self, document: Document) -> bool:
        return self.shelf.held_document(document.kind, document.name, project=document.project) == document


class World:
    def __init__(self, loop: StreamLoop, folder: Path) -> None:
        self.loop, self.folder = loop, folder
        self.nodes: dict[str, Node] = {}

    async def node(self, name: str) -> Node:
        node = self.nodes[name] = Node(self.loop, name, self.folder)
        await node.start(f"10.0.0.{len(self.nodes)}")
        return node

    async def link(self, one: Node, other: Node) -> None:
        one.peers.want(other.record())
        await until(lambda: other.node_id in one.peers.links and one.node_id in other.peers.links)

    def stop(self) -> None:
        for node in self.nodes.values():
            for task in node.tasks:
                task.cancel()


async def until(true: Callable[[], object], within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.005)


Play = Callable[[Callable[[World], Awaitable[None]]], None]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    def run(scenario: Callable[[World], Awaitable[None]]) -> None:
        async def main(loop: StreamLoop) -> None:
            world = World(loop, tmp_path)
            try:
                await scenario(world)
            finally:
                world.stop()

        run_streams(main)

    return run


@pytest.mark.parametrize("size", [10, WHOLE_BYTES + 1, LINK_BYTES - 200])
def test_a_new_document_is_everywhere_at_once_also_through_another_proxy(play: Play, size: int) -> None:
    async def scenario(world: World) -> None:
        alice, bob, carol = [await world.node(name) for name in ("alice", "bob", "carol")]
        await world.link(alice, bob)
        await world.link(bob, carol)
        document = write(body=bytes(size))
        assert alice.shelf.accept_document(document.signed)
        await until(lambda: carol.holds(document), within_s=1.0)

    play(scenario)


def test_what_was_missed_is_made_good_when_the_link_comes_up(play: Play) -> None:
    async def scenario(world: World) -> None:
        alice, bob = await world.node("alice"), await world.node("bob")
        first = write()
        newer, other = write(first, b"newer"), write(name="other", project="search")
        alice.shelf.accept_document(newer.signed)
        bob.shelf.accept_document(first.signed)
        bob.shelf.accept_document(other.signed)
        await world.link(alice, bob)
        await until(lambda: bob.holds(newer) and alice.holds(other), within_s=1.0)

    play(scenario)


def test_many_documents_take_several_frames_and_all_come(play: Play) -> None:
    async def scenario(world: World) -> None:
        alice, bob = await world.node("alice"), await world.node("bob")
        documents = [write(name=f"n{number}", kind="endpoint") for number in range(MAX_LISTED + 7)]
        for document in documents:
            alice.shelf.accept_document(document.signed)
        await world.link(alice, bob)
        await until(lambda: all(bob.holds(document) for document in documents))

    play(scenario)


def test_workers_hear_of_keysets_and_of_nothing_else(play: Play) -> None:
    async def scenario(world: World) -> None:
        alice, worker = await world.node("alice"), await world.node("worker")
        await world.link(alice, worker)
        keyset = keyset_document(2)
        alice.shelf.accept_document(write().signed)
        alice.shelf.accept_document(keyset.signed)
        await until(lambda: worker.holds(keyset), within_s=1.0)
        assert worker.shelf.trust.keyset.seq == 2
        assert worker.shelf.held_documents() == [keyset]
        worker.shelf.accept_document(write(kind="prices").signed)
        await asyncio.sleep(2 * ACCOUNT_S)
        assert not alice.shelf.held_documents("prices")

    play(scenario)


def test_proxies_that_hold_the_same_agree_again_and_again(play: Play) -> None:
    async def scenario(world: World) -> None:
        alice, bob = await world.node("alice"), await world.node("bob")
        alice.shelf.accept_document(write().signed)
        await world.link(alice, bob)
        await until(lambda: bob.agreed and alice.agreed, within_s=2 * ACCOUNT_S)
        count = len(bob.agreed)
        await asyncio.sleep(2 * ACCOUNT_S)
        assert len(bob.agreed) > count
        rival = write(body=b"another first version")
        assert not bob.shelf.accept_document(rival.signed)
        bob.shelf.store = Shelf(MESH.trust(), bob.clock).store
        bob.shelf.accept_document(rival.signed)
        bob.agreed.clear()
        await asyncio.sleep(3 * ACCOUNT_S)
        assert bob.agreed == [], "two versions with one number are not the same"

    play(scenario)


def test_what_does_not_hold_is_not_kept_and_the_link_stays(play: Play) -> None:
    async def scenario(world: World) -> None:
        alice, bob = await world.node("alice"), await world.node("bob")
        await world.link(alice, bob)
        link = alice.link_to(bob)
        forged = bytes([*(signed := write().signed)[:-1], signed[-1] ^ 1])
        link.send_control(Frame.DOCUMENT, {"doc": forged})
        link.send_control(Frame.DOCUMENT, {"want": [{"kind": "x", "name": "y", "seq": 1, "dig": bytes(32), "size": 1}]})
        await asyncio.sleep(1)
        assert bob.shelf.held_documents() == []
        assert not link.closed

    play(scenario)


@pytest.mark.parametrize(
    "fields",
    [
        {"doc": "text"},
        {"doc": bytes(LINK_BYTES + 1)},
        {"have": [{"kind": "a"}]},
        {"have": [{"kind": "a", "name": "b", "seq": 0, "dig": bytes(32), "size": 1}]},
        {"want": [1]},
        {"have": [], "close": 1},
    ],
)
def test_a_frame_that_makes_no_sense_ends_the_link(play: Play, fields: dict[str, object]) -> None:
    async def scenario(world: World) -> None:
        alice, bob = await world.node("alice"), await world.node("bob")
        await world.link(alice, bob)
        link = bob.link_to(alice)
        alice.link_to(bob).send_control(Frame.DOCUMENT, fields)
        await until(lambda: link.closed)

    play(scenario)


def test_one_peer_cannot_make_another_verify_without_end(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        alice, bob = await world.node("alice"), await world.node("bob")
        await world.link(alice, bob)
        taken: list[bytes] = []
        monkeypatch.setattr(bob.shelf, "accept_document", taken.append)
        for _ in range(3 * int(BURST)):
            alice.link_to(bob).send_control(Frame.DOCUMENT, {"doc": b"x"})
        await asyncio.sleep(0.5)
        assert BURST - 5 <= len(taken) <= BURST + 20

    play(scenario)


def test_what_is_too_large_for_a_frame_is_read_from_the_directory(play: Play) -> None:
    async def scenario(world: World) -> None:
        alice, bob = await world.node("alice"), await world.node("bob")
        await world.link(alice, bob)
        alice.shelf.accept_document(write(body=bytes(64 * 1024), kind="endpoint").signed)
        await until(lambda: ("endpoint", "default") in bob.shelf.asked)

    play(scenario)


def keyset_document(seq: int) -> Document:
    body = seal_keyset(MESH.root, name="test", seq=seq, issued=WALL_START, issuers=MESH.keyset.issuers)
    return seal_document(
        Document(kind=KEYSET_KIND, name=KEYSET_KIND, seq=seq, previous=bytes(32), issued=WALL_START, body=body), MESH.keys_issuer, KEYS_KID
    )
