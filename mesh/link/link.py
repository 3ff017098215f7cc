"""One link: frames in and out of a TLS connection, streams with credit, heartbeat.

The dialling side opens odd streams, the listening side even ones. Each direction of a stream has a credit window in bytes:
a sender may have that much unconsumed at the other end and no more, so one slow client holds up itself and nobody else.
Outgoing frames of one turn of the event loop leave in one write; that is what makes a token cheap.
"""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import structlog

from mesh.clock import Clock
from mesh.errors import MeshError, Overloaded, ProtocolError, WorkerLost
from mesh.identity import Peer
from mesh.link.allowance import Allowance
from mesh.link.errors import encode_error, parse_error
from mesh.link.frames import (
    EMPTY_CONTROL,
    LINK_CONTROL,
    MAX_PAYLOAD_BYTES,
    MAX_TOKENS_DATA_BYTES,
    Frame,
    FrameReader,
    encode_control,
    encode_credit,
    encode_frame,
    encode_tokens,
    encode_whole,
    parse_control,
    parse_credit,
)

log = structlog.get_logger(__name__)

WINDOW_BYTES = 256 * 1024
MAX_INCOMING_STREAMS = 4096
MAX_STREAM_NUMBER = 2**32 - 1
MAX_UNSENT_BYTES = 64 * 1024 * 1024
"""More than this waiting for a peer that does not read ends the link. Credit bounds answers long before; this bounds control frames."""
_HIGH_WATER_BYTES = 4 * 1024 * 1024
ACCEPT_AFTER_S = 0.025
"""An answer that begins within this says itself when its request got its slot."""
MAX_TRAIL_BYTES = 256 * 1024
"""More trail than this is not kept: some 40,000 tokens. A stream that long stays where it is."""
MAX_ROUND_TRIP_S = 3600.0
_OPEN, _HEAD, _DATA, _END, _TOKENS = (int(kind) for kind in (Frame.OPEN, Frame.HEAD, Frame.DATA, Frame.END, Frame.TOKENS))
"""Of every request, or every token; looking a member up costs as much as the rest of a comparison."""
_BODY = frozenset({_DATA, _TOKENS})
_STAMP = struct.Struct(">d")


class StreamSink(Protocol):
    """What the opener of a stream brings. Called from the read loop: must neither block nor raise.

    After ``on_end`` or ``on_error`` nothing more is called.
    """

    def on_accepted(self) -> None:
        """A slot was taken for the request."""

    def on_progress(self, info: dict[str, Any]) -> None:
        """No byte yet, but the engine is at work."""

    def on_head(self, head: dict[str, Any]) -> None:
        """Status and headers of the answer."""

    def on_data(self, data: bytes) -> None:
        """Bytes of the answer. The sink calls ``stream.consumed(len(data))`` once they are out of its hands."""

    def on_end(self, trailer: dict[str, Any]) -> None:
        """The answer is complete."""

    def on_error(self, error: MeshError) -> None:
        """The answer will not be completed."""


class LinkOwner(Protocol):
    """Who a link reports to. Called from the read loop: must neither block nor raise, but `admit` may refuse."""

    def admit(self, link: Link, transport: asyncio.Transport) -> Peer:
        """Who is at the other end, as TLS proved it. Raises a `MeshError` to refuse."""
        ...

    def on_hello(self, link: Link, fields: dict[str, Any]) -> None: ...

    def on_open(self, stream: IncomingStream, head: dict[str, Any]) -> None: ...

    def on_control(self, link: Link, kind: Frame, fields: dict[str, Any]) -> None: ...

    def on_lost(self, link: Link, reason: str) -> None: ...


@dataclass(slots=True)
class LinkStats:
    """Counters of one link since it came up."""

    bytes_in: int = 0
    bytes_out: int = 0
    streams: int = 0
    round_trip_s: float = 0.0


class Link(asyncio.Protocol):
    """A connection after its TLS handshake. Made by `mesh.link.peers`; used by whoever has requests to send or to serve."""

    def __init__(self, owner: LinkOwner, *, clock: Clock, dialled: bool) -> None:
        self._owner = owner
        self._clock = clock
        self.dialled = dialled
        self.peer: Peer | None = None
        self.hello: dict[str, Any] | None = None
        self.stats = LinkStats()
        self.up_since = clock.monotonic()
        self.last_heard = self.pinged_at = self.up_since
        self.vouched_until = math.inf
        """When its peer stops being a member, on the monotonic clock; set by `mesh.link.peers`."""
        self.closed = False
        self.draining = False
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader()
        self._allowance = Allowance(self.up_since)
        self._out: list[bytes] = []
        self._flush_due = False
        self._outgoing: dict[int, OutgoingStream] = {}
        self._incoming: dict[int, IncomingStream] = {}
        self._next_stream = 1 if dialled else 2
        self._last_incoming = 0
        self._writable = asyncio.Event()
        self._writable.set()
        self.transport: asyncio.Transport | None = None

    # -- what users of a link call

    @property
    def node_id(self) -> bytes:
        assert self.peer is not None
        return self.peer.node_id

    @property
    def streams(self) -> int:
        """How many streams are open, in both directions."""
        return len(self._outgoing) + len(self._incoming)

    @property
    def last_incoming(self) -> int:
        """The number of the newest stream that the peer opened, 0 before the first."""
        return self._last_incoming

    def open(self, head: Mapping[str, Any], sink: StreamSink) -> OutgoingStream:
        """Open a stream with an OPEN frame. Raises `WorkerLost` if the link is gone."""
        if not self.closed and self._next_stream > MAX_STREAM_NUMBER:
            self.close("every stream number has been used")  # after weeks; a new link begins again
        if self.closed:
            raise WorkerLost("the link is closed")
        number = self._next_stream
        self._next_stream += 2
        stream = OutgoingStream(self, number, sink)
        self._outgoing[number] = stream
        self.stats.streams += 1
        self.write(encode_control(_OPEN, number, head))
        return stream

    def send_control(self, kind: Frame, fields: Mapping[str, Any]) -> None:
        """Send a frame of the link itself (HELLO, LOAD, PREFIX, RECORD, DRAIN)."""
        self.write(encode_control(kind, 0, fields))

    def ping(self) -> None:
        self.pinged_at = self._clock.monotonic()
        self.write(encode_frame(Frame.PING, 0, _STAMP.pack(self.pinged_at)))

    def close(self, reason: str) -> None:
        """End the link now; every open stream fails with `WorkerLost`."""
        if self.closed:
            return
        self._flush()
        if self.transport is not None:
            self.transport.close()
        self._lost(reason)

    def abort(self, reason: str) -> None:
        """As `close`, without waiting for what is still to be written: the peer does not answer."""
        if self.closed:
            return
        if self.transport is not None:
            self.transport.abort()
        self._lost(reason)

    # -- writing

    def write(self, frame: bytes) -> None:
        """Queue an encoded frame; all frames of this loop turn leave together."""
        if self.closed:
            return
        self._out.append(frame)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self._out and self.transport is not None:
            data = b"".join(self._out)
            self._out.clear()
            self.stats.bytes_out += len(data)
            self.transport.write(data)
            if not self._writable.is_set() and self.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
                self.abort("the peer does not read")

    async def writable(self) -> None:
        """Wait until the connection's own buffer has room."""
        await self._writable.wait()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's own class is one in all but name
        self.transport = transport
        transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        try:
            self.peer = self._owner.admit(self, transport)
        except MeshError as error:
            log.warning("link.refused", peer=str(transport.get_extra_info("peername")), reason=error.message)
            self.abort(error.message)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost("connection lost" if exc is None else f"connection lost: {type(exc).__name__}")

    def data_received(self, data: bytes) -> None:
        if self.closed:
            return
        self.last_heard = self._clock.monotonic()
        self.stats.bytes_in += len(data)
        outgoing = self._outgoing
        try:
            for kind, number, payload in self._reader.feed(data):
                if (kind == _TOKENS or kind == _DATA) and payload:  # noqa: SIM109 - a set is slower, and this is every token
                    stream = outgoing.get(number)
                    if stream is not None:
                        if kind == _TOKENS:
                            trail, cut = stream.trail, payload[0] + 1
                            if trail is None:
                                raise ProtocolError("TOKENS that nobody asked for")
                            if len(trail) < MAX_TRAIL_BYTES:
                                trail += payload[1:cut]
                            piece, payload = payload, payload[cut:]
                            if not payload:
                                if cut > len(piece):
                                    raise ProtocolError("bad TOKENS frame")
                                self._spend(kind, cut)
                                continue
                        stream.unread += len(payload)
                        if stream.unread > WINDOW_BYTES:
                            raise ProtocolError("more DATA than credit")
                        stream.sink.on_data(payload)
                        continue
                self._on_frame(kind, number, payload)
                if self.closed:
                    return
        except ProtocolError as error:
            log.warning("link.protocol_error", peer=self._peer_name(), error=error.message)
            self.abort(error.message)

    # -- frames

    def _on_frame(self, kind: int, number: int, payload: bytes) -> None:
        if kind not in _BODY or not payload:
            self._spend(kind, len(payload))
        if number == 0:
            self._on_link_frame(kind, payload)
        elif self.hello is None:
            raise ProtocolError("a stream before HELLO")
        elif number % 2 == self._next_stream % 2:
            self._on_answer_frame(kind, number, payload)
        else:
            self._on_request_frame(kind, number, payload)

    def _spend(self, kind: int, size: int) -> None:
        """A frame came that no credit bounds."""
        if not self._allowance.spend(kind, size):
            self._allowance.refill(self._clock.monotonic())

    def _on_link_frame(self, kind: int, payload: bytes) -> None:
        if kind == Frame.PING:
            self.write(encode_frame(Frame.PONG, 0, payload[:8]))
        elif kind == Frame.PONG:
            self._on_pong(payload)
        elif kind == Frame.HELLO:
            if self.hello is not None:
                raise ProtocolError("a second HELLO")
            self.hello = parse_control(payload)
            self._owner.on_hello(self, self.hello)
        elif kind in LINK_CONTROL:
            if self.hello is None:
                raise ProtocolError("control before HELLO")
            self._owner.on_control(self, Frame(kind), parse_control(payload))
        elif kind in Frame._value2member_map_:
            raise ProtocolError(f"{Frame(kind).name} belongs to a stream")
        # An unknown frame of the link itself comes from a newer peer: skipped.

    def _on_pong(self, payload: bytes) -> None:
        """The peer may say what it likes; only what this side can have sent is taken for a time."""
        if len(payload) == _STAMP.size:
            round_trip_s = self._clock.monotonic() - _STAMP.unpack(payload)[0]
            if 0.0 <= round_trip_s < MAX_ROUND_TRIP_S:
                self.stats.round_trip_s = round_trip_s

    def _on_answer_frame(self, kind: int, number: int, payload: bytes) -> None:
        """A frame on a stream this side opened."""
        stream = self._outgoing.get(number)
        if stream is None:
            if number >= self._next_stream:
                raise ProtocolError("a frame on a stream that was never opened")
            self._on_late_frame(kind, payload)
            return
        if kind == _END:
            trailer = parse_control(payload)
            self.forget_outgoing(number)
            stream.sink.on_end(trailer)
        elif kind == _HEAD:
            stream.sink.on_head(parse_control(payload))
        elif kind == Frame.CREDIT:
            stream.add_credit(parse_credit(payload))
        elif kind == Frame.ERROR:
            error = parse_error(parse_control(payload))
            self.forget_outgoing(number)
            stream.sink.on_error(error)
        elif kind == Frame.ACCEPTED:
            stream.sink.on_accepted()
        elif kind == Frame.PROGRESS:
            stream.sink.on_progress(parse_control(payload))
        else:
            raise ProtocolError(f"frame type {kind} does not belong on an answer")

    def _on_request_frame(self, kind: int, number: int, payload: bytes) -> None:
        """A frame on a stream the peer opened."""
        if kind == _OPEN:
            self._on_open_frame(number, payload)
            return
        stream = self._incoming.get(number)
        if stream is None:
            if number > self._last_incoming:
                raise ProtocolError("a frame on a stream that was never opened")
            self._on_late_frame(kind, payload)
            return
        if kind == _DATA:
            stream.receive(payload)
        elif kind == _END:
            stream.receive_end()
        elif kind == Frame.CREDIT:
            stream.add_credit(parse_credit(payload))
        elif kind == Frame.CANCEL:
            self.forget_incoming(number)
            stream.peer_cancelled()
        else:
            raise ProtocolError(f"frame type {kind} does not belong on a request")

    def _on_late_frame(self, kind: int, payload: bytes) -> None:
        """On a stream that was cancelled or has ended: passed over, as long as it can have been under way."""
        if kind in _BODY:
            self._allowance.spend_late(len(payload))

    def _on_open_frame(self, number: int, payload: bytes) -> None:
        if number <= self._last_incoming:
            raise ProtocolError("stream numbers only grow")
        self._last_incoming = number
        head = parse_control(payload)
        if len(self._incoming) >= MAX_INCOMING_STREAMS:
            error = Overloaded("too many streams on this link", retry_after_s=1.0)
            self.write(encode_control(Frame.ERROR, number, encode_error(error)))
            self.expect_late()
            return
        stream = IncomingStream(self, number)
        self._incoming[number] = stream
        self.stats.streams += 1
        self._owner.on_open(stream, head)

    def forget_outgoing(self, number: int) -> None:
        stream = self._outgoing.pop(number, None)
        if stream is not None:
            stream.finish()

    def forget_incoming(self, number: int) -> None:
        self._incoming.pop(number, None)

    def expect_late(self) -> None:
        """This side closed a stream: what its peer sent before it heard of that will still come."""
        self._allowance.closed()

    def _lost(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        self._out.clear()
        self._writable.set()
        outgoing, incoming = list(self._outgoing.values()), list(self._incoming.values())
        self._outgoing.clear()
        self._incoming.clear()
        for opened in outgoing:
            opened.finish()
            opened.sink.on_error(WorkerLost(f"the link to the worker broke ({reason})"))
        for received in incoming:
            received.peer_cancelled()
        self._owner.on_lost(self, reason)

    def _peer_name(self) -> str:
        return self.peer.node_id.hex()[:12] if self.peer is not None else "?"


class _Sending:
    """The sending half of a stream: pieces of at most one frame, never more than the peer gave credit for."""

    __slots__ = ("_credit", "_more", "done", "granted", "link", "number")

    def __init__(self, link: Link, number: int) -> None:
        self.link = link
        self.number = number
        self.done = False
        self.granted = 0
        """Credit that came from the peer so far, in bytes: it grows as the peer takes what is sent."""
        self._credit = WINDOW_BYTES
        self._more: asyncio.Event | None = None

    def add_credit(self, count: int) -> None:
        self.granted += count
        self._credit += count
        if self._credit > 2**31:
            raise ProtocolError("more credit than makes sense")
        if self._more is not None:
            self._more.set()

    def finish(self) -> None:
        """Nothing more can be sent; whoever waits for credit is let go."""
        self.done = True
        if self._more is not None:
            self._more.set()

    def send_now(self, data: bytes | bytearray) -> bool:
        """Send ``data`` if credit and buffers allow it at once; False if the caller must `send` instead."""
        size = len(data)
        if not size:
            return True  # a frame without bytes says nothing, and a peer takes it for an attack
        if size > self._credit or size > MAX_PAYLOAD_BYTES or not self.link._writable.is_set():
            return False
        self._credit -= size
        self.link.write(encode_frame(_DATA, self.number, data))
        return True

    async def credit(self, count: int) -> None:
        """Wait until so many bytes may be sent, or the stream is over."""
        while self._credit < count and not self.done:
            self._more = self._more or asyncio.Event()
            self._more.clear()
            await self._more.wait()

    async def send(self, data: bytes | bytearray) -> None:
        """Send all of ``data``, waiting for credit. Raises `WorkerLost` if the stream ends first."""
        if self.send_now(data):
            return
        view = memoryview(data)
        while view:
            await self.credit(1)
            await self.link.writable()
            if self.done or self.link.closed:
                raise WorkerLost("the stream ended while it was being written")
            size = min(len(view), self._credit, MAX_PAYLOAD_BYTES)
            self._credit -= size
            self.link.write(encode_frame(_DATA, self.number, bytes(view[:size])))
            view = view[size:]


class OutgoingStream(_Sending):
    """A stream this side opened: the request's body goes out, the answer comes to ``sink``."""

    __slots__ = ("_owed", "sink", "trail", "unread")

    def __init__(self, link: Link, number: int, sink: StreamSink) -> None:
        super().__init__(link, number)
        self.sink = sink
        self.unread = 0
        self.trail: bytearray | None = None
        """Where the trail goes, if TOKENS were asked for; full at `MAX_TRAIL_BYTES`."""
        self._owed = 0

    def send_whole(self, body: bytes | bytearray) -> bool:
        """`send_now` and `end` at once: what most requests are."""
        size = len(body)
        if size > self._credit or size > MAX_PAYLOAD_BYTES or not self.link._writable.is_set():
            return False
        self._credit -= size
        self.link.write(encode_whole(self.number, body))
        return True

    def end(self) -> None:
        """The request's body is complete."""
        if not self.done:
            self.link.write(encode_frame(_END, self.number, EMPTY_CONTROL))

    def cancel(self) -> None:
        """Nobody wants the answer any more; the sink hears nothing further."""
        if not self.done:
            self.link.forget_outgoing(self.number)
            self.link.expect_late()
            self.link.write(encode_frame(Frame.CANCEL, self.number))

    def consumed(self, count: int) -> None:
        """``count`` bytes of the answer have left; the peer gets the room back in large steps."""
        self._owed += count
        if self._owed * 2 >= WINDOW_BYTES and not self.done:
            self.unread -= self._owed
            self.link.write(encode_credit(self.number, self._owed))
            self._owed = 0


class IncomingStream(_Sending):
    """A stream the peer opened: its request comes in, the answer goes out."""

    __slots__ = ("_accepted_at", "_accepting", "_arrived", "_body", "_body_done", "_unread", "on_cancel")

    def __init__(self, link: Link, number: int) -> None:
        super().__init__(link, number)
        self._accepted_at = 0.0
        self._accepting: asyncio.TimerHandle | None = None
        self._body: list[bytes] = []
        self._body_done = False
        self._unread = 0
        self._arrived: asyncio.Event | None = None
        self.on_cancel: asyncio.Task[Any] | None = None

    def whole_body(self) -> bytes | None:
        """The request's body if it has come whole and in one frame, as most do; None if `read_body` must wait for it."""
        return self._body[0] if self._body_done and len(self._body) == 1 else None

    async def read_body(self, *, max_bytes: int) -> bytes | bytearray:
        """The whole request body. Raises `ProtocolError` beyond ``max_bytes``; the proxy should have refused it.

        A large one is gathered as it comes: joining twenty megabytes at the end would stand still for tens of milliseconds.
        """
        total, body = 0, bytearray()
        while True:
            arrived, self._body = self._body, []
            size = sum(map(len, arrived))
            total += size
            if total > max_bytes:
                raise ProtocolError(f"a request body of more than {max_bytes} bytes")
            if self._body_done and not total - size and len(arrived) == 1:
                return arrived[0]
            for piece in arrived:
                body += piece
            if size:
                self._unread -= size
                if not self._body_done:
                    self.link.write(encode_credit(self.number, size))
            if self._body_done and not self._body:
                return body
            if not self._body:
                self._arrived = self._arrived or asyncio.Event()
                self._arrived.clear()
                await self._arrived.wait()

    def send_tokens_now(self, trail: bytes, data: bytes) -> bool:
        """Send ``data`` whole, its trail with it, if credit and buffers allow it at once; False if the caller must `send_tokens`."""
        size = len(data)
        if size > self._credit or size > MAX_TOKENS_DATA_BYTES or not self.link._writable.is_set():
            return False
        self._credit -= size
        self.link.write(encode_tokens(self.number, trail, data))
        return True

    async def send_tokens(self, trail: bytes, data: bytes) -> None:
        """As `send_tokens_now`, waiting for credit: what a client has and what its trail says must never differ, so nothing goes in parts.

        ``data`` has at most `mesh.link.frames.MAX_TOKENS_DATA_BYTES`. Raises `WorkerLost` if the stream ends first.
        """
        while not self.send_tokens_now(trail, data):
            await self.credit(len(data))
            await self.link.writable()
            if self.done or self.link.closed:
                raise WorkerLost("the stream ended while it was being written")

    def accept(self) -> None:
        """A slot was taken for the request. Said by HEAD if that comes soon, else in `ACCEPT_AFTER_S`: one write and one wake-up less."""
        loop = self.link._loop
        self._accepted_at = loop.time()
        self._accepting = loop.call_later(ACCEPT_AFTER_S, self._tell_accepted)

    def _tell_accepted(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None
            self.link.write(encode_frame(Frame.ACCEPTED, self.number, EMPTY_CONTROL))

    def progress(self, fields: Mapping[str, Any]) -> None:
        self._tell_accepted()
        self.link.write(encode_control(Frame.PROGRESS, self.number, fields))

    def send_head(self, fields: Mapping[str, Any]) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None
            fields = {**fields, "acc": round((self.link._loop.time() - self._accepted_at) * 1000)}
        self.link.write(encode_control(_HEAD, self.number, fields))

    def end(self, trailer: Mapping[str, Any]) -> None:
        """The answer is complete."""
        self._close(encode_control(_END, self.number, trailer))

    def fail(self, error: MeshError) -> None:
        """The answer will not be completed."""
        self._close(encode_control(Frame.ERROR, self.number, encode_error(error)))

    def _close(self, frame: bytes) -> None:
        if not self.done:
            self.link.write(frame)
            self.finish()
            self.link.forget_incoming(self.number)
            self.link.expect_late()

    def finish(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None
        super().finish()

    # -- called by the link

    def receive(self, data: bytes) -> None:
        self._unread += len(data)
        if not data or self._unread > WINDOW_BYTES or self._body_done:
            raise ProtocolError("more DATA than credit")
        self._body.append(data)
        if self._arrived is not None:
            self._arrived.set()

    def receive_end(self) -> None:
        self._body_done = True
        if self._arrived is not None:
            self._arrived.set()

    def peer_cancelled(self) -> None:
        self.finish()
        if self.on_cancel is not None:
            self.on_cancel.cancel()
