"""Frames: the wire format of a link. Pure.

::

    payload length (4, big-endian) ‖ stream (4) ‖ type (1) ‖ payload

Stream 0 is the link itself. Control payloads are one msgpack map each; DATA is raw bytes, TOKENS the same after a piece of trail,
CREDIT a 4-byte count, PING and PONG 8 bytes echoed. A peer that breaks a rule here has broken the link: the error is a `ProtocolError`
and the connection ends.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any

import msgspec

from mesh.envelope import parse_payload
from mesh.errors import MalformedEnvelope, ProtocolError

HEADER = struct.Struct(">IIB")
HEADER_BYTES = HEADER.size
_header = HEADER.pack
MAX_PAYLOAD_BYTES = 64 * 1024
_COUNT = struct.Struct(">I")
EMPTY_CONTROL = b"\x80"
"""A control payload that says nothing: an empty map."""
_pack = msgspec.msgpack.Encoder().encode
"""The same bytes as msgpack's own packer, in a third of the time."""


class Frame(IntEnum):
    """Frame types. The number is the wire value and is never reused."""

    HELLO = 1
    OPEN = 2
    DATA = 3
    END = 4
    CREDIT = 5
    CANCEL = 6
    HEAD = 7
    ERROR = 8
    ACCEPTED = 9
    PROGRESS = 10
    LOAD = 11
    RECORD = 12
    DRAIN = 13
    PING = 14
    PONG = 15
    PREFIX = 16
    TOKENS = 17
    DOCUMENT = 18
    ORDER = 19
    SHARES = 20
    ASK = 21
    GRANT = 22


MAX_TRAIL_PIECE_BYTES = 255
MAX_TOKENS_DATA_BYTES = MAX_PAYLOAD_BYTES - 1 - MAX_TRAIL_PIECE_BYTES
"""So much of an answer's body fits into any TOKENS frame."""
_DATA, _END, _TOKENS = int(Frame.DATA), int(Frame.END), int(Frame.TOKENS)
_tokens_header = struct.Struct(">IIBB").pack

LINK_CONTROL = frozenset(
    {Frame.LOAD, Frame.RECORD, Frame.DRAIN, Frame.PREFIX, Frame.DOCUMENT, Frame.ORDER, Frame.SHARES, Frame.ASK, Frame.GRANT}
)
"""Control frames of the link itself that come after HELLO."""


def encode_frame(kind: int, stream: int, payload: bytes | bytearray = b"") -> bytes:
    """One frame. ``payload`` is at most `MAX_PAYLOAD_BYTES`."""
    size = len(payload)
    if size > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a frame holds at most {MAX_PAYLOAD_BYTES} bytes, not {size}")
    return _header(size, stream, kind) + payload


def encode_whole(stream: int, body: bytes | bytearray) -> bytes:
    """DATA and END of a body that fits into one frame: what most requests send."""
    return _header(len(body), stream, _DATA) + body + _header(1, stream, _END) + EMPTY_CONTROL


def encode_tokens(stream: int, trail: bytes, data: bytes) -> bytes:
    """A TOKENS frame: DATA with up to `MAX_TRAIL_PIECE_BYTES` of trail before it. ``data`` leaves room for them."""
    size = len(trail)
    return _tokens_header(size + len(data) + 1, stream, _TOKENS, size) + trail + data


def encode_control(kind: int, stream: int, fields: Mapping[str, Any]) -> bytes:
    """A frame whose payload is one msgpack map."""
    return encode_frame(kind, stream, _pack(fields))


def encode_credit(stream: int, count: int) -> bytes:
    """A CREDIT frame: the receiver may send ``count`` more bytes on this stream."""
    return encode_frame(Frame.CREDIT, stream, _COUNT.pack(count))


def parse_control(payload: bytes) -> dict[str, Any]:
    """A control frame's map. Raises `ProtocolError`."""
    if payload == EMPTY_CONTROL:
        return {}
    try:
        return parse_payload(payload)
    except MalformedEnvelope as error:
        raise ProtocolError(f"bad control frame: {error.message}") from None


def parse_credit(payload: bytes) -> int:
    """Raises `ProtocolError`."""
    if len(payload) != _COUNT.size:
        raise ProtocolError("bad CREDIT frame")
    return int(_COUNT.unpack(payload)[0])


class FrameReader:
    """Cuts a byte stream into frames, whatever pieces it arrives in. Holds at most one incomplete frame."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Yield ``(type, stream, payload)`` of each complete frame. Raises `ProtocolError` on a length beyond the limit."""
        if self._rest:
            data = self._rest + data
        at, size, unpack = 0, len(data), HEADER.unpack_from
        while size - at >= HEADER_BYTES:
            length, stream, kind = unpack(data, at)
            if length > MAX_PAYLOAD_BYTES:
                self._rest = b""
                raise ProtocolError(f"frame of {length} bytes, more than {MAX_PAYLOAD_BYTES}")
            end = at + HEADER_BYTES + length
            if end > size:
                break
            yield kind, stream, data[at + HEADER_BYTES : end]
            at = end
        self._rest = data[at:]
