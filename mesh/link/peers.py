"""Who is linked: listening, dialling, one link per pair, heartbeat.

Either side dials. Two nodes that dial each other at once agree, without a word, to keep the link that the lower node id dialled; the
other takes no new requests and ends once those it has are done. A node that restarted replaces its old link at once. A link that is
silent for `LinkConfig.silent_s` is dead, whatever TCP thinks.
"""

from __future__ import annotations

import asyncio
import functools
import random
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from mesh.address import parse_address
from mesh.claims import read_bytes, read_int
from mesh.clock import Clock
from mesh.errors import ProtocolError, TrustError, UsageError
from mesh.identity import ALPN, Identity, Peer, TlsContexts, peer_of
from mesh.link.frames import Frame
from mesh.link.link import IncomingStream, Link
from mesh.membership import MembershipCache
from mesh.records import MAX_RECORD_BYTES, Record, member_until, parse_record
from mesh.trust import Role

log = structlog.get_logger(__name__)

PROTOCOL_VERSION = 1
_MAX_LET_GO_BY = 4_096
REPLACED = "replaced"
"""Why a link went down that another one to the same node took the place of."""
MEASURE_S = 5.0
"""A link that needs no ping gets one all the same, to know its round trip."""
TICKS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConfig:
    """Timing of links, in seconds. At each heartbeat a link is pinged on which nothing came for half of one."""

    heartbeat_s: float = 0.5
    silent_s: float = 2.3
    handshake_s: float = 5.0
    backoff_first_s: float = 0.1
    backoff_most_s: float = 5.0


class PeersOwner(Protocol):
    """What a room does with its links. Called from the read loop: must neither block nor raise."""

    def on_up(self, link: Link, record: Record) -> None: ...

    def on_down(self, link: Link, reason: str) -> None: ...

    def on_record(self, link: Link, record: Record) -> None: ...

    def on_load(self, link: Link, fields: dict[str, Any]) -> None: ...

    def on_prefix(self, link: Link, fields: dict[str, Any]) -> None: ...

    def on_drain(self, link: Link) -> None: ...

    def on_frame(self, link: Link, kind: Frame, fields: dict[str, Any]) -> None:
        """Any other control frame: what only some roles have to say to each other."""
        ...

    def on_open(self, stream: IncomingStream, head: dict[str, Any]) -> None: ...


class Board(Protocol):
    """What passes documents on: `mesh.bulletin.Bulletin`."""

    def on_up(self, link: Link) -> None: ...

    def on_frame(self, link: Link, fields: dict[str, Any]) -> None: ...


class Peers:
    """The links of one node. ``accept`` says which roles it links with, ``wants`` whom of those it dials; ``record`` gives its own newest
    record."""

    def __init__(
        self,
        identity: Identity,
        tls: TlsContexts,
        owner: PeersOwner,
        *,
        accept: frozenset[Role],
        record: Callable[[], Record],
        members: MembershipCache,
        clock: Clock,
        rng: random.Random,
        config: LinkConfig | None = None,
        wants: Callable[[Record], bool] = lambda record: True,
    ) -> None:
        self.links: dict[bytes, Link] = {}
        self.board: Board | None = None
        self._identity = identity
        self._tls = tls
        self._owner = owner
        self._accept = accept
        self._record = record
        self._members = members
        self._clock = clock
        self._rng = rng
        self._config = config or LinkConfig()
        self._wants = wants
        self._boots: dict[bytes, int] = {}
        self._let_go_by: dict[bytes, int] = {}
        self._open: set[Link] = set()
        self._retired: dict[Link, float] = {}
        self._wanted: dict[bytes, Record] = {}
        self._dials: dict[bytes, asyncio.Task[None]] = {}
        self._pauses: dict[bytes, float] = {}
        """Before the next dial, for nodes whose links come up and go down at once: two that cannot agree must not shake hands for ever."""
        self._server: asyncio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._stopping = False

    # -- lifetime

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Take links on ``host:port`` (port 0: any). Returns the bound address."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Link(self, clock=self._clock, dialled=False),
            host,
            port,
            ssl=self._tls.server,
            ssl_handshake_timeout=self._config.handshake_s,
            ssl_shutdown_timeout=1.0,
        )
        bound: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return bound

    def start(self) -> None:
        """Start the heartbeat."""
        self._ticker = asyncio.create_task(self._tick())

    async def stop(self) -> None:
        """Close every link and stop dialling."""
        self._stopping = True
        tasks = [task for task in (self._ticker, *self._dials.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            self._server.close()
        for link in list(self._open):
            link.close("this node is stopping")

    # -- dialling

    def want(self, record: Record) -> None:
        """Keep a link to this node for as long as its record lives; a newer record renews the wish."""
        if self._stopping or record.node_id == self._identity.node_id or record.role not in self._accept or not record.addresses:
            return
        if self._let_go_by.get(record.node_id) == record.boot or not self._wants(record):
            return
        self._remember(record)
        dialling = self._dials.get(record.node_id)
        if dialling is None or dialling.done():
            task = asyncio.create_task(self._keep_dialled(record.node_id))
            self._dials[record.node_id] = task
            task.add_done_callback(functools.partial(self._dialled, record.node_id))

    def let_go(self, node_id: bytes) -> None:
        """End an idle link to a node that others have links to, and tell it not to dial again. One that is in use stays."""
        link = self.links.get(node_id)
        if link is None or link.streams:
            return
        link.send_control(Frame.DRAIN, {})
        link.draining = True
        self._owner.on_drain(link)
        link.close("left to other proxies")

    async def _keep_dialled(self, node_id: bytes) -> None:
        """Dial while the node's record lives and it is not linked. Ends, and is begun again by the next `want`, once it is."""
        backoff_s = self._config.backoff_first_s
        if pause_s := self._pauses.get(node_id, 0.0):
            await self._clock.sleep(pause_s * self._rng.uniform(0.5, 1.0))
        while True:
            record = self._wanted.get(node_id)
            if record is None or not record.alive(self._clock.wall()):
                self._wanted.pop(node_id, None)
                self._pauses.pop(node_id, None)
                return
            for address in record.addresses:
                if node_id in self.links or await self._dial(address, node_id):
                    break
            if node_id in self.links:
                return
            await self._clock.sleep(backoff_s * self._rng.uniform(0.5, 1.0))
            backoff_s = min(backoff_s * 2, self._config.backoff_most_s)

    def _dialled(self, node_id: bytes, task: asyncio.Task[None]) -> None:
        if self._dials.get(node_id) is task:
            del self._dials[node_id]

    async def _dial(self, address: str, node_id: bytes) -> bool:
        """One attempt; True once the link is up."""
        loop = asyncio.get_running_loop()
        up: asyncio.Future[bool] = loop.create_future()
        try:
            where = parse_address(address)
            async with asyncio.timeout(self._config.handshake_s):
                await loop.create_connection(
                    lambda: Link(_Dialler(self, node_id, up), clock=self._clock, dialled=True),
                    where.host,
                    where.port,
                    ssl=self._tls.client,
                    server_hostname="",
                    ssl_shutdown_timeout=1.0,
                )
                return await up
        except (OSError, ValueError, TimeoutError, UsageError) as error:
            log.debug("link.dial_failed", peer=node_id.hex()[:12], address=address, error=type(error).__name__)
            return False

    # -- LinkOwner

    def admit(self, link: Link, transport: asyncio.Transport, *, expect: bytes | None = None) -> Peer:
        ssl_object: ssl.SSLObject = transport.get_extra_info("ssl_object")
        certificate = ssl_object.getpeercert(binary_form=True)
        if certificate is None or ssl_object.selected_alpn_protocol() != ALPN:
            raise ProtocolError("the peer does not speak this protocol")
        try:
            peer = peer_of(certificate, self._identity.mesh_id)
        except ValueError:
            raise TrustError("the peer's certificate cannot be read") from None
        if peer.role not in self._accept:
            raise TrustError(f"a {self._identity.role} does not link with a {peer.role}")
        if expect is not None and peer.node_id != expect:
            raise TrustError("another node answers at this address")
        if peer.node_id == self._identity.node_id:
            raise TrustError("this is the node itself")
        link.transport = transport
        self._open.add(link)
        link.send_control(Frame.HELLO, {"v": PROTOCOL_VERSION, "rec": self._record().signed})
        return peer

    def on_hello(self, link: Link, fields: dict[str, Any]) -> None:
        try:
            read_int(fields, "v", low=1)
            record = self._parse_record(link, fields)
        except TrustError as error:
            raise ProtocolError(f"bad HELLO: {error.message}") from None
        old = self.links.get(link.node_id)
        both_dialled = old is not None and old.dialled != link.dialled and record.boot == self._boots[link.node_id]
        if old is not None and not self._replaces(link, record, old):
            if both_dialled:
                self._retire(link)
            else:
                link.close("a newer link to this node is kept")
            return
        self.links[link.node_id] = link
        self._boots[link.node_id] = record.boot
        self._remember(record)
        self._vouch(link, record)
        if old is not None:
            self._owner.on_down(old, REPLACED)
            if both_dialled:
                self._retire(old)
            else:
                old.close("replaced by a newer link")
        log.info("link.up", peer=link.node_id.hex()[:12], role=str(record.role), dialled=link.dialled)
        self._owner.on_up(link, record)
        if self.board is not None:
            self.board.on_up(link)

    def on_control(self, link: Link, kind: Frame, fields: dict[str, Any]) -> None:
        if self.links.get(link.node_id) is not link:
            return
        if kind == Frame.RECORD:
            try:
                record = self._parse_record(link, fields)
            except TrustError as error:
                raise ProtocolError(f"bad RECORD: {error.message}") from None
            self._remember(record)
            self._vouch(link, record)
            self._owner.on_record(link, record)
        elif kind == Frame.LOAD:
            self._owner.on_load(link, fields)
        elif kind == Frame.PREFIX:
            self._owner.on_prefix(link, fields)
        elif kind == Frame.DRAIN:
            link.draining = True
            self._let_go_by[link.node_id] = self._boots[link.node_id]
            if len(self._let_go_by) > _MAX_LET_GO_BY:
                self._let_go_by.pop(next(iter(self._let_go_by)))
            self._owner.on_drain(link)
        elif kind == Frame.DOCUMENT:
            if self.board is not None:
                self.board.on_frame(link, fields)
        else:
            self._owner.on_frame(link, kind, fields)

    def on_open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        self._owner.on_open(stream, head)

    def on_lost(self, link: Link, reason: str) -> None:
        self._open.discard(link)
        self._retired.pop(link, None)
        if link.peer is None or self.links.get(link.node_id) is not link:
            return
        del self.links[link.node_id]
        del self._boots[link.node_id]
        log.info("link.down", peer=link.node_id.hex()[:12], reason=reason)
        self._owner.on_down(link, reason)
        config, node_id = self._config, link.node_id
        if self._clock.monotonic() - link.up_since > config.backoff_most_s:
            self._pauses.pop(node_id, None)
        else:
            self._pauses[node_id] = min(config.backoff_most_s, 2 * self._pauses.get(node_id, config.backoff_first_s / 2))
        wanted = self._wanted.pop(node_id, None)
        if wanted is not None and not link.draining:
            self.want(wanted)

    # -- to all

    def broadcast(self, kind: Frame, fields: dict[str, Any]) -> None:
        """Send one control frame over every link, also one whose peer has yet to say HELLO: it got ours before this."""
        for link in list(self._open):
            link.send_control(kind, fields)

    # -- inside

    def _parse_record(self, link: Link, fields: dict[str, Any]) -> Record:
        signed = read_bytes(fields, "rec", max_len=MAX_RECORD_BYTES)
        record = parse_record(signed, self._members, now=self._clock.wall(), first_hand=True)
        if link.peer is None or record.node_id != link.peer.node_id or record.role != link.peer.role:
            raise TrustError("the record is another node's")
        return record

    def _remember(self, record: Record) -> None:
        """Where to dial a linked node if its link breaks, though the directory be gone by then."""
        known = self._wanted.get(record.node_id)
        if record.addresses and (known is None or record.order >= known.order):
            self._wanted[record.node_id] = record

    def _vouch(self, link: Link, record: Record) -> None:
        """The certificate that TLS saw may be long renewed; the newest record says until when its node is a member."""
        link.vouched_until = self._clock.monotonic() + member_until(record) - self._clock.wall()

    def _retire(self, link: Link) -> None:
        """Let the link that was not kept finish what it has: its peer may have used it before it heard of the other."""
        for earlier in [earlier for earlier in self._retired if earlier.node_id == link.node_id]:
            earlier.close("another link to this node is kept")
        self._retired[link] = self._clock.monotonic()

    def _replaces(self, link: Link, record: Record, old: Link) -> bool:
        """Whether a second link to a node takes the place of the first; both ends come to the same answer."""
        boot = self._boots.get(link.node_id, 0)
        if record.boot != boot:
            return record.boot > boot
        if link.dialled == old.dialled:
            return True  # the dialler knows that its old link is dead
        lower_dialled = link.dialled == (self._identity.node_id < link.node_id)
        return lower_dialled

    async def _tick(self) -> None:
        """Once a heartbeat, ping every link that is quiet and end those that have gone silent.

        Silent also means: nothing came between the last `TICKS` ticks and this one. A tick that comes late means that this process stood
        still, and what its peers sent meanwhile is read before the next.
        """
        ticks = deque([self._clock.monotonic()] * TICKS, maxlen=TICKS)
        while True:
            await self._clock.sleep(self._config.heartbeat_s)
            now = self._clock.monotonic()
            for link in list(self._open):
                self._check(link, now, ticks[0])
            ticks.append(now)

    def _check(self, link: Link, now: float, before: float) -> None:
        limit_s = self._config.silent_s if link.hello is not None else self._config.handshake_s
        retired_at = self._retired.get(link)
        if now - link.last_heard > limit_s and link.last_heard < before:
            link.abort(f"silent for {now - link.last_heard:.1f} s")
        elif now > link.vouched_until:
            link.close("its certificate has run out")
        elif retired_at is not None and not link.streams and now - retired_at >= self._config.heartbeat_s:
            link.close("another link to this node is kept")
        elif now - link.last_heard > self._config.heartbeat_s / 2 or now - link.pinged_at > MEASURE_S:
            link.ping()


class _Dialler:
    """Between a dialled link and `Peers`: expects one node, and tells the dialling task how it ended."""

    def __init__(self, peers: Peers, node_id: bytes, up: asyncio.Future[bool]) -> None:
        self._peers = peers
        self._node_id = node_id
        self._up = up

    def admit(self, link: Link, transport: asyncio.Transport) -> Peer:
        return self._peers.admit(link, transport, expect=self._node_id)

    def on_hello(self, link: Link, fields: dict[str, Any]) -> None:
        self._peers.on_hello(link, fields)
        self._settle(self._node_id in self._peers.links)

    def on_open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        self._peers.on_open(stream, head)

    def on_control(self, link: Link, kind: Frame, fields: dict[str, Any]) -> None:
        self._peers.on_control(link, kind, fields)

    def on_lost(self, link: Link, reason: str) -> None:
        self._settle(False)
        self._peers.on_lost(link, reason)

    def _settle(self, up: bool) -> None:
        if not self._up.done():
            self._up.set_result(up)
