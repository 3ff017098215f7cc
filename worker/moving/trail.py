"""The trail of a stream: all that a worker needs to go on with an answer which another one began. Pure.

It grows with every event that goes to the client, so that the two never differ. The proxy keeps it and does not look into it; whoever is
asked to go on reads it as it reads anything from outside, since the worker that wrote it may have been anybody's.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgpack

from mesh.claims import read_bytes, read_int, read_str
from mesh.envelope import parse_payload
from mesh.errors import MalformedEnvelope, NotResumed
from mesh.trail import BEGIN as _BEGIN
from mesh.trail import CUT as _CUT
from mesh.trail import DONE as _DONE
from mesh.trail import EVENT as _EVENT
from mesh.trail import FINISH as _FINISH
from mesh.trail import FIXED as _FIXED
from mesh.trail import GAP as _GAP
from mesh.trail import MAX_GAP, MOST_NUMBER_BYTES
from mesh.trail import USAGE as _USAGE

VERSION = b"\x01"
MAX_TOKENS = 1 << 20
MAX_CHARS = 1 << 24
MAX_TOKEN_ID = 2**31 - 1
MAX_GAP_BYTES = MAX_GAP
MAX_NAME = 256
MAX_REASON = 32
HASH_BYTES = 8
MAX_BEGIN_BYTES = 4096
_TOKEN, _ONE, _short = struct.Struct("<I"), struct.Struct("<BI"), struct.Struct("<BBI").pack
_SHORT_CHARS = 128 - _EVENT
"""With fewer than so many characters, what an event begins with is one byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """What a stream's events say of it, and its prompt: how many tokens, and their hash where the engine tells them."""

    id: str
    model: str
    created: int
    prompt_tokens: int
    prompt_hash: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Tokens from ``at`` on of which only the last is known, and the text that they make together."""

    at: int
    count: int
    text: str


@dataclass(slots=True, kw_only=True)
class Trail:
    """What a stream has come to. ``ids`` are the answer's, with zeros in a gap; ``chars`` of text have reached the client.

    All of the text of the first ``settled`` ids was out when the last text went out, unless the engine was holding text back for a stop
    string. ``marks`` are the counts of ids and of characters each time that text went out.
    """

    begin: Begin
    ids: list[int] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    chars: int = 0
    marks: list[tuple[int, int]] = field(default_factory=list)
    finished: bool = False
    usage_sent: bool = False
    done: bool = False
    fixed: str = ""

    @property
    def settled(self) -> int:
        return self.marks[-1][0] if self.marks else 0


FINISH, USAGE, DONE = bytes([_FINISH]), bytes([_USAGE]), bytes([_DONE])


def hash_prompt(ids: Sequence[int]) -> bytes:
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).digest()[:HASH_BYTES]


def encode_begin(begin: Begin) -> bytes:
    """The version and the first record."""
    fields = {"id": begin.id, "model": begin.model, "at": begin.created, "p": begin.prompt_tokens}
    packed: bytes = msgpack.packb(fields | ({"h": begin.prompt_hash} if begin.prompt_hash else {}))
    return VERSION + _NUMBERS[_BEGIN] + _number(len(packed)) + packed


def encode_event(chars: int, ids: Sequence[int]) -> bytes:
    if len(ids) == 1:
        return encode_token(chars, ids[0])
    return _number(_EVENT + chars) + _number(len(ids)) + struct.pack(f"<{len(ids)}I", *ids)


def encode_token(chars: int, token: int) -> bytes:
    """The usual event: one token."""
    if chars < _SHORT_CHARS:
        return _short(_EVENT + chars, 1, token)
    return _number(_EVENT + chars) + _ONE.pack(1, token)


def encode_gap(chars: int, count: int, last: int, text: str) -> bytes:
    raw = text.encode()
    return b"".join(map(_number, (_GAP, chars, count))) + _TOKEN.pack(last) + _number(len(raw)) + raw


def encode_cut(count: int) -> bytes:
    """The answer goes on after its first ``count`` tokens; those after them are made again."""
    return _NUMBERS[_CUT] + _number(count)


def encode_fixed(reason: str) -> bytes:
    return _NUMBERS[_FIXED] + _number(len(reason)) + reason.encode("ascii")


def _number(value: int) -> bytes:
    """LEB128."""
    if value < _LISTED:
        return _NUMBERS[value]
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


_LISTED = 1 << 14
_NUMBERS = tuple(bytes((value,)) if value < 128 else bytes((value & 127 | 128, value >> 7)) for value in range(_LISTED))


def parse_trail(data: bytes) -> Trail:
    """What the whole trail of a stream says. Raises `NotResumed` if it breaks any rule; nothing is guessed."""
    try:
        return _parse(_Reader(data))
    except (MalformedEnvelope, UnicodeDecodeError) as error:
        raise NotResumed(f"The stream's trail is not valid ({type(error).__name__})") from None


def _parse(reader: _Reader) -> Trail:
    if reader.take(1) != VERSION:
        raise MalformedEnvelope("a trail of another version")
    if reader.number() != _BEGIN:
        raise MalformedEnvelope("a trail that does not begin")
    trail = Trail(begin=_parse_begin(reader.take(reader.number())))
    while reader.left and not trail.fixed:
        _parse_record(reader, trail)
        if len(trail.ids) > MAX_TOKENS or trail.chars > MAX_CHARS:
            raise MalformedEnvelope("a trail without end")
    return trail


def _parse_begin(packed: bytes) -> Begin:
    fields = parse_payload(packed)
    return Begin(
        id=read_str(fields, "id", max_len=MAX_NAME),
        model=read_str(fields, "model", max_len=MAX_NAME),
        created=read_int(fields, "at", high=2**53),
        prompt_tokens=read_int(fields, "p", high=2**31),
        prompt_hash=read_bytes(fields, "h", size=HASH_BYTES) if "h" in fields else b"",
    )


def _parse_record(reader: _Reader, trail: Trail) -> None:
    kind = reader.number()
    if trail.done or (trail.finished and kind not in (_USAGE, _DONE, _FIXED)):
        raise MalformedEnvelope("a record after the end")
    if kind >= _EVENT:
        count = reader.number()
        trail.ids += reader.tokens(count)
        _emitted(trail, kind - _EVENT)
    elif kind == _GAP:
        chars, count, (last,) = reader.number(), reader.number(), reader.tokens(1)
        text = reader.take(reader.number(), most=MAX_GAP_BYTES).decode()
        if not text or not 1 < count <= MAX_GAP_BYTES:
            raise MalformedEnvelope("a gap that cannot be")
        trail.gaps.append(Gap(at=len(trail.ids), count=count, text=text))
        trail.ids += [0] * (count - 1) + [last]
        _emitted(trail, chars)
    elif kind == _FINISH:
        trail.finished = True
    elif kind == _USAGE:
        trail.usage_sent = True
    elif kind == _DONE:
        trail.done = True
    elif kind == _CUT:
        count = reader.number()
        if count > len(trail.ids) or any(gap.at + gap.count > count for gap in trail.gaps):
            raise MalformedEnvelope("a cut that cannot be")
        del trail.ids[count:]
        trail.marks = [mark for mark in trail.marks if mark[0] <= count]
        if trail.chars > (trail.marks[-1][1] if trail.marks else 0):
            trail.marks.append((count, trail.chars))
    elif kind == _FIXED:
        trail.fixed = reader.take(reader.number(), most=MAX_REASON).decode("ascii")
        if not trail.fixed.isalnum():
            raise MalformedEnvelope("a reason that is no word")
    else:
        raise MalformedEnvelope("a record of an unknown kind")


def _emitted(trail: Trail, chars: int) -> None:
    trail.chars += chars
    if chars:
        trail.marks.append((len(trail.ids), trail.chars))


class _Reader:
    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int, *, most: int = MAX_BEGIN_BYTES) -> bytes:
        if count > min(self.left, most):
            raise MalformedEnvelope("a trail that is cut off")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self) -> int:
        data, value = self._data, 0
        for at in range(self._at, min(self._at + MOST_NUMBER_BYTES, len(data))):
            byte = data[at]
            value |= (byte & 127) << 7 * (at - self._at)
            if byte < 128:
                self._at = at + 1
                return value
        raise MalformedEnvelope("a number without end")

    def tokens(self, count: int) -> tuple[int, ...]:
        found = struct.unpack(f"<{count}I", self.take(_TOKEN.size * count, most=self.left))
        if max(found, default=0) > MAX_TOKEN_ID:
            raise MalformedEnvelope("a token that cannot be")
        return found
