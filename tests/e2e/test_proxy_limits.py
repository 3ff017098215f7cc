"""What a client may cost: heads, bodies and connections within limits of size, number and time, whoever else is served meanwhile."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from mesh.link.link import IncomingStream
from proxy import connections as connections_module
from tests.support.answers import assert_openai_error
from tests.support.authority import make_mesh
from tests.support.front import Front, Wire, post

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy.")
MESH = make_mesh(now=time.time() - 3600)
CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Say something"}]}).encode()
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"

Make = Callable[..., Awaitable[Front]]


@pytest.fixture
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


@pytest.fixture
async def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    monkeypatch.setattr(connections_module, "TICK_S", 0.02)
    fronts: list[Front] = []

    async def build(**settings: Any) -> Front:
        front = Front(MESH, tmp_path, **settings)
        await front.__aenter__()
        fronts.append(front)
        await front.worker(whole)
        return front

    yield build
    for front in fronts:
        await front.__aexit__(None, None, None)


async def whole(stream: IncomingStream, head: dict[str, Any]) -> None:
    body = await stream.read_body(max_bytes=head["size"])
    answer = json.dumps({"choices": [{"message": {"content": "hello"}}], "echo": len(body)}).encode()
    stream.accept()
    stream.send_head({"status": 200, "type": "application/json", "length": len(answer)})
    await stream.send(answer)
    stream.end({"in": 3, "out": 2})


async def served(front: Front) -> None:
    wire = await front.connect()
    await wire.send(post(CHAT, BODY, front.key()))
    assert (await wire.answer()).status == 200
    wire.close()


# -- time


@pytest.mark.parametrize(
    "begun", [b"GET /", b"GET /health HTTP/1.1\r\n", b"\r\n", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX: y"]
)
async def test_head_that_does_not_end_is_given_up_whatever_drips(make: Make, begun: bytes) -> None:
    front = await make(head_timeout_s=0.3, idle_timeout_s=30.0)
    wire = await front.connect()
    await wire.send(begun)

    async def drip() -> None:
        while True:
            await wire.send(b"z" if begun != b"\r\n" else b"\r\n")
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    assert_openai_error(await wire.answer(), 408, "request_timeout")
    dripping.cancel()
    assert front.server.connections.slow == 1
    await served(front)


async def test_head_on_a_kept_connection_has_its_deadline_from_its_own_first_byte(make: Make) -> None:
    front = await make(head_timeout_s=0.3, idle_timeout_s=30.0)
    wire = await front.connect()
    for _ in range(3):
        await wire.send(HEALTH[:10])
        await asyncio.sleep(0.15)
        await wire.send(HEALTH[10:])
        assert (await wire.answer()).status == 200
        await asyncio.sleep(0.2)
    await asyncio.sleep(0.4)
    await wire.send(HEALTH)
    assert (await wire.answer()).status == 200
    await wire.send(HEALTH[:10])
    assert_openai_error(await wire.answer(), 408, "request_timeout")
    assert await wire.end() == b""


@pytest.mark.parametrize("requests", [0, 1])
async def test_idle_connection_is_closed_without_a_word(make: Make, requests: int) -> None:
    front = await make(idle_timeout_s=0.3)
    wire = await front.connect()
    for _ in range(requests):
        await wire.send(HEALTH)
        assert (await wire.answer()).status == 200
    assert await wire.end() == b""
    assert len(front.server.connections) == 0


async def test_goodbye_to_idle_connections_spares_the_one_that_has_just_been_asked(make: Make) -> None:
    front = await make()
    wire, idle = await front.connect(), await front.connect()
    for each in (wire, idle):
        await each.send(HEALTH)
        assert (await each.answer()).status == 200
    os.write(wire.writer.get_extra_info("socket").fileno(), HEALTH)  # in the kernel, and this loop has had no turn to read it
    front.server.connections.close_idle()
    assert (await wire.answer()).status == 200
    assert await idle.end() == b""


async def test_body_that_drips_is_given_up(make: Make) -> None:
    front = await make(body_timeout_s=0.3)
    wire = await front.connect()
    await wire.send(post(CHAT, b"{", front.key(), content_length="1000"))

    async def drip() -> None:
        while True:
            await wire.send(b" ")
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    assert_openai_error(await wire.answer(), 408, "request_timeout")
    dripping.cancel()
    assert front.inference.bodies.held_bytes == 0


async def test_client_that_reads_none_of_its_answers_is_cut_off(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "UNREAD_S", 0.2)
    front = await make()
    wire = await front.connect()
    wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
    asking = asyncio.create_task(_ask_for_ever(wire))
    async with asyncio.timeout(30):
        while not front.server.connections.slow:
            await asyncio.sleep(0.05)
    asking.cancel()
    await served(front)


async def _ask_for_ever(wire: Wire) -> None:
    while True:
        await wire.send(HEALTH * 200)


# -- size


@pytest.mark.parametrize("at_once", [True, False])
async def test_head_beyond_its_limit_is_431(make: Make, at_once: bool) -> None:
    front = await make(max_head_bytes=4096)
    wire = await front.connect()
    head = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: %b\r\n" % (n, b"y" * 900) for n in range(20))
    if at_once:
        await wire.send(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 5000 + b"\r\n\r\n")
    else:
        for at in range(0, 4501, 500):  # no more than it takes: what comes later would meet a closed connection
            await wire.send(head[at : at + 500])
            await asyncio.sleep(0)
    assert_openai_error(await wire.answer(), 431, "headers_too_large")
    assert (await wire.end()) == b""
    await served(front)


async def test_too_many_headers_are_431(make: Make) -> None:
    front = await make(max_headers=16)
    wire = await front.connect()
    await wire.send(b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 20 + b"\r\n")
    assert_openai_error(await wire.answer(), 431, "headers_too_large")


async def test_bodies_together_have_a_limit_and_give_their_room_back(make: Make) -> None:
    front = await make(max_body_bytes=300_000, max_bodies_bytes=500_000)
    key = front.key()
    wires = [await front.connect() for _ in range(2)]
    for wire in wires:
        await wire.send(post(CHAT, b"{" + b" " * 220_000, key, content_length="290000"))
    async with asyncio.timeout(20):
        while front.inference.bodies.held_bytes < 440_000:
            await asyncio.sleep(0.01)
    late = await front.connect()
    await late.send(post(CHAT, b" " * 200_000, key, content_length="210000"))
    assert_openai_error(await late.answer(), 503, "no_room")
    for wire in wires:
        wire.close()
    async with asyncio.timeout(20):
        while front.inference.bodies.held_bytes:
            await asyncio.sleep(0.01)
    wire = await front.connect()
    await wire.send(post(CHAT, BODY + b" " * 250_000, key))
    assert (await wire.answer()).status == 200
    assert front.inference.bodies.held_bytes == 0


# -- number


async def test_newcomer_takes_the_place_of_the_longest_idle_and_of_nobody_who_is_served(make: Make) -> None:
    front = await make(max_connections=5)

    async def waits(stream: IncomingStream, head: dict[str, Any]) -> None:
        stream.send_head({"status": 200, "type": "text/event-stream"})
        await stream.send(b"data: 1\n\n")
        await asyncio.Event().wait()

    for worker in list(front.fleet.workers.values()):
        worker.link.abort("another comes")
    await front.worker(waits)
    busy = [await front.connect() for _ in range(3)]
    for wire in busy:
        await wire.send(post(CHAT, BODY[:-1] + b', "stream": true}', front.key()))
        await wire.until(b"data: 1")
    idle = [await front.connect() for _ in range(2)]
    for wire in idle:
        await wire.send(HEALTH)
        assert (await wire.answer()).status == 200
    newcomer = await front.connect()
    await newcomer.send(HEALTH)
    assert (await newcomer.answer()).status == 200
    assert await idle[0].end() == b""
    assert not any(wire.ended for wire in [*busy, idle[1]])
    assert front.server.connections.evicted == 1
    front.metrics.watch(front.server.connections)
    told = front.metrics.render().decode()
    assert 'infermesh_connections_ended_total{why="evicted"} 1.0' in told
    assert "infermesh_connections 5.0" in told


async def test_full_of_busy_connections_a_newcomer_is_told(make: Make) -> None:
    front = await make(max_connections=2, body_timeout_s=30.0)
    busy = [await front.connect() for _ in range(2)]
    for wire in busy:
        await wire.send(post(CHAT, b"{", front.key(), content_length="100"))
    async with asyncio.timeout(20):
        while front.inference.in_flight < 2:
            await asyncio.sleep(0.01)
    wire = await front.connect()
    assert_openai_error(await wire.answer(), 503, "no_room")
    assert await wire.end() == b""
    assert front.server.connections.refused == 1


async def test_one_address_gets_no_more_than_its_share(make: Make) -> None:
    front = await make(max_connections_per_address=3)
    wires = [await front.connect() for _ in range(3)]
    fourth = await front.connect()
    assert_openai_error(await fourth.answer(), 503, "no_room")
    wires[0].close()
    async with asyncio.timeout(20):
        while len(front.server.connections) == 3:
            await asyncio.sleep(0.01)
    await served(front)


async def test_compressed_bomb_is_refused_unopened(make: Make) -> None:
    front = await make()
    wire = await front.connect()
    await wire.send(post(CHAT, gzip.compress(b" " * 50_000_000), front.key(), content_encoding="gzip"))
    assert "Content-Encoding" in assert_openai_error(await wire.answer(), 400, "invalid_request")


# -- what a body may say


LONG = b"9" * 100_000
BAD_BODIES: dict[str, tuple[bytes, str | None]] = {
    "a model twice": (b'{"model": "m", "model": "dear", "messages": [1]}', "model"),
    "a model twice, once escaped": (b'{"model": "m", "mod\\u0065l": "dear", "messages": [1]}', "model"),
    "a model twice, once in capitals": (b'{"model": "m", "Model": "dear", "messages": [1]}', "model"),
    "a model twice, with an odd letter": ('{"stream": false, "\u017ftream": true, "model": "m", "messages": [1]}'.encode(), "stream"),
    "anything twice": (b'{"model": "m", "messages": [1], "x": 1, "x": 2}', "x"),
    "nesting": (b'{"model": "m", "messages": [' + b"[" * 100_000, None),
    "nesting in what nobody reads": (b'{"model": "m", "messages": [1], "x": ' + b'{"a":' * 100_000, None),
    "a huge count": (b'{"model": "m", "messages": [1], "max_tokens": ' + LONG + b"}", "max_tokens"),
    "a large count": (b'{"model": "m", "messages": [1], "max_tokens": 2147483648}', "max_tokens"),
    "a count beyond any float": (b'{"model": "m", "messages": [1], "max_tokens": 1e999}', "max_tokens"),
    "a negative count": (b'{"model": "m", "messages": [1], "max_tokens": -1}', "max_tokens"),
    "half a count": (b'{"model": "m", "messages": [1], "n": 1.5}', "n"),
    "many answers": (b'{"model": "m", "messages": [1], "n": 99999999999}', "n"),
    "an infinite temperature": (b'{"model": "m", "messages": [1], "temperature": 1e999}', "temperature"),
    "not a number": (b'{"model": "m", "messages": [1], "temperature": NaN}', None),
    "true for a number": (b'{"model": "m", "messages": [1], "max_tokens": true}', "max_tokens"),
    "text for a truth": (b'{"model": "m", "messages": [1], "stream": "true"}', "stream"),
    "a list for a model": (b'{"model": ["m"], "messages": [1]}', "model"),
    "nothing for a model": (b'{"model": null, "messages": [1]}', "model"),
    "an empty model": (b'{"model": "", "messages": [1]}', "model"),
    "a long model": (b'{"model": "' + b"m" * 257 + b'", "messages": [1]}', "model"),
    "no messages": (b'{"model": "m"}', "messages"),
    "empty messages": (b'{"model": "m", "messages": []}', "messages"),
    "text for messages": (b'{"model": "m", "messages": "hello"}', "messages"),
    "bad UTF-8": (b'{"model": "m", "messages": ["\xff"]}', None),
    "UTF-8 of a surrogate": (b'{"model": "m", "messages": ["\xed\xa0\x80"]}', None),
    "half a character": (b'{"model": "m", "messages": ["\xe2\x82"]}', None),
    "a lone surrogate": (b'{"model": "m", "messages": ["\\ud800"]}', None),
    "a raw NUL": (b'{"model": "m", "messages": ["\x00"]}', None),
    "a NUL after the end": (b'{"model": "m", "messages": [1]}\x00', None),
    "a mark of byte order": (b'\xef\xbb\xbf{"model": "m", "messages": [1]}', None),
    "two objects": (b'{"model": "m", "messages": [1]}{"model": "dear"}', None),
    "a comma too many": (b'{"model": "m", "messages": [1],}', None),
    "a comment": (b'{"model": "m", /* dear */ "messages": [1]}', None),
    "UTF-16": ('{"model": "m", "messages": [1]}'.encode("utf-16"), None),
    "an array": (b'[{"model": "m", "messages": [1]}]', None),
    "a string": (b'"model"', None),
}


@pytest.mark.parametrize("padded", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("name", BAD_BODIES)
async def test_hostile_body_is_a_clear_400_and_reaches_no_worker(make: Make, name: str, padded: bool) -> None:
    """``padded``: the body comes in many pieces, which takes another way through the proxy."""
    body, param = BAD_BODIES[name]
    front = await make()
    heads: list[dict[str, Any]] = []

    async def seen(stream: IncomingStream, head: dict[str, Any]) -> None:
        heads.append(head)
        await whole(stream, head)

    for worker in list(front.fleet.workers.values()):
        worker.link.abort("another comes")
    await front.worker(seen)
    wire = await front.connect()
    await wire.send(post(CHAT, (b" " * 300_000 if padded else b"") + body, front.key()))
    message = assert_openai_error(await wire.answer(), 400, "invalid_request", param=param)
    assert len(message) < 400
    assert heads == []
    assert front.inference.bodies.held_bytes == 0
    wire.close()


async def test_unusual_but_right_bodies_pass(make: Make) -> None:
    front = await make()
    for body in (
        b'{"model": "m", "messages": [{"model": "dear", "content": "{\\"model\\": \\"dear\\", \\"model\\": 1}"}]}',
        '{"model": "m", "messages": ["\u20ac\U0001f600"], "mode": 1, "models": 2}'.encode(),
        b'{"model": "m", "messages": ["\\ud83d\\ude00\\u0000"], "x": ' + LONG + b"}",
        b'{"model": "m", "messages": [' + b"[" * 100 + b"]" * 100 + b'], "max_tokens": 2147483647}',
        b'{"model": "\\u006d", "messages": [1], "model_extra": 1}',
    ):
        for padding in (b"", b" " * 300_000):
            wire = await front.connect()
            await wire.send(post(CHAT, padding + body, front.key()))
            assert (await wire.answer()).status == 200, body[:80]
            wire.close()
