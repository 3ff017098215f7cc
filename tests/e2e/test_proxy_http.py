"""The proxy's front over real sockets, on uvloop as in production: the shape of every answer and of every failure.

Workers are linked in memory: scripts, or a real gateway over the stand-in engine.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
import random
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from mesh.errors import BodyTooLarge, EngineUnavailable, InvalidRequest, MeshError, ModelNotFound, Overloaded
from mesh.identity import make_root_certificate, private_key_pem
from mesh.link.frames import Frame
from mesh.link.link import IncomingStream
from mesh.records import ModelEntry, State
from proxy import server as server_module
from proxy.retry import FLOOR
from tests.support.answers import Answer, assert_openai_error
from tests.support.authority import make_mesh
from tests.support.fake_engine import FakeEngine, Misbehaviour, Mode, answer_to
from tests.support.front import DEADLINE_S, Front, Wire, post
from tests.support.pipe import settle

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy.")
MESH = make_mesh(now=time.time() - 3600)
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Say something"}]
ANSWER = b'{"choices": [{"message": {"content": "hello"}}]}'
EVENT = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
SCANDALS = {"request.crashed", "http.failed", "task.unhandled"}


@pytest.fixture
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


@pytest.fixture(autouse=True)
async def strict(caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """Nothing may go unhandled: no callback, no task, no request that crashed."""
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    with structlog.testing.capture_logs() as events, caplog.at_level(logging.WARNING):
        yield
    assert problems == []
    assert [event for event in events if event["event"] in SCANDALS] == []
    assert [record for record in caplog.records if record.name.startswith("aiohttp")] == []


Make = Callable[..., Awaitable[Front]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    fronts: list[Front] = []

    async def build(**settings: Any) -> Front:
        front = Front(MESH, tmp_path, **settings)
        await front.__aenter__()
        fronts.append(front)
        return front

    yield build
    for front in fronts:
        await front.__aexit__(None, None, None)


@pytest.fixture
async def front(make: Make) -> Front:
    return await make()


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode()


async def ask(front: Front, path: str = CHAT, body: bytes | None = None, *, key: str | None = "", **headers: str) -> Answer:
    """One request on a connection of its own. ``key`` "" is a good one."""
    wire = await front.connect()
    try:
        await wire.send(post(path, chat() if body is None else body, front.key() if key == "" else key, **headers))
        return await wire.answer()
    finally:
        wire.close()


async def get(front: Front, path: str, key: str | None = None, **headers: str) -> Answer:
    wire = await front.connect()
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    lines += f"Authorization: Bearer {key}\r\n" if key else ""
    try:
        await wire.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
        return await wire.answer()
    finally:
        wire.close()


# -- workers by script


async def whole(stream: IncomingStream, head: dict[str, Any]) -> None:
    """Answers properly, and says what it was sent."""
    await whole_answer(stream, len(await stream.read_body(max_bytes=head["size"])))


async def whole_answer(stream: IncomingStream, echo: int) -> None:
    answer = json.dumps({"choices": [{"message": {"content": "hello"}}], "echo": echo}).encode()
    stream.accept()
    stream.send_head({"status": 200, "type": "application/json", "length": len(answer)})
    await stream.send(answer)
    stream.end({"in": 3, "out": 2})


async def streaming(stream: IncomingStream, head: dict[str, Any]) -> None:
    stream.send_head({"status": 200, "type": "text/event-stream"})
    for piece in (EVENT, EVENT, DONE):
        await stream.send(piece)
        await asyncio.sleep(0)
    stream.end({"in": 3, "out": 2})


async def silent(stream: IncomingStream, head: dict[str, Any]) -> None:
    await asyncio.Event().wait()


async def begins(stream: IncomingStream, head: dict[str, Any]) -> None:
    """Sends two events and then nothing more."""
    stream.send_head({"status": 200, "type": "text/event-stream"})
    await stream.send(EVENT + EVENT)
    await asyncio.Event().wait()


def failing(error: MeshError) -> Callable[[IncomingStream, dict[str, Any]], Awaitable[None]]:
    async def serve(stream: IncomingStream, head: dict[str, Any]) -> None:
        stream.fail(error)

    return serve


# -- what goes right


async def test_answer_is_passed_with_its_length_and_a_request_id(front: Front) -> None:
    worker = await front.worker(whole)
    answer = await ask(front)
    assert answer.complete
    assert (answer.status, answer.json()["echo"]) == (200, len(chat()))
    assert answer.headers["x-request-id"].startswith("req_")
    assert int(answer.headers["openai-processing-ms"]) >= 0
    assert "x-mesh-worker" not in answer.headers
    (head,) = worker.heads
    assert head == {
        "id": answer.headers["x-request-id"],
        "task": "chat",
        "model": "m",
        "stream": False,
        "size": len(chat()),
        "project": "p",
        "key": b"12345678",
        "at": head["at"],
        "try": 1,
    }


async def test_stream_is_chunked_events_and_ends_properly(front: Front) -> None:
    await front.worker(streaming)
    answer = await ask(front, body=chat(stream=True))
    assert answer.complete
    assert answer.body == EVENT + EVENT + DONE
    assert answer.headers["transfer-encoding"] == "chunked"
    assert answer.headers["cache-control"] == "no-cache"


async def test_who_may_look_is_told_which_worker_it_was(front: Front) -> None:
    await front.worker(whole, name="w")
    answer = await ask(front, key=front.key(roles=frozenset({"invoker", "viewer"})))
    assert answer.headers["x-mesh-worker"] == b"w".ljust(32, b".").hex()[:12]


async def test_large_body_and_large_answer_pass(front: Front) -> None:
    async def echo(stream: IncomingStream, head: dict[str, Any]) -> None:
        body = await stream.read_body(max_bytes=head["size"])
        stream.send_head({"status": 200, "type": "application/json", "length": len(body)})
        await stream.send(body)
        stream.end({})

    await front.worker(echo)
    body = chat(padding="x" * 5_000_000)
    answer = await ask(front, body=body)
    assert answer.complete
    assert answer.body == body


async def test_chunked_request_body_is_taken(front: Front) -> None:
    await front.worker(whole)
    wire = await front.connect()
    await wire.send(post(CHAT, b"", front.key(), content_length="", transfer_encoding="chunked"))
    body = chat()
    for byte in body:
        await wire.send(b"1\r\n" + bytes((byte,)) + b"\r\n")
    await wire.send(b"0\r\n\r\n")
    assert (await wire.answer()).json()["echo"] == len(body)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("serve", [whole, streaming])
async def test_connection_is_kept_or_closed_as_its_version_says(front: Front, version: str, serve: Any) -> None:
    await front.worker(serve)
    wire = await front.connect()
    await wire.send(post(CHAT, chat(), front.key(), version=version))
    answer = await wire.answer()
    assert answer.complete
    if version == "1.1":
        assert "connection" not in answer.headers
        await wire.send(post(CHAT, chat(), front.key()))
        assert (await wire.answer()).status == 200
    else:
        assert answer.headers["connection"] == "close"
        assert await wire.end() == b""


async def test_http_1_0_with_keep_alive_is_kept_for_a_sized_answer(front: Front) -> None:
    await front.worker(whole)
    wire = await front.connect()
    for _ in range(2):
        await wire.send(post(CHAT, chat(), front.key(), version="1.0", connection="keep-alive"))
        answer = await wire.answer()
        assert answer.headers["connection"] == "keep-alive"
        assert answer.complete


async def test_connection_close_is_honoured(front: Front) -> None:
    await front.worker(streaming)
    wire = await front.connect()
    await wire.send(post(CHAT, chat(), front.key(), connection="close"))
    answer = await wire.answer()
    assert (answer.complete, answer.headers["connection"]) == (True, "close")
    assert await wire.end() == b""


async def test_pipelined_requests_are_answered_in_their_order(front: Front) -> None:
    async def serve(stream: IncomingStream, head: dict[str, Any]) -> None:
        body = json.loads(await stream.read_body(max_bytes=head["size"]))
        stream.send_head({"status": 200, "type": "text/event-stream"})
        for _ in range(3):
            await stream.send(b"data: %d\n\n" % body["n"])
            await asyncio.sleep(0)
        stream.end({})

    await front.worker(serve)
    wire = await front.connect()
    key = front.key()
    bad = post(CHAT, b"{", key)
    await wire.send(b"".join([post(CHAT, chat(n=1), key), bad, post(CHAT, chat(n=2), key), b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"]))
    assert (await wire.answer()).body == b"data: 1\n\n" * 3
    assert_openai_error(await wire.answer(), 400, "invalid_request")
    assert (await wire.answer()).body == b"data: 2\n\n" * 3
    assert (await wire.answer()).json() == {"status": "ok"}


async def test_expect_100_continue_is_answered_before_the_body_is_sent(front: Front) -> None:
    await front.worker(whole)
    wire = await front.connect()
    request = post(CHAT, chat(), front.key(), expect="100-continue")
    head, _, body = request.partition(b"\r\n\r\n")
    await wire.send(head + b"\r\n\r\n")
    assert (await wire.answer(skip_100=False)).status == 100
    await wire.send(body)
    assert (await wire.answer()).json()["echo"] == len(body)


# -- keys come first


BODIES: dict[str, tuple[bytes, dict[str, str]]] = {
    "none sent": (b"", {"content_length": str(1 << 30)}),
    "garbage": (b"\x00\xff" * 100, {}),
    "no JSON": (b"{", {}),
    "no chunks yet": (b"", {"content_length": "", "transfer_encoding": "chunked"}),
    "gzip": (b"\x1f\x8b\x08", {"content_encoding": "gzip"}),
    "a wait for 100": (b"", {"content_length": "100", "expect": "100-continue"}),
    "too large": (b"x" * 1000, {"content_length": str(1 << 50)}),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("key", [None, "hello", "im_abc"])
async def test_without_a_good_key_nothing_else_is_looked_at(front: Front, key: str | None, name: str) -> None:
    worker = await front.worker(whole)
    body, headers = BODIES[name]
    wire = await front.connect()
    await wire.send(post(CHAT, body, key, **headers))
    message = assert_openai_error(await wire.answer(skip_100=False), 401, "invalid_api_key", kind="authentication_error")
    assert key is None or key not in message
    assert worker.heads == []
    await wire.send(b"zz\r\n no chunk, and nobody reads it\r\n")
    wire.close()


async def test_every_route_but_health_wants_a_key(front: Front) -> None:
    for path in (
        "/v1/models",
        "/v1/models/m",
        "/mesh/v1/status",
        "/mesh/v1/workers",
        "/mesh/v1/peers",
        "/mesh/v1/lookup",
        "/mesh/v1/doctor",
    ):
        assert_openai_error(await get(front, path), 401, "invalid_api_key")
    for path in ("/v1/completions", "/v1/embeddings", "/v1/responses"):
        assert_openai_error(await ask(front, path, b"{}", key=None), 401, "invalid_api_key")
    assert (await get(front, "/health")).status == 200
    assert_openai_error(await get(front, "/metrics", X_Forwarded_For="192.0.2.1"), 401, "invalid_api_key")


async def test_key_without_the_model_or_the_role_is_403(front: Front) -> None:
    worker = await front.worker(whole)
    answer = await ask(front, key=front.key(models=frozenset({"other"})))
    assert_openai_error(answer, 403, "key_not_allowed", kind="permission_error", param="model")
    assert_openai_error(await ask(front, key=front.key(roles=frozenset({"viewer"}))), 403, "key_not_allowed")
    assert_openai_error(await get(front, "/mesh/v1/workers", front.key()), 403, "key_not_allowed")
    assert worker.heads == []


async def test_key_that_may_not_use_a_model_does_not_learn_whether_it_exists(front: Front) -> None:
    await front.worker(whole)
    key = front.key(models=frozenset({"mine"}))
    for model in ("m", "nothing"):
        assert_openai_error(await ask(front, body=chat(model=model), key=key), 403, "key_not_allowed", param="model")
    for model in ("m", "nothing"):
        assert_openai_error(await get(front, f"/v1/models/{model}", key), 404, "model_not_found", param="model")


# -- what is refused


async def test_request_without_any_body_is_400(front: Front) -> None:
    assert_openai_error(await ask(front, body=b"", content_length=""), 400, "invalid_request")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"\xff\xfe", None),
        (b"{}", "model"),
        (b'{"messages": [1]}', "model"),
        (chat(stream="yes"), "stream"),
        (chat(n=0), "n"),
        (chat(max_tokens="many"), "max_tokens"),
        (b"[" * 100_000, None),
    ],
    ids=lambda value: repr(value)[:20],
)
async def test_bad_body_is_400_and_names_the_parameter(front: Front, body: bytes, param: str | None) -> None:
    worker = await front.worker(whole)
    assert_openai_error(await ask(front, body=body), 400, "invalid_request", kind="invalid_request_error", param=param)
    assert worker.heads == []


async def test_unknown_model_is_404_and_one_without_a_ready_worker_503(front: Front) -> None:
    worker = await front.worker(whole)
    assert_openai_error(await ask(front, body=chat(model="nothing")), 404, "model_not_found", param="model")
    front.directory.records = [worker.record]
    worker.lose()
    await settle(*worker.ends)
    assert_openai_error(await ask(front), 503, "no_worker", kind="service_unavailable_error")


async def test_model_that_cannot_do_the_task_is_400(front: Front) -> None:
    await front.worker(whole, models=(ModelEntry(name="e", tasks=("embeddings",)),))
    message = assert_openai_error(await ask(front, body=chat(model="e")), 400, "invalid_request", param="model")
    assert "embeddings" in message


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/v1/nope", "/v1/chat/completions/", "//v1/models", "/v1/../health", "/%00"])
async def test_unknown_route_is_404(front: Front, path: str) -> None:
    assert_openai_error(await get(front, path, front.key()), 404, "unknown_url")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
async def test_wrong_method_is_405(front: Front, method: str) -> None:
    wire = await front.connect()
    await wire.send(f"{method} {CHAT} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = await wire.answer()
    assert_openai_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert_openai_error(await ask(front, "/v1/models"), 405, "method_not_allowed")


async def test_head_request_gets_no_body(front: Front) -> None:
    wire = await front.connect()
    await wire.send(b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    data = await wire.end()
    assert data.count(b"HTTP/1.1 ") == 2
    assert data.endswith(b'\r\n\r\n{"status": "ok"}')
    assert b"error" not in data


async def test_body_beyond_the_limit_is_413_whether_announced_or_not(make: Make) -> None:
    front = await make(max_body_bytes=10_000)
    worker = await front.worker(whole)
    key = front.key()
    assert_openai_error(await ask(front, body=b"x" * 10_001), 413, "body_too_large")
    wire = await front.connect()
    await wire.send(post(CHAT, b"", key, content_length=str(1 << 40)))
    assert_openai_error(await wire.answer(), 413, "body_too_large")
    wire = await front.connect()
    await wire.send(post(CHAT, b"", key, content_length="", transfer_encoding="chunked"))
    for _ in range(12):
        await wire.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
    assert_openai_error(await wire.answer(), 413, "body_too_large")
    assert (await ask(front, body=chat(pad="x" * 9_000))).status == 200
    assert len(worker.heads) == 1


async def test_compressed_body_is_refused(front: Front) -> None:
    message = assert_openai_error(await ask(front, content_encoding="gzip", body=b"\x1f\x8b\x08\x00"), 400, "invalid_request")
    assert "Content-Encoding" in message or "valid HTTP" in message


async def test_body_that_never_comes_is_given_up(make: Make) -> None:
    front = await make(body_timeout_s=0.2)
    wire = await front.connect()
    await wire.send(post(CHAT, b"{", front.key(), content_length="100"))
    assert_openai_error(await wire.answer(), 408, "request_timeout")


@pytest.mark.parametrize("chunks", [b"zz\r\nnope\r\n", b"5\r\nhelloX", b"-1\r\n", b"5\r\nhello\r\nFFFFFFFFFFFFFFFFF\r\n"])
async def test_body_whose_chunks_are_none_is_400(front: Front, chunks: bytes) -> None:
    await front.worker(whole)
    wire = await front.connect()
    await wire.send(post(CHAT, b"", front.key(), content_length="", transfer_encoding="chunked"))
    await wire.send(chunks)
    assert_openai_error(await wire.answer(), 400, "invalid_request")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nBad Header: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 6\r\n\r\nhello",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\nhello",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n X-Folded: y\r\n\r\n",
        b"GET /health HTTP/1.1\nHost: x\n\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=lambda data: repr(data[:40]),
)
async def test_what_is_not_http_gets_one_openai_shaped_400_and_a_closed_connection(front: Front, request_bytes: bytes) -> None:
    wire = await front.connect()
    await wire.send(request_bytes + b"\r\n\r\n")
    assert_openai_error(await wire.answer(), 400, "invalid_request")
    assert await wire.end() == b""
    assert (await get(front, "/health")).status == 200


@pytest.mark.parametrize("seed", range(30))
async def test_random_bytes_never_get_more_than_refusals(front: Front, seed: int) -> None:
    worker = await front.worker(whole)
    rng = random.Random(seed)
    request = bytearray(post(CHAT, chat(), front.key()))
    for _ in range(rng.randint(1, 12)):
        at = rng.randrange(len(request))
        match rng.randrange(3):
            case 0:
                request[at] = rng.randrange(256)
            case 1:
                del request[at : at + rng.randint(1, 5)]
            case _:
                request[at:at] = rng.choice(
                    [b"\r\n", b"\x00", b" ", b":", b"\r\n\r\n", b"Transfer-Encoding: chunked\r\n", rng.randbytes(3)]
                )
    wire = await front.connect()
    await wire.send(bytes(request))
    wire.writer.write_eof()
    data = await wire.end()
    for first in data.split(b"HTTP/1.1 ")[1:]:
        assert first[:3] in (b"200", b"400", b"401", b"404", b"405", b"403", b"413", b"100")
    assert len(worker.heads) <= 1
    assert (await get(front, "/health")).status == 200


@pytest.mark.parametrize("serve", [whole, streaming])
async def test_finished_requests_leave_nothing_to_the_cycle_collector(front: Front, serve: Any) -> None:
    """Garbage in cycles costs a walk over everything that lives, again and again, and stalls every stream meanwhile."""
    await front.worker(serve)
    wire, request = await front.connect(), post(CHAT, chat(), front.key())
    await wire.send(request)
    await wire.answer()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(20):
            await wire.send(request)
            assert (await wire.answer()).complete
        gc.collect()
        left = Counter(type(thing).__name__ for thing in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not [name for name, count in left.items() if count >= 20], left


async def test_half_a_request_and_a_closed_connection_leave_nothing_behind(front: Front) -> None:
    await front.worker(whole)
    request = post(CHAT, chat(), front.key())
    for at in range(0, len(request), 37):
        wire = await front.connect()
        await wire.send(request[:at])
        wire.close()
    assert (await ask(front)).status == 200
    await front.inference.drained()
    assert front.inference.in_flight == 0


# -- workers that fail


@pytest.mark.parametrize(
    "error", [InvalidRequest("too long", param="messages"), BodyTooLarge("too large"), ModelNotFound("not here", param="model")]
)
async def test_clients_mistake_is_passed_on_and_tried_nowhere_else(front: Front, error: MeshError) -> None:
    workers = [await front.worker(failing(error)) for _ in range(3)]
    status = {InvalidRequest: 400, BodyTooLarge: 413, ModelNotFound: 404}[type(error)]
    assert_openai_error(await ask(front), status, error.code, param=error.param)
    assert sum(len(worker.heads) for worker in workers) == 1
    assert all(seen.failed == 0 for seen in front.fleet.workers.values())


@pytest.mark.parametrize("stream", [True, False])
async def test_worker_that_fails_before_the_first_byte_is_followed_by_another(front: Front, stream: bool) -> None:
    bad = [await front.worker(failing(EngineUnavailable("down"))) for _ in range(2)]
    good = await front.worker(streaming if stream else whole)
    for _ in range(10):
        answer = await ask(front, body=chat(stream=stream))
        assert (answer.status, answer.complete) == (200, True)
    assert len(good.heads) == 10
    assert all(len({head["id"] for head in worker.heads}) == len(worker.heads) for worker in bad)


async def test_head_without_a_byte_is_not_yet_an_answer(front: Front) -> None:
    async def promises(stream: IncomingStream, head: dict[str, Any]) -> None:
        stream.send_head({"status": 200, "type": "text/event-stream"})
        await asyncio.sleep(0)
        stream.fail(EngineUnavailable("died"))

    await front.worker(promises, name="a")
    await front.worker(whole, name="b")
    for _ in range(5):
        answer = await ask(front)
        assert answer.complete
        assert answer.json()["choices"]
        assert answer.headers["content-type"] == "application/json"


async def test_failures_stop_at_the_retry_limit(make: Make) -> None:
    front = await make(retry_limit=2)
    workers = [await front.worker(failing(EngineUnavailable("down"))) for _ in range(6)]
    assert_openai_error(await ask(front), 502, "engine_unavailable", kind="api_error")
    assert sum(len(worker.heads) for worker in workers) == 3
    assert max(len(worker.heads) for worker in workers) == 1


async def test_overloaded_everywhere_is_429_with_a_time_to_come_back(front: Front) -> None:
    workers = [await front.worker(failing(Overloaded("full", retry_after_s=3.0))) for _ in range(6)]
    answer = await ask(front)
    assert_openai_error(answer, 429, "overloaded", kind="rate_limit_error")
    assert answer.headers["retry-after"] == "3"
    assert [len(worker.heads) for worker in workers] == [1] * 6


async def test_overloaded_worker_is_followed_by_one_that_is_not(front: Front) -> None:
    for _ in range(5):
        await front.worker(failing(Overloaded("full")))
    await front.worker(whole)
    assert (await ask(front)).status == 200


@pytest.mark.parametrize("times", [1, 2])
async def test_stream_that_loses_its_worker_ends_with_an_error_event_and_never_cleanly(front: Front, times: int) -> None:
    worker = await front.worker(begins)
    other = await front.worker(whole, models=(ModelEntry(name="other"),))
    wires = [await front.connect() for _ in range(times)]
    for wire in wires:
        await wire.send(post(CHAT, chat(stream=True), front.key()))
    for wire in wires:
        await wire.until(EVENT + EVENT)
    worker.lose()
    for wire in wires:
        answer = await wire.answer()
        assert not answer.complete
        assert answer.body.startswith(EVENT + EVENT)
        assert answer.events()[-1]["error"]["code"] == "not_movable"
        assert "link" in answer.events()[-1]["error"]["message"]
        assert DONE not in answer.body
        assert wire.ended
    assert other.heads == []
    front.directory.records = [worker.record]
    assert_openai_error(await ask(front), 503, "no_worker")
    assert len(worker.heads) == times, "nothing more is sent to a lost worker"


async def test_requests_in_flight_on_a_lost_worker_run_elsewhere(front: Front) -> None:
    lost = await front.worker(silent, name="lost")
    asking = [asyncio.create_task(ask(front)) for _ in range(20)]
    await lost.until(lambda: len(lost.heads) == 20)
    saviour = await front.worker(whole, name="saviour")
    lost.lose()
    answers = await asyncio.gather(*asking)
    assert all(answer.status == 200 and answer.complete for answer in answers)
    assert len(saviour.heads) == 20
    assert (await ask(front)).status == 200
    assert len(lost.heads) == 20


async def test_draining_worker_gets_nothing_new_and_finishes_what_it_has(front: Front) -> None:
    worker = await front.worker(begins)
    wire = await front.connect()
    await wire.send(post(CHAT, chat(stream=True), front.key()))
    await wire.until(EVENT + EVENT)
    front.directory.records = [worker.record]
    worker.link.send_control(Frame.DRAIN, {})
    await settle(*worker.ends)
    assert_openai_error(await ask(front), 503, "no_worker")
    assert len(worker.heads) == 1
    wire.close()
    await worker.until(lambda: worker.cancelled == 1)


async def test_worker_without_a_sign_of_life_is_504(make: Make) -> None:
    front = await make(first_byte_timeout_s=0.3)
    workers = [await front.worker(silent) for _ in range(2)]
    assert_openai_error(await ask(front), 504, "upstream_timeout", kind="api_error")
    assert sum(len(worker.heads) for worker in workers) == 1
    (worker,) = [worker for worker in workers if worker.heads]
    await worker.until(lambda: worker.cancelled == 1)


async def test_stream_that_stalls_is_broken_off(make: Make) -> None:
    front = await make(first_byte_timeout_s=0.3)
    worker = await front.worker(begins)
    answer = await ask(front, body=chat(stream=True))
    assert not answer.complete
    assert answer.events()[-1]["error"]["code"] == "not_movable"
    assert "no sign" in answer.events()[-1]["error"]["message"]
    await worker.until(lambda: worker.cancelled == 1)


BROKEN: dict[str, list[tuple[str, Any]]] = {
    "half a sized answer": [("head", {"status": 200, "type": "application/json", "length": 100}), ("data", b"half"), ("end", {})],
    "too much of one": [("head", {"status": 200, "type": "application/json", "length": 2}), ("data", b"{"), ("data", b"}}"), ("end", {})],
    "a second head": [
        ("head", {"status": 200, "type": "application/json", "length": 9}),
        ("data", b"{"),
        ("head", {"status": 200, "type": "text/plain"}),
    ],
    "a failure in the middle": [
        ("head", {"status": 200, "type": "application/json", "length": 9}),
        ("data", b"{"),
        ("fail", EngineUnavailable("died")),
    ],
}


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("name", BROKEN)
async def test_broken_answer_is_cut_off_and_never_looks_whole(front: Front, name: str, version: str) -> None:
    async def serve(stream: IncomingStream, head: dict[str, Any]) -> None:
        for what, value in BROKEN[name]:
            match what:
                case "head":
                    stream.send_head(value)
                case "data":
                    await stream.send(value)
                case "fail":
                    stream.fail(value)
                case _:
                    stream.end(value)
            await asyncio.sleep(0)

    worker = await front.worker(serve)
    wire = await front.connect()
    await wire.send(post(CHAT, chat(), front.key(), version=version))
    answer = await wire.answer()
    assert not answer.complete
    assert wire.ended
    assert not worker.proxy_link.closed


@pytest.mark.parametrize("kind", ["text/plain\r\nX-Evil: 1", "text/plain\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", 5, None])
async def test_head_with_a_header_smuggled_in_is_refused(front: Front, kind: Any) -> None:
    async def serve(stream: IncomingStream, head: dict[str, Any]) -> None:
        stream.send_head({"status": 200, "type": kind})
        stream.send_now(b"evil")
        stream.end({})

    await front.worker(serve)
    answer = await ask(front)
    assert_openai_error(answer, 502, "protocol_error")
    assert b"vil" not in answer.body


async def test_worker_that_breaks_the_links_rules_costs_its_own_link_only(front: Front) -> None:
    evil, good = await front.worker(begins, name="evil"), await front.worker(begins, name="good", models=(ModelEntry(name="g"),))
    one, other = await front.connect(), await front.connect()
    await one.send(post(CHAT, chat(stream=True), front.key()))
    await other.send(post(CHAT, chat(stream=True, model="g"), front.key()))
    await one.until(EVENT + EVENT)
    await other.until(EVENT + EVENT)
    evil.link.send_control(Frame.LOAD, {"run": -1})
    answer = await one.answer()
    assert answer.events()[-1]["error"]["code"] == "not_movable"
    assert not good.proxy_link.closed
    assert not other.ended
    other.close()


# -- clients


@pytest.mark.parametrize("serve", [silent, begins])
async def test_client_that_goes_away_cancels_the_work(front: Front, serve: Any) -> None:
    worker = await front.worker(serve)
    wire = await front.connect()
    await wire.send(post(CHAT, chat(stream=True), front.key()))
    await worker.until(lambda: worker.heads)
    if serve is begins:
        await wire.until(EVENT)
    wire.close()
    await worker.until(lambda: worker.cancelled == 1)
    await front.inference.drained()
    assert front.fleet.workers[worker.record.node_id].in_flight == 0
    assert worker.proxy_link.streams == 0


async def test_client_that_does_not_read_stalls_only_its_own_stream(front: Front) -> None:
    sent = 0

    async def torrent(stream: IncomingStream, head: dict[str, Any]) -> None:
        nonlocal sent
        stream.send_head({"status": 200, "type": "text/event-stream"})
        for _ in range(800):
            await stream.send(b"data: " + b"x" * 10_000 + b"\n\n")
            sent += 10_000
        stream.end({})

    worker = await front.worker(torrent, models=(ModelEntry(name="t"),))
    await front.worker(streaming)
    wire = await front.connect()
    wire.reader._limit = 1  # type: ignore[attr-defined]
    wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await wire.send(post(CHAT, chat(model="t", stream=True), front.key()))
    await worker.until(lambda: worker.heads)
    for _ in range(10):
        assert (await ask(front, body=chat(stream=True))).complete
    assert sent < 8_000_000
    assert front.inference.in_flight == 1
    wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
    while not wire.got.endswith(b"0\r\n\r\n"):
        await wire.more()
    answer = await wire.answer()
    assert len(answer.body) == 800 * (10_000 + 8)


async def test_body_of_twenty_megabytes_goes_between_the_tokens_of_other_streams(front: Front) -> None:
    """Every turn of the loop, a token of the one stream and a piece of the other's body: no step takes much of either."""
    steps: list[tuple[int, float]] = []

    async def ticking(stream: IncomingStream, head: dict[str, Any]) -> None:
        stream.send_head({"status": 200, "type": "text/event-stream"})
        while not stream.done:
            await stream.send(EVENT)
            await asyncio.sleep(0)

    async def taking(stream: IncomingStream, head: dict[str, Any]) -> None:
        body = await stream.read_body(max_bytes=head["size"])
        passed.append(len(steps))
        await whole_answer(stream, len(body))

    async def watch() -> None:
        while True:
            before = len(wire.got)
            await wire.more()
            if len(wire.got) > before:
                steps.append((front.inference.bodies.held_bytes, time.thread_time()))

    passed: list[int] = []
    await front.worker(ticking, models=(ModelEntry(name="t"),))
    await front.worker(taking)
    wire, large = await front.connect(), await front.connect()
    await wire.send(post(CHAT, chat(model="t", stream=True), front.key()))
    await wire.until(EVENT)
    watching = asyncio.create_task(watch())
    image = "x" * 20_000_000
    await large.send(post(CHAT, chat(messages=[{"role": "user", "content": image}]), front.key()))
    answer = await large.answer()
    watching.cancel()
    assert answer.json()["echo"] > len(image)
    assert passed[0] > 50, "the stream went on meanwhile"
    gathered = [after[0] - before[0] for before, after in itertools.pairwise(steps)]
    assert max(gathered) <= 2 << 20
    assert max(after[1] - before[1] for before, after in itertools.pairwise(steps)) < 0.5, "CPU time of this whole process, client included"


async def test_clients_that_leave_while_their_answers_end_harm_nobody(front: Front) -> None:
    async def ends(stream: IncomingStream, head: dict[str, Any]) -> None:
        stream.send_head({"status": 200, "type": "text/event-stream"})
        await stream.send(EVENT)
        await go.wait()
        stream.end({})

    go = asyncio.Event()
    worker = await front.worker(ends)
    wires = [await front.connect() for _ in range(30)]
    for wire in wires:
        await wire.send(post(CHAT, chat(stream=True), front.key()))
    for wire in wires:
        await wire.until(EVENT)
    for wire in wires[::2]:
        wire.close()
    go.set()
    for wire in wires[1::2]:
        assert (await wire.answer()).complete
    assert not worker.proxy_link.closed
    await front.inference.drained()


# -- looking


async def test_models_are_those_the_key_may_use(front: Front) -> None:
    await front.worker(whole)
    await front.worker(whole, models=(ModelEntry(name="org/other"), ModelEntry(name="third")))
    await front.worker(whole, models=(ModelEntry(name="cold"),), state=State.LOADING)
    listed = (await get(front, "/v1/models", front.key())).json()
    assert [entry["id"] for entry in listed["data"]] == ["m", "org/other", "third"]
    key = front.key(models=frozenset({"org/other", "cold"}))
    assert [entry["id"] for entry in (await get(front, "/v1/models", key)).json()["data"]] == ["org/other"]
    assert (await get(front, "/v1/models/org/other", key)).json()["id"] == "org/other"
    assert_openai_error(await get(front, "/v1/models/third", key), 404, "model_not_found", param="model")


async def test_readiness_follows_the_workers_and_the_draining(front: Front) -> None:
    assert (await get(front, "/readyz")).status == 503
    await front.worker(whole)
    assert (await get(front, "/readyz")).json() == {"status": "ready", "models": 1}
    front.inference.draining = True
    answer = await get(front, "/readyz")
    assert (answer.status, answer.json()["status"], answer.headers["connection"]) == (503, "draining", "close")
    answer = await ask(front)
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert (await get(front, "/health")).status == 200


async def test_metrics_count_every_outcome(front: Front) -> None:
    await front.worker(whole)
    await ask(front)
    await ask(front, body=b"{")
    await ask(front, key=None)
    await ask(front, key=front.key(models=frozenset()))
    text = (await get(front, "/metrics")).body.decode()
    for line in (
        'infermesh_requests_total{code="ok",model="m",task="chat"} 1.0',
        'infermesh_requests_total{code="invalid_request",model="",task="chat"} 1.0',
        'infermesh_requests_total{code="invalid_api_key",model="",task="chat"} 1.0',
        'infermesh_requests_total{code="key_not_allowed",model="",task="chat"} 1.0',
        'infermesh_tokens_total{kind="completion",model="m"} 2.0',
    ):
        assert line in text, line
    assert (await get(front, "/metrics", front.key(roles=frozenset({"viewer"})), X_Forwarded_For="192.0.2.1")).status == 200


async def test_status_and_workers_are_for_viewers(front: Front) -> None:
    await front.worker(whole, name="w")
    await ask(front)
    key = front.key(roles=frozenset({"viewer"}))
    (worker,) = (await get(front, "/mesh/v1/workers", key)).json()["workers"]
    assert (worker["id"], worker["served"], worker["linked"]) == (b"w".ljust(32, b".").hex(), 1, True)
    status = (await get(front, "/mesh/v1/status", key)).json()
    assert status["proxy"]["models"] == ["m"]


# -- with a real gateway over the stand-in engine


async def test_answers_streams_and_embeddings_of_a_real_gateway(front: Front) -> None:
    async with FakeEngine() as engine, front.gateway(engine):
        answer = await ask(front, body=chat(max_tokens=5))
        assert answer.json()["choices"][0]["message"]["content"] == answer_to(MESSAGES, 5)
        assert answer.json()["usage"]["completion_tokens"] == 5
        streamed = await ask(front, body=chat(max_tokens=5, stream=True))
        said = "".join(event["choices"][0]["delta"].get("content", "") for event in streamed.events()[:-1])
        assert said == answer_to(MESSAGES, 5)
        assert (streamed.complete, streamed.events()[-1]) == (True, "[DONE]")
        embedded = await ask(front, "/v1/embeddings", json.dumps({"model": "m", "input": ["a", "b"]}).encode())
        assert len(embedded.json()["data"]) == 2
        completed = await ask(front, "/v1/completions", json.dumps({"model": "m", "prompt": "hi", "max_tokens": 3}).encode())
        assert completed.json()["usage"]["completion_tokens"] == 3
        responded = await ask(
            front, "/v1/responses", json.dumps({"model": "m", "input": "hi", "stream": True, "max_output_tokens": 3}).encode()
        )
        assert responded.complete
        assert responded.events()[-1]["type"] == "response.completed"
        text = (await get(front, "/metrics")).body.decode()
        counted = engine.stats.completion_tokens
        assert f'infermesh_tokens_total{{kind="completion",model="m"}} {float(counted)}' in text


async def test_usage_event_is_shown_only_to_who_asked(front: Front) -> None:
    async with FakeEngine() as engine, front.gateway(engine):
        for options, shown in (({}, False), ({"stream_options": {"include_usage": True}}, True)):
            answer = await ask(front, body=chat(max_tokens=3, stream=True, **options))
            usages = [event["usage"] for event in answer.events()[:-1] if event.get("usage")]
            assert [usage["completion_tokens"] for usage in usages] == ([3] if shown else [])


async def test_engine_that_dribbles_bytes_is_read_right(front: Front) -> None:
    async with FakeEngine() as engine, front.gateway(engine):
        engine.misbehave(Misbehaviour(mode=Mode.DRIBBLE))
        answer = await ask(front, body=chat(max_tokens=4, stream=True))
        said = "".join(event["choices"][0]["delta"].get("content", "") for event in answer.events()[:-1] if event["choices"])
        assert said == answer_to(MESSAGES, 4)
        assert not any(event.get("usage") for event in answer.events()[:-1])


@pytest.mark.parametrize("mode", [Mode.CUT, Mode.END, Mode.GARBAGE, Mode.GIANT_LINE, Mode.ERROR_EVENT])
@pytest.mark.parametrize("after_tokens", [0, 2])
async def test_engine_that_breaks_in_a_stream_is_an_error_event_or_another_worker(front: Front, mode: Mode, after_tokens: int) -> None:
    async with FakeEngine() as engine, front.gateway(engine) as (worker, _):
        engine.misbehave(Misbehaviour(mode=mode, after_tokens=after_tokens))
        answer = await ask(front, body=chat(max_tokens=8, stream=True))
        assert engine.stats.failed == 1
        assert not answer.complete
        last = answer.body.rsplit(b"\n\n", 2)[-2]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "not_movable"
        assert DONE not in answer.body
        assert not worker.proxy_link.closed
        engine.misbehave(None)
        assert (await ask(front, body=chat(max_tokens=8, stream=True))).complete


@pytest.mark.parametrize("mode", [Mode.CUT, Mode.WRONG_TYPE, Mode.STATUS])
async def test_engine_that_breaks_before_the_first_byte_is_followed_by_another(front: Front, mode: Mode) -> None:
    async with FakeEngine() as one, FakeEngine() as other, front.gateway(one), front.gateway(other):
        for engine in (one, other):
            engine.misbehave(None)
        one.misbehave(Misbehaviour(mode=mode))
        for _ in range(6):
            answer = await ask(front, body=chat(max_tokens=3))
            assert answer.json()["choices"][0]["message"]["content"] == answer_to(MESSAGES, 3)
        assert one.stats.failed >= 1, "the fault happened"
        assert other.stats.finished == 6


@pytest.mark.parametrize(
    ("status", "expected", "code"),
    [
        (400, 400, "invalid_request"),
        (422, 400, "invalid_request"),
        (429, 429, "overloaded"),
        (500, 502, "engine_unavailable"),
        (503, 502, "engine_unavailable"),
    ],
)
async def test_engines_refusals_reach_the_client_in_openais_shape(front: Front, status: int, expected: int, code: str) -> None:
    async with FakeEngine() as engine, front.gateway(engine):
        engine.misbehave(Misbehaviour(mode=Mode.STATUS, status=status))
        message = assert_openai_error(await ask(front), expected, code)
        assert ("told to fail" in message) == (status < 500)
        assert engine.stats.started == 1


async def test_client_that_goes_away_cancels_the_generation_in_the_engine(front: Front) -> None:
    async with FakeEngine(tokens_per_s=50) as engine, front.gateway(engine) as (_, gateway):
        wire = await front.connect()
        await wire.send(post(CHAT, chat(max_tokens=1000, stream=True), front.key()))
        await wire.until(b"content")
        wire.close()
        async with asyncio.timeout(DEADLINE_S):
            await engine.until(lambda stats: stats.cancelled == 1)
        assert engine.stats.completion_tokens < 500
        await asyncio.wait_for(gateway.admission.idle(), DEADLINE_S)


async def test_cancelling_overtakes_the_next_request_on_its_way_to_the_engine(front: Front) -> None:
    async with FakeEngine(tokens_per_s=20) as engine, front.gateway(engine) as _:
        wire, other = await front.connect(), await front.connect()
        await wire.send(post(CHAT, chat(max_tokens=1000, stream=True), front.key()))
        await wire.until(b"content")
        wire.close()
        await other.send(post(CHAT, chat(max_tokens=1), front.key()))
        assert (await other.answer()).status == 200
        assert engine.stats.cancelled == 1
        assert engine.stats.completion_tokens < 20, "a second of generating for nobody"


async def test_full_worker_queues_then_refuses_and_serves_in_the_end(front: Front) -> None:
    async with FakeEngine(prefill_s=0.2) as engine, front.gateway(engine, limit=2, queue_limit=2):
        asking = [asyncio.create_task(ask(front, body=chat(max_tokens=1))) for _ in range(8)]
        answers = await asyncio.gather(*asking)
        good = [answer for answer in answers if answer.status == 200]
        for answer in answers:
            if answer.status != 200:
                assert_openai_error(answer, 429, "overloaded", kind="rate_limit_error")
        assert len(good) >= 4
        assert engine.stats.started == len(good)


async def test_hundred_streams_at_once_are_each_whole(front: Front) -> None:
    async with FakeEngine() as one, FakeEngine() as other, front.gateway(one), front.gateway(other):
        bodies = [[{"role": "user", "content": f"number {number}"}] for number in range(100)]
        answers = await asyncio.gather(*(ask(front, body=chat(messages=body, max_tokens=20, stream=True)) for body in bodies))
        for body, answer in zip(bodies, answers, strict=True):
            assert answer.complete
            said = "".join(event["choices"][0]["delta"].get("content", "") for event in answer.events()[:-1])
            assert said == answer_to(body, 20)
        assert one.stats.finished + other.stats.finished == 100
        assert min(one.stats.finished, other.stats.finished) >= 40


# -- TLS


def certificate(folder: Path, name: str) -> tuple[Path, Path, bytes]:
    """A self-signed pair for the API; Ed25519 will do for Python's own client."""
    key = Ed25519PrivateKey.generate()
    pem = make_root_certificate(key, name=name, now=time.time(), lifetime_s=3600)
    (folder / "api.crt").write_bytes(pem)
    (folder / "api.key").write_bytes(private_key_pem(key))
    return folder / "api.crt", folder / "api.key", x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


async def tls_answer(front: Front) -> tuple[Answer, bytes]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    wire = Wire(*await asyncio.open_connection("127.0.0.1", front.port, ssl=context))
    await wire.send(post(CHAT, chat(stream=True), front.key()))
    answer = await wire.answer()
    presented = wire.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    wire.close()
    return answer, presented


async def test_certificate_is_reloaded_when_it_changes_and_a_bad_one_is_not(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "TLS_RELOAD_S", 0.02)
    cert, key, first = certificate(tmp_path, "first")
    front = await make(tls_cert=cert, tls_key=key)
    await front.worker(streaming)
    answer, presented = await tls_answer(front)
    assert (answer.complete, answer.body, presented) == (True, EVENT + EVENT + DONE, first)
    with structlog.testing.capture_logs() as events:
        key.write_bytes(b"half a key")
        async with asyncio.timeout(DEADLINE_S):
            while not any(event["event"] == "tls.reload_failed" for event in events):
                await asyncio.sleep(0.02)
    assert (await tls_answer(front))[1] == first
    _, _, second = certificate(tmp_path, "second")
    async with asyncio.timeout(DEADLINE_S):
        while (await tls_answer(front))[1] != second:
            await asyncio.sleep(0.02)
    cert.unlink()
    await asyncio.sleep(0.06)
    assert (await tls_answer(front))[1] == second


async def test_plain_http_to_a_tls_port_is_not_answered(make: Make, tmp_path: Path) -> None:
    cert, key, _ = certificate(tmp_path, "api")
    front = await make(tls_cert=cert, tls_key=key)
    wire = await front.connect()
    await wire.send(post(CHAT, chat(), front.key()))
    assert b"HTTP/1.1" not in await wire.end()


async def test_new_proxy_lets_requests_wait_for_the_workers_it_has_yet_to_meet(front: Front) -> None:
    front.inference.new_until = asyncio.get_running_loop().time() + 60
    asking = asyncio.create_task(ask(front))
    async with asyncio.timeout(10):
        while not front.inference.in_flight:
            await asyncio.sleep(0.01)
    assert not asking.done()
    await front.worker(whole)
    assert (await asking).status == 200
    front.inference.new_until = asyncio.get_running_loop().time() + 0.1
    assert_openai_error(await ask(front, body=chat(model="other")), 404, "model_not_found", param="model")


# -- deadlines, and how much is tried again


async def test_request_timeout_travels_to_the_worker_and_ends_the_wait(front: Front) -> None:
    worker = await front.worker(whole)
    assert (await ask(front)).status == 200
    assert "dl" not in worker.heads[0]
    worker.serve = silent
    answer = await ask(front, x_request_timeout="0.2")
    assert_openai_error(answer, 504, "deadline_exceeded", kind="api_error")
    assert 0 < worker.heads[1]["dl"] <= 200
    await worker.until(lambda: worker.cancelled == 1)


async def test_stream_that_outlasts_its_deadline_says_so_and_is_cut_short(make: Make) -> None:
    front = await make(deadline_s=0.3)
    worker = await front.worker(begins)
    answer = await ask(front, body=chat(stream=True))
    assert not answer.complete
    assert answer.events()[-1]["error"]["code"] == "deadline_exceeded"
    await worker.until(lambda: worker.cancelled == 1)
    assert front.fleet.workers[worker.record.node_id].failed == 0, "it is not held against the worker"


@pytest.mark.parametrize("odd", ["0", "-1", "soon", "1e3", "86401", "nan", "1.2.3", "0x10"])
async def test_odd_request_timeout_is_refused(front: Front, odd: str) -> None:
    await front.worker(whole)
    assert_openai_error(await ask(front, x_request_timeout=odd), 400, "invalid_request", param="x-request-timeout")


async def test_only_so_many_requests_are_tried_again_when_everything_fails(make: Make) -> None:
    front = await make(retry_share=0.0)
    workers = [await front.worker(failing(EngineUnavailable("broken"))) for _ in range(3)]
    for _ in range(60):
        assert (await ask(front)).status == 502
    asked = sum(len(worker.heads) for worker in workers)
    assert asked == 60 + FLOOR
    assert "infermesh_retries_refused_total 28.0" in front.metrics.render().decode()


async def test_requests_that_every_worker_fails_eject_nobody(front: Front) -> None:
    for _ in range(3):
        await front.worker(failing(EngineUnavailable("broken")))
    for _ in range(20):
        assert (await ask(front)).status == 502
    assert {worker.standing for worker in front.fleet.workers.values()} == {"trusted"}
    for worker in front.fleet.workers.values():
        assert worker.failed == 20, "each was tried each time"


async def test_requests_of_a_worker_whose_engine_stands_still_run_elsewhere(front: Front) -> None:
    stuck = await front.worker(silent, name="stuck")
    asking = [asyncio.create_task(ask(front)) for _ in range(5)]
    await stuck.until(lambda: len(stuck.heads) == 5)
    saviour = await front.worker(whole, name="saviour")
    for attempt in front.inference.attempts:
        attempt.may_move = True  # as if there had been a choice
    stuck.link.send_control(Frame.LOAD, {"run": 5, "wait": 0, "yours": 5, "stuck": True})
    answers = await asyncio.gather(*asking)
    assert all(answer.status == 200 and answer.complete for answer in answers)
    assert len(saviour.heads) == 5
    assert (await ask(front)).status == 200
    assert len(stuck.heads) == 5, "and it gets nothing more"
