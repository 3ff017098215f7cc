"""The wire format of a link: what is written can be read in whatever pieces it comes, and nothing else can."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import MeshError, Overloaded, ProtocolError
from mesh.link.errors import encode_error
from mesh.link.frames import (
    HEADER,
    HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    Frame,
    FrameReader,
    encode_control,
    encode_credit,
    encode_frame,
    encode_tokens,
    parse_control,
    parse_credit,
)
from proxy.limits.buckets import Ask, Grant, Kind
from proxy.limits.messages import Count, encode_asks, encode_grants
from tests.support import vectors

VECTORS = Path(__file__).parent / "vectors" / "frames.json"
KINDS = st.integers(min_value=0, max_value=255)
STREAMS = st.integers(min_value=0, max_value=2**32 - 1)
FRAMES = st.tuples(KINDS, STREAMS, st.binary(max_size=300))


def examples() -> dict[str, tuple[Frame, int, bytes]]:
    """One frame of every type, as PROTOCOL.md describes them: name → type, stream, the frame's bytes."""
    record = bytes.fromhex(vectors.read("record.json")["record"])
    request = {
        "id": "req_0123456789abcdef01234567",
        "task": "chat",
        "model": "qwen3-8b",
        "stream": True,
        "size": 74,
        "project": "search",
        "key": bytes(range(8)),
    }
    entry = {"kind": "limits", "name": "default", "seq": 3, "dig": bytes(range(32)), "size": 417}
    two = bytes(range(16))
    shares = {"t": 73_500, "echo": 41_000, "v": 4, "ack": 9, "want": True, "bye": False, "lend": True, "sure": True}
    rate = Ask(bucket=bytes(range(16)), kind=Kind.RATE, limit=100.0, burst=100.0, want=12.0, least=1.0, demand=20.0)
    budget = Ask(
        bucket=bytes(range(16, 32)),
        kind=Kind.BUDGET,
        limit=1e6,
        want=600.0,
        back=5.0,
        used=4200.0,
        held=300.0,
        ends=1_800_000_000.0,
        burst=0.0,
    )
    count = Count(bucket=bytes(range(16, 32)), source=bytes(range(16)), used=4200.0, ends=1_800_000_000.0)
    refusal = encode_error(Overloaded("This worker is full", retry_after_s=1.0))
    event = b'data: {"choices":[{"index":0,"delta":{"content":" t1"}}]}\n\n'
    controls: dict[str, tuple[Frame, int, dict[str, Any]]] = {
        "hello": (Frame.HELLO, 0, {"v": 1, "rec": record}),
        "open": (Frame.OPEN, 1, request),
        "end of a request": (Frame.END, 1, {}),
        "accepted": (Frame.ACCEPTED, 1, {}),
        "progress": (Frame.PROGRESS, 1, {"running": 3}),
        "head of a stream of events": (Frame.HEAD, 1, {"status": 200, "type": "text/event-stream"}),
        "head of a sized answer": (Frame.HEAD, 3, {"status": 200, "type": "application/json", "length": 335}),
        "end of an answer": (Frame.END, 1, {"in": 12, "out": 5, "cached": 0, "queue_ms": 0, "engine_ms": 31}),
        "error": (Frame.ERROR, 5, refusal),
        "load": (Frame.LOAD, 0, {"run": 3, "wait": 0, "kv": 0.25, "yours": 2}),
        "record": (Frame.RECORD, 0, {"rec": record}),
        "drain": (Frame.DRAIN, 0, {}),
        "load with prefill": (Frame.LOAD, 0, {"run": 3, "wait": 0, "kv": 0.25, "yours": 2, "n": 7, "pre": 12000, "rate": 7000, "last": 41}),
        "open of a long prompt": (Frame.OPEN, 5, {**request, "pri": 2, "pfx": bytes(range(16)), "txt": 1100, "seen": 7}),
        "open of a stream that moves": (Frame.OPEN, 7, {**request, "trail": 1024}),
        "head of a stream that has moved": (Frame.HEAD, 7, {"status": 200, "type": "text/event-stream", "resumed": 170}),
        "head of a stream that cannot move": (Frame.HEAD, 9, {"status": 200, "type": "text/event-stream", "fixed": "tools"}),
        "prefixes, all": (Frame.PREFIX, 0, {"new": True, "add": bytes(range(16))}),
        "prefixes, a change": (Frame.PREFIX, 0, {"add": bytes(range(16, 24)), "del": bytes(range(8))}),
        "load of a worker whose engine stands still": (Frame.LOAD, 0, {"run": 3, "wait": 1, "kv": 0.25, "yours": 2, "stuck": True}),
        "load of a worker whose engine was stopped": (Frame.LOAD, 0, {"run": 3, "wait": 1, "yours": 2, "stuck": True, "halted": True}),
        "open of a request with a deadline": (Frame.OPEN, 11, {**request, "dl": 30_000}),
        "open of a call of an endpoint": (Frame.OPEN, 13, {**request, "ep": "chat"}),
        "an order": (Frame.ORDER, 0, {"order": bytes.fromhex(vectors.read("order.json")["order"])}),
        "a document": (Frame.DOCUMENT, 0, {"doc": bytes.fromhex(vectors.read("envelope.json")["envelope"])}),
        "documents that are held": (Frame.DOCUMENT, 0, {"have": [entry, entry | {"proj": "search"}], "close": True}),
        "a document that is wanted": (Frame.DOCUMENT, 0, {"want": [entry]}),
        "shares": (Frame.SHARES, 0, shares),
        "shares, with lists": (
            Frame.SHARES,
            0,
            shares | {"of": two, "all": two, "gone": b"", "was": bytes(range(8)), "held": bytes(range(8))},
        ),
        "asks": (Frame.ASK, 0, encode_asks([rate, budget], [count])),
        "what an owner may use": (Frame.ASK, 0, encode_asks([], [replace(count, most=4700.0)])),
        "a will that was heard": (Frame.GRANT, 0, encode_grants([], [replace(count, most=4700.0)])),
        "grants": (Frame.GRANT, 0, encode_grants([Grant(bucket=bytes(range(16)), given=12.0, left=30.5, wait_s=0.0)])),
    }
    raw = {
        "data": (Frame.DATA, 1, encode_frame(Frame.DATA, 1, event)),
        "tokens": (Frame.TOKENS, 1, encode_tokens(1, bytes.fromhex("1301b7010000"), event)),
        "credit": (Frame.CREDIT, 1, encode_credit(1, 131072)),
        "cancel": (Frame.CANCEL, 1, encode_frame(Frame.CANCEL, 1)),
        "ping": (Frame.PING, 0, encode_frame(Frame.PING, 0, bytes(range(8)))),
        "pong": (Frame.PONG, 0, encode_frame(Frame.PONG, 0, bytes(range(8)))),
    }
    return {name: (kind, stream, encode_control(kind, stream, fields)) for name, (kind, stream, fields) in controls.items()} | raw


def build_vectors() -> list[dict[str, Any]]:
    built = []
    for name, (kind, stream, frame) in examples().items():
        payload = frame[HEADER_BYTES:]
        vector: dict[str, Any] = {"name": name, "type": kind.name, "number": int(kind), "stream": stream, "frame": frame.hex()}
        if kind not in (Frame.DATA, Frame.TOKENS, Frame.CREDIT, Frame.CANCEL, Frame.PING, Frame.PONG):
            fields = parse_control(payload)
            vector["fields"] = readable(fields)
        built.append(vector)
    return built


def readable(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {key: readable(item) for key, item in value.items()}
    return [readable(item) for item in value] if isinstance(value, list) else value


def read_all(data: bytes, pieces: list[bytes] | None = None) -> list[tuple[int, int, bytes]]:
    reader = FrameReader()
    return [frame for piece in pieces or [data] for frame in reader.feed(piece)]


def test_committed_vectors_are_what_is_written_today() -> None:
    assert json.loads(VECTORS.read_text()) == build_vectors()


def test_every_frame_type_has_a_vector() -> None:
    assert {vector["type"] for vector in json.loads(VECTORS.read_text())} == {kind.name for kind in Frame}


def test_committed_vectors_are_read_in_every_pair_of_pieces() -> None:
    frames = [bytes.fromhex(vector["frame"]) for vector in json.loads(VECTORS.read_text())]
    data = b"".join(frames)
    whole = read_all(data)
    assert [encode_frame(*frame) for frame in whole] == frames
    for at in range(len(data) + 1):
        assert read_all(data, [data[:at], data[at:]]) == whole


def test_frames_are_read_byte_by_byte() -> None:
    data = b"".join(frame for _, _, frame in examples().values())
    assert read_all(data, [bytes((byte,)) for byte in data]) == read_all(data)


@given(st.lists(FRAMES, max_size=8), st.integers(0, 2**32))
def test_any_frames_come_back_whatever_the_pieces(frames: list[tuple[int, int, bytes]], seed: int) -> None:
    data, rng, pieces = b"".join(encode_frame(*frame) for frame in frames), random.Random(seed), []
    at = 0
    while at < len(data):
        size = rng.randint(1, 40)
        pieces.append(data[at : at + size])
        at += size
    assert read_all(data, pieces or [b""]) == frames


def test_frame_of_the_greatest_length_passes_and_one_byte_more_does_not() -> None:
    largest = encode_frame(Frame.DATA, 1, bytes(MAX_PAYLOAD_BYTES))
    assert len(read_all(largest)[0][2]) == MAX_PAYLOAD_BYTES
    with pytest.raises(ProtocolError):
        read_all(HEADER.pack(MAX_PAYLOAD_BYTES + 1, 1, Frame.DATA))


@pytest.mark.parametrize("length", [MAX_PAYLOAD_BYTES + 1, 2**31, 2**32 - 1])
def test_giant_length_is_refused_at_its_header_with_nothing_kept(length: int) -> None:
    reader = FrameReader()
    with pytest.raises(ProtocolError):
        list(reader.feed(HEADER.pack(length, 1, Frame.DATA)))
    assert list(reader.feed(encode_frame(Frame.PING, 0, b"12345678"))) == [(Frame.PING, 0, b"12345678")]


def test_frames_before_a_giant_one_are_still_given() -> None:
    frames = FrameReader().feed(encode_frame(Frame.CANCEL, 1) + HEADER.pack(2**31, 1, 3))
    assert next(frames) == (Frame.CANCEL, 1, b"")
    with pytest.raises(ProtocolError):
        next(frames)


def test_too_large_a_payload_is_not_written() -> None:
    with pytest.raises(ValueError, match="at most"):
        encode_frame(Frame.DATA, 1, bytes(MAX_PAYLOAD_BYTES + 1))


@given(st.integers(0, 2**32 - 1))
def test_credit_comes_back(count: int) -> None:
    ((kind, stream, payload),) = read_all(encode_credit(7, count))
    assert (kind, stream, parse_credit(payload)) == (Frame.CREDIT, 7, count)


@pytest.mark.parametrize("size", [0, 1, 3, 5, 8])
def test_credit_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError):
        parse_credit(bytes(size))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=6))
def test_any_map_comes_back(fields: dict[str, Any]) -> None:
    ((_, _, payload),) = read_all(encode_control(Frame.LOAD, 0, fields))
    assert parse_control(payload) == fields


@given(st.binary(max_size=200))
def test_random_payload_is_a_map_or_a_protocol_error(payload: bytes) -> None:
    try:
        fields = parse_control(payload)
    except ProtocolError:
        return
    assert all(isinstance(key, str) for key in fields)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x80\x80",  # two maps
        b"\xc0",  # nil
        b"\x93\x01\x02\x03",  # an array
        b"\x81\x01\x02",  # an integer for a key
        b"\x81\xc4\x01a\x02",  # bytes for a key
        b"\xdf\xff\xff\xff\xff",  # a map of four billion entries
        b"\x81\xa1a\xdd\xff\xff\xff\xff",  # an array of four billion
        b"\x81\xa1a\xc7\x00\x05",  # an extension of no bytes: kept opaque or refused, but never run
        b"\x81\xa1a" + b"\x91" * 5000 + b"\xc0",  # deep
        b"\x81\xa1\xff\xc0",  # a key that is no UTF-8
    ],
)
def test_hostile_msgpack_is_a_protocol_error(payload: bytes) -> None:
    if payload == b"\x81\xa1a\xc7\x00\x05":
        assert list(parse_control(payload)) == ["a"]
    else:
        with pytest.raises(ProtocolError):
            parse_control(payload)


def test_infinite_numbers_pass_the_parser_and_are_for_the_readers_of_fields_to_refuse() -> None:
    assert math.isinf(parse_control(msgpack.packb({"kv": math.inf}))["kv"])


def test_every_error_that_crosses_a_link_fits_a_frame() -> None:
    error = MeshError("\U0001f600" * 100_000, param="x" * 10_000, retry_after_s=1.0)
    assert len(encode_control(Frame.ERROR, 1, encode_error(error))) < MAX_PAYLOAD_BYTES


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(build_vectors(), indent=1) + "\n")
