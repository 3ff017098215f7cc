"""One attempt on one worker: bytes through, credit while the client is slow, and what ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from aiohttp import web

from mesh.errors import EngineUnavailable, InvalidRequest, MeshError, ProtocolError, UpstreamTimeout, WorkerLost
from mesh.link.frames import Frame, encode_control
from mesh.link.link import WINDOW_BYTES, IncomingStream
from proxy.downstream import Downstream
from proxy.fleet import Fleet, Worker
from proxy.forward import SLOW_CLIENT_BYTES, SLOW_CLIENT_S, Attempt, usage_of
from proxy.health import Health
from proxy.moves import Moves
from proxy.openai import Call
from tests.support.pipe import Pair, linked
from tests.support.web_client import ClientRequest, ClientTransport

EVENTS = {"status": 200, "type": "text/event-stream"}
PIECE = bytes(16 * 1024)


class Stage:
    """A client, an attempt, and a worker's stream in the test's hands."""

    def __init__(self, pair: Pair, *, slow: bool = False) -> None:
        self.pair = pair
        self.transport = ClientTransport(slow=slow)
        self.request = ClientRequest(self.transport)
        self.downstream = Downstream(cast(web.BaseRequest, self.request), self.transport, keep_alive=True)
        worker = cast(Worker, type("Linked", (), {"link": pair.alice, "stuck": False, "halted": False, "health": Health()})())
        self.began = asyncio.get_running_loop().time()
        self.attempt = Attempt(worker, self.downstream, "x-request-id: req_1\r\n", loop=asyncio.get_running_loop(), now=self.began)
        self.running: asyncio.Task[dict[str, Any]] | None = None

    async def start(self, body: bytes = b"{}") -> IncomingStream:
        self.running = asyncio.create_task(self.attempt.run({"id": "req_1"}, body))
        await self.pair.settle()
        return self.pair.bob_owner.opened[-1][0]

    def check(self, after_s: float) -> bool:
        """The sweep comes by ``after_s`` seconds after the request began; False if that ended the attempt."""
        self.attempt.check_time(self.began + after_s, patience_s=30.0, most_s=600.0)
        return not self.attempt._done.done()

    async def outcome(self) -> dict[str, Any]:
        assert self.running is not None
        return await asyncio.wait_for(self.running, 5)

    async def error(self) -> MeshError:
        with pytest.raises(MeshError) as caught:
            await self.outcome()
        return caught.value


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    yield await linked()
    assert problems == []


@pytest.fixture
async def stage(pair: Pair) -> Stage:
    return Stage(pair)


async def test_bytes_pass_and_the_trailer_comes_back(stage: Stage) -> None:
    stream = await stage.start(b'{"model": "m"}')
    assert await stream.read_body(max_bytes=100) == b'{"model": "m"}'
    stream.accept()
    stream.send_head(EVENTS)
    stream.send_now(b"data: 1\n\n")
    stream.end({"in": 3, "out": 1})
    assert await stage.outcome() == {"in": 3, "out": 1}
    answer = stage.transport.answer()
    assert answer is not None
    assert answer.complete
    assert answer.body == b"data: 1\n\n"
    assert int(answer.headers["openai-processing-ms"]) >= 0
    assert stage.attempt.accepted_at is not None
    assert stage.attempt.first_byte_at is not None
    assert stage.pair.alice.streams == stage.pair.bob.streams == 0


async def test_head_alone_gives_the_client_nothing(stage: Stage) -> None:
    stream = await stage.start()
    stream.send_head(EVENTS)
    stream.fail(EngineUnavailable("died"))
    assert isinstance(await stage.error(), EngineUnavailable)
    assert stage.transport.data == b""
    assert not stage.downstream.started


@pytest.mark.parametrize("broken", ["bad head", "two heads", "data first", "end first", "too long", "too short"])
async def test_worker_that_breaks_http_loses_the_request_not_its_link(stage: Stage, broken: str) -> None:
    stream = await stage.start()
    if broken not in ("data first", "end first"):
        stream.send_head({"status": 299 if broken == "bad head" else 200, "type": "text/plain", "length": 2})
    match broken:
        case "two heads":
            stream.send_head(EVENTS)
        case "data first":
            stream.send_now(b"x")
        case "too long":
            stream.send_now(b"xxx")
        case "too short":
            stream.send_now(b"x")
    stream.end({})
    assert isinstance(await stage.error(), ProtocolError)
    assert not stage.pair.alice.closed
    assert stage.pair.alice.streams == stage.pair.bob.streams == 0
    answer = stage.transport.answer()
    assert answer is None or not answer.complete


async def test_lost_link_is_a_lost_worker(stage: Stage) -> None:
    await stage.start()
    stage.pair.bob_end.lose()
    assert isinstance(await stage.error(), WorkerLost)


async def test_lost_link_while_the_body_is_sent_is_a_lost_worker(stage: Stage) -> None:
    await stage.start(bytes(5 * WINDOW_BYTES))
    stage.pair.bob_end.lose()
    assert isinstance(await stage.error(), WorkerLost)


async def test_refusal_before_the_body_is_sent_ends_the_sending(stage: Stage) -> None:
    stream = await stage.start(bytes(5 * WINDOW_BYTES))
    stream.fail(InvalidRequest("no such thing", param="model"))
    error = await stage.error()
    assert (type(error), error.param) == (InvalidRequest, "model")


async def test_cancelled_request_cancels_the_workers_work(stage: Stage) -> None:
    stream = await stage.start()
    work = asyncio.create_task(asyncio.Event().wait())
    stream.on_cancel = work
    assert stage.running is not None
    stage.running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stage.running
    await stage.pair.settle()
    assert work.cancelled()
    assert stage.pair.alice.streams == stage.pair.bob.streams == 0


async def test_cancelled_in_the_same_turn_as_its_link_is_lost_leaves_nothing_behind(stage: Stage) -> None:
    await stage.start(bytes(5 * WINDOW_BYTES))
    assert stage.running is not None
    stage.pair.alice.abort("lost")
    stage.running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stage.running


# -- slow clients


async def test_slow_client_is_sent_what_its_buffer_and_the_window_hold_and_then_the_rest(pair: Pair) -> None:
    stage = Stage(pair, slow=True)
    stream = await stage.start()
    stream.send_head(EVENTS)
    sending = asyncio.create_task(stream.send(bytes(1_000_000)))
    await pair.settle()
    held = stage.downstream.bytes_sent
    assert SLOW_CLIENT_BYTES < held <= SLOW_CLIENT_BYTES + WINDOW_BYTES + len(PIECE)
    assert not sending.done()
    while not sending.done():
        stage.transport.take(100_000)
        await pair.settle()
        await asyncio.sleep(0)
        if not stage.transport.get_write_buffer_size():
            stage.transport.slow = False
    stream.end({})
    await stage.outcome()
    answer = stage.transport.answer()
    assert answer is not None
    assert answer.complete
    assert len(answer.body) == 1_000_000


async def test_slow_client_holds_up_nobody_else(pair: Pair) -> None:
    slow, quick = Stage(pair, slow=True), Stage(pair)
    stalled = await slow.start()
    stalled.send_head(EVENTS)
    stuck = asyncio.create_task(stalled.send(bytes(1_000_000)))
    stream = await quick.start()
    stream.send_head(EVENTS)
    await stream.send(bytes(1_000_000))
    stream.end({})
    await quick.outcome()
    assert quick.downstream.bytes_sent == 1_000_000
    assert not stuck.done()
    slow.attempt.fail(WorkerLost("enough"))
    await slow.error()
    with pytest.raises(WorkerLost):
        await stuck


async def test_client_that_stops_reading_is_given_up_and_not_held_against_the_worker(pair: Pair) -> None:
    stage = Stage(pair, slow=True)
    stream = await stage.start()
    stream.send_head(EVENTS)
    sending = asyncio.create_task(stream.send(bytes(1_000_000)))
    await pair.settle()
    after_s = 0.0
    for _ in range(100):  # for as long as it takes a little now and then, it is waited for
        after_s += SLOW_CLIENT_S / 2
        stage.transport.take(10)
        assert stage.check(after_s)
    assert not stage.check(after_s + SLOW_CLIENT_S + 1)
    error = await stage.error()
    assert isinstance(error, InvalidRequest)
    await pair.settle()
    with pytest.raises(WorkerLost):
        await sending


async def test_client_that_goes_away_while_it_is_waited_for_is_not_an_error_of_its_own(pair: Pair) -> None:
    stage = Stage(pair, slow=True)
    stream = await stage.start()
    stream.send_head(EVENTS)
    sending = asyncio.create_task(stream.send(bytes(1_000_000)))
    stage.request.writer.error = ConnectionResetError("Connection lost")
    await pair.settle()
    stage.transport.close()
    stream.send_now(b"more")
    await pair.settle()
    assert stage.running is not None
    stage.running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stage.running
    await pair.settle()
    with pytest.raises(WorkerLost):
        await sending


async def test_answer_that_ends_after_its_client_left_does_no_harm(stage: Stage) -> None:
    stream = await stage.start()
    stream.send_head(EVENTS)
    stream.send_now(b"data: 1\n\n")
    await stage.pair.settle()
    stage.transport.close()
    stream.send_now(b"data: 2\n\n")
    stream.end({"out": 2})
    await stage.pair.settle()
    assert not stage.pair.alice.closed
    assert await stage.outcome() == {"out": 2}


# -- pace


async def test_pace_of_a_stream_is_measured_from_its_first_byte_on(stage: Stage) -> None:
    health = stage.attempt.worker.health
    stream = await stage.start()
    stream.accept()
    await stage.pair.settle()
    stage.attempt.measure(stage.began + 1.0)
    assert health.first.evidence(0.0) == 0.0, "nothing has come yet"
    stream.send_head({"status": 200, "type": "text/event-stream"})
    stream.send_now(bytes(1000))
    await stage.pair.settle()
    assert stage.attempt.first_byte_at is not None
    stage.attempt.measure(stage.attempt.first_byte_at + 1.0)
    assert health.first.evidence(0.0) == 1.0
    assert round(health.stream.evidence(0.0)) == 1
    assert round(health.stream.value) == 1000
    stream.send_now(bytes(3000))
    await stage.pair.settle()
    stage.attempt.measure(stage.attempt.first_byte_at + 2.0)
    assert round(health.stream.evidence(0.0)) == 2
    assert round(health.stream.value) == 2000
    assert health.first.evidence(0.0) == 1.0, "told once"


async def test_pace_of_a_whole_answer_is_its_tokens_from_its_slot_on(stage: Stage) -> None:
    health = stage.attempt.worker.health
    stream = await stage.start()
    stream.accept()
    stream.send_head({"status": 200, "type": "application/json", "length": 2})
    stream.send_now(b"{}")
    await stage.pair.settle()
    assert stage.attempt.accepted_at is not None
    stage.attempt.measure(stage.attempt.accepted_at + 2.0)
    assert health.whole.evidence(0.0) == 0.0, "not complete"
    stage.attempt.measure(stage.attempt.accepted_at + 2.0, 50)
    assert round(health.whole.evidence(0.0)) == 2
    assert round(health.whole.value) == 25


# -- time


async def test_silent_worker_is_given_up_after_the_patience(stage: Stage) -> None:
    await stage.start()
    assert stage.check(0.5)
    assert stage.check(29.9)
    assert not stage.check(31.0)
    assert isinstance(await stage.error(), UpstreamTimeout)
    await stage.pair.settle()
    assert stage.pair.bob.streams == 0


@pytest.mark.parametrize(("may_move", "begun", "moves"), [(True, False, True), (False, False, False), (True, True, False)])
async def test_request_moves_from_an_engine_that_stands_still_if_it_may_and_has_had_no_byte(
    stage: Stage, may_move: bool, begun: bool, moves: bool
) -> None:
    stream = await stage.start()
    stage.attempt.may_move = may_move
    stage.attempt.worker.stuck = True
    if begun:
        stream.send_head({"status": 200, "type": "text/event-stream"})
        stream.send_now(b"data: {}\n\n")
        await stage.pair.settle()
    assert stage.check(0.5) is not moves
    if moves:
        assert isinstance(await stage.error(), WorkerLost)


@pytest.mark.parametrize(
    ("fixed", "halted", "after_s", "moves"),
    [("", False, 9.0, False), ("", False, 12.0, True), ("tools", False, 12.0, False), ("", True, 2.0, True), ("tools", True, 12.0, False)],
)
async def test_stream_that_has_begun_waits_longer_and_moves_only_if_it_can(
    stage: Stage, fixed: str, halted: bool, after_s: float, moves: bool
) -> None:
    passage = Moves(Fleet(on_record=lambda record: None), enabled=True).passage(cast(Call, type("Call", (), {"stream": True})()), "req_1")
    assert passage is not None
    stage.attempt._passage = passage
    stream = await stage.start()
    stage.attempt.may_move = stage.attempt.worker.stuck = True
    stream.send_head({"status": 200, "type": "text/event-stream"} | ({"fixed": fixed} if fixed else {}))
    stream.send_now(b"data: {}\n\n")
    await stage.pair.settle()
    assert stage.check(0.5), "its bytes are a sign"
    passage.trail += b"trail"
    stage.attempt.worker.halted = halted
    assert stage.check(after_s) is not moves
    if moves:
        assert isinstance(await stage.error(), WorkerLost)


async def test_worker_that_takes_a_large_body_slowly_is_not_silent(stage: Stage) -> None:
    stream = await stage.start(bytes(3 * WINDOW_BYTES))
    assert stage.check(25.0)
    reading = asyncio.create_task(stream.read_body(max_bytes=3 * WINDOW_BYTES))
    await stage.pair.settle()
    assert stage.check(50.0)
    assert stage.check(79.0)
    assert not stage.check(81.0)
    await reading
    await stage.error()


async def test_worker_that_never_takes_the_body_is_silent(stage: Stage) -> None:
    await stage.start(bytes(3 * WINDOW_BYTES))
    assert stage.check(29.0)
    assert not stage.check(31.0)
    assert isinstance(await stage.error(), UpstreamTimeout)


async def test_bytes_of_the_answer_are_signs_of_life(stage: Stage) -> None:
    stream = await stage.start()
    stream.send_head(EVENTS)
    for second in range(0, 200, 25):
        stream.send_now(b"data: 1\n\n")
        await stage.pair.settle()
        assert stage.check(second)
    assert not stage.check(220)
    assert isinstance(await stage.error(), UpstreamTimeout)


async def test_progress_is_a_sign_of_life(stage: Stage) -> None:
    stream = await stage.start()
    assert stage.check(1.0)
    stage.attempt.last_sign_at = stage.began - 1000.0
    stream.progress({"running": 1})
    await stage.pair.settle()
    assert stage.check(29.0)
    assert not stage.check(40.0)
    await stage.error()


@pytest.mark.parametrize("trailer", [{}, {"in": -1}, {"in": "5"}, {"out": 2**63}, {"in": True}, {"in": 1.5}, {"in": None}])
def test_trailer_of_nonsense_counts_nothing(trailer: dict[str, Any]) -> None:
    assert usage_of(trailer) == (0, 0)


def test_trailer_is_counted() -> None:
    assert usage_of({"in": 3, "out": 4, "more": "x"}) == (3, 4)


@pytest.mark.parametrize("fields", [{"status": None}, {"status": 200}, {"status": 200, "type": "x" * 60_000}, {"length": []}])
async def test_odd_head_on_the_wire_ends_the_request_not_the_link(stage: Stage, fields: dict[str, Any]) -> None:
    stream = await stage.start()
    stage.pair.bob.write(encode_control(Frame.HEAD, stream.number, fields))
    assert isinstance(await stage.error(), ProtocolError)
    assert not stage.pair.alice.closed


async def test_progress_alone_does_not_buy_for_ever(pair: Pair) -> None:
    stage = Stage(pair)
    await stage.start()
    for after_s in range(10, 600, 10):
        stage.attempt.last_sign_at = stage.began + after_s
        assert stage.check(after_s)
    stage.attempt.last_sign_at = stage.began + 601
    assert not stage.check(601)
    assert isinstance(await stage.error(), UpstreamTimeout)


async def test_an_answer_that_has_begun_may_take_as_long_as_it_likes(pair: Pair) -> None:
    stage = Stage(pair)
    stream = await stage.start()
    stream.send_head({"status": 200, "type": "text/event-stream"})
    stream.send_now(b"data: 1\n\n")
    await pair.settle()
    assert stage.check(10)
    stage.attempt.last_sign_at = stage.began + 700
    assert stage.check(701)
