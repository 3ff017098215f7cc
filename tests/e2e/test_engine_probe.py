"""Questions to engines that answer anything but the question."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from mesh.errors import EngineError
from worker.engine import EngineKind, EngineSpec, Task, make_engine
from worker.engine.probe import Probe, Refused, Unanswered, session

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def probing(answer: Answer) -> AsyncIterator[Probe]:
    """A probe of a server that reads a request's head and then does what `answer` does."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    engine = make_engine(EngineSpec(kind=EngineKind.EXTERNAL, url=url))
    async with server, session(engine) as client:
        yield Probe(engine, url, client, deadline_s=1.0)


def says(data: bytes) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return answer


async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def says_it_for_ever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        await writer.drain()


NO_HTTP = says(b"\x00\xff SSH-2.0\r\n\r\n")
CUT = says(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
GIANT_HEADER = says(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n")
ELSEWHERE = says(b"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")
HTML = says(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>")
HOSTILE = {
    "silence": says_nothing,
    "no end": says_it_for_ever,
    "no HTTP": NO_HTTP,
    "cut": CUT,
    "giant header": GIANT_HEADER,
    "redirect": ELSEWHERE,
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
async def test_engine_that_answers_badly_is_neither_healthy_nor_listed(answer: Answer) -> None:
    async with asyncio.timeout(20), probing(answer) as probe:
        with pytest.raises(Unanswered):
            await probe.health()
        with pytest.raises(EngineError):
            await probe.listing()
        assert await probe.load() is None


async def test_page_of_html_is_no_listing_no_load_and_no_answer() -> None:
    async with probing(HTML) as probe:
        with pytest.raises(EngineError, match="not a list of models"):
            await probe.listing()
        assert await probe.load() is None
        assert not await probe.answers(Task.CHAT, "m")


async def test_nobody_there_is_told_apart_from_silence() -> None:
    engine = make_engine(EngineSpec(kind=EngineKind.EXTERNAL, url="http://127.0.0.1:1"))
    async with session(engine) as client:
        with pytest.raises(Refused):
            await Probe(engine, "http://127.0.0.1:1", client, deadline_s=1.0).health()


@pytest.mark.parametrize(("status", "can"), [(400, False), (404, False), (405, False), (422, False), (501, False)])
async def test_task_an_engine_does_not_know_is_left_out(status: int, can: bool) -> None:
    async with probing(says(f"HTTP/1.1 {status} No\r\nContent-Length: 2\r\n\r\n{{}}".encode())) as probe:
        assert await probe.answers(Task.EMBEDDINGS, "m") is can


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
async def test_task_an_engine_should_know_and_fails_is_an_error(status: int) -> None:
    async with probing(says(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode())) as probe:
        with pytest.raises(EngineError, match=str(status)):
            await probe.answers(Task.CHAT, "m")


async def test_server_without_a_health_route_is_healthy_when_it_lists_models() -> None:
    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    engine = make_engine(EngineSpec(kind=EngineKind.EXTERNAL, url=url))
    async with session(engine) as client:
        probe = Probe(engine, url, client, deadline_s=5.0)
        await probe.health()
        assert [model.id for model in await probe.listing()] == ["m"]
    await runner.cleanup()
