"""TOKENS: an answer's bytes with a piece of the stream's trail before them. What a proxy has of the one is what it has of the other."""

from __future__ import annotations

import asyncio

import pytest

from mesh.errors import WorkerLost
from mesh.link.frames import MAX_TOKENS_DATA_BYTES, MAX_TRAIL_PIECE_BYTES, Frame, encode_frame, encode_tokens
from mesh.link.link import MAX_TRAIL_BYTES, WINDOW_BYTES, IncomingStream
from tests.support.pipe import Pair, Sink, attacked, linked


async def begun(pair: Pair, *, eager: bool = True) -> tuple[Sink, IncomingStream, bytearray]:
    """A stream whose opener keeps its trail: both ends of it, and the trail."""
    sink = pair.open(eager=eager)
    trail = sink.stream.trail = bytearray()
    await pair.settle()
    return sink, pair.bob_owner.opened[-1][0], trail


@pytest.mark.parametrize("piece_bytes", [None, 1, 7])
async def test_trail_and_body_come_apart_again(piece_bytes: int | None) -> None:
    pair = await linked(piece_bytes=piece_bytes)
    sink, stream, trail = await begun(pair)
    assert stream.send_tokens_now(b"\x11\x01", b"event 1")
    assert stream.send_tokens_now(b"", b"event 2")
    assert stream.send_tokens_now(b"x" * MAX_TRAIL_PIECE_BYTES, b"")
    assert stream.send_now(b"event 3")
    stream.end({})
    await pair.settle()
    assert (bytes(sink.data), bytes(trail)) == (b"event 1event 2event 3", b"\x11\x01" + b"x" * MAX_TRAIL_PIECE_BYTES)
    assert sink.trailer == {}


async def test_event_waits_for_credit_and_then_goes_whole() -> None:
    pair = await linked()
    sink, stream, trail = await begun(pair, eager=False)
    while stream.send_tokens_now(b"t", bytes(MAX_TOKENS_DATA_BYTES)):
        pass
    waiting = asyncio.create_task(stream.send_tokens(b"T", bytes(MAX_TOKENS_DATA_BYTES)))
    await pair.settle()
    had = len(sink.data)
    assert (had, bytes(trail)) == (len(trail) * MAX_TOKENS_DATA_BYTES, b"t" * len(trail)), "nothing of the one that waits"
    sink.stream.consumed(had)
    await pair.settle()
    await asyncio.wait_for(waiting, 5)
    await pair.settle()
    assert (len(sink.data), trail[-1:]) == (had + MAX_TOKENS_DATA_BYTES, b"T")


async def test_who_waits_for_credit_is_let_go_when_the_stream_ends() -> None:
    pair = await linked()
    sink, stream, _ = await begun(pair, eager=False)
    while stream.send_tokens_now(b"", bytes(MAX_TOKENS_DATA_BYTES)):
        pass
    waiting = asyncio.create_task(stream.send_tokens(b"", bytes(MAX_TOKENS_DATA_BYTES)))
    await pair.settle()
    sink.stream.cancel()
    await pair.settle()
    with pytest.raises(WorkerLost):
        await asyncio.wait_for(waiting, 5)


async def test_trail_without_end_is_not_kept_and_the_answer_goes_on() -> None:
    victim = await attacked(dialled=True)
    sink = Sink()
    sink.stream = victim.link.open({}, sink)
    trail = sink.stream.trail = bytearray()
    for _ in range(2 * MAX_TRAIL_BYTES // MAX_TRAIL_PIECE_BYTES):
        await victim.send(encode_tokens(1, bytes(MAX_TRAIL_PIECE_BYTES), b"x"))
    assert MAX_TRAIL_BYTES <= len(trail) < MAX_TRAIL_BYTES + MAX_TRAIL_PIECE_BYTES
    assert not victim.link.closed


@pytest.mark.parametrize(
    ("frame", "asked"),
    [
        (encode_tokens(1, b"t", b"x"), False),
        (encode_frame(Frame.TOKENS, 1, b""), True),
        (encode_frame(Frame.TOKENS, 1, b"\x02t"), True),
        (encode_frame(Frame.TOKENS, 1, b"\xff" + bytes(254)), True),
    ],
    ids=["not asked for", "empty", "shorter than it says", "shorter by one"],
)
async def test_bad_tokens_end_the_link(frame: bytes, asked: bool) -> None:
    victim = await attacked(dialled=True)
    sink = Sink()
    sink.stream = victim.link.open({}, sink)
    sink.stream.trail = bytearray() if asked else None
    await victim.send(frame)
    assert victim.link.closed
    assert [type(error) for error in sink.errors] == [WorkerLost]
    assert not sink.data


async def test_tokens_use_credit_as_data_does() -> None:
    victim = await attacked(dialled=True)
    sink = Sink(eager=False)
    sink.stream = victim.link.open({}, sink)
    sink.stream.trail = bytearray()
    for _ in range(WINDOW_BYTES // MAX_TOKENS_DATA_BYTES):
        await victim.send(encode_tokens(1, b"t", bytes(MAX_TOKENS_DATA_BYTES)))
    assert not victim.link.closed
    await victim.send(encode_tokens(1, b"t", bytes(MAX_TOKENS_DATA_BYTES)))
    assert victim.link.closed


async def test_tokens_belong_to_answers_only() -> None:
    victim = await attacked()
    await victim.send(encode_frame(Frame.OPEN, 1, b"\x80"), encode_tokens(1, b"t", b"x"))
    assert victim.link.closed


async def test_late_tokens_on_an_ended_stream_are_passed_over() -> None:
    victim = await attacked(dialled=True)
    sink = Sink()
    sink.stream = victim.link.open({}, sink)
    sink.stream.trail = bytearray()
    sink.stream.cancel()
    await victim.send(encode_tokens(1, b"t", b"x"))
    assert not victim.link.closed
