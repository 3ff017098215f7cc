"""Streams in, the engine's answers out: what is asked of the engine, what is passed on, and what every failure becomes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    EngineUnavailable,
    InvalidRequest,
    MeshError,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    WorkerError,
)
from mesh.link.link import WINDOW_BYTES
from tests.support.pipe import Pair, Sink, linked
from worker.admission import Admission
from worker.engine import ModelSpec, Task
from worker.engine.client import EngineClient, StaleConnection
from worker.gateway import MAX_COMPLAINT_BYTES, PROGRESS_S, Gateway
from worker.usage import EventStream

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
ANSWER = json.dumps({"choices": [{"message": {"content": "hello"}}], "usage": USAGE}).encode()
EVENT = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = "text/event-stream; charset=utf-8"


@dataclass
class Reply:
    """What the engine does: ``pieces`` of a body; an exception among them is raised there, None waits for ever."""

    pieces: list[bytes | Exception | None] = field(default_factory=list)
    status: int = 200
    content_type: str = "application/json"
    before: Exception | None = None
    hangs: bool = False


class StandInContent:
    def __init__(self, pieces: list[bytes | Exception | None]) -> None:
        self._pieces = pieces

    async def iter_any(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            await asyncio.sleep(0)
            if piece is None:
                await asyncio.Event().wait()
            elif isinstance(piece, Exception):
                raise piece
            else:
                yield piece


class StandInResponse:
    def __init__(self, reply: Reply, engine: StandInSession) -> None:
        self.status = reply.status
        self.content_type = reply.content_type.partition(";")[0]
        self.content = StandInContent(reply.pieces)
        self._reply = reply
        self._engine = engine

    async def __aenter__(self) -> StandInResponse:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._engine.closed += 1


@dataclass
class StandInSession:
    """What the gateway asks of aiohttp's client session: replies in turn, and notes what was asked."""

    replies: list[Reply] = field(default_factory=list)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    closed: int = 0

    async def post(self, url: str, **options: Any) -> StandInResponse:
        """Returns once the head is there, or raises what keeps it from coming."""
        self.asked.append((url, options))
        reply = self.replies[min(len(self.asked), len(self.replies)) - 1]
        if reply.before is not None:
            raise reply.before
        if reply.hangs:
            try:
                await asyncio.Event().wait()
            finally:
                self.closed += 1
        return StandInResponse(reply, self)


@dataclass
class StandInEngine:
    """Implements `worker.gateway.EngineView`."""

    base_url: str | None = "http://127.0.0.1:9"
    suspected: int = 0
    models: tuple[ModelSpec, ...] = (
        ModelSpec(name="m", engine_name="inner", tasks=frozenset({Task.CHAT, Task.COMPLETIONS}), adapters=("legal",)),
        ModelSpec(name="e", engine_name="e", tasks=frozenset({Task.EMBEDDINGS})),
    )

    def suspect(self) -> None:
        self.suspected += 1


class HandClock:
    """A clock whose sleepers wake when the test says."""

    def __init__(self) -> None:
        self.sleepers: list[tuple[float, asyncio.Event]] = []

    def monotonic(self) -> float:
        return 0.0

    def wall(self) -> float:
        return 0.0

    async def sleep(self, delay_s: float) -> None:
        woken = asyncio.Event()
        self.sleepers.append((delay_s, woken))
        await woken.wait()

    def tick(self) -> None:
        waiting, self.sleepers = self.sleepers, []
        for _, woken in waiting:
            woken.set()


class Stage:
    def __init__(self, pair: Pair, *replies: Reply, limit: int = 10, queue_limit: int = 10) -> None:
        self.pair = pair
        self.session = StandInSession(list(replies))
        self.engine = StandInEngine()
        self.admission = Admission(limit=limit, queue_limit=queue_limit)
        self.clock = HandClock()
        self.loads: list[tuple[int, int]] = []
        self.gateway = Gateway(
            self.engine,
            cast(EngineClient, self.session),
            headers={"Authorization": "Bearer engine-secret"},
            admission=self.admission,
            on_load=lambda: self.loads.append((self.admission.running, self.admission.waiting)),
            clock=self.clock,
        )
        pair.bob_owner.on_stream = self.gateway.open

    async def ask(self, body: dict[str, Any] | bytes | None = None, *, end: bool = True, eager: bool = True, **head: Any) -> Sink:
        """Open a stream with a request; returns once nothing moves any more."""
        data = body if isinstance(body, bytes) else json.dumps(CHAT if body is None else body).encode()
        fields = {"id": "req_1", "task": "chat", "model": "m", "size": len(data), "project": "p", "key": bytes(8)} | head
        sink = self.pair.open({name: value for name, value in fields.items() if value is not ...}, eager=eager)
        if data:
            sink.stream.send_now(data)
        if end:
            sink.stream.end()
        await self.settle()
        return sink

    async def settle(self) -> None:
        for _ in range(12):
            await self.pair.settle()


Open = Callable[..., Stage]


@pytest.fixture
async def stage() -> AsyncIterator[Open]:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    pair, stages = await linked(), []

    def build(*replies: Reply, **options: int) -> Stage:
        stages.append(Stage(pair, *replies, **options))
        return stages[-1]

    yield build
    for built in stages:
        await built.gateway.stop()
    assert problems == []


def failure(sink: Sink) -> MeshError:
    assert sink.trailer is None
    (error,) = sink.errors
    return error


# -- what goes right


async def test_whole_answer_is_passed_with_its_length_and_its_usage(stage: Open) -> None:
    at = stage(Reply([ANSWER[:10], ANSWER[10:]]))
    sink = await at.ask()
    assert sink.accepted == 1
    assert sink.heads == [{"status": 200, "type": "application/json", "length": len(ANSWER)}]
    assert bytes(sink.data) == ANSWER
    assert sink.trailer is not None
    assert {name: sink.trailer[name] for name in ("in", "out", "cached")} == {"in": 3, "out": 2, "cached": 0}
    assert at.gateway.served == 1
    assert at.admission.running == 0


async def test_engine_is_asked_on_the_right_route_by_its_own_name_with_its_own_key(stage: Open) -> None:
    at = stage(Reply([ANSWER]))
    await at.ask(id="req_7")
    ((url, options),) = at.session.asked
    assert url == "http://127.0.0.1:9/v1/chat/completions"
    assert json.loads(options["data"]) == CHAT | {"model": "inner"}
    assert options["headers"]["Authorization"] == "Bearer engine-secret"
    assert options["headers"]["X-Request-Id"] == "req_7"


async def test_adapter_and_unrenamed_model_keep_their_names(stage: Open) -> None:
    at = stage(Reply([ANSWER]))
    await at.ask(CHAT | {"model": "legal"}, model="legal")
    await at.ask({"model": "e", "input": "x"}, model="e", task="embeddings")
    assert json.loads(at.session.asked[0][1]["data"])["model"] == "legal"
    assert at.session.asked[1][0].endswith("/v1/embeddings")


async def test_stream_is_passed_in_whole_events_and_its_head_goes_with_the_first(stage: Open) -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}\n\n'
    at = stage(Reply([EVENT[:7], EVENT[7:] + EVENT[:3], EVENT[3:] + usage, DONE], content_type=STREAM))
    sink = await at.ask(CHAT | {"stream": True})
    assert sink.heads == [{"status": 200, "type": "text/event-stream"}]
    assert bytes(sink.data) == EVENT + EVENT + DONE
    assert sink.trailer is not None
    assert (sink.trailer["in"], sink.trailer["out"]) == (3, 1)
    assert json.loads(at.session.asked[0][1]["data"])["stream_options"] == {"include_usage": True}


async def test_all_tokens_of_an_engine_step_leave_in_one_write(stage: Open) -> None:
    steps, streams = 30, 20
    at = stage(Reply([*[EVENT] * steps, DONE], content_type=STREAM), limit=streams)
    body = json.dumps(CHAT | {"stream": True}).encode()
    head = {"id": "req_1", "task": "chat", "model": "m", "size": len(body), "project": "p", "key": bytes(8)}
    before = at.pair.bob_end.writes
    sinks = [at.pair.open(head) for _ in range(streams)]
    for sink in sinks:
        assert sink.stream.send_whole(body)
    while not all(sink.trailer for sink in sinks):
        await at.pair.settle()
    assert [bytes(sink.data) for sink in sinks] == [EVENT * steps + DONE] * streams
    assert at.pair.bob_end.writes - before <= steps + 5, "of 20 streams, each token in a frame of its own"


async def test_usage_is_shown_to_who_asked(stage: Open) -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}\n\n'
    at = stage(Reply([EVENT + usage + DONE], content_type=STREAM))
    sink = await at.ask(CHAT | {"stream": True, "stream_options": {"include_usage": True}})
    assert bytes(sink.data) == EVENT + usage + DONE


async def test_end_without_its_blank_line_is_passed_behind_a_head(stage: Open) -> None:
    at = stage(Reply([b"data: [DONE]"], content_type=STREAM))
    sink = await at.ask(CHAT | {"stream": True})
    assert len(sink.heads) == 1
    assert bytes(sink.data) == DONE
    assert sink.trailer is not None


async def test_answer_larger_than_the_window_passes_as_it_is_read(stage: Open) -> None:
    answer = json.dumps({"data": ["x" * (3 * WINDOW_BYTES)]}).encode()
    sink = await stage(Reply([answer])).ask()
    assert bytes(sink.data) == answer
    assert sink.trailer is not None


async def test_json_of_an_unusual_shape_is_an_answer(stage: Open) -> None:
    sink = await stage(Reply([b'{"usage": "none", "data": 5}'])).ask()
    assert bytes(sink.data) == b'{"usage": "none", "data": 5}'
    assert sink.errors == []


async def test_progress_is_told_every_second_until_the_first_byte_and_not_after(stage: Open) -> None:
    at = stage(Reply([EVENT, None], content_type=STREAM), limit=1)
    at.session.replies[0].pieces.insert(0, b"")
    first = await at.ask(CHAT | {"stream": True})
    assert (first.heads != [], first.progress) == (True, [])
    queued = await at.ask()
    for expected in (1, 2, 3):
        at.clock.tick()
        await at.settle()
        assert len(queued.progress) == expected
    assert first.progress == []
    at.engine.base_url = None
    at.clock.tick()
    await at.settle()
    assert len(queued.progress) == 3
    assert {delay_s for delay_s, _ in at.clock.sleepers} == {PROGRESS_S}


async def test_load_is_told_on_every_change_waiting_included(stage: Open) -> None:
    at = stage(Reply([], hangs=True), limit=1)
    running = await at.ask()
    waiting = await at.ask()
    assert at.loads
    assert (at.admission.running, at.admission.waiting) == (1, 1)
    before = len(at.loads)
    waiting.stream.cancel()
    await at.settle()
    assert at.loads[before:] == [(1, 0)]
    running.stream.cancel()
    await at.settle()
    assert at.loads[-1] == (0, 0)


# -- clients that go away, workers that are full


async def test_cancelled_request_closes_its_connection_to_the_engine_and_frees_its_slot(stage: Open) -> None:
    at = stage(Reply([EVENT, None], content_type=STREAM))
    sink = await at.ask(CHAT | {"stream": True})
    assert at.admission.running == 1
    sink.stream.cancel()
    await at.settle()
    assert at.session.closed == 1
    assert at.admission.running == 0
    assert at.gateway._tasks == {}
    assert at.clock.sleepers == [] or at.loads[-1] == (0, 0)


async def test_cancelled_while_waiting_never_reaches_the_engine(stage: Open) -> None:
    at = stage(Reply([], hangs=True), limit=1)
    await at.ask()
    waiting = await at.ask()
    waiting.stream.cancel()
    await at.settle()
    assert at.admission.waiting == 0
    assert len(at.session.asked) == 1


async def test_full_worker_refuses_without_reading_the_body(stage: Open) -> None:
    at = stage(Reply([], hangs=True), limit=1, queue_limit=0)
    await at.ask()
    sink = await at.ask(b"", end=False, size=1 << 30)
    error = failure(sink)
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == 1.0


async def test_lost_link_ends_every_request(stage: Open) -> None:
    at = stage(Reply([], hangs=True), limit=1)
    await at.ask()
    await at.ask()
    at.pair.alice_end.lose()
    await at.settle()
    assert (at.admission.running, at.admission.waiting, at.gateway._tasks) == (0, 0, {})


async def test_slow_reader_holds_up_the_reading_from_the_engine(stage: Open) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += len(EVENT)
            await asyncio.sleep(0)
            yield EVENT * 100

    at = stage(Reply([], content_type=STREAM))
    response = await at.session.post("x")
    at.session.asked.clear()
    response.content.iter_any = endless  # type: ignore[method-assign]

    async def post(url: str, **options: Any) -> StandInResponse:
        return response

    at.session.post = post  # type: ignore[method-assign]
    sink = await at.ask(CHAT | {"stream": True}, eager=False)
    for _ in range(200):
        await at.pair.settle()
    assert len(sink.data) <= WINDOW_BYTES
    stopped = taken
    for _ in range(20):
        await at.pair.settle()
    assert taken == stopped


# -- engines that fail


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (404, InvalidRequest),
        (405, InvalidRequest),
        (409, InvalidRequest),
        (415, InvalidRequest),
        (422, InvalidRequest),
        (413, BodyTooLarge),
        (429, Overloaded),
        (401, EngineUnavailable),
        (403, EngineUnavailable),
        (408, EngineUnavailable),
        (500, EngineUnavailable),
        (502, EngineUnavailable),
        (503, EngineUnavailable),
        (504, EngineUnavailable),
        (201, EngineUnavailable),
        (204, EngineUnavailable),
        (301, EngineUnavailable),
        (307, EngineUnavailable),
        (100, EngineUnavailable),
        (599, EngineUnavailable),
    ],
)
async def test_engines_status_is_the_clients_mistake_a_full_engine_or_a_broken_one(stage: Open, status: int, kind: type[MeshError]) -> None:
    at = stage(Reply([b'{"error": {"message": "what the engine said"}}'], status=status))
    error = failure(await at.ask())
    assert type(error) is kind
    assert ("what the engine said" in error.message) == (kind is not EngineUnavailable)
    assert at.engine.suspected == 0
    assert at.gateway.served == 0


async def test_complaint_in_pieces_is_read_whole_and_a_giant_one_cut(stage: Open) -> None:
    pieces: list[bytes | Exception | None] = [bytes((byte,)) for byte in b'{"error": {"message": "too long a prompt"}}']
    assert failure(await stage(Reply(pieces, status=400)).ask()).message == "too long a prompt"
    giant: list[bytes | Exception | None] = [b"x" * MAX_COMPLAINT_BYTES, b"x" * MAX_COMPLAINT_BYTES, AssertionError("read on")]
    assert failure(await stage(Reply(giant, status=400)).ask()).message == "the engine answered 400"


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError("cut"),
        aiohttp.ClientOSError(104, "reset"),
        ConnectionResetError(),
        TimeoutError(),
        OSError("no route"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("when", ["connecting", "before the first byte", "in the middle", "in a complaint"])
async def test_connection_that_breaks_is_a_broken_engine_whose_health_is_looked_at(stage: Open, error: Exception, when: str) -> None:
    match when:
        case "connecting":
            at = stage(Reply(before=error))
        case "before the first byte":
            at = stage(Reply([error], content_type=STREAM))
        case "in the middle":
            at = stage(Reply([EVENT, error], content_type=STREAM))
        case _:
            at = stage(Reply([b"{", error], status=400))
    sink = await at.ask(CHAT | {"stream": True})
    assert isinstance(failure(sink), EngineUnavailable)
    assert bytes(sink.data) == (EVENT if when == "in the middle" else b"")
    assert (sink.heads == []) == (when != "in the middle")
    assert at.engine.suspected == 1
    assert at.admission.running == 0


@pytest.mark.parametrize(
    ("pieces", "passed"),
    [
        ([], b""),
        ([EVENT], EVENT),
        ([EVENT, EVENT[:20]], EVENT),
        ([EVENT[:20]], b""),
        ([b": ping\n\n"], b": ping\n\n"),
        ([b"\x00\xff garbage"], b""),
        ([EVENT, b'data: {"choices": [{"delta": {"content": "[DONE]"}}]}\n\n'], None),
    ],
)
async def test_stream_that_ends_without_done_is_an_error_and_half_an_event_is_not_passed(
    stage: Open, pieces: list[bytes | Exception | None], passed: bytes | None
) -> None:
    at = stage(Reply(pieces, content_type=STREAM))
    sink = await at.ask(CHAT | {"stream": True})
    assert isinstance(failure(sink), EngineUnavailable)
    assert passed is None or bytes(sink.data) == passed
    assert at.engine.suspected == 1


@pytest.mark.parametrize("body", [b"", b"<html>It works!</html>", b'{"choices": [', b"\xff\xfe"])
async def test_answer_that_is_no_json_is_a_broken_engine(stage: Open, body: bytes) -> None:
    sink = await stage(Reply([body] if body else [], content_type="text/html")).ask()
    assert isinstance(failure(sink), EngineUnavailable)
    assert sink.heads == []


async def test_event_without_end_is_a_broken_engine(stage: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventStream, "MAX_EVENT_BYTES", 1000)
    at = stage(Reply([EVENT, b"x" * 2000], content_type=STREAM))
    sink = await at.ask(CHAT | {"stream": True})
    assert "without end" in failure(sink).message


async def test_engine_that_is_down_is_said_to_be(stage: Open) -> None:
    at = stage(Reply([ANSWER]))
    at.engine.base_url = None
    assert isinstance(failure(await at.ask()), EngineUnavailable)
    assert at.session.asked == []


async def test_bug_in_the_gateway_is_an_error_of_the_worker_and_its_details_stay_here(stage: Open) -> None:
    at = stage(Reply(before=ZeroDivisionError("secret detail")))
    error = failure(await at.ask())
    assert type(error) is WorkerError
    assert "secret" not in error.message
    assert at.admission.running == 0


# -- proxies that send nonsense


async def test_model_that_is_not_served_and_task_it_cannot_do(stage: Open) -> None:
    at = stage(Reply([ANSWER]))
    assert isinstance(failure(await at.ask(model="other")), ModelNotFound)
    error = failure(await at.ask(model="e"))
    assert (type(error), error.param) == (InvalidRequest, "model")
    assert at.session.asked == []


@pytest.mark.parametrize(
    "head",
    [
        {"id": ...},
        {"id": 5},
        {"id": "x" * 65},
        {"id": "a\r\nX-Evil: 1"},
        {"task": "paint"},
        {"task": ...},
        {"task": 5},
        {"model": ...},
        {"model": b"m"},
        {"size": ...},
        {"size": -1},
        {"size": 1 << 40},
        {"size": "10"},
        {"size": True},
    ],
    ids=repr,
)
async def test_odd_open_ends_the_stream_and_not_the_link(stage: Open, head: dict[str, Any]) -> None:
    at = stage(Reply([ANSWER]))
    assert isinstance(failure(await at.ask(**head)), ProtocolError)
    assert not at.pair.bob.closed
    assert at.session.asked == []


@pytest.mark.parametrize("size", [0, 5, 10_000])
async def test_body_of_another_length_than_announced_never_reaches_the_engine(stage: Open, size: int) -> None:
    at = stage(Reply([ANSWER]))
    assert isinstance(failure(await at.ask(size=size)), ProtocolError)
    assert at.session.asked == []


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff"])
async def test_body_that_is_no_json_object_is_the_clients_mistake(stage: Open, body: bytes) -> None:
    assert isinstance(failure(await stage(Reply([ANSWER])).ask(body)), InvalidRequest)


async def test_stopping_ends_what_is_served(stage: Open) -> None:
    at = stage(Reply([], hangs=True))
    await at.ask()
    await at.gateway.stop()
    assert at.admission.running == 0
    assert at.gateway._tasks == {}


FRAGMENTS = [EVENT, EVENT[:9], EVENT[9:], DONE, DONE[:5], b": ping\n\n", b"\n\n", b"\r\n", b"data: {}\n\n"]
PIECES = st.lists(st.sampled_from(FRAGMENTS) | st.binary(min_size=1, max_size=20), max_size=8)


@given(PIECES, st.booleans(), st.sampled_from([200, 200, 200, 400, 500]))
@settings(max_examples=60, deadline=None)
def test_whatever_the_engine_says_each_request_ends_exactly_once(pieces: list[Any], stream: bool, status: int) -> None:
    async def main() -> None:
        at = Stage(await linked(), Reply(list(pieces), status=status, content_type=STREAM if stream else "application/json"))
        sink = await at.ask(CHAT | {"stream": True})
        assert (sink.trailer is not None) + len(sink.errors) == 1
        if sink.trailer is not None and stream:
            assert DONE.strip() in bytes(sink.data)
        assert at.admission.running == 0
        assert at.gateway._tasks == {}

    asyncio.run(main())


async def test_kept_connections_that_turn_out_to_be_closed_are_tried_again_over_another(stage: Open) -> None:
    stale = Reply(before=StaleConnection())
    at = stage(stale, stale, Reply([b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}']))
    sink = await at.ask()
    assert sink.heads
    assert len(at.session.asked) == 3
    assert at.engine.suspected == 0


async def test_request_that_a_connection_of_its_own_died_of_is_not_sent_to_the_engine_again(stage: Open) -> None:
    """It may have been at work on it, or ended by it."""
    at = stage(Reply(before=aiohttp.ServerDisconnectedError()), Reply([ANSWER]))
    sink = await at.ask()
    assert [type(error) for error in sink.errors] == [EngineUnavailable]
    assert len(at.session.asked) == 1


# -- the engine's pulse


async def test_reading_an_answer_is_a_sign_of_life_and_begun_streams_are_counted_while_they_run(stage: Open) -> None:
    at = stage(Reply([EVENT, EVENT, None], content_type=STREAM))
    sink = await at.ask(CHAT | {"stream": True})
    assert at.gateway.pulse.signs == 2
    assert at.gateway.pulse.begun == 1
    sink.stream.cancel()
    await at.settle()
    assert at.gateway.pulse.begun == 0


async def test_progress_is_reported_of_a_long_step_too_until_the_engine_is_given_up(stage: Open) -> None:
    at = stage(Reply([], hangs=True))
    sink = await at.ask()
    at.gateway.pulse.stuck = True
    at.clock.tick()
    await at.settle()
    assert len(sink.progress) == 1, "on processors one step may last longer than a proxy waits for a sign"
    at.gateway.give_up("no step for 300 s")
    await at.settle()
    assert isinstance(failure(sink), EngineUnavailable)


async def test_engine_that_was_given_up_fails_every_request_at_once_so_that_they_go_elsewhere(stage: Open) -> None:
    at = stage(Reply([], hangs=True), limit=1)
    running, waiting = await at.ask(), await at.ask()
    at.gateway.give_up("no step for 30 s")
    await at.settle()
    for sink in (running, waiting):
        error = failure(sink)
        assert isinstance(error, EngineUnavailable)
        assert "no step" in error.message
    assert (at.admission.running, at.admission.waiting, at.gateway._tasks) == (0, 0, {})


# -- deadlines


async def test_request_whose_deadline_passes_ends_at_the_engine_too(stage: Open) -> None:
    at = stage(Reply([EVENT, None], content_type=STREAM), limit=1)
    running = await at.ask(CHAT | {"stream": True}, dl=500)
    waiting = await at.ask(dl=1)
    while at.gateway._tasks:
        await asyncio.sleep(0.01)
    await at.settle()
    for sink in (running, waiting):
        assert isinstance(failure(sink), DeadlineExceeded)
    assert at.session.closed == 1
    assert (at.admission.running, at.admission.waiting) == (0, 0)


@pytest.mark.parametrize("dl", [0, -1, 1.5, "5", 86_400_001, True])
async def test_odd_deadline_is_refused(stage: Open, dl: Any) -> None:
    at = stage()
    assert isinstance(failure(await at.ask(dl=dl)), ProtocolError)
