"""Connections in memory: a pair of transports joined back to back, links over them, and a loop on which `Peers` dial each other so.

What a test does with a pipe: hold bytes back (`hold`), cut them into pieces (`piece_bytes`), break it (`lose`). No sockets, no TLS; who is
at the other end is what the test says.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mesh.claims import read_str
from mesh.clock import Clock, SystemClock
from mesh.errors import MeshError
from mesh.identity import ALPN, Identity, Peer, TlsContexts
from mesh.link.frames import Frame, encode_control
from mesh.link.link import IncomingStream, Link
from mesh.link.peers import LinkConfig, Peers, PeersOwner
from mesh.membership import MembershipCache
from mesh.records import ModelEntry, Record, State, seal_record
from mesh.trust import Role
from tests.support.virtual_time import VirtualClock, VirtualLoop

HIGH_WATER_BYTES = 64 * 1024


class PipeTransport(asyncio.Transport):
    """One end. What is written here is delivered to the other end's protocol, in order, in later turns of the loop."""

    def __init__(self, protocol: asyncio.Protocol, extra: Mapping[str, Any] | None = None) -> None:
        super().__init__(dict(extra or {}))
        self.protocol = protocol
        self.other: PipeTransport | None = None
        self.sent = bytearray()
        """Every byte ever written, for a test to look at."""
        self.writes = 0
        self.piece_bytes: int | None = None
        self.aborted = False
        self._buffer = bytearray()
        self._held = False
        self._closing = False
        self._lost = False
        self._paused = False
        self._high = HIGH_WATER_BYTES
        self._loop = asyncio.get_running_loop()

    # -- what a test does

    def hold(self) -> None:
        """Deliver nothing more from this end: the other does not read, or the network is gone."""
        self._held = True

    def release(self) -> None:
        self._held = False
        self._schedule()

    def lose(self, error: Exception | None = None) -> None:
        """Break the connection for both ends at once."""
        for end in (self, self.other):
            if end is not None:
                end._drop(error or ConnectionResetError("lost"))

    @property
    def waiting(self) -> bool:
        return bool(self._buffer) and not self._held and not self._lost

    # -- asyncio.Transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or self._lost:
            return
        self.writes += 1
        self.sent += data
        self._buffer += data
        if not self._paused and len(self._buffer) > self._high:
            self._paused = True
            self.protocol.pause_writing()
        self._schedule()

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._schedule()

    def abort(self) -> None:
        self.aborted = True
        self._drop(None)
        if self.other is not None:
            self.other._drop(ConnectionResetError("aborted by the other end"))

    def is_closing(self) -> bool:
        return self._closing or self._lost

    def get_write_buffer_size(self) -> int:
        return len(self._buffer)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = HIGH_WATER_BYTES if high is None else high

    # -- inside

    def _schedule(self) -> None:
        self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        if self._held or self._lost:
            return
        if self._buffer and self.other is not None and not self.other._lost:
            size = self.piece_bytes or len(self._buffer)
            piece = bytes(self._buffer[:size])
            del self._buffer[:size]
            self.other.protocol.data_received(piece)
            if self._paused and len(self._buffer) <= self._high // 4:
                self._paused = False
                self.protocol.resume_writing()
            if self._buffer:
                self._schedule()
        if self._closing and not self._buffer:
            self._drop(None)
            if self.other is not None:
                self.other._drop(None)

    def _drop(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = self._closing = True
            self._loop.call_soon(self.protocol.connection_lost, error)


def connect(
    one: asyncio.Protocol, other: asyncio.Protocol, *, extra: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None
) -> tuple[PipeTransport, PipeTransport]:
    """Join two protocols. ``extra`` is what each end's transport tells its own protocol (`get_extra_info`)."""
    about_one, about_other = extra or ({}, {})
    ends = PipeTransport(one, about_one), PipeTransport(other, about_other)
    ends[0].other, ends[1].other = ends[1], ends[0]
    one.connection_made(ends[0])
    other.connection_made(ends[1])
    return ends


async def settle(*ends: PipeTransport) -> None:
    """Return once nothing is on its way any more, and whoever was woken by it has run."""
    quiet = 0
    while quiet < 8:
        await asyncio.sleep(0)
        quiet = 0 if any(end.waiting for end in ends) else quiet + 1


# ----------------------------------------------------------------------------------------------------- links over a pipe


class Owner:
    """Implements `mesh.link.link.LinkOwner`: says HELLO, lets everybody in, notes what happens. ``on_stream`` gets what is opened."""

    def __init__(self, peer: Peer, *, refuse: MeshError | None = None) -> None:
        self.peer = peer
        self.refuse = refuse
        self.hellos: list[dict[str, Any]] = []
        self.controls: list[tuple[Frame, dict[str, Any]]] = []
        self.opened: list[tuple[IncomingStream, dict[str, Any]]] = []
        self.lost: list[str] = []
        self.on_stream: Callable[[IncomingStream, dict[str, Any]], None] | None = None

    def admit(self, link: Link, transport: asyncio.Transport) -> Peer:
        if self.refuse is not None:
            raise self.refuse
        link.send_control(Frame.HELLO, {"v": 1})
        return self.peer

    def on_hello(self, link: Link, fields: dict[str, Any]) -> None:
        self.hellos.append(fields)

    def on_open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        self.opened.append((stream, head))
        if self.on_stream is not None:
            self.on_stream(stream, head)

    def on_control(self, link: Link, kind: Frame, fields: dict[str, Any]) -> None:
        self.controls.append((kind, fields))

    def on_lost(self, link: Link, reason: str) -> None:
        self.lost.append(reason)


class Sink:
    """Implements `mesh.link.link.StreamSink`: notes everything. ``eager`` gives credit back at once; else the test calls ``consumed``."""

    def __init__(self, *, eager: bool = True) -> None:
        self.accepted = 0
        self.slot_ms: int | None = None
        """What HEAD said of it, which then counts as accepted too."""
        self.progress: list[dict[str, Any]] = []
        self.heads: list[dict[str, Any]] = []
        self.data = bytearray()
        self.trailer: dict[str, Any] | None = None
        self.errors: list[MeshError] = []
        self.stream: Any = None
        self._eager = eager

    def on_accepted(self) -> None:
        self.accepted += 1

    def on_progress(self, info: dict[str, Any]) -> None:
        self.progress.append(info)

    def on_head(self, head: dict[str, Any]) -> None:
        self.slot_ms = head.pop("acc", None)
        self.accepted += self.slot_ms is not None
        self.heads.append(head)

    def on_data(self, data: bytes) -> None:
        self.data += data
        if self._eager:
            self.stream.consumed(len(data))

    def on_end(self, trailer: dict[str, Any]) -> None:
        self.trailer = trailer

    def on_error(self, error: MeshError) -> None:
        self.errors.append(error)


ALICE = Peer(node_id=b"a" * 32, role=Role.PROXY)
BOB = Peer(node_id=b"b" * 32, role=Role.WORKER)


@dataclass
class Pair:
    """Alice, a proxy, dialled Bob, a worker. Each side's link, owner and end of the pipe."""

    alice: Link
    bob: Link
    alice_owner: Owner
    bob_owner: Owner
    alice_end: PipeTransport
    bob_end: PipeTransport

    async def settle(self) -> None:
        await settle(self.alice_end, self.bob_end)

    def open(self, head: Mapping[str, Any] | None = None, *, eager: bool = True) -> Sink:
        """Alice opens a stream; its answer goes to the sink returned, the stream is ``sink.stream``."""
        sink = Sink(eager=eager)
        sink.stream = self.alice.open(head or {}, sink)
        return sink


async def linked(*, piece_bytes: int | None = None, clock: Clock | None = None) -> Pair:
    """Two links that have said HELLO to each other."""
    owners = Owner(BOB), Owner(ALICE)
    clock = clock or SystemClock()
    alice, bob = Link(owners[0], clock=clock, dialled=True), Link(owners[1], clock=clock, dialled=False)
    ends = connect(alice, bob)
    for end in ends:
        end.piece_bytes = piece_bytes
    pair = Pair(alice, bob, *owners, *ends)
    await pair.settle()
    return pair


class Raw(asyncio.Protocol):
    """A peer under the test's own control: writes any bytes whatever, notes what it got."""

    def __init__(self) -> None:
        self.got = bytearray()
        self.is_lost = False

    def data_received(self, data: bytes) -> None:
        self.got += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True


@dataclass
class Attacked:
    """A link whose peer is `Raw`."""

    link: Link
    owner: Owner
    raw: Raw
    link_end: PipeTransport
    raw_end: PipeTransport

    async def send(self, *frames: bytes) -> None:
        for frame in frames:
            self.raw_end.write(frame)
        await settle(self.link_end, self.raw_end)


async def attacked(*, dialled: bool = False, hello: bool = True, clock: Clock | None = None) -> Attacked:
    """A link (the listening side, unless ``dialled``) for a test to send nonsense to; with ``hello`` the nonsense comes after a HELLO."""
    owner, raw = Owner(ALICE), Raw()
    link = Link(owner, clock=clock or SystemClock(), dialled=dialled)
    link_end, raw_end = connect(link, raw)
    found = Attacked(link, owner, raw, link_end, raw_end)
    if hello:
        await found.send(encode_control(Frame.HELLO, 0, {"v": 1}))
    return found


# ------------------------------------------------------------------------------------------------ `Peers` without sockets


@dataclass
class FakeTls:
    """What `Peers` asks a TLS object for."""

    certificate: bytes | None
    alpn: str | None = ALPN

    def getpeercert(self, binary_form: bool = False) -> bytes | None:
        assert binary_form
        return self.certificate

    def selected_alpn_protocol(self) -> str | None:
        return self.alpn


@dataclass
class _Listening:
    factory: Callable[[], asyncio.Protocol]
    certificate: bytes


class StreamLoop(VirtualLoop):
    """A virtual-time loop with connections in memory. Certificates are not checked here, only told: TLS itself is tested over sockets."""

    def __init__(self) -> None:
        super().__init__()
        self.certificates: dict[Any, bytes] = {}
        """TLS context → the certificate of whoever holds it."""
        self.listening: dict[tuple[str, int], _Listening] = {}
        self.pipes: list[tuple[PipeTransport, PipeTransport]] = []
        """Every connection made, dialling end first."""
        self.latency_s = 0.01
        self.dials: list[tuple[str, int]] = []

    async def create_server(self, factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:  # type: ignore[override]
        port = port or 1000 + len(self.listening)
        self.listening[host, port] = _Listening(factory, self.certificates[options["ssl"]])
        return _Server(self, (host, port))

    async def create_connection(self, factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:  # type: ignore[override]
        self.dials.append((host, port))
        await asyncio.sleep(self.latency_s)
        listening = self.listening.get((host, port))
        if listening is None:
            raise ConnectionRefusedError(f"nobody listens at {host}:{port}")
        one, other = factory(), listening.factory()
        extra = {"ssl_object": FakeTls(listening.certificate)}, {"ssl_object": FakeTls(self.certificates[options["ssl"]])}
        ends = connect(one, other, extra=extra)
        self.pipes.append(ends)
        return ends[0], one

    def pass_without_running(self, seconds: float) -> None:
        """The process stands still: time passes and nothing runs."""
        self._virtual.now += seconds


class _Server:
    def __init__(self, loop: StreamLoop, at: tuple[str, int]) -> None:
        self._loop, self._at = loop, at
        self.sockets = [self]

    def getsockname(self) -> tuple[str, int]:
        return self._at

    def close(self) -> None:
        self._loop.listening.pop(self._at, None)


@dataclass
class Room:
    """Implements `mesh.link.peers.PeersOwner`: notes what happens."""

    up: list[Record] = field(default_factory=list)
    down: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    drains: int = 0
    opened: list[IncomingStream] = field(default_factory=list)

    def on_up(self, link: Link, record: Record) -> None:
        self.up.append(record)

    def on_down(self, link: Link, reason: str) -> None:
        self.down.append(reason)

    def on_record(self, link: Link, record: Record) -> None:
        self.records.append(record)

    def on_load(self, link: Link, fields: dict[str, Any]) -> None:
        read_str(fields, "any", default="")
        self.loads.append(fields)

    def on_prefix(self, link: Link, fields: dict[str, Any]) -> None:
        pass

    def on_drain(self, link: Link) -> None:
        self.drains += 1

    def on_frame(self, link: Link, kind: Frame, fields: dict[str, Any]) -> None:
        pass

    def on_open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        self.opened.append(stream)


class Party:
    """One node's `Peers`, with a real identity and real records, on a `StreamLoop`."""

    def __init__(
        self,
        loop: StreamLoop,
        identity: Identity,
        directory: Path,
        *,
        accept: Iterable[Role],
        boot: int = 1,
        config: LinkConfig | None = None,
        owner: PeersOwner | None = None,
    ) -> None:
        self.identity = identity
        self.clock = VirtualClock(loop)
        self.room = Room()
        self.boot = boot
        self.seq = 0
        self.addresses: tuple[str, ...] = ()
        self.ttl_s = 20.0
        directory.mkdir(parents=True, exist_ok=True)
        tls = TlsContexts(identity, directory)
        self.certificate = x509.load_pem_x509_certificate(identity.credentials.certificate_chain).public_bytes(Encoding.DER)
        loop.certificates[tls.client] = loop.certificates[tls.server] = self.certificate
        self.peers = Peers(
            identity,
            tls,
            owner or self.room,
            accept=frozenset(accept),
            record=self.record,
            members=MembershipCache(identity.trust),
            clock=self.clock,
            rng=random.Random(self.boot),
            config=config,
        )

    @property
    def node_id(self) -> bytes:
        return self.identity.node_id

    async def start(self, host: str | None) -> Party:
        if host is not None:
            bound = await self.peers.listen(host, 0)
            self.addresses = (f"{bound[0]}:{bound[1]}",)
        self.peers.start()
        return self

    def record(self) -> Record:
        self.seq += 1
        now = self.clock.wall()
        record = Record(
            node_id=self.node_id,
            role=self.identity.role,
            boot=self.boot,
            seq=self.seq,
            issued=now,
            expires=now + self.ttl_s,
            state=State.READY,
            addresses=self.addresses,
            models=(ModelEntry(name="fake"),) if self.identity.role == Role.WORKER else (),
        )
        return seal_record(record, self.identity.key, self.identity.membership.signed)

    def link_to(self, other: Party) -> Link:
        return self.peers.links[other.node_id]


def run_streams(main: Callable[[StreamLoop], Any]) -> None:
    """Run ``main(loop)`` on a fresh `StreamLoop` and end whatever it left running."""
    loop = StreamLoop()
    problems: list[Mapping[str, Any]] = []
    loop.set_exception_handler(lambda _, context: problems.append(context))
    try:
        loop.run_until_complete(main(loop))
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()
    assert not problems, problems
