"""From link streams to the engine's HTTP and back.

One task per stream: read the request, take a slot, ask the engine, pass its answer on as it comes. A client that goes away cancels the
task, which closes the connection to the engine, which is how engines learn that nobody listens. An engine's stream that ends
without its proper end is an error here, so that it is one for the client too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Protocol

import aiohttp
import structlog

from mesh.claims import read_bool, read_bytes, read_int, read_str
from mesh.clock import Clock
from mesh.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    EngineUnavailable,
    InvalidRequest,
    MalformedEnvelope,
    MeshError,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    WorkerError,
)
from mesh.link.frames import MAX_PAYLOAD_BYTES, MAX_TOKENS_DATA_BYTES
from mesh.link.link import MAX_TRAIL_BYTES, IncomingStream
from mesh.prefix import HASH_BYTES, MAX_BLOCKS, MAX_TEXT_BYTES, split_chain
from worker.admission import Admission, Priority
from worker.engine import ModelSpec, Task
from worker.engine.client import EngineAnswer, EngineClient, StaleConnection
from worker.metering import Meter, Tally
from worker.moving.relay import EngineRoutes, Events, prepare
from worker.moving.resume import Continuation, ResumedEvents, Trailed, continuation, not_resumed
from worker.moving.tracked import Piece, TrackedEvents
from worker.moving.trail import parse_trail
from worker.prefill import Prefill, Prompt, Work
from worker.pulse import Pulse
from worker.room import Room
from worker.usage import LARGE_BYTES, EventStream, Prepared, Usage, engine_complaint, engine_failure, prepare_body, read_answer

log = structlog.get_logger(__name__)

PROGRESS_S = 1.0
STALE_CONNECTIONS = 2
"""How many kept connections may turn out to be closed before the engine counts as gone."""
BODY_DEADLINE_S = 60.0
MAX_REQUEST_BYTES = 4 << 30
MAX_ANSWER_BYTES = 256 << 20
MAX_COMPLAINT_BYTES = 64 * 1024
COST_BYTES, MAX_COST = 4096, 64.0
"""In its project's queue a request counts as one, and one more for each ``COST_BYTES`` of its body, up to ``MAX_COST``."""


class EngineView(Protocol):
    """What the gateway asks of whoever keeps the engine (`worker.engine.Supervisor`)."""

    @property
    def base_url(self) -> str | None: ...
    @property
    def models(self) -> tuple[ModelSpec, ...]: ...
    def suspect(self) -> None: ...


class Gateway:
    """Serves the streams that proxies open. ``on_load`` is called whenever the number of requests changes."""

    def __init__(
        self,
        engine: EngineView,
        client: EngineClient,
        *,
        headers: Mapping[str, str],
        admission: Admission,
        on_load: Callable[[], None],
        clock: Clock,
        prefill: Prefill | None = None,
        pulse: Pulse | None = None,
        meter: Meter | None = None,
        max_bodies_bytes: int = MAX_REQUEST_BYTES,
    ) -> None:
        self.admission = admission
        self.pulse = pulse or Pulse()
        self.prefill = prefill or Prefill(clock)
        self.served = 0
        self._engine = engine
        self._client = client
        self._headers = dict(headers)
        self._on_load = on_load
        self._clock = clock
        self._tasks: dict[asyncio.Task[None], IncomingStream] = {}
        self._meter = meter or Meter(None, clock=clock)
        self._silent: set[IncomingStream] = set()
        self._ticking: asyncio.Task[None] | None = None
        self._closing: asyncio.TimerHandle | None = None
        self._closed = False
        self._room = Room(max_bodies_bytes)

    def open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        """A proxy opened a stream: serve it in a task of its own."""
        task = asyncio.create_task(self._serve(stream, head))
        stream.on_cancel = task
        self._tasks[task] = stream
        task.add_done_callback(self._tasks.pop)

    def close_in(self, delay_s: float) -> None:
        """Take no new requests once proxies have had so long to hear of it. One that comes all the same is sent elsewhere."""
        self.reopen()
        self._closing = asyncio.get_running_loop().call_later(delay_s, self._close)

    def reopen(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
        self._closing, self._closed = None, False

    def _close(self) -> None:
        self._closed = True

    async def finish(self, within_s: float) -> None:
        """Return once nothing is served any more. What is not finished by then goes on elsewhere, or ends."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(0.0, within_s))
        self.give_up("this worker is leaving")

    def give_up(self, reason: str) -> None:
        """The engine will not answer any more: tell the proxies at once, so that they go on elsewhere."""
        for task, stream in list(self._tasks.items()):
            stream.fail(EngineUnavailable(f"The worker gave this request up: {reason}"))
            task.cancel()

    async def stop(self) -> None:
        """End whatever is still being served."""
        tasks = [*self._tasks, *((self._ticking,) if self._ticking else ())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- one stream

    async def _serve(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        try:
            if self._closed:
                raise Overloaded("This worker is leaving and takes no new requests", retry_after_s=1.0)
            request = _Request(head)
            model = self._model(request)
            if request.deadline_s:
                self._expire_in(request.deadline_s, stream)
            self._meter.check()
            self.admission.check(
                request.priority, request.project
            )  # before the body is read: a full worker need not take megabytes to say no
            with self._room.hold(stream.link, request.trail_size + request.size):
                await self._work(stream, request, model)
        except MeshError as error:
            stream.fail(error)
        except TimeoutError:
            stream.fail(InvalidRequest("The request body did not arrive in time"))
        except Exception:
            log.exception("request.crashed")
            stream.fail(WorkerError("The worker failed to handle this request"))

    async def _work(self, stream: IncomingStream, request: _Request, model: ModelSpec) -> None:
        if request.prompt is None:
            await self._answer(stream, request, model, None)
            return
        work = self.prefill.arrive(stream.link, request.prompt)
        self._on_load()
        usage = None
        try:
            usage = await self._answer(stream, request, model, work)
        finally:
            self.prefill.leave(work, usage)
            self._on_load()

    def _expire_in(self, deadline_s: float, stream: IncomingStream) -> None:
        """End what this task serves when nobody wants it any more."""
        task = asyncio.current_task()
        assert task is not None

        def expire() -> None:
            stream.fail(DeadlineExceeded())
            task.cancel()

        timer = asyncio.get_running_loop().call_later(deadline_s, expire)
        task.add_done_callback(lambda _: timer.cancel())

    async def _answer(self, stream: IncomingStream, request: _Request, model: ModelSpec, work: Work | None) -> Usage:
        body: bytes | bytearray | None = stream.whole_body()
        if body is None:
            async with asyncio.timeout(BODY_DEADLINE_S):
                body = await stream.read_body(max_bytes=request.trail_size + request.size)
        if len(body) != request.trail_size + request.size:
            raise ProtocolError("a request body of another length than OPEN announced")
        prepared = self._prepare(body, request, model)
        queued = time.monotonic()
        begun = False

        def on_first() -> None:
            nonlocal begun
            self._silent.discard(stream)
            if not begun:
                begun = True
                self.pulse.begun += 1
            if work is not None:
                self.prefill.computed(work)
                self._on_load()

        self._silent.add(stream)
        self._ticking = self._ticking or asyncio.create_task(self._report_progress())
        try:
            self._on_load()
            async with self.admission.slot(request.priority, request.project, cost=request.cost):
                stream.accept()
                queue_s = time.monotonic() - queued
                with self._tally(stream, request, model, queue_s) as tally:
                    return await self._ask(stream, request, model, prepared, on_first, tally, queue_s=queue_s)
        finally:
            self.pulse.begun -= begun
            self._silent.discard(stream)
            self._on_load()

    def _prepare(self, body: bytes | bytearray, request: _Request, model: ModelSpec) -> Prepared | Trailed:
        task, engine_model = request.task, _renamed(model, request)
        if request.trail_size:
            return Trailed(parse_trail(bytes(body[: request.trail_size])), body[request.trail_size :])
        if request.moves:
            return prepare(body, task, model, engine_model=engine_model)
        return prepare_body(body, task=task, engine_model=engine_model)

    def _model(self, request: _Request) -> ModelSpec:
        for model in self._engine.models:
            if request.model == model.name or request.model in model.adapters:
                if request.task not in model.tasks:
                    raise InvalidRequest(f"The model '{model.name}' does not serve {request.task}", param="model")
                return model
        raise ModelNotFound(f"The model '{request.model}' is not served here", param="model")

    async def _ask(
        self,
        stream: IncomingStream,
        request: _Request,
        model: ModelSpec,
        prepared: Prepared | Trailed,
        on_first: Callable[[], None],
        tally: Tally,
        *,
        queue_s: float,
    ) -> Usage:
        base_url = self._engine.base_url
        if base_url is None:
            raise EngineUnavailable("The worker's engine is not ready")
        headers = {**self._headers, "Content-Type": "application/json", "X-Request-Id": request.id}
        started = time.monotonic()
        try:
            if isinstance(prepared, Trailed):
                ask = EngineRoutes(self._client, base_url, headers)
                going_on = await continuation(prepared, request.task, model, _renamed(model, request) or request.model, ask)
                usage = await self._go_on(stream, going_on, base_url, headers, on_first, tally)
            else:
                usage = await self._begin(stream, request, model, prepared, base_url, headers, on_first, tally)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._engine.suspect()
            raise EngineUnavailable(f"The worker's engine failed ({type(error).__name__})") from None
        self.served += 1
        tally.engine_ms = round((time.monotonic() - started) * 1000)
        stream.end({**usage.to_trailer(), "queue_ms": round(queue_s * 1000), "engine_ms": tally.engine_ms})
        return usage

    async def _begin(
        self,
        stream: IncomingStream,
        request: _Request,
        model: ModelSpec,
        prepared: Prepared,
        base_url: str,
        headers: dict[str, str],
        on_first: Callable[[], None],
        tally: Tally,
    ) -> Usage:
        async with await self._post(base_url + request.task.path, prepared, headers) as response:
            if response.status != 200:
                raise await _refusal(response)
            if response.content_type != "text/event-stream":
                return await self._relay_whole(stream, response, on_first, tally)
            head = _Head(stream, on_first, **({"fixed": prepared.fixed} if prepared.fixed else {}))
            if prepared.fixed == "" and model.token_ids is not None:
                events = TrackedEvents(model.token_ids, show_usage=prepared.show_usage)
                return await self._relay_tokens(stream, response, events, head, tally)
            return await self._relay_events(stream, response, prepared, head, tally)

    async def _go_on(
        self,
        stream: IncomingStream,
        going_on: Continuation,
        base_url: str,
        headers: dict[str, str],
        on_first: Callable[[], None],
        tally: Tally,
    ) -> Usage:
        """With a stream that another worker began."""
        head, events = _Head(stream, on_first, resumed=len(going_on.ids)), ResumedEvents(going_on)
        tally.stream = events
        await self._pass_on(stream, events.begin(), head, tally)
        if not events.over:
            prepared = Prepared(body=going_on.request(), stream=True, show_usage=True)
            async with await self._post(base_url + Task.COMPLETIONS.path, prepared, headers) as response:
                if response.status != 200:
                    raise not_resumed(await _refusal(response))
                await self._relay_tokens(stream, response, events, head, tally)
        head()
        return events.usage

    async def _post(self, url: str, prepared: Prepared, headers: dict[str, str]) -> EngineAnswer:
        """Send a request to the engine; returns once its answer's head is there.

        A connection that was kept may just have been closed by an engine that keeps none: the request goes again, over another. One that
        was made for it and dies has taken the engine's answer with it, and maybe the engine: what did that is not sent there again.
        """
        for left in reversed(range(STALE_CONNECTIONS + 1)):
            data: bytes | bytearray | AsyncIterator[bytes | memoryview] = prepared.body
            if prepared.size >= LARGE_BYTES:
                data, headers["Content-Length"] = prepared.pieces(), str(prepared.size)
            try:
                return await self._client.post(url, data=data, headers=headers)
            except StaleConnection:
                if not left:
                    raise
        raise AssertionError("unreachable")

    async def _relay_events(
        self,
        stream: IncomingStream,
        response: EngineAnswer,
        prepared: Prepared,
        begin: _Head,
        tally: Tally,
    ) -> Usage:
        """Pass events on, whole ones only. HEAD goes with the first, so a request that has had no token can still move."""
        events = tally.stream = EventStream(show_usage=prepared.show_usage)
        async for data in response.content.iter_any():
            self.pulse.signs += 1
            try:
                whole = events.feed(data)
            except ValueError:
                raise EngineUnavailable("The worker's engine sent an event without end") from None
            if whole:
                begin()
                if not stream.send_now(whole):
                    await self._send(stream, whole)
                tally.passed(whole)
            if events.failure is not None:
                break
        rest = events.close()
        if events.failure is not None:
            raise self._failed(events.failure)
        if not events.complete:
            self._engine.suspect()
            raise EngineUnavailable("The worker's engine ended its answer in the middle")
        if rest:
            begin()
            await self._send(stream, rest)
            tally.passed(rest)
        return events.usage

    async def _relay_tokens(self, stream: IncomingStream, response: EngineAnswer, events: Events, begin: _Head, tally: Tally) -> Usage:
        """As `_relay_events`, each event with what a successor would need to go on after it."""
        tally.stream = events
        async for data in response.content.iter_any():
            self.pulse.signs += 1
            usual = events.usual(data)
            if usual is not None:
                trail, event = usual
                if stream.send_tokens_now(trail, event):
                    tally.passed_one(event)
                else:
                    await self._pass_on(stream, [usual], begin, tally)
                continue
            try:
                pieces = events.feed(data)
            except ValueError:
                raise EngineUnavailable("The worker's engine sent an event without end") from None
            await self._pass_on(stream, pieces, begin, tally)
            if events.over:
                return events.usage
            if events.failure is not None:
                break
        pieces = events.close()
        if events.failure is not None:
            raise self._failed(events.failure)
        if not events.complete:
            self._engine.suspect()
            raise EngineUnavailable("The worker's engine ended its answer in the middle")
        await self._pass_on(stream, pieces, begin, tally)
        return events.usage

    async def _pass_on(self, stream: IncomingStream, pieces: Iterable[Piece], begin: _Head, tally: Tally) -> None:
        for trail, data in pieces:
            begin()
            if len(data) > MAX_TOKENS_DATA_BYTES:
                await self._send(stream, data)  # what is as long as that has no trail
            elif not stream.send_tokens_now(trail, data):
                await self._send(stream, data, trail)
            tally.passed(data)

    async def _relay_whole(self, stream: IncomingStream, response: EngineAnswer, on_first: Callable[[], None], tally: Tally) -> Usage:
        pieces, size = [], 0
        async for data in response.content.iter_any():
            self.pulse.signs += 1
            size += len(data)
            if size > MAX_ANSWER_BYTES:
                raise EngineUnavailable("The worker's engine sent too large an answer")
            pieces.append(data)
        body = b"".join(pieces)
        usage, answer = read_answer(body)
        if answer is None:
            raise EngineUnavailable("The worker's engine sent an answer that is not JSON")
        if answer.failed:
            raise self._failed(body)
        on_first()
        tally.usage, tally.length = usage, len(body)
        stream.send_head({"status": 200, "type": "application/json", "length": len(body)})
        for at in range(0, len(body), MAX_PAYLOAD_BYTES):
            await self._send(stream, piece := body[at : at + MAX_PAYLOAD_BYTES])
            tally.sent += len(piece)
        return usage or Usage()

    async def _send(self, stream: IncomingStream, data: bytes, trail: bytes | None = None) -> None:
        """Send what may have to wait for the client; the engine owes nothing meanwhile."""
        self.pulse.held += 1
        try:
            await (stream.send(data) if trail is None else stream.send_tokens(trail, data))
        finally:
            self.pulse.held -= 1

    def _failed(self, said: bytes) -> MeshError:
        """The engine says, under a status of 200, that it gave up."""
        error = engine_failure(said)
        if isinstance(error, EngineUnavailable):
            self._engine.suspect()
        return error

    def _tally(self, stream: IncomingStream, request: _Request, model: ModelSpec, queue_s: float) -> Tally:
        return self._meter.tally(
            request_id=request.id,
            attempt=request.attempt,
            at=request.at,
            proxy=stream.link.node_id,
            project=request.project,
            key=request.key,
            endpoint=request.endpoint,
            task=request.task,
            asked=request.model,
            model=model,
            queue_s=queue_s,
        )

    async def _report_progress(self) -> None:
        """Once a second, as long as there are requests without a byte: tell their proxies that the engine has not been given up."""
        while self._silent:
            await self._clock.sleep(PROGRESS_S)
            if self._engine.base_url is not None:
                for stream in self._silent:
                    stream.progress({"running": self.admission.running})
        self._ticking = None


class _Head:
    """Sends HEAD, once, with the first event."""

    __slots__ = ("_fields", "_on_first", "_stream", "sent")

    def __init__(self, stream: IncomingStream, on_first: Callable[[], None], **fields: Any) -> None:
        self._stream, self._on_first, self.sent = stream, on_first, False
        self._fields = {"status": 200, "type": "text/event-stream", **fields}

    def __call__(self) -> None:
        if not self.sent:
            self.sent = True
            self._on_first()
            self._stream.send_head(self._fields)


_LOWEST = max(Priority)


class _Request:
    """The fields of an OPEN frame, checked. Raises `ProtocolError`."""

    __slots__ = (
        "at",
        "attempt",
        "cost",
        "deadline_s",
        "endpoint",
        "id",
        "key",
        "model",
        "moves",
        "priority",
        "project",
        "prompt",
        "size",
        "task",
        "trail_size",
    )

    def __init__(self, head: Mapping[str, Any]) -> None:
        try:
            self.id = read_str(head, "id", max_len=64)
            self.model = read_str(head, "model")
            self.size = read_int(head, "size", high=MAX_REQUEST_BYTES)
            self.task = Task(read_str(head, "task", max_len=32))
            self.project = read_str(head, "project", default="", max_len=64)
            self.key = read_bytes(head, "key", size=8) if "key" in head else b""
            self.endpoint = read_str(head, "ep", default="", max_len=128)
            self.attempt = read_int(head, "try", default=1, low=1, high=1000)
            self.at = read_int(head, "at", default=0)
            self.priority = Priority(read_int(head, "pri", default=0, high=_LOWEST))
            self.prompt = _prompt(head) if "pfx" in head else None
            self.moves = "trail" in head
            self.trail_size = read_int(head, "trail", default=0, high=MAX_TRAIL_BYTES)
            self.deadline_s = read_int(head, "dl", low=1, high=86_400_000) / 1000 if "dl" in head else 0.0
        except (MalformedEnvelope, ValueError) as error:
            raise ProtocolError(f"bad OPEN: {error}") from None
        if self.trail_size:
            self.priority = Priority.INTERACTIVE  # what has begun goes before what has not
        self.cost = min(MAX_COST, 1 + self.size / COST_BYTES)


def _prompt(head: Mapping[str, Any]) -> Prompt:
    return Prompt(
        chain=split_chain(read_bytes(head, "pfx", max_len=MAX_BLOCKS * HASH_BYTES)),
        size_bytes=read_int(head, "txt", high=MAX_TEXT_BYTES),
        streamed=read_bool(head, "stream", default=False),
        seen=read_int(head, "seen") if "seen" in head else None,
    )


def _renamed(model: ModelSpec, request: _Request) -> str | None:
    """The engine's own name for what is asked, or None where the body has it already: that of an endpoint's call names the endpoint."""
    name = model.engine_name if request.model == model.name else request.model
    return name if name != request.model or request.endpoint else None


async def _refusal(response: EngineAnswer) -> MeshError:
    """What an engine's error status means to the client: its own mistake, a full engine, or a broken one."""
    complaint = engine_complaint(await _read_some(response, MAX_COMPLAINT_BYTES), response.status)
    match response.status:
        case 400 | 404 | 405 | 409 | 415 | 422:
            return InvalidRequest(complaint)
        case 413:
            return BodyTooLarge(complaint)
        case 429:
            return Overloaded(complaint, retry_after_s=1.0)
    return EngineUnavailable(f"The worker's engine answered {response.status}")


async def _read_some(response: EngineAnswer, most_bytes: int) -> bytes:
    """The whole body, or its beginning if it is longer."""
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) >= most_bytes:
            break
    return bytes(data[:most_bytes])
