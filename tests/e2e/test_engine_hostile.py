"""Engines that answer with anything at all: the client gets a right answer or a clear error, and the worker is unharmed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from tests.support.answers import Answer
from tests.support.authority import make_mesh
from tests.support.fake_engine import FakeEngine
from tests.support.front import Front, post

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy.")
MESH = make_mesh(now=time.time() - 3600)
CHAT = "/v1/chat/completions"
TOKEN = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": null}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


@pytest.fixture(autouse=True)
async def strict() -> AsyncIterator[None]:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    yield
    assert problems == []


@dataclass
class RawEngine:
    """Answers every request with the same bytes, then ends the connection, or resets it."""

    said: bytes
    reset: bool = False
    model: str = "m"
    port: int = 0
    asked: int = 0
    _server: asyncio.Server | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> RawEngine:
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
            writer.write(self.said)
            await writer.drain()
        if self.reset:
            writer.transport.abort()
        else:
            writer.close()


def http(body: bytes, *, status: str = "200 OK", kind: str = "application/json", **headers: str) -> bytes:
    lines = {"Content-Type": kind, "Content-Length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    return f"HTTP/1.1 {status}\r\n".encode() + b"".join(f"{name}: {value}\r\n".encode() for name, value in lines.items()) + b"\r\n" + body


def chunked(*pieces: bytes, kind: str = "text/event-stream", end: bytes = b"0\r\n\r\n") -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


WHOLE = b'{"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]}'
SAID: dict[str, bytes] = {
    "nothing": b"",
    "garbage": b"garbage\r\n\r\n",
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Type: appl",
    "an endless head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 3_000_000,
    "too many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
    "a length and chunks": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a length never kept": http(WHOLE, Content_Length="100000"),
    "chunks that are none": chunked(end=b"zz\r\nnope"),
    "a giant chunk": chunked(end=b"fffffffffffffff0\r\nhello"),
    "half a stream": chunked(TOKEN, TOKEN, end=b""),
    "a stream with a clean end and no proper one": chunked(TOKEN, TOKEN),
    "a stream in which nothing is an event": chunked(b"\x00\xff" * 1000),
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "another protocol offered": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nhello",
    "continue for ever": b"HTTP/1.1 100 Continue\r\n\r\n" * 2000,
    "a way elsewhere": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    "a status that is none": b"HTTP/1.1 999 What\r\nContent-Length: 2\r\n\r\n{}",
    "a status of letters": b"HTTP/1.1 OK 200\r\nContent-Length: 2\r\n\r\n{}",
    "a page": http(b"<html><body>It works!</body></html>", kind="text/html"),
    "compressed": http(b"\x1f\x8b\x08\x00", Content_Encoding="gzip"),
    "nesting": http(b"[" * 200_000),
    "not UTF-8": http(b'{"choices": ["\xff\xfe"'),
    "not a number": http(b'{"choices": [], "usage": {"prompt_tokens": NaN}}'),
    "an error under a good status": http(b'{"error": {"message": "died", "code": 500}}'),
    "an error whose words are bytes": http(b'{"error": {"message": "\xff\r\n\r\nHTTP/1.1 200 OK"}}', status="400 Bad Request"),
    "an error of megabytes": http(b'{"error": {"message": "' + b"x" * 2_000_000 + b'"}}', status="400 Bad Request"),
    "an error that is an array": http(b"[[[]]]", status="422 No"),
    "an error event, then a proper end": chunked(TOKEN, b'data: {"error": {"message": "died"}}\n\n', DONE),
}


async def ask(front: Front, *, stream: bool) -> Answer:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream}).encode()
    wire = await front.connect()
    try:
        await wire.send(post(CHAT, body, front.key()))
        return await wire.answer()
    finally:
        wire.close()


@pytest.mark.parametrize("reset", [False, True], ids=["ends", "resets"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", SAID)
async def test_whatever_an_engine_says_the_client_is_told_clearly(tmp_path: Path, name: str, stream: bool, reset: bool) -> None:
    async with (
        Front(MESH, tmp_path, retry_limit=0) as front,
        RawEngine(SAID[name], reset=reset) as engine,
        front.gateway(cast(FakeEngine, engine)) as (worker, gateway),
    ):
        answer = await ask(front, stream=stream)
        assert engine.asked >= 1
        if answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream"):
            assert not answer.complete
            assert b'"error"' in answer.body.rsplit(b"\n\n", 2)[-2]
            assert DONE not in answer.body
        else:
            assert answer.complete
            assert answer.status in (400, 502), answer
            assert set(answer.json()) == {"error"}
            assert len(answer.body) < 8_000
        assert not worker.proxy_link.closed
        assert gateway.admission.running == 0


async def test_bytes_after_an_answer_are_nobodys(tmp_path: Path) -> None:
    """An engine that answers twice to one request does not answer the next with it."""
    twice = http(WHOLE) + http(WHOLE.replace(b"hello", b"evil!"))
    async with Front(MESH, tmp_path) as front, RawEngine(twice) as engine, front.gateway(cast(FakeEngine, engine)):
        for _ in range(5):
            answer = await ask(front, stream=False)
            assert answer.json()["choices"][0]["message"]["content"] == "hello"
