"""A stand-in for an engine: an OpenAI-compatible server of a language model that is none, which does as it is told.

Answers are deterministic and autoregressive: each token is a function of the token ids before it, so a completion over
a prompt's ids and the ids so far goes on exactly as the uninterrupted answer would. Its manners are vLLM's (SSE events,
`return_token_ids`, metric names, error bodies). It can be made to misbehave in the ways real servers do.

In a test, in the test's own process:

    async with FakeEngine(tokens_per_s=100) as engine:
        …engine.url…
        engine.misbehave(Misbehaviour(mode=Mode.CUT, times=1, after_tokens=3))
        assert engine.stats.cancelled == 1

As a process of its own, printing `{"port": …, "url": …}`; it takes vLLM's arguments too, so it can stand in for `vllm
serve` below a real worker (`vllm_command`), with GET /stats and POST /misbehave to steer it:

    python tests/support/fake_engine.py --port 0 --model fake --tokens-per-s 50
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import itertools
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any

from aiohttp import web

VOCABULARY = 1_000
FIRST_HALF, SECOND_HALF, HALVES = 900, 950, 50
SEEN_IDS = 16
DEFAULT_MAX_TOKENS = 16
CONTEXT_TOKENS = 4_096
EMBEDDING_SIZE = 8
GIANT_LINE_BYTES = 32 << 20
KEPT_REQUESTS = 1_000


class Mode(StrEnum):
    """How to misbehave."""

    STATUS = "status"
    """Answer with `status` and an error body."""
    HANG = "hang"
    """Take the request and send nothing at all."""
    STALL = "stall"
    """Send `after_tokens` tokens, then nothing more, with the connection open."""
    CUT = "cut"
    """Break the connection after `after_tokens` tokens."""
    END = "end"
    """End cleanly after `after_tokens` tokens: no finish_reason, no [DONE]."""
    ERROR_EVENT = "error_event"
    """After `after_tokens` tokens, an in-band error event, then [DONE]."""
    GARBAGE = "garbage"
    """After `after_tokens` tokens, bytes that are no SSE and no UTF-8, then a clean end."""
    GIANT_LINE = "giant_line"
    """After `after_tokens` tokens, one line of 32 MiB."""
    WRONG_TYPE = "wrong_type"
    """Status 200 with a page of HTML."""
    DRIBBLE = "dribble"
    """A right answer, in pieces of one byte, with comments and CR LF: hard to read, but not wrong."""
    SLOW = "slow"
    """A right answer at a hundredth of the speed."""
    SICK = "sick"
    """/health says 503."""
    DEAF = "deaf"
    """/health does not answer."""


@dataclass(frozen=True, kw_only=True)
class Misbehaviour:
    """One way to misbehave, for the next `times` requests (None: until told otherwise)."""

    mode: Mode
    times: int | None = None
    after_tokens: int = 2
    status: int = 500

    @property
    def is_about_health(self) -> bool:
        return self.mode in (Mode.SICK, Mode.DEAF)


@dataclass
class Stats:
    """Of requests for tokens: every started one is in the end finished, failed (by misbehaviour) or cancelled."""

    started: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    running: int = 0
    waiting: int = 0
    health_checks: int = 0
    tokenized: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT_REQUESTS))

    def numbers(self) -> dict[str, int]:
        found = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, int)}


class Cut(Exception):
    """The connection is to be broken."""


# ------------------------------------------------------------------------------------------------- the model that is none


def encode(text: str) -> list[int]:
    """Token ids of a text: what `decode` gave comes back as it was, every other word gets an id of its own."""
    words = re.findall(r"\S+", text)
    return [int(w[1:]) if re.fullmatch(r"t\d{1,3}", w) else zlib.crc32(w.encode()) % VOCABULARY for w in words]


def decode(token: int) -> str:
    return f" t{token}"


def next_token(ids: list[int], *, split: bool = False) -> int:
    """A function of the last ids and their number. ``split``: half of a character is followed by its other half, and by nothing else."""
    seen = ids[-SEEN_IDS:]
    drawn = zlib.crc32(struct.pack(f"<{len(seen) + 1}I", len(ids), *seen))
    if not split:
        return drawn % VOCABULARY
    return SECOND_HALF + drawn % HALVES if FIRST_HALF <= ids[-1] < SECOND_HALF else drawn % SECOND_HALF


def speak(ids: list[int], *, split: bool = False) -> str:
    """The text of ids; ``split``: the highest hundred are halves of characters, the first half with a space before it."""
    if not split:
        return "".join(map(decode, ids))
    return b"".join(map(_half, ids)).decode("utf-8", "replace")


def _half(token: int) -> bytes:
    if token < FIRST_HALF:
        return decode(token).encode()
    return b" \xf0\x9f" if token < SECOND_HALF else b"\x98" + bytes([0x80 + token % 0x30])


class Speech:
    """How vLLM gives text out: whole characters only, and less the length of the longest stop string while there are some."""

    def __init__(self, *, split: bool, stops: tuple[str, ...], include_stop: bool) -> None:
        self.ids: list[int] = []
        self.stopped = False
        self._split, self._stops, self._include = split, stops, include_stop
        self._hold = 0 if include_stop else max((len(stop) for stop in stops), default=1) - 1
        self._told = self._whole = ""

    def say(self, token: int, *, is_last: bool) -> str:
        """What goes out with this token."""
        self.ids.append(token)
        if not self._split and not self._stops:
            return decode(token)
        text = speak(self.ids, split=self._split)
        if not text.endswith("\ufffd") or is_last:
            self._whole = text
        for stop in self._stops:
            at = self._whole.find(stop)
            if at >= 0:
                self.stopped = True
                self._whole = self._whole[: at + (len(stop) if self._include else 0)]
        end = max(len(self._told), len(self._whole) - (0 if is_last or self.stopped else self._hold))
        out, self._told = self._whole[len(self._told) : end], self._whole[:end]
        return out


def embed(text: str) -> list[float]:
    raw = [zlib.crc32(f"{index}:{text}".encode()) / 2**32 - 0.5 for index in range(EMBEDDING_SIZE)]
    norm = math.sqrt(sum(value * value for value in raw))
    return [value / norm for value in raw]


def render(messages: list[dict[str, Any]]) -> str:
    """The chat template."""
    lines = [f"<{message.get('role')}> {_text(message.get('content'))}" for message in messages]
    return " ".join([*lines, "<assistant>"])


def _text(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content)


def answer_to(messages: list[dict[str, Any]], max_tokens: int = DEFAULT_MAX_TOKENS, *, split: bool = False) -> str:
    """What the model says to these messages; for a test to compare with."""
    return speak(continue_ids(encode(render(messages)), max_tokens, split=split), split=split)


def continue_ids(prompt: list[int], count: int, *, split: bool = False) -> list[int]:
    """The next ids after a prompt's."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, split=split))
    return ids[len(prompt) :]


# --------------------------------------------------------------------------------------------------- shapes of the answers


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request for tokens, parsed."""

    id: str
    route: str
    model: str
    prompt_ids: list[int]
    max_tokens: int
    finish_reason: str
    stream: bool
    include_usage: bool
    token_ids: bool
    stops: tuple[str, ...] = ()
    include_stop: bool = False

    @property
    def is_chat(self) -> bool:
        return self.route == "chat"

    def envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": 1_700_000_000, "model": self.model}

    def usage(self, completion_tokens: int) -> dict[str, Any]:
        prompt = len(self.prompt_ids)
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion_tokens,
            "completion_tokens": completion_tokens,
            "prompt_tokens_details": None,
        }


def first_events(job: Job) -> list[dict[str, Any]]:
    if job.route != "chat":
        return []
    choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    event = {**job.envelope("chat.completion.chunk"), "choices": [choice]}
    return [event | {"prompt_token_ids": job.prompt_ids if job.token_ids else None}]


def token_event(job: Job, token: int, text: str, finish: str | None, is_first: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
    if job.is_chat:
        choice["delta"] = {"content": text}
    else:
        choice["text"] = text
        choice["prompt_token_ids"] = job.prompt_ids if is_first and job.token_ids else None
    choice["token_ids"] = [token] if job.token_ids else None
    return {**job.envelope("chat.completion.chunk" if job.is_chat else "text_completion"), "choices": [choice]}


def usage_event(job: Job, completion_tokens: int) -> dict[str, Any]:
    kind = "chat.completion.chunk" if job.is_chat else "text_completion"
    return {**job.envelope(kind), "choices": [], "usage": job.usage(completion_tokens)}


def whole_answer(job: Job, tokens: list[int], text: str, finish: str) -> dict[str, Any]:
    if job.route == "responses":
        return response_object(job, text, len(tokens), "completed")
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
    if job.is_chat:
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    if job.token_ids:
        choice["token_ids"] = tokens
    answer = {**job.envelope("chat.completion" if job.is_chat else "text_completion"), "choices": [choice]}
    answer["usage"] = job.usage(len(tokens))
    return answer | ({"prompt_token_ids": job.prompt_ids} if job.token_ids else {})


def response_object(job: Job, text: str, completion_tokens: int, status: str) -> dict[str, Any]:
    prompt = len(job.prompt_ids)
    content = {"type": "output_text", "text": text, "annotations": []}
    message = {"id": f"msg_{job.id}", "type": "message", "role": "assistant", "status": status, "content": [content]}
    return {
        **job.envelope("response"),
        "created_at": 1_700_000_000,
        "status": status,
        "output": [message] if status == "completed" else [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": prompt,
            "output_tokens": completion_tokens,
            "total_tokens": prompt + completion_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    }


def error_body(status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def sse(event: dict[str, Any] | str, name: str | None = None) -> bytes:
    data = event if isinstance(event, str) else json.dumps(event)
    return (f"event: {name}\n" if name else "").encode() + f"data: {data}\n\n".encode()


def refuse(status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> web.HTTPException:
    """An error in vLLM's shape, to be raised."""
    text = json.dumps(error_body(status, message, kind, param))
    shapes: dict[int, type[web.HTTPException]] = {400: web.HTTPBadRequest, 401: web.HTTPUnauthorized, 404: web.HTTPNotFound}
    return shapes[status](text=text, content_type="application/json")


# --------------------------------------------------------------------------------------------------------------- the server


class FakeEngine:
    """The server; see the module's docstring. `tokens_per_s` is per stream, None as fast as it goes; `slots` requests
    run at once, others wait; `prefill_s` passes before each first token. `split_utf8`: some tokens are halves of characters; without
    `token_ids` it has never heard of them."""

    def __init__(
        self,
        *,
        model: str = "fake",
        tokens_per_s: float | None = None,
        prefill_s: float = 0.0,
        slots: int = 256,
        split_utf8: bool = False,
        token_ids: bool = True,
        api_key: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.model = model
        self.tokens_per_s = tokens_per_s
        self.prefill_s = prefill_s
        self.split_utf8 = split_utf8
        self.token_ids = token_ids
        self.tokenizes_wrongly = False
        self.stats = Stats()
        self._slots = asyncio.Semaphore(slots)
        self._api_key = api_key
        self._address = host, port
        self._misbehaviour: Misbehaviour | None = None
        self._left: int | None = None
        self._steps = self._prefilling = self._hung = 0
        self._numbers = itertools.count(1)
        self._changed = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self.port = port

    @property
    def url(self) -> str:
        return f"http://{self._address[0]}:{self.port}"

    def misbehave(self, how: Misbehaviour | None) -> None:
        """Misbehave like this from now on; None: behave."""
        self._misbehaviour, self._left = how, how.times if how else None

    async def until(self, true_of: Callable[[Stats], bool]) -> None:
        """Return once `true_of(stats)`; for tests to wait for what the engine sees. The caller sets the deadline."""
        while not true_of(self.stats):
            await self._changed.wait()

    async def __aenter__(self) -> FakeEngine:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    async def start(self) -> None:
        app = web.Application(client_max_size=64 << 20, middlewares=[self._check_key])
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/stats", self._stats)
        app.router.add_post("/misbehave", self._told_to_misbehave)
        app.router.add_get("/v1/models", self._models)
        if self.token_ids:
            app.router.add_post("/tokenize", self._tokenize)
            app.router.add_post("/detokenize", self._detokenize)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/responses", self._responses)
        app.router.add_post("/v1/embeddings", self._embeddings)
        # handler_cancellation: a client that goes away cancels its generation, as in vLLM.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, *self._address, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close every connection and stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = None

    # ------------------------------------------------------------------------------------------------------ small routes

    @web.middleware
    async def _check_key(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        if self._api_key and request.path.startswith("/v1") and request.headers.get("Authorization") != f"Bearer {self._api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        answer = await handler(request)
        assert isinstance(answer, web.StreamResponse)
        return answer

    async def _health(self, request: web.Request) -> web.StreamResponse:
        self.stats.health_checks += 1
        self._tell()
        if self._misbehaviour is not None and self._misbehaviour.is_about_health:
            if self._misbehaviour.mode is Mode.DEAF:
                await asyncio.Event().wait()
            return web.Response(status=503)
        return web.Response()

    async def _models(self, request: web.Request) -> web.StreamResponse:
        entry = {"id": self.model, "object": "model", "created": 1_700_000_000, "owned_by": "fake"}
        return web.json_response({"object": "list", "data": [entry | {"parent": None, "max_model_len": CONTEXT_TOKENS}]})

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        self.stats.tokenized += 1
        ids = encode(render(body["messages"])) if "messages" in body else encode(_text(body.get("prompt")))
        if self.tokenizes_wrongly:
            ids = [*ids[:-1], ids[-1] + 1]
        return web.json_response({"count": len(ids), "max_model_len": CONTEXT_TOKENS, "tokens": ids, "token_strs": None})

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        return web.json_response({"prompt": speak(body["tokens"], split=self.split_utf8)})

    async def _stats(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.stats.numbers())

    async def _told_to_misbehave(self, request: web.Request) -> web.StreamResponse:
        """Body: the fields of a Misbehaviour; {} or null to behave."""
        told = await request.json()
        self.misbehave(Misbehaviour(**told | {"mode": Mode(told["mode"])}) if told else None)
        return web.json_response({"ok": True})

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        self._steps += self._prefilling > 0
        label = f'{{engine="0",model_name="{self.model}"}}'
        used = min(1.0, (self.stats.running - self._hung) / 100)
        rows = (
            ("vllm:num_requests_running", "gauge", float(self.stats.running)),
            ("vllm:num_requests_waiting", "gauge", float(self.stats.waiting)),
            ("vllm:kv_cache_usage_perc", "gauge", used),
            ("vllm:prompt_tokens_total", "counter", float(self.stats.prompt_tokens)),
            ("vllm:generation_tokens_total", "counter", float(self.stats.completion_tokens)),
            ("vllm:iteration_tokens_total_count", "counter", float(self._steps)),
        )
        text = "".join(f"# HELP {n} {n}\n# TYPE {n} {kind}\n{n}{label} {value}\n" for n, kind, value in rows)
        return web.Response(text=text, content_type="text/plain")

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        given = body.get("input")
        texts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        as_base64 = body.get("encoding_format") == "base64"
        vectors = [embed(str(text)) for text in texts]
        data = [
            {"object": "embedding", "index": i, "embedding": _pack(vector) if as_base64 else vector} for i, vector in enumerate(vectors)
        ]
        tokens = sum(len(encode(str(text))) for text in texts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        async with self._counted(body):
            if (broken := await self._instead(request)) is not None:
                return broken
            return web.json_response({"object": "list", "model": self.model, "data": data, "usage": usage})

    # ------------------------------------------------------------------------------------------------- routes with tokens

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise refuse(400, "messages must be a list with something in it", param="messages")
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        return await self._generate(request, body, "chat", encode(render(messages)), limit)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        prompt = body.get("prompt")
        ids = list(prompt) if isinstance(prompt, list) and all(type(i) is int for i in prompt) else encode(_text(prompt))
        return await self._generate(request, body, "completions", ids, body.get("max_tokens"))

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        given = body.get("input")
        messages = given if isinstance(given, list) else [{"role": "user", "content": given}]
        return await self._generate(request, body, "responses", encode(render(messages)), body.get("max_output_tokens"))

    async def _body(self, request: web.Request) -> dict[str, Any]:
        try:
            body = json.loads(await request.read())
        except ValueError as error:
            raise refuse(400, "the body is not JSON") from error
        if not isinstance(body, dict):
            raise refuse(400, "the body is not an object")
        if body.get("model") != self.model:
            raise refuse(404, f"The model `{body.get('model')}` does not exist.", "NotFoundError", "model")
        return body

    async def _generate(self, request: web.Request, body: dict[str, Any], route: str, ids: list[int], limit: Any) -> web.StreamResponse:
        if limit is not None and (type(limit) is not int or limit < 1):
            raise refuse(400, "max_tokens must be at least 1", param="max_tokens")
        if len(ids) + (limit or 1) > CONTEXT_TOKENS:
            raise refuse(400, f"This model's maximum context length is {CONTEXT_TOKENS} tokens.", param="input_tokens")
        options = body.get("stream_options") or {}
        job = Job(
            id=f"{route}-{next(self._numbers)}",
            route=route,
            model=self.model,
            prompt_ids=ids,
            max_tokens=limit or DEFAULT_MAX_TOKENS,
            finish_reason="length" if limit else "stop",
            stream=bool(body.get("stream")),
            include_usage=bool(options.get("include_usage")),
            token_ids=self.token_ids and bool(body.get("return_token_ids")),
            stops=tuple([body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or ()),
            include_stop=bool(body.get("include_stop_str_in_output")),
        )
        async with self._counted(body):
            if (broken := await self._instead(request)) is not None:
                return broken
            self.stats.prompt_tokens += len(ids)
            how = self._take(Mode.STALL, Mode.CUT, Mode.END, Mode.ERROR_EVENT, Mode.GARBAGE, Mode.GIANT_LINE, Mode.DRIBBLE)
            slow = self._take(Mode.SLOW) is not None
            if job.stream:
                return await self._stream(request, job, how, slow)
            said = [part async for part in self._speech(job, slow)]
            if how is not None and how.mode is not Mode.DRIBBLE:
                raise self._break(request)
            text, finish = "".join(text for _, text, _ in said), said[-1][2] or "stop"
            return web.json_response(whole_answer(job, [token for token, _, _ in said], text, finish))

    async def _tokens(self, job: Job, slow: bool) -> AsyncIterator[int]:
        """The answer's ids, at the pace that is set."""
        loop, ids = asyncio.get_running_loop(), list(job.prompt_ids)
        pace_s = 1 / self.tokens_per_s if self.tokens_per_s else 0.0
        if slow:
            pace_s = max(pace_s, 0.001) * 100
        due_s = loop.time() + self.prefill_s
        self._prefilling += 1
        try:
            await asyncio.sleep(max(0.0, due_s - loop.time()))
        finally:
            self._prefilling -= 1
        for _ in range(job.max_tokens):
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            due_s += pace_s
            ids.append(next_token(ids, split=self.split_utf8))
            self.stats.completion_tokens += 1
            yield ids[-1]

    async def _speech(self, job: Job, slow: bool) -> AsyncIterator[tuple[int, str, str | None]]:
        """Each token, the text that goes out with it, and why the answer ends if it does."""
        speech = Speech(split=self.split_utf8, stops=job.stops, include_stop=job.include_stop)
        async for token in self._tokens(job, slow):
            is_last = len(speech.ids) + 1 == job.max_tokens
            text = speech.say(token, is_last=is_last)
            yield token, text, "stop" if speech.stopped else job.finish_reason if is_last else None
            if speech.stopped:
                return

    async def _stream(self, request: web.Request, job: Job, how: Misbehaviour | None, slow: bool) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        dribble = how is not None and how.mode is Mode.DRIBBLE

        async def send(data: bytes) -> None:
            if not dribble:
                return await response.write(data)
            for byte in b": comment\r\n" + data.replace(b"\n", b"\r\n"):
                await response.write(bytes([byte]))

        said: list[int] = []
        for event in first_events(job):
            await send(sse(event))
        if job.route == "responses":
            await send(_response_event("response.created", response=response_object(job, "", 0, "in_progress")))
        whole = ""
        async for token, text, finish in self._speech(job, slow):
            if how is not None and not dribble and len(said) >= how.after_tokens:
                return await self._break_stream(request, response, how)
            said.append(token)
            whole += text
            if job.route == "responses":
                await send(_response_event("response.output_text.delta", delta=text, item_id=f"msg_{job.id}"))
            else:
                await send(sse(token_event(job, token, text, finish, len(said) == 1)))
        if job.route == "responses":
            text = whole
            await send(_response_event("response.completed", response=response_object(job, text, len(said), "completed")))
        else:
            if job.include_usage:
                await send(sse(usage_event(job, len(said))))
            await send(sse("[DONE]"))
        await response.write_eof()
        return response

    # --------------------------------------------------------------------------------------------------------- misbehaving

    def _take(self, *modes: Mode) -> Misbehaviour | None:
        """The misbehaviour in force if it is one of these, counting it as used once."""
        how = self._misbehaviour
        if how is None or how.mode not in modes:
            return None
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                self._misbehaviour = None
        return how

    async def _instead(self, request: web.Request) -> web.StreamResponse | None:
        """What is sent instead of an answer, when told to misbehave before the first byte."""
        how = self._take(Mode.STATUS, Mode.HANG, Mode.WRONG_TYPE)
        if how is None:
            return None
        if how.mode is Mode.HANG:
            await self._stand_still()
        self.stats.failed += 1
        if how.mode is Mode.WRONG_TYPE:
            return web.Response(text="<html><body>It works!</body></html>", content_type="text/html")
        return web.json_response(error_body(how.status, "told to fail", "InternalServerError"), status=how.status)

    async def _break_stream(self, request: web.Request, response: web.StreamResponse, how: Misbehaviour) -> web.StreamResponse:
        if how.mode is Mode.STALL:
            await self._stand_still()
        if how.mode is Mode.CUT:
            raise self._break(request)
        self.stats.failed += 1
        if how.mode is Mode.ERROR_EVENT:
            await response.write(sse(error_body(500, "the engine died", "InternalServerError")) + sse("[DONE]"))
        elif how.mode is Mode.GARBAGE:
            await response.write(b"\x00\xff\xfe garbage \x80\n\ndata: {not json\n\nevent\n\n")
        elif how.mode is Mode.GIANT_LINE:
            piece = b"x" * (64 << 10)
            await response.write(b'data: {"choices": [{"delta": {"content": "')
            for _ in range(GIANT_LINE_BYTES // len(piece)):
                await response.write(piece)
        await response.write_eof()
        return response

    async def _stand_still(self) -> None:
        self._hung += 1
        try:
            await asyncio.Event().wait()
        finally:
            self._hung -= 1

    def _break(self, request: web.Request) -> Cut:
        """Reset the connection at once, without a clean end."""
        self.stats.failed += 1
        if request.transport is not None:
            request.transport.abort()
        return Cut()

    @asynccontextmanager
    async def _counted(self, body: dict[str, Any]) -> AsyncIterator[None]:
        """Wait for a slot and keep the books: started = finished + failed + cancelled + running + waiting."""
        stats, failed_before = self.stats, self.stats.failed
        stats.requests.append(body)
        stats.started += 1
        stats.waiting += 1
        is_waiting = True
        self._tell()
        try:
            async with self._slots:
                stats.waiting, is_waiting = stats.waiting - 1, False
                stats.running += 1
                try:
                    yield
                finally:
                    stats.running -= 1
            if stats.failed == failed_before:
                stats.finished += 1
        except Cut:
            pass
        except (asyncio.CancelledError, ConnectionError):
            stats.waiting -= is_waiting
            stats.cancelled += 1
            raise
        finally:
            self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _pack(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _response_event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, "sequence_number": 0, "output_index": 0, "content_index": 0, **fields}, kind)


# -------------------------------------------------------------------------------------------------- as a process of its own


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A stand-in for an engine.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="fake")
    parser.add_argument("--served-model-name", help="like vLLM's; wins over --model")
    parser.add_argument("--tokens-per-s", type=float)
    parser.add_argument("--prefill-s", type=float, default=0.0)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--split-utf8", action="store_true", help="some tokens are halves of characters")
    parser.add_argument("--load-s", type=float, default=0.0, help="pretend to load for so long before listening")
    parser.add_argument("--crash-after-s", type=float, help="exit with status 3 after so long")
    parser.add_argument("--deaf-to-sigterm", action="store_true", help="ignore SIGTERM")
    parser.add_argument(
        "--grandchild",
        choices=["group", "session"],
        help="start a child that ignores SIGTERM, in the engine's process group or in a session of its own",
    )
    return parser.parse_known_args(argv)[0]


async def serve(args: argparse.Namespace) -> None:
    engine = FakeEngine(
        model=args.served_model_name or args.model,
        tokens_per_s=args.tokens_per_s,
        prefill_s=args.prefill_s,
        slots=args.slots,
        split_utf8=args.split_utf8,
        api_key=os.environ.get("VLLM_API_KEY"),
        host=args.host,
        port=args.port,
    )
    stopped = asyncio.Event()
    if not args.deaf_to_sigterm:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with engine:
        print(json.dumps({"port": engine.port, "url": engine.url, "pid": os.getpid()}), flush=True)
        with suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), args.crash_after_s)
    if not stopped.is_set():
        print("RuntimeError: told to crash", file=sys.stderr, flush=True)
        raise SystemExit(3)


def main() -> None:
    args = parse_args()
    if args.deaf_to_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if args.grandchild:
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=args.grandchild == "session")
        print(json.dumps({"grandchild": child.pid}), flush=True)
    time.sleep(args.load_s)
    asyncio.run(serve(args))


if __name__ == "__main__":
    main()
