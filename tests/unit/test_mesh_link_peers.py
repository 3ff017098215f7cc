"""Who is linked: dialling, one link per pair, silence. In virtual time, over connections in memory, with real identities and records.

What TLS itself refuses is in tests/e2e/test_link.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import WorkerLost
from mesh.link.frames import Frame, FrameReader, encode_control, encode_frame
from mesh.link.link import Link
from mesh.link.peers import LinkConfig
from mesh.records import seal_record
from mesh.trust import Role
from tests.support.authority import make_mesh
from tests.support.pipe import FakeTls, Party, PipeTransport, Raw, Sink, StreamLoop, connect, run_streams
from tests.support.virtual_time import WALL_START

MESH = make_mesh(now=WALL_START)
OTHER_MESH = make_mesh(now=WALL_START, name="other")
IDENTITIES = {
    name: MESH.identity(role, now=WALL_START)
    for name, role in (("proxy", Role.PROXY), ("worker", Role.WORKER), ("second", Role.WORKER), ("boot", Role.BOOTSTRAP))
}

Scenario = Callable[["Stage"], Coroutine[Any, Any, None]]


class Stage:
    """The loop of one test and the nodes on it."""

    def __init__(self, loop: StreamLoop, folder: Path) -> None:
        self.loop = loop
        self.folder = folder

    async def node(self, name: str, host: str | None = None, *, boot: int = 1, config: LinkConfig | None = None) -> Party:
        """A proxy or a worker, listening at ``host`` unless None. The same name again is the same node restarted."""
        identity = IDENTITIES[name]
        accept = Role.WORKER if identity.role == Role.PROXY else Role.PROXY
        party = Party(self.loop, identity, self.folder / f"{name}{boot}", accept=(accept,), boot=boot, config=config)
        return await party.start(host)

    async def until(self, true: Callable[[], object], *, within_s: float = 60.0) -> float:
        """Let virtual time pass until it is true; returns how much passed."""
        start = self.loop.time()
        while not true():
            assert self.loop.time() - start < within_s, "never became true"
            await asyncio.sleep(0.005)
        return self.loop.time() - start

    async def linked(self, *, config: LinkConfig | None = None) -> tuple[Party, Party]:
        proxy, worker = await self.node("proxy", config=config), await self.node("worker", "10.0.0.2", config=config)
        proxy.peers.want(worker.record())
        await self.until(lambda: proxy.peers.links and worker.peers.links)
        return proxy, worker


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Scenario], None]:
    """Run a scenario on a loop of its own."""
    return lambda scenario: run_streams(lambda loop: scenario(Stage(loop, tmp_path)))


Play = Callable[[Scenario], None]


# -- coming together


def test_dialled_node_and_dialler_both_have_the_link_and_each_others_record(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.linked()
        assert proxy.link_to(worker).dialled
        assert not worker.link_to(proxy).dialled
        assert [record.node_id for record in proxy.room.up] == [worker.node_id]
        assert [record.node_id for record in worker.room.up] == [proxy.node_id]
        assert proxy.link_to(worker).peer.role == Role.WORKER

    play(scenario)


def test_two_nodes_that_dial_at_once_end_with_one_link_the_same_on_both_sides(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.node("proxy", "10.0.0.1"), await stage.node("worker", "10.0.0.2")
        proxy.peers.want(worker.record())
        worker.peers.want(proxy.record())
        await stage.until(lambda: proxy.peers.links and worker.peers.links)
        await asyncio.sleep(10)
        assert len(stage.loop.pipes) == 2, "the fault: both dialled"
        assert proxy.link_to(worker).dialled == (proxy.node_id < worker.node_id)
        assert worker.link_to(proxy).dialled == (worker.node_id < proxy.node_id)
        kept = [pipe for pipe in stage.loop.pipes if not pipe[0].is_closing()]
        assert len(kept) == 1
        assert {kept[0][0].protocol, kept[0][1].protocol} == {proxy.link_to(worker), worker.link_to(proxy)}

    play(scenario)


@pytest.mark.parametrize("head_start_s", [0.0, 0.003, 0.0099, 0.0101, 0.015])
@pytest.mark.parametrize("first", ["proxy", "worker"])
def test_however_two_dials_overlap_one_link_is_left(play: Play, first: str, head_start_s: float) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.node("proxy", "10.0.0.1"), await stage.node("worker", "10.0.0.2")
        order = (proxy, worker) if first == "proxy" else (worker, proxy)
        order[0].peers.want(order[1].record())
        await asyncio.sleep(head_start_s)
        order[1].peers.want(order[0].record())
        await asyncio.sleep(10)
        kept = [pipe for pipe in stage.loop.pipes if not pipe[0].is_closing()]
        assert len(kept) == 1
        assert {kept[0][0].protocol, kept[0][1].protocol} == {proxy.link_to(worker), worker.link_to(proxy)}
        assert len(proxy.room.up) - len(proxy.room.down) == 1
        assert len(worker.room.up) - len(worker.room.down) == 1

    play(scenario)


def test_request_on_the_link_that_is_not_kept_is_finished(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.node("proxy", "10.0.0.1"), await stage.node("worker", "10.0.0.2")
        lower, higher = sorted((proxy, worker), key=lambda party: party.node_id)
        # The link that will not be kept comes up first, and is used at once.
        higher.peers.want(lower.record())
        await stage.until(lambda: lower.peers.links and higher.peers.links)
        doomed = proxy.link_to(worker)
        sink = Sink()
        sink.stream = doomed.open({}, sink)
        # As after a glitch of the network: the other side was dialling at the same time.
        stage.loop.create_task(lower.peers._dial(higher.addresses[0], higher.node_id))
        await stage.until(lambda: proxy.link_to(worker) is not doomed)
        await asyncio.sleep(3)
        assert not doomed.closed
        (stream,) = worker.room.opened
        stream.end({"out": 1})
        await stage.until(lambda: doomed.closed, within_s=3)
        assert sink.trailer == {"out": 1}
        assert sink.errors == []
        assert not proxy.link_to(worker).closed

    play(scenario)


def test_restarted_node_replaces_its_old_link_at_once(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.linked()
        old = proxy.link_to(worker)
        sink = Sink()
        sink.stream = old.open({}, sink)
        for end in stage.loop.pipes[0]:
            end.hold()  # its machine lost power: no FIN will ever come
        again = await stage.node("worker", "10.0.0.3", boot=2)
        stage.loop.create_task(proxy.peers._dial(again.addresses[0], again.node_id))
        await stage.until(lambda: proxy.link_to(worker) is not old, within_s=1)
        assert old.closed
        assert [type(error) for error in sink.errors] == [WorkerLost]
        assert proxy.room.down == ["replaced"]
        assert [record.boot for record in proxy.room.up] == [1, 2]
        assert again.link_to(proxy)

    play(scenario)


def test_older_boot_does_not_replace_a_newer_link(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.node("proxy"), await stage.node("worker", "10.0.0.2", boot=2)
        proxy.peers.want(worker.record())
        await stage.until(lambda: proxy.peers.links)
        link = proxy.link_to(worker)
        past = await stage.node("worker", "10.0.0.3", boot=1)
        await proxy.peers._dial(past.addresses[0], past.node_id)
        assert proxy.link_to(worker) is link
        await stage.until(lambda: not past.peers.links, within_s=1)

    play(scenario)


def test_node_without_addresses_is_not_dialled_but_can_dial(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.node("proxy", "10.0.0.1"), await stage.node("worker")
        proxy.peers.want(worker.record())
        await asyncio.sleep(5)
        assert stage.loop.dials == []
        worker.peers.want(proxy.record())
        await stage.until(lambda: proxy.peers.links)
        assert not proxy.link_to(worker).dialled

    play(scenario)


def test_node_is_not_dialled_twice_at_once_nor_when_linked(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.node("proxy"), await stage.node("worker", "10.0.0.2")
        for _ in range(10):
            proxy.peers.want(worker.record())
        await stage.until(lambda: proxy.peers.links)
        for _ in range(10):
            proxy.peers.want(worker.record())
            await asyncio.sleep(0.3)
        assert len(stage.loop.dials) == 1

    play(scenario)


def test_wrong_role_and_own_record_are_not_dialled(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.node("worker", "10.0.0.2")
        other = await stage.node("second", "10.0.0.3")
        worker.peers.want(other.record())
        worker.peers.want(worker.record())
        await asyncio.sleep(1)
        assert stage.loop.dials == []

    play(scenario)


ODD_ADDRESSES = ["", "x", "10.0.0.9:0", "10.0.0.9:99999", "10.0.0.9:-1", "[::1", "a b:5", "10.0.0.9:٣", "::::", "\x7f:1"]


@pytest.mark.parametrize("address", ODD_ADDRESSES)
def test_odd_address_is_passed_over_and_the_next_one_tried(play: Play, address: str) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.node("proxy"), await stage.node("worker", "10.0.0.2")
        proxy.peers.want(replace(worker.record(), addresses=(address, *worker.addresses)))
        await stage.until(lambda: proxy.peers.links, within_s=1)
        assert stage.loop.dials == [("10.0.0.2", 1000)]

    play(scenario)


def test_dialling_backs_off_while_the_record_lives_and_ends_with_it(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.node("proxy"), await stage.node("worker", "10.0.0.2")
        worker.peers._server.close()
        proxy.peers.want(worker.record())
        await asyncio.sleep(60)
        assert 5 <= len(stage.loop.dials) <= 15
        assert proxy.peers._wanted == {}
        assert proxy.peers._dials == {}

    play(scenario)


def test_another_node_at_the_address_is_refused(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.node("proxy"), await stage.node("worker", "10.0.0.2")
        impostor = await stage.node("second", "10.0.0.3")
        proxy.peers.want(replace(worker.record(), addresses=impostor.addresses))
        await asyncio.sleep(5)
        assert stage.loop.dials, "the fault: it was dialled"
        assert (proxy.peers.links, impostor.peers.links) == ({}, {})
        assert (proxy.room.up, impostor.room.up) == ([], [])

    play(scenario)


def test_listener_that_speaks_another_protocol_is_refused(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.linked()
        link = Link(proxy.peers, clock=proxy.clock, dialled=True)
        tls = stage.loop.pipes[0][0].get_extra_info("ssl_object")
        connect(link, Raw(), extra=({"ssl_object": replace(tls, alpn="h2")}, {}))
        assert link.closed
        link = Link(proxy.peers, clock=proxy.clock, dialled=True)
        connect(link, Raw(), extra=({"ssl_object": replace(tls, certificate=None)}, {}))
        assert link.closed
        assert worker.node_id in proxy.peers.links

    play(scenario)


# -- HELLO, RECORD and the rest


def hello(record: bytes, **fields: Any) -> bytes:
    return encode_control(Frame.HELLO, 0, {"v": 1, "rec": record, **fields})


def raw_peer(proxy: Party, worker: Party) -> tuple[Link, Raw, PipeTransport]:
    """A connection that TLS has found to be the worker's, with nothing said yet by it."""
    link, raw = Link(proxy.peers, clock=proxy.clock, dialled=False), Raw()
    _, raw_end = connect(link, raw, extra=({"ssl_object": FakeTls(worker.certificate)}, {}))
    return link, raw, raw_end


def bad_hellos(worker: Party, second: Party, foreign: Party) -> dict[str, bytes]:
    good = worker.record()
    tampered = bytearray(good.signed)
    tampered[100] ^= 1
    old = replace(good, issued=good.issued - 100, expires=good.issued - 50)
    expired = seal_record(old, worker.identity.key, worker.identity.membership.signed)
    return {
        "another node's record": hello(second.record().signed),
        "a forged record": hello(bytes(tampered)),
        "a record of another mesh": hello(foreign.record().signed),
        "an expired record": hello(expired.signed),
        "no record": encode_control(Frame.HELLO, 0, {"v": 1}),
        "no version": encode_control(Frame.HELLO, 0, {"rec": good.signed}),
        "version 0": hello(good.signed, v=0),
        "a version that is no number": hello(good.signed, v="1"),
        "a record that is text": hello("x" * 100),  # type: ignore[arg-type]
        "an endless record": hello(bytes(5000)),
        "an empty record": hello(b""),
    }


HELLO_NAMES = [
    "another node's record",
    "a forged record",
    "a record of another mesh",
    "an expired record",
    "no record",
    "no version",
    "version 0",
    "a version that is no number",
    "a record that is text",
    "an endless record",
    "an empty record",
]


@pytest.mark.parametrize("name", HELLO_NAMES)
def test_bad_hello_ends_the_connection_before_anybody_hears_of_it(play: Play, name: str) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.node("proxy", "10.0.0.1"), await stage.node("worker", "10.0.0.2")
        second = await stage.node("second", "10.0.0.3")
        foreign = Party(stage.loop, OTHER_MESH.identity(Role.WORKER, now=WALL_START), stage.folder / "foreign", accept=(Role.PROXY,))
        hellos = bad_hellos(worker, second, foreign)
        assert list(hellos) == HELLO_NAMES
        link, raw, raw_end = raw_peer(proxy, worker)
        raw_end.write(hellos[name])
        await stage.until(lambda: raw.is_lost, within_s=1)
        assert link.closed
        assert (proxy.peers.links, proxy.room.up, proxy.room.down) == ({}, [], [])

    play(scenario)


def test_good_hello_of_a_newer_protocol_version_is_taken(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.node("proxy", "10.0.0.1"), await stage.node("worker", "10.0.0.2")
        link, _, raw_end = raw_peer(proxy, worker)
        raw_end.write(hello(worker.record().signed, v=7, news={"a": [1]}))
        await stage.until(lambda: proxy.peers.links, within_s=1)
        assert proxy.link_to(worker) is link

    play(scenario)


def test_connection_that_never_says_hello_is_ended(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.node("proxy", "10.0.0.1"), await stage.node("worker", "10.0.0.2")
        _, raw, _ = raw_peer(proxy, worker)
        took_s = await stage.until(lambda: raw.is_lost, within_s=10)
        assert 5 <= took_s <= 7
        assert proxy.room.up == []

    play(scenario)


def test_record_that_does_not_hold_ends_the_link(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.linked()
        second = await stage.node("second", "10.0.0.3")
        worker.link_to(proxy).send_control(Frame.RECORD, {"rec": worker.record().signed})
        await stage.until(lambda: proxy.room.records, within_s=1)
        worker.link_to(proxy).send_control(Frame.RECORD, {"rec": second.record().signed})
        await stage.until(lambda: not proxy.peers.links, within_s=1)
        assert [record.node_id for record in proxy.room.records] == [worker.node_id]

    play(scenario)


def test_load_and_drain_reach_the_owner_and_a_draining_peer_is_not_dialled_again(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.linked()
        worker.peers.broadcast(Frame.LOAD, {"run": 1})
        worker.peers.broadcast(Frame.DRAIN, {})
        await stage.until(lambda: proxy.room.drains, within_s=1)
        assert proxy.room.loads == [{"run": 1}]
        assert proxy.link_to(worker).draining
        await worker.peers.stop()
        await stage.until(lambda: not proxy.peers.links, within_s=1)
        await asyncio.sleep(30)
        assert len(stage.loop.dials) == 1

    play(scenario)


def test_record_broadcast_between_admission_and_hello_is_not_missed(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.node("proxy", "10.0.0.1"), await stage.node("worker", "10.0.0.2")
        link, raw, raw_end = raw_peer(proxy, worker)
        proxy.peers.broadcast(Frame.RECORD, {"rec": proxy.record().signed})
        raw_end.write(hello(worker.record().signed))
        await stage.until(lambda: proxy.peers.links, within_s=1)
        await asyncio.sleep(0.1)
        kinds = [kind for kind, _, _ in FrameReader().feed(bytes(raw.got))]
        assert kinds[:2] == [Frame.HELLO, Frame.RECORD]
        assert not link.closed

    play(scenario)


# -- losing a peer and coming back


def test_broken_link_is_dialled_again_within_a_moment(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, _ = await stage.linked()
        stage.loop.pipes[0][0].lose()
        await stage.until(lambda: not proxy.peers.links, within_s=1)
        assert await stage.until(lambda: proxy.peers.links, within_s=1) < 0.2
        assert proxy.room.down == ["connection lost: ConnectionResetError"]

    play(scenario)


def test_link_is_dialled_again_from_the_record_it_brought_though_the_directory_is_gone(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.linked()
        for _ in range(20):  # longer than the record lives that the directory had
            await asyncio.sleep(5)
            worker.peers.broadcast(Frame.RECORD, {"rec": worker.record().signed})
        stage.loop.pipes[0][0].lose()
        await stage.until(lambda: not proxy.peers.links, within_s=1)
        await stage.until(lambda: proxy.peers.links, within_s=1)

    play(scenario)


def test_node_that_said_good_bye_is_soon_not_dialled_any_more(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.linked()
        worker.ttl_s = 1.0
        worker.peers.broadcast(Frame.RECORD, {"rec": worker.record().signed})
        await asyncio.sleep(0.1)
        await worker.peers.stop()
        await asyncio.sleep(60)
        assert len(stage.loop.dials) < 8
        assert (proxy.peers._wanted, proxy.peers._boots, proxy.peers._open, proxy.peers._dials) == ({}, {}, set(), {})

    play(scenario)


def test_silent_peer_is_given_up_after_three_heartbeats(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.linked()
        sink = Sink()
        sink.stream = proxy.link_to(worker).open({}, sink)
        await asyncio.sleep(20)
        assert proxy.peers.links
        assert worker.peers.links
        for end in stage.loop.pipes[0]:
            end.hold()
        took_s = await stage.until(lambda: sink.errors, within_s=10)
        assert 2 <= took_s <= 4
        assert isinstance(sink.errors[0], WorkerLost)
        assert proxy.room.down[0].startswith("silent for")
        await stage.until(lambda: worker.room.down, within_s=2)

    play(scenario)


def test_one_way_silence_is_noticed_too(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.linked()
        await asyncio.sleep(5)
        stage.loop.pipes[0][1].hold()  # what the worker sends no longer arrives
        await stage.until(lambda: proxy.room.down, within_s=5)
        await stage.until(lambda: worker.room.down, within_s=1)

    play(scenario)


@pytest.mark.parametrize("stood_s", [0.9, 1.5, 1.95, 2.5, 10.0, 3600.0])
@pytest.mark.parametrize("offset_s", [0.0, 0.001, 0.5, 0.999])
def test_process_that_stood_still_does_not_blame_its_peers(play: Play, stood_s: float, offset_s: float) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.linked()
        link = proxy.link_to(worker)
        for pause_s in (5.0 + offset_s, 1.2, 0.3):
            await asyncio.sleep(pause_s)
            stage.loop.pass_without_running(stood_s)
        await asyncio.sleep(5)
        assert proxy.link_to(worker) is link
        assert proxy.room.down == []
        assert worker.room.down == []

    play(scenario)


def test_dead_peer_is_noticed_even_by_a_process_that_stands_still_now_and_then(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, _ = await stage.linked()
        await asyncio.sleep(5)
        for end in stage.loop.pipes[0]:
            end.hold()
        start = stage.loop.time()
        while not proxy.room.down:
            await asyncio.sleep(0.2)
            stage.loop.pass_without_running(2.0)
            assert stage.loop.time() - start < 15

    play(scenario)


def test_link_of_a_node_whose_certificate_runs_out_ends_and_one_that_renewed_stays(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.linked()
        link = proxy.link_to(worker)
        left_s = link.vouched_until - stage.loop.time()
        assert 23 * 3600 < left_s <= 24 * 3600
        link.vouched_until = stage.loop.time() + 30
        worker.peers.broadcast(Frame.RECORD, {"rec": worker.record().signed})
        await asyncio.sleep(60)
        assert proxy.link_to(worker) is link, "its new record says that it still is a member"
        link.vouched_until = stage.loop.time() + 5
        await stage.until(lambda: proxy.room.down, within_s=10)
        assert proxy.room.down == ["its certificate has run out"]
        await stage.until(lambda: worker.room.down, within_s=2)

    play(scenario)


def test_busy_link_is_not_silent(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.linked(config=LinkConfig(heartbeat_s=1000.0))
        for _ in range(20):
            await asyncio.sleep(1)
            worker.link_to(proxy).write(encode_frame(99, 0))
        assert proxy.peers.links

    play(scenario)


def test_stopping_closes_every_link_and_dials_no_more(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        proxy, worker = await stage.linked()
        second = await stage.node("second", "10.0.0.3")
        proxy.peers.want(second.record())
        await stage.until(lambda: len(proxy.peers.links) == 2)
        await proxy.peers.stop()
        proxy.peers.want(second.record())
        await asyncio.sleep(1)
        assert proxy.peers.links == {}
        assert proxy.peers._open == set()
        assert all(end.is_closing() for pipe in stage.loop.pipes for end in pipe)
        assert len(proxy.room.down) == 2
        assert len(worker.room.down) == len(second.room.down) == 1

    play(scenario)
