"""One link over a pipe: streams and their credit, what ends them, and what a peer that breaks the rules breaks (its own link, no more)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.clock import SystemClock
from mesh.errors import (
    BodyTooLarge,
    EngineUnavailable,
    InvalidRequest,
    MeshError,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    TrustError,
    UpstreamTimeout,
    WorkerError,
    WorkerLost,
)
from mesh.link import link as link_module
from mesh.link.errors import encode_error, parse_error
from mesh.link.frames import HEADER, MAX_PAYLOAD_BYTES, Frame, FrameReader, encode_control, encode_credit, encode_frame
from mesh.link.link import MAX_INCOMING_STREAMS, MAX_STREAM_NUMBER, WINDOW_BYTES, IncomingStream, Link
from tests.support.pipe import ALICE, Attacked, Owner, Raw, Sink, attacked, connect, linked, settle

HELLO = encode_control(Frame.HELLO, 0, {"v": 1})
OPEN = encode_control(Frame.OPEN, 1, {})


def frames_of(data: bytes | bytearray) -> list[tuple[int, int, bytes]]:
    return list(FrameReader().feed(bytes(data)))


# -- a request and its answer


@pytest.mark.parametrize("piece_bytes", [None, 1, 7, 1000])
async def test_request_and_answer_pass_whole_whatever_the_pieces(piece_bytes: int | None) -> None:
    pair = await linked(piece_bytes=piece_bytes)
    sink = pair.open({"id": "req_1", "size": 5})
    await sink.stream.send(b"hello")
    sink.stream.end()
    await pair.settle()
    ((stream, head),) = pair.bob_owner.opened
    assert head == {"id": "req_1", "size": 5}
    assert await stream.read_body(max_bytes=5) == b"hello"

    stream.accept()
    stream.progress({"running": 1})
    stream.send_head({"status": 200})
    await stream.send(b"one")
    await stream.send(b"two")
    stream.end({"out": 2})
    await pair.settle()
    assert (sink.accepted, sink.progress, sink.heads) == (1, [{"running": 1}], [{"status": 200}])
    assert (bytes(sink.data), sink.trailer, sink.errors) == (b"onetwo", {"out": 2}, [])
    assert pair.alice.streams == pair.bob.streams == 0


async def test_slot_is_told_by_the_head_of_an_answer_that_comes_soon() -> None:
    pair = await linked()
    sink = pair.open()
    await pair.settle()
    stream, _ = pair.bob_owner.opened[0]
    stream.accept()
    stream.send_head({"status": 200})
    await pair.settle()
    assert (sink.heads, sink.accepted) == ([{"status": 200}], 1)
    assert sink.slot_ms is not None
    assert 0 <= sink.slot_ms < 10_000


async def test_slot_is_told_by_itself_while_an_answer_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "ACCEPT_AFTER_S", 0.001)
    pair = await linked()
    sink, cancelled = pair.open(), pair.open()
    await pair.settle()
    for stream, _ in pair.bob_owner.opened:
        stream.accept()
    cancelled.stream.cancel()
    async with asyncio.timeout(10):
        while not sink.accepted:
            await asyncio.sleep(0.001)
            await pair.settle()
    pair.bob_owner.opened[0][0].send_head({"status": 200})
    await pair.settle()
    assert (sink.accepted, sink.slot_ms, sink.heads, cancelled.accepted) == (1, None, [{"status": 200}], 0)


async def test_frames_of_one_turn_leave_in_one_write() -> None:
    pair = await linked()
    sinks = [pair.open() for _ in range(20)]
    await pair.settle()
    before = pair.bob_end.writes
    for stream, _ in pair.bob_owner.opened:
        stream.send_now(b"token")
    await pair.settle()
    assert pair.bob_end.writes == before + 1
    assert all(sink.data == b"token" for sink in sinks)


async def test_both_sides_may_open_streams_and_their_numbers_never_meet() -> None:
    pair = await linked()
    mine, theirs = pair.open(), Sink()
    theirs.stream = pair.bob.open({}, theirs)
    assert (mine.stream.number, theirs.stream.number) == (1, 2)
    await pair.settle()
    pair.bob_owner.opened[0][0].end({"to": "alice"})
    pair.alice_owner.opened[0][0].end({"to": "bob"})
    await pair.settle()
    assert (mine.trailer, theirs.trailer) == ({"to": "alice"}, {"to": "bob"})


@pytest.mark.parametrize("size", [0, 1, MAX_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES + 1, WINDOW_BYTES, WINDOW_BYTES + 1, 3 * WINDOW_BYTES + 17])
async def test_body_of_any_size_arrives_whole(size: int) -> None:
    pair = await linked()
    body = random.Random(size).randbytes(size)
    sink = pair.open()
    await pair.settle()
    reading = asyncio.create_task(pair.bob_owner.opened[0][0].read_body(max_bytes=size))
    await sink.stream.send(body)
    sink.stream.end()
    assert await reading == body


async def test_body_beyond_what_was_announced_ends_the_request_not_the_link() -> None:
    pair = await linked()
    sink = pair.open()
    await sink.stream.send(b"12345678")
    await pair.settle()
    with pytest.raises(ProtocolError):
        await pair.bob_owner.opened[0][0].read_body(max_bytes=7)
    assert not pair.bob.closed


@pytest.mark.parametrize("size", [WINDOW_BYTES + 1, 2 * WINDOW_BYTES, 5 * WINDOW_BYTES + 3])
async def test_answer_of_any_size_arrives_whole(size: int) -> None:
    pair = await linked()
    answer = random.Random(size).randbytes(size)
    sink = pair.open()
    await pair.settle()
    stream = pair.bob_owner.opened[0][0]
    await stream.send(answer)
    stream.end({})
    await pair.settle()
    assert sink.data == answer
    assert sink.trailer == {}


# -- credit


async def test_sender_stops_at_the_window_until_the_reader_has_consumed() -> None:
    pair = await linked()
    slow = pair.open(eager=False)
    await pair.settle()
    stream = pair.bob_owner.opened[0][0]
    sending = asyncio.create_task(stream.send(bytes(2 * WINDOW_BYTES)))
    await pair.settle()
    assert len(slow.data) == WINDOW_BYTES
    assert not sending.done()
    assert stream.granted == 0

    slow.stream.consumed(WINDOW_BYTES)
    await pair.settle()
    assert len(slow.data) == 2 * WINDOW_BYTES
    assert stream.granted == WINDOW_BYTES
    assert sending.done()


async def test_slow_reader_stalls_its_own_stream_and_no_other() -> None:
    pair = await linked()
    slow, quick = pair.open(eager=False), pair.open()
    await pair.settle()
    (slow_stream, _), (quick_stream, _) = pair.bob_owner.opened
    stalled = asyncio.create_task(slow_stream.send(bytes(4 * WINDOW_BYTES)))
    await quick_stream.send(bytes(4 * WINDOW_BYTES))
    quick_stream.end({})
    await pair.settle()
    assert len(quick.data) == 4 * WINDOW_BYTES
    assert quick.trailer == {}
    assert len(slow.data) == WINDOW_BYTES
    assert not stalled.done()
    slow.stream.cancel()
    await pair.settle()
    with pytest.raises(WorkerLost):
        await stalled


async def test_whole_body_is_sent_and_ended_at_once_or_not_at_all() -> None:
    pair = await linked()
    stream = pair.open().stream
    assert not stream.send_whole(bytes(MAX_PAYLOAD_BYTES + 1))
    assert stream.send_whole(b"all of it")
    await pair.settle()
    received, _ = pair.bob_owner.opened[0]
    assert await received.read_body(max_bytes=100) == b"all of it"


async def test_send_now_refuses_beyond_credit_and_beyond_a_frame() -> None:
    pair = await linked()
    pair.open(eager=False)
    await pair.settle()
    stream = pair.bob_owner.opened[0][0]
    assert not stream.send_now(bytes(MAX_PAYLOAD_BYTES + 1))
    for _ in range(WINDOW_BYTES // MAX_PAYLOAD_BYTES):
        assert stream.send_now(bytes(MAX_PAYLOAD_BYTES))
    assert not stream.send_now(b"x")


async def test_small_consumed_amounts_are_given_back_in_large_steps() -> None:
    pair = await linked()
    sink = pair.open()
    await pair.settle()
    stream = pair.bob_owner.opened[0][0]
    del pair.alice_end.sent[:]
    for _ in range(1000):
        stream.send_now(bytes(200))
    await pair.settle()
    credits = [frame for frame in frames_of(pair.alice_end.sent) if frame[0] == Frame.CREDIT]
    assert len(sink.data) == 200_000
    assert len(credits) == 200_000 // (WINDOW_BYTES // 2)


async def test_writing_waits_while_the_connection_is_full() -> None:
    pair = await linked()
    pair.bob_end.set_write_buffer_limits(high=1000)
    sink = pair.open()
    await pair.settle()
    stream = pair.bob_owner.opened[0][0]
    pair.bob_end.hold()
    await stream.send(bytes(2000))
    await pair.settle()
    assert not stream.send_now(b"x")
    sending = asyncio.create_task(stream.send(b"more"))
    await pair.settle()
    assert not sending.done()
    pair.bob_end.release()
    await pair.settle()
    await sending
    assert bytes(sink.data) == bytes(2000) + b"more"


async def test_peer_that_never_reads_costs_a_bounded_amount_and_then_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_UNSENT_BYTES", 100_000)
    victim = await attacked()
    victim.link_end.set_write_buffer_limits(high=1000)
    victim.link_end.hold()
    for _ in range(100):
        await victim.send(encode_frame(Frame.PING, 0, b"12345678") * 200)
    assert victim.link.closed
    assert victim.owner.lost == ["the peer does not read"]
    assert victim.link_end.get_write_buffer_size() < 110_000


# -- cancelling


async def test_cancel_reaches_the_other_side_and_its_task() -> None:
    pair = await linked()
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    def serve(stream: IncomingStream, head: dict[str, Any]) -> None:
        stream.on_cancel = asyncio.create_task(work())

    pair.bob_owner.on_stream = serve
    sink = pair.open()
    await pair.settle()
    assert pair.bob.streams == 1
    sink.stream.cancel()
    sink.stream.cancel()
    await asyncio.wait_for(ended.wait(), 5)
    assert pair.alice.streams == pair.bob.streams == 0
    assert (sink.trailer, sink.errors) == (None, [])
    assert [kind for kind, _, _ in frames_of(pair.alice_end.sent)].count(Frame.CANCEL) == 1


async def test_answer_on_its_way_when_it_was_cancelled_is_dropped() -> None:
    pair = await linked()
    sink = pair.open()
    await pair.settle()
    stream = pair.bob_owner.opened[0][0]
    stream.send_head({"status": 200})
    stream.send_now(b"late")
    stream.end({})
    sink.stream.cancel()
    await pair.settle()
    assert (sink.heads, bytes(sink.data), sink.trailer, sink.errors) == ([], b"", None, [])
    assert not pair.alice.closed
    assert not pair.bob.closed


async def test_cancelled_request_lets_go_of_whoever_sends_its_body() -> None:
    pair = await linked()
    sink = pair.open()
    sending = asyncio.create_task(sink.stream.send(bytes(3 * WINDOW_BYTES)))
    await pair.settle()
    pair.bob_owner.opened[0][0].fail(Overloaded("full"))
    await pair.settle()
    with pytest.raises(WorkerLost):
        await sending
    assert isinstance(sink.errors[0], Overloaded)


async def test_stream_answers_once() -> None:
    pair = await linked()
    sink = pair.open()
    await pair.settle()
    stream = pair.bob_owner.opened[0][0]
    stream.end({"out": 1})
    stream.fail(WorkerError("too late"))
    stream.end({"out": 2})
    await pair.settle()
    assert sink.trailer == {"out": 1}
    assert sink.errors == []


# -- losing the link


@pytest.mark.parametrize("how", ["lost", "closed here", "closed there", "aborted"])
async def test_link_loss_fails_every_outgoing_stream_once_and_cancels_every_incoming_one(how: str) -> None:
    pair = await linked()
    tasks: list[asyncio.Task[bool]] = []

    def serve(stream: IncomingStream, head: dict[str, Any]) -> None:
        tasks.append(asyncio.create_task(asyncio.Event().wait()))
        stream.on_cancel = tasks[-1]

    pair.bob_owner.on_stream = serve
    sinks = [pair.open() for _ in range(3)]
    await pair.settle()
    match how:
        case "lost":
            pair.alice_end.lose()
        case "closed here":
            pair.alice.close("enough")
        case "closed there":
            pair.bob.close("enough")
        case "aborted":
            pair.bob.abort("enough")
    await pair.settle()
    assert [[type(error) for error in sink.errors] for sink in sinks] == [[WorkerLost]] * 3
    assert len(tasks) == 3
    assert all(task.cancelled() for task in tasks)
    assert len(pair.alice_owner.lost) == len(pair.bob_owner.lost) == 1
    assert pair.alice.closed
    assert pair.bob.closed
    with pytest.raises(WorkerLost):
        pair.open()


async def test_closing_still_sends_what_was_queued() -> None:
    pair = await linked()
    sink = pair.open()
    await pair.settle()
    pair.bob_owner.opened[0][0].end({"out": 1})
    pair.bob.close("good-bye")
    await pair.settle()
    assert sink.trailer == {"out": 1}
    assert sink.errors == []


async def test_sending_on_a_lost_link_ends_with_worker_lost() -> None:
    pair = await linked()
    pair.open(eager=False)
    await pair.settle()
    stream = pair.bob_owner.opened[0][0]
    waiting = asyncio.create_task(stream.send(bytes(3 * WINDOW_BYTES)))
    await pair.settle()
    pair.bob_end.lose()
    await pair.settle()
    with pytest.raises(WorkerLost):
        await waiting
    stream.end({})
    stream.fail(WorkerError("nobody hears it"))


async def test_refused_peer_is_aborted_before_any_frame() -> None:
    owner, raw = Owner(ALICE, refuse=TrustError("a stranger")), Raw()
    link = Link(owner, clock=SystemClock(), dialled=False)
    link_end, raw_end = connect(link, raw)
    raw_end.write(HELLO + OPEN)
    await settle(link_end, raw_end)
    assert link.closed
    assert link_end.aborted
    assert link_end.sent == b""
    assert (owner.hellos, owner.opened) == ([], [])
    assert raw.is_lost


# -- what errors become on the other side


CROSSING = [BodyTooLarge, EngineUnavailable, InvalidRequest, ModelNotFound, Overloaded, ProtocolError, UpstreamTimeout, WorkerError]


@pytest.mark.parametrize("kind", CROSSING)
async def test_error_keeps_its_kind_message_and_details_across_the_link(kind: type[MeshError]) -> None:
    pair = await linked()
    sink = pair.open()
    await pair.settle()
    pair.bob_owner.opened[0][0].fail(kind("what went wrong", param="model", retry_after_s=2.5))
    await pair.settle()
    (error,) = sink.errors
    assert type(error) is kind
    assert (error.message, error.param, error.retry_after_s) == ("what went wrong", "model", 2.5)


@pytest.mark.parametrize("kind", [MeshError, TrustError, WorkerLost])
def test_error_that_may_not_cross_becomes_a_plain_worker_error(kind: type[MeshError]) -> None:
    error = parse_error(encode_error(kind("inside matters")))
    assert type(error) is WorkerError


def test_error_code_of_a_newer_peer_becomes_a_plain_worker_error() -> None:
    assert type(parse_error({"code": "quantum_decoherence", "message": "x"})) is WorkerError


def test_client_errors_cannot_be_forged_into_key_errors() -> None:
    for code in ("invalid_api_key", "key_not_allowed", "rate_limit_exceeded", "internal_error"):
        assert type(parse_error({"code": code, "message": "x"})) is WorkerError


# -- rules


CREDIT_OVERFLOW = (OPEN, encode_credit(1, 2**31), encode_credit(1, 2**31))
BROKEN_RULES: dict[str, tuple[bytes, ...]] = {
    "a giant frame": (HEADER.pack(2**32 - 1, 1, Frame.DATA),),
    "a second HELLO": (HELLO,),
    "a stream of the wrong parity": (encode_control(Frame.OPEN, 2, {}),),
    "data on a stream never opened": (encode_frame(Frame.DATA, 1, b"x"),),
    "an answer on a stream never opened": (encode_control(Frame.END, 2, {}),),
    "a stream number used twice": (OPEN, OPEN),
    "stream numbers going back": (encode_control(Frame.OPEN, 5, {}), encode_control(Frame.OPEN, 3, {})),
    "a HEAD on a request": (OPEN, encode_control(Frame.HEAD, 1, {})),
    "an unknown type on a stream": (OPEN, encode_frame(99, 1)),
    "OPEN on the link itself": (encode_control(Frame.OPEN, 0, {}),),
    "DATA on the link itself": (encode_frame(Frame.DATA, 0, b"x"),),
    "credit on the link itself": (encode_credit(0, 1),),
    "more DATA than credit": (OPEN, *[encode_frame(Frame.DATA, 1, bytes(MAX_PAYLOAD_BYTES))] * 5),
    "DATA after END": (OPEN, encode_control(Frame.END, 1, {}), encode_frame(Frame.DATA, 1, b"x")),
    "credit without end": CREDIT_OVERFLOW,
    "a short CREDIT": (OPEN, encode_frame(Frame.CREDIT, 1, b"\0\0\0")),
    "an OPEN that is no map": (encode_frame(Frame.OPEN, 1, b"\x93\x01\x02\x03"),),
    "a LOAD that is no map": (encode_frame(Frame.LOAD, 0, b"\xc1"),),
}


@pytest.mark.parametrize("name", BROKEN_RULES)
async def test_broken_rule_ends_this_link_and_nobody_elses(name: str) -> None:
    victim, other = await attacked(), await linked()
    await victim.send(*BROKEN_RULES[name])
    assert victim.link.closed
    assert victim.link_end.aborted
    assert len(victim.owner.lost) == 1
    assert victim.raw.is_lost
    assert not other.alice.closed
    assert not other.bob.closed


@pytest.mark.parametrize(
    "frame", [OPEN, encode_frame(Frame.DATA, 1, b"x"), encode_control(Frame.LOAD, 0, {}), encode_control(Frame.DRAIN, 0, {})]
)
async def test_nothing_is_taken_before_hello(frame: bytes) -> None:
    victim = await attacked(hello=False)
    await victim.send(frame)
    assert victim.link.closed
    assert (victim.owner.opened, victim.owner.controls) == ([], [])


async def test_answer_beyond_its_credit_ends_the_link() -> None:
    victim = await attacked(dialled=True)
    sink = Sink(eager=False)
    sink.stream = victim.link.open({}, sink)
    await victim.send(*[encode_frame(Frame.DATA, 1, bytes(MAX_PAYLOAD_BYTES))] * 4)
    assert not victim.link.closed
    await victim.send(encode_frame(Frame.DATA, 1, b"x"))
    assert victim.link.closed
    assert [type(error) for error in sink.errors] == [WorkerLost]
    assert len(sink.data) == WINDOW_BYTES


async def test_credit_given_back_late_never_counts_against_the_sender() -> None:
    pair = await linked()
    sink = pair.open(eager=False)
    await pair.settle()
    stream, rng, consumed = pair.bob_owner.opened[0][0], random.Random(1), 0
    sending = asyncio.create_task(stream.send(bytes(20 * WINDOW_BYTES)))
    while consumed < 20 * WINDOW_BYTES:
        await pair.settle()
        step = rng.randint(1, len(sink.data) - consumed)
        sink.stream.consumed(step)
        consumed += step
    await sending
    assert not pair.alice.closed


@pytest.mark.parametrize("kind", [Frame.OPEN, Frame.DATA, Frame.CANCEL])
async def test_frame_of_a_request_on_an_answer_ends_the_link(kind: Frame) -> None:
    victim = await attacked(dialled=True)
    sink = Sink()
    sink.stream = victim.link.open({}, sink)
    await victim.send(encode_control(kind, 1, {}) if kind != Frame.DATA else encode_control(Frame.LOAD, 1, {}))
    assert victim.link.closed


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"code": 5},
        {"code": b"x"},
        {"code": "x" * 100},
        {"code": "overloaded", "message": 5},
        {"code": "overloaded", "param": ["a"]},
        {"code": "overloaded", "retry": "soon"},
        {"code": "overloaded", "retry": float("nan")},
        {"code": "overloaded", "retry": float("inf")},
        {"code": "overloaded", "retry": -1},
        {"code": "overloaded", "retry": True},
    ],
)
async def test_error_with_odd_fields_ends_the_link_and_the_request_with_it(fields: dict[str, Any]) -> None:
    victim = await attacked(dialled=True)
    sink = Sink()
    sink.stream = victim.link.open({}, sink)
    await victim.send(encode_control(Frame.ERROR, 1, fields))
    assert victim.link.closed
    assert [type(error) for error in sink.errors] == [WorkerLost]


async def test_unknown_frame_on_the_link_itself_is_passed_over() -> None:
    victim = await attacked()
    await victim.send(encode_frame(99, 0, b"from a newer peer"), OPEN)
    assert not victim.link.closed
    assert len(victim.owner.opened) == 1


async def test_late_frames_on_an_ended_stream_are_passed_over() -> None:
    victim = await attacked()
    await victim.send(OPEN)
    victim.owner.opened[0][0].end({})
    late = (encode_frame(Frame.DATA, 1, b"x"), encode_credit(1, 5), encode_control(Frame.END, 1, {}), encode_frame(Frame.CANCEL, 1))
    await victim.send(*late)
    assert not victim.link.closed


async def test_too_many_streams_are_refused_one_by_one() -> None:
    victim = await attacked()
    await victim.send(b"".join(encode_control(Frame.OPEN, 1 + 2 * index, {}) for index in range(MAX_INCOMING_STREAMS + 2)))
    assert len(victim.owner.opened) == MAX_INCOMING_STREAMS
    refused = [frame for frame in frames_of(victim.link_end.sent) if frame[0] == Frame.ERROR]
    assert [number for _, number, _ in refused] == [1 + 2 * MAX_INCOMING_STREAMS, 3 + 2 * MAX_INCOMING_STREAMS]
    assert not victim.link.closed


async def test_link_whose_stream_numbers_are_used_up_ends_so_that_a_new_one_begins() -> None:
    pair = await linked()
    last = pair.open()
    pair.alice._next_stream = MAX_STREAM_NUMBER
    assert pair.open().stream.number == MAX_STREAM_NUMBER
    with pytest.raises(WorkerLost):
        pair.open()
    assert pair.alice.closed
    assert [type(error) for error in last.errors] == [WorkerLost]


async def test_ping_is_answered_and_measures_the_round_trip() -> None:
    pair = await linked()
    pair.alice.ping()
    await pair.settle()
    assert pair.alice.stats.round_trip_s > 0
    await_frames = [kind for kind, _, _ in frames_of(pair.bob_end.sent)]
    assert await_frames.count(Frame.PONG) == 1


@pytest.mark.parametrize("payload", [b"", b"123", bytes(8), b"\xff" * 8, bytes(1000)])
async def test_odd_pings_and_pongs_do_no_harm(payload: bytes) -> None:
    victim = await attacked()
    await victim.send(encode_frame(Frame.PING, 0, payload), encode_frame(Frame.PONG, 0, payload))
    assert not victim.link.closed
    assert victim.link.stats.round_trip_s >= 0 or payload == b"\xff" * 8


# -- nonsense


JUNK = st.binary(max_size=60)
SMALL = st.integers(0, 6)
ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["v", "rec", "id", "model", "size", "task", "status", "type", "length", "code", "message", "retry", "param", "run"])
FIELDS = st.dictionaries(NAMES, ODD, max_size=4).map(lambda fields: bytes(msgpack.packb(fields)))
NONSENSE = st.lists(
    st.one_of(
        JUNK,
        st.builds(lambda kind, stream, payload: encode_frame(kind, stream, payload), st.integers(0, 20), SMALL, JUNK),
        st.builds(lambda kind, stream, payload: encode_frame(kind, stream, payload), st.sampled_from(list(Frame)), SMALL, FIELDS),
        st.builds(encode_credit, SMALL, st.integers(0, 2**32 - 1)),
    ),
    max_size=12,
)


def run_strictly(main: Coroutine[Any, Any, None]) -> None:
    """Run it on a loop of its own; nothing may go unhandled in any callback."""
    problems: list[dict[str, Any]] = []
    with asyncio.Runner() as runner:
        runner.get_loop().set_exception_handler(lambda _, context: problems.append(context))
        runner.run(main)
    assert problems == []


@given(NONSENSE, st.booleans(), st.booleans())
@settings(max_examples=250, deadline=None)
def test_nonsense_ends_the_link_or_is_passed_over_but_never_raises(pieces: list[bytes], dialled: bool, hello: bool) -> None:
    async def main() -> None:
        victim: Attacked = await attacked(dialled=dialled, hello=hello)
        sinks = []
        if hello:
            for _ in range(3):
                sink = Sink()
                sink.stream = victim.link.open({}, sink)
                sinks.append(sink)
        await victim.send(*pieces)
        assert len(victim.owner.lost) == victim.link.closed
        for sink in sinks:
            assert len(sink.errors) + (sink.trailer is not None) <= 1

    run_strictly(main())


@given(st.binary(max_size=3000))
@settings(max_examples=150, deadline=None)
def test_random_bytes_never_raise(data: bytes) -> None:
    async def main() -> None:
        victim = await attacked(hello=False)
        await victim.send(data)

    run_strictly(main())
