"""Requests and replies between proven nodes, over sealed datagrams.

Plain bytes inside the seal::

    kind (1) ‖ flags (1) ‖ sender's clock (4)
        [reply: counter of the request (4) ‖ part (1) ‖ parts (1)]
        [INTRO: length (2) ‖ introduction] [COOKIE: 16 bytes] ‖ body (msgpack) ‖ [MAC: 16 bytes]

A request to a peer that does not know us carries our introduction and no MAC; its reply carries theirs, under the pair key.
From then on every datagram has a MAC. A request under a MAC that the peer no longer knows (it has started again) is answered
by RESET, which only echoes bytes of the request, and is sent again with the introduction. An address that has not echoed its
cookie gets at most three times what it sent.

Where `rpcudp` made a coroutine for each datagram and timed every peer alike, here a datagram costs one call and each peer has
its own patience.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import msgpack
from rpcudp.protocol import RPCProtocol

from mesh.clock import Clock
from mesh.dht.address import Address, is_dialable, normalise
from mesh.dht.config import DirectoryConfig
from mesh.dht.counts import Counts
from mesh.dht.limits import Bucket, Buckets
from mesh.dht.mesh_time import MeshTime
from mesh.dht.peers import PeerMemory
from mesh.dht.seal import HEADER, MAX_DATAGRAM_BYTES, TAG_BYTES, Opened, Sealer, SeenNonces
from mesh.dht.session import COOKIE_BYTES, MAC_BYTES, Cookies, Session, Sessions, mac, mac_holds
from mesh.errors import DirectoryError, MalformedEnvelope, MeshError, TrustError

REPLY = 0x80
INTRO, COOKIE, MAC, RESET, PROVE = 1, 2, 4, 8, 16
_HEAD = struct.Struct("!BBI")
_REPLY_HEAD = struct.Struct("!IBB")
_MAX_PARTS = 32
_MAX_OUTSTANDING = 8_192
_AMPLIFICATION = 3
_REQUEST_FRAME_BYTES = HEADER.size + _HEAD.size + MAC_BYTES + TAG_BYTES
_REPLY_FRAME_BYTES = _REQUEST_FRAME_BYTES + _REPLY_HEAD.size
MAX_REQUEST_BODY_BYTES = MAX_DATAGRAM_BYTES - _REQUEST_FRAME_BYTES - COOKIE_BYTES


class Request(NamedTuple):
    """A request from a peer that has shown its key. ``proven``: it also receives at this address.

    ``room`` is how many bytes one part of the reply's body may have, ``parts`` how many there may be.
    """

    session: Session
    address: Address
    proven: bool
    body: list[Any]
    room: int
    parts: int

    @property
    def node_id(self) -> bytes:
        return self.session.node_id

    def require_proof(self) -> None:
        """Raises `ProveFirst` unless the asker receives at this address."""
        if not self.proven:
            raise ProveFirst


class Reply(NamedTuple):
    """What a peer answered: the bodies of the parts that came. ``complete`` is False if some are missing."""

    node_id: bytes
    address: Address
    bodies: list[list[Any]]
    complete: bool
    rtt_s: float


class ProveFirst(MeshError):
    """This request is answered only at a proven address."""


OnReply = Callable[[Reply | None], None]
Handler = Callable[[Request], list[list[Any]]]
"""From a request to the bodies of its reply's parts. Raises `TrustError` for a malformed body, `ProveFirst`."""


@dataclass(slots=True, kw_only=True)
class _Parsed:
    kind: int
    flags: int
    stamp: int
    reply_to: int = 0
    part: int = 0
    parts: int = 1
    introduction: bytes = b""
    cookie: bytes = b""
    body: bytes = b""
    mac: bytes = b""
    signed: bytes = b""


@dataclass(slots=True, kw_only=True, eq=False)
class _Pending:
    address: Address
    node_id: bytes | None
    kind: int
    body: bytes
    on_reply: OnReply
    sent_at: float
    done: bool = False
    counters: list[int] = field(default_factory=list)
    macs: list[bytes] = field(default_factory=list)
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    parts: dict[int, list[Any]] = field(default_factory=dict)
    expected: int = 0
    resets: int = 0
    replier: bytes = b""


class SealedRpc(RPCProtocol):  # type: ignore[misc]
    """The transport under the Kademlia protocol. Subclasses fill ``handlers`` and override the ``on_…`` hooks. ``welcomes``: it answers
    those who do not know whom they meet here, as a bootstrap node does."""

    def __init__(
        self,
        *,
        clock: Clock,
        config: DirectoryConfig,
        sessions: Sessions,
        memory: PeerMemory,
        time: MeshTime,
        counts: Counts,
        own_id: bytes,
        welcomes: bool,
    ) -> None:
        RPCProtocol.__init__(self, wait_timeout=config.max_timeout_s)
        self.clock = clock
        self.config = config
        self.sessions = sessions
        self.memory = memory
        self.time = time
        self.counts = counts
        self.own_id = own_id
        self.sealer = Sealer(sessions.sid, own_id)
        self._welcomes = welcomes
        self.handlers: dict[int, Handler] = {}
        self.notices: dict[int, Handler] = {}
        self._outstanding: dict[int, _Pending] = {}
        self._cookies = Cookies()
        self._nonces = SeenNonces()
        self._request_limits = Buckets(config.requests_per_s, 2 * config.requests_per_s)
        self._introduction_limit = Bucket(config.introductions_per_s, 2 * config.introductions_per_s)
        self._reset_limit = Bucket(50.0, 100.0)
        self._ipv6 = False
        self.transport: asyncio.DatagramTransport | None = None

    def __getattr__(self, name: str) -> Any:
        """rpcudp turns every unknown attribute into a remote call; a slip of the pen should not send a datagram."""
        raise AttributeError(name)

    # what subclasses see

    def on_proven(self, session: Session, address: Address) -> None:
        """A peer has shown key, membership and address."""

    def on_failed(self, node_id: bytes, failures: int) -> None:
        """A peer kept silent past its hard deadline, ``failures`` times in a row."""

    def on_cookie(self, session: Session, address: Address) -> None:
        """A peer wants to see that we receive at our address."""

    def on_self(self, address: Address) -> None:
        """We are the node at this address."""

    # sending

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)
        sock = transport.get_extra_info("socket")
        self._ipv6 = sock is not None and sock.family == socket.AF_INET6

    def close(self) -> None:
        """Close the socket; everything outstanding ends without a reply."""
        if self.transport is not None:
            self.transport.close()
            self.transport = None
        for pending in list(self._outstanding.values()):
            self._finish(pending, None)

    def request(self, address: Address, kind: int, body: bytes, *, node_id: bytes | None = None) -> asyncio.Future[Reply | None]:
        """As `ask`, for waiting on."""
        future: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()

        def settle(reply: Reply | None) -> None:
            if not future.done():
                future.set_result(reply)

        self.ask(address, kind, body, settle, node_id=node_id)
        return future

    def ask(self, address: Address, kind: int, body: bytes, on_reply: OnReply, *, node_id: bytes | None = None) -> None:
        """Ask a peer. ``on_reply`` is called once, in the moment its reply is read, or with None if it does not answer by its hard
        deadline; never before this returns. Never raises for what the network does.

        A silent peer is asked a second time, after its usual patience. With ``node_id`` only that node's reply counts.
        """
        pending = _Pending(address=address, node_id=node_id, kind=kind, body=body, on_reply=on_reply, sent_at=self.clock.monotonic())
        if len(body) > MAX_REQUEST_BODY_BYTES or not is_dialable(*address) or len(self._outstanding) > _MAX_OUTSTANDING:
            self.counts.add("unsendable")
            self._give_up(pending)
            return
        loop = asyncio.get_running_loop()
        pending.timers = [
            loop.call_later(self.memory.patience_s(node_id), self._send_again, pending),
            loop.call_later(self.memory.deadline_s(node_id), self._timed_out, pending),
        ]
        self._send_request(pending)

    def notify(self, session: Session, address: Address, kind: int, body: bytes) -> None:
        """Tell a peer something it need not answer."""
        self._send_under_mac(session, kind, MAC, body, address)

    def echo(self, session: Session, address: Address, kind: int, body: bytes) -> None:
        """Give a peer its cookie back, without asking for anything."""
        self._send_under_mac(session, kind, MAC | COOKIE, session.cookie + body, address)

    def _send_request(self, pending: _Pending) -> None:
        session = self.sessions.by_node(pending.node_id) if pending.node_id is not None else None
        now = self.clock.wall()
        try:
            counter = self.sealer.next_counter()
            header = self.sealer.header(counter, now)
        except DirectoryError as error:
            self.counts.refuse("no_network_key", error, now=self.clock.monotonic())
            self._give_up(pending)
            return
        flags, extra = (MAC, b"") if session is not None else (INTRO, _with_length(self.sessions.introduction))
        if session is not None and session.cookie:
            flags, extra = flags | COOKIE, session.cookie
        plain = _HEAD.pack(pending.kind, flags, self.time.stamp()) + extra + pending.body
        if session is not None:
            code = mac(session.key, header, plain)
            pending.macs.append(code)
            plain += code
        if len(plain) + HEADER.size + TAG_BYTES > MAX_DATAGRAM_BYTES:
            self.counts.add("unsendable")  # a body this long needs a session first; see `introduce`
            self._give_up(pending)
            return
        pending.counters.append(counter)
        self._outstanding[counter] = pending
        self._transmit(self.sealer.seal(header, plain, now, to=pending.node_id or b""), pending.address)

    def _send_again(self, pending: _Pending) -> None:
        if not pending.done and not pending.parts:
            self.counts.add("retransmissions")
            self._send_request(pending)

    def _timed_out(self, pending: _Pending) -> None:
        if pending.parts:
            self._finish(pending, self._reply(pending, complete=False))
            return
        self._finish(pending, None)
        self.counts.add("timeouts")
        if pending.node_id is not None:
            failures = self.memory.failed(pending.node_id, self.clock.monotonic(), sent_at=pending.sent_at)
            self.on_failed(pending.node_id, failures)

    def _finish(self, pending: _Pending, reply: Reply | None) -> None:
        for timer in pending.timers:
            timer.cancel()
        for counter in pending.counters:
            self._outstanding.pop(counter, None)
        if not pending.done:
            pending.done = True
            pending.on_reply(reply)

    def _give_up(self, pending: _Pending) -> None:
        """It cannot be sent: say so, but not before the asker has its hands free."""
        for timer in pending.timers:
            timer.cancel()
        asyncio.get_running_loop().call_soon(self._finish, pending, None)

    def _reply(self, pending: _Pending, *, complete: bool) -> Reply:
        return Reply(
            node_id=pending.replier,
            address=pending.address,
            bodies=[pending.parts[index] for index in sorted(pending.parts)],
            complete=complete,
            rtt_s=self.clock.monotonic() - pending.sent_at,
        )

    def _transmit(self, datagram: bytes, address: Address) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        host = address.host
        if self._ipv6 and ":" not in host:
            host = "::ffff:" + host
        elif not self._ipv6 and ":" in host:
            self.counts.add("unsendable")
            return
        self.counts.add("datagrams_out")
        self.counts.add("bytes_out", len(datagram))
        self.transport.sendto(datagram, (host, address.port))

    # receiving

    def error_received(self, exc: Exception) -> None:
        self.counts.add("socket_errors")

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        """Every datagram enters here. Whatever it holds, it costs at most one log line."""
        address = normalise(addr[0], addr[1])
        self.counts.add("datagrams_in")
        self.counts.add("bytes_in", len(data))
        opened = self.sealer.open(data, self.clock.wall())
        if opened is None:
            self._refuse("unsealed", address)
            return
        if opened.sid == self.sealer.sid:
            pending = self._outstanding.get(opened.counter)
            if pending is not None and pending.address == address:
                self.on_self(address)
            return
        try:
            parsed = _parse(opened)
            if opened.addressed or parsed.flags & RESET or (self._welcomes and parsed.introduction):
                self._accept(parsed, opened, address, len(data))
            else:
                self._refuse("unaddressed", address)
        except TrustError as error:
            self._refuse(error.code, address)

    def _refuse(self, reason: str, address: Address) -> None:
        self.counts.refuse(reason, address, now=self.clock.monotonic())

    def _accept(self, parsed: _Parsed, opened: Opened, address: Address, size: int) -> None:
        if not self.time.is_fresh(parsed.stamp):
            self._refuse("clock", address)
        elif parsed.flags & RESET:
            self._accept_reset(parsed, address)
        elif parsed.kind & REPLY:
            self._accept_reply(parsed, opened, address)
        else:
            self._accept_request(parsed, opened, address, size)

    def _session(self, parsed: _Parsed, opened: Opened) -> Session | None:
        """The sender's session, by its introduction or its session id; the MAC, if it must have one, is checked."""
        if parsed.introduction:
            session = self.sessions.known(parsed.introduction, opened.sid)
            if session is None:
                if not self._introduction_limit.take(self.clock.monotonic()):
                    self.counts.add("refused_introduction_rate")
                    return None
                session = self.sessions.admit(parsed.introduction, opened.sid, now=self.time.now(), at=self.clock.monotonic())
                self.counts.add("introductions")
        else:
            session = self.sessions.by_sid(opened.sid)
        if session is None or self.time.now() >= session.introduction.member.expires:
            return None
        if parsed.flags & MAC and not mac_holds(session.key, opened.header, parsed.signed, parsed.mac):
            return None
        return session

    def _accept_request(self, parsed: _Parsed, opened: Opened, address: Address, size: int) -> None:
        handler = self.handlers.get(parsed.kind) or self.notices.get(parsed.kind)
        if handler is None or not (parsed.introduction or parsed.flags & MAC):
            self._refuse("unknown_kind", address)
            return
        session = self._session(parsed, opened)
        if session is None:
            if parsed.flags & MAC and self._nonces.accept(opened.sid, opened.counter):
                self._send_reset(parsed, opened, address)
            return
        under_mac = bool(parsed.flags & MAC)
        fresh = session.window.accept(opened.counter) if under_mac else self._nonces.accept(opened.sid, opened.counter)
        if not fresh:
            self._refuse("replayed", address)
            return
        now = self.clock.monotonic()
        if not self._request_limits.take(session.node_id, now):
            self.counts.add("refused_rate")
            return
        proven = under_mac and self._proves(session, parsed, address)
        if under_mac:
            session.heard = now
        if proven:
            self.on_proven(session, address)
        if parsed.kind in self.notices:
            if under_mac:
                handler(Request(session=session, address=address, proven=proven, body=_unpack(parsed.body), room=0, parts=0))
            return
        self._answer(handler, session, parsed, opened, address, size, proven)

    def _proves(self, session: Session, parsed: _Parsed, address: Address) -> bool:
        if address in session.proven:
            return True
        if parsed.cookie and self._cookies.holds(parsed.cookie, session.node_id, address):
            session.prove(address)
            return True
        return False

    def _answer(
        self, handler: Handler, session: Session, parsed: _Parsed, opened: Opened, address: Address, size: int, proven: bool
    ) -> None:
        flags, extra = MAC, b""
        if parsed.introduction:
            flags, extra = flags | INTRO, _with_length(self.sessions.introduction)
        if not proven:
            flags |= COOKIE
            extra += self._cookies.make(session.node_id, address, now=self.clock.monotonic())
        allowed = MAX_DATAGRAM_BYTES if proven else min(MAX_DATAGRAM_BYTES, _AMPLIFICATION * size)
        room = allowed - _REPLY_FRAME_BYTES - len(extra)
        if room < 16:
            self._refuse("too_short_to_answer", address)
            return
        request = Request(
            session=session,
            address=address,
            proven=proven,
            body=_unpack(parsed.body),
            room=room,
            parts=_MAX_PARTS if proven else 1,
        )
        try:
            bodies = handler(request)
        except ProveFirst:
            flags, bodies = flags | PROVE, [[]]
        for part, body in enumerate(bodies):
            head = _REPLY_HEAD.pack(opened.counter, part, len(bodies))
            self._send_under_mac(session, parsed.kind | REPLY, flags, head + extra + msgpack.packb(body), address)

    def _send_under_mac(self, session: Session, kind: int, flags: int, rest: bytes, address: Address) -> None:
        now = self.clock.wall()
        try:
            header = self.sealer.header(self.sealer.next_counter(), now)
        except DirectoryError as error:
            self.counts.refuse("no_network_key", error, now=self.clock.monotonic())
            return
        plain = _HEAD.pack(kind, flags, self.time.stamp()) + rest
        self._transmit(self.sealer.seal(header, plain + mac(session.key, header, plain), now, to=session.node_id), address)

    def _send_reset(self, parsed: _Parsed, opened: Opened, address: Address) -> None:
        """The peer believes in a session we do not have. It proves nothing, so it may only cost the peer a new introduction."""
        if not self._reset_limit.take(self.clock.monotonic()):
            return
        now = self.clock.wall()
        header = self.sealer.header(self.sealer.next_counter(), now)
        plain = _HEAD.pack(parsed.kind | REPLY, RESET, self.time.stamp()) + _REPLY_HEAD.pack(opened.counter, 0, 1) + parsed.mac
        self._transmit(self.sealer.seal(header, plain, now, to=b""), address)

    def _accept_reset(self, parsed: _Parsed, address: Address) -> None:
        pending = self._outstanding.get(parsed.reply_to)
        if pending is None or pending.address != address or pending.resets or parsed.body not in pending.macs:
            self._refuse("unexpected_reset", address)
            return
        pending.resets += 1
        session = self.sessions.by_node(pending.node_id) if pending.node_id is not None else None
        if session is not None:
            self.sessions.drop(session)
        self.counts.add("resets")
        self._send_request(pending)

    def _accept_reply(self, parsed: _Parsed, opened: Opened, address: Address) -> None:
        pending = self._outstanding.get(parsed.reply_to)
        if pending is None or pending.kind | REPLY != parsed.kind:
            self.counts.add("late_replies")
            return
        if pending.address != address:
            self._refuse("wrong_source", address)
            return
        session = self._session(parsed, opened) if parsed.flags & MAC else None
        if session is None or (pending.node_id is not None and session.node_id != pending.node_id):
            self._refuse("wrong_node", address)
            return
        if not session.window.accept(opened.counter):
            self._refuse("replayed", address)
            return
        if parsed.cookie and parsed.cookie != session.cookie:
            session.cookie = parsed.cookie
            self.on_cookie(session, address)
        session.cookie = parsed.cookie
        self._heard_from(session, parsed, pending, address)
        if parsed.flags & PROVE:
            if pending.resets < 2:
                pending.resets = 2
                pending.node_id = session.node_id
                self._send_request(pending)
            return
        if not 1 <= parsed.parts <= _MAX_PARTS or parsed.part >= parsed.parts:
            raise MalformedEnvelope("bad part")
        pending.parts[parsed.part] = _unpack(parsed.body)
        pending.replier = session.node_id
        if len(pending.parts) >= parsed.parts:
            self._finish(pending, self._reply(pending, complete=True))
        else:
            self._await_next_part(pending)

    def _await_next_part(self, pending: _Pending) -> None:
        """The parts of a reply come close together: a gap means that some are lost, and those that came are worth having now."""
        for timer in pending.timers:
            timer.cancel()
        gap_s = max(self.config.min_timeout_s, self.memory.patience_s(pending.replier) / 2)
        pending.timers = [asyncio.get_running_loop().call_later(gap_s, self._timed_out, pending)]

    def _heard_from(self, session: Session, parsed: _Parsed, pending: _Pending, address: Address) -> None:
        now = self.clock.monotonic()
        session.heard = now
        session.prove(address)
        once = len(pending.counters) == 1
        rtt_s = now - pending.sent_at
        if not pending.parts:
            self.memory.answered(session.node_id, rtt_s if once else None)
            if once:
                self.time.observe(session.node_id, parsed.stamp, rtt_s)
        self.on_proven(session, address)


def _with_length(data: bytes) -> bytes:
    return len(data).to_bytes(2) + data


def _parse(opened: Opened) -> _Parsed:
    """Take the plain bytes apart. Raises `MalformedEnvelope`."""
    plain = opened.plain
    if len(plain) < _HEAD.size:
        raise MalformedEnvelope("short datagram")
    kind, flags, stamp = _HEAD.unpack_from(plain)
    parsed = _Parsed(kind=kind, flags=flags, stamp=stamp)
    at = _HEAD.size
    if kind & REPLY:
        if len(plain) < at + _REPLY_HEAD.size:
            raise MalformedEnvelope("short reply")
        parsed.reply_to, parsed.part, parsed.parts = _REPLY_HEAD.unpack_from(plain, at)
        at += _REPLY_HEAD.size
    if flags & INTRO:
        size = int.from_bytes(plain[at : at + 2])
        parsed.introduction = plain[at + 2 : at + 2 + size]
        at += 2 + size
    if flags & COOKIE:
        parsed.cookie = plain[at : at + COOKIE_BYTES]
        at += COOKIE_BYTES
    end = len(plain) - (MAC_BYTES if flags & MAC else 0)
    if end < at:
        raise MalformedEnvelope("short datagram")
    parsed.body, parsed.mac, parsed.signed = plain[at:end], plain[end:], plain[:end]
    return parsed


def _unpack(body: bytes) -> list[Any]:
    """A body is one msgpack list. Raises `MalformedEnvelope`."""
    size = len(body)
    try:
        value = msgpack.unpackb(body, raw=False, max_str_len=size, max_bin_len=size, max_array_len=256, max_map_len=16, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
        raise MalformedEnvelope("body is not msgpack") from None
    if not isinstance(value, list):
        raise MalformedEnvelope("body is not a list")
    return value
