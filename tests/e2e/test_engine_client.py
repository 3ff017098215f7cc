"""The gateway's HTTP client against servers that misbehave: connections kept, given up, closed on whoever stops listening."""

from __future__ import annotations

import asyncio
import gc
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from worker.engine.client import EngineAnswer, EngineClient, StaleConnection

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy.")
DEADLINE_S = 10.0
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


class Server:
    """Takes connections and does with each what the test says. ``requests`` holds what was sent, by connection."""

    def __init__(self, serve: Callable[[Server, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        self._serve = serve
        self.connections = 0
        self.ended = 0
        self.requests: list[tuple[int, bytes, bytes]] = []
        self.changed = asyncio.Event()
        self.tls: ssl.SSLContext | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0, ssl=self.tls)
        self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1/chat/completions"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.create_task(self._run(reader, writer)))

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self._serve(self, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.ended += 1
            self.changed.set()
            writer.close()

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        """Read one request; returns its head. Raises `IncompleteReadError` when there is none."""
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")).split(b":")[1])
        self.requests.append((self.connections, head, await reader.readexactly(size)))
        return head

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not true():
                self.changed.clear()
                await self.changed.wait()


async def answers(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await server.request(reader)
        writer.write(OK)


def says(*pieces: bytes, close: bool = False) -> Callable[..., Awaitable[None]]:
    """Sends the pieces after each request, then waits for the next or closes."""

    async def serve(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await server.request(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if close:
                return

    return serve


async def read(answer: EngineAnswer) -> bytes:
    async with answer:
        return b"".join([piece async for piece in answer.content.iter_any()])


async def ask(client: EngineClient, server: Server, data: Any = b"{}", **headers: str) -> bytes:
    async with asyncio.timeout(DEADLINE_S):
        return await read(await client.post(server.url, data=data, headers=JSON | headers))


async def test_request_is_what_was_asked_and_the_answer_what_was_said() -> None:
    async with Server(answers) as server, EngineClient(idle_s=5) as client:
        answer = await client.post(server.url, data=b'{"model": "m"}', headers=JSON | {"X-Request-Id": "req_1"})
        assert (answer.status, answer.content_type) == (200, "application/json")
        assert await read(answer) == b"{}"
    ((_, head, body),) = server.requests
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /v1/chat/completions HTTP/1.1"
    assert {"X-Request-Id: req_1", "Content-Type: application/json", "Content-Length: 14"} <= set(lines)
    assert f"Host: {server.url.split('/')[2]}" in lines
    assert body == b'{"model": "m"}'


async def test_connection_is_kept_for_the_next_request_and_closed_when_idle() -> None:
    async with Server(answers) as server, EngineClient(idle_s=0.05) as client:
        for _ in range(5):
            assert await ask(client, server) == b"{}"
        assert server.connections == 1
        await server.until(lambda: server.ended == 1)
        assert await ask(client, server) == b"{}"
        assert server.connections == 2


async def test_client_that_keeps_nothing_says_so_and_closes() -> None:
    async with Server(answers) as server, EngineClient(idle_s=0) as client:
        assert await ask(client, server) == b"{}"
        await server.until(lambda: server.ended == 1)
    assert b"\r\nConnection: close\r\n" in server.requests[0][1]


async def test_requests_at_once_have_a_connection_each() -> None:
    async with Server(answers) as server, EngineClient(idle_s=5) as client:
        assert await asyncio.gather(*(ask(client, server) for _ in range(10))) == [b"{}"] * 10
        assert server.connections == 10
        await asyncio.gather(*(ask(client, server) for _ in range(10)))
        assert server.connections == 10


async def test_kept_connection_that_was_closed_meanwhile_is_a_disconnection() -> None:
    closing = asyncio.Event()

    async def serve(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(OK)
        await closing.wait()

    async with Server(serve) as server, EngineClient(idle_s=5) as client:
        await ask(client, server)
        closing.set()
        await server.until(lambda: server.ended == 1)
        try:
            assert await ask(client, server) == b"{}", "its end had been heard of"
        except StaleConnection:
            assert await ask(client, server) == b"{}"
        assert server.connections == 2


async def test_only_a_connection_that_was_kept_is_stale() -> None:
    """One that was made for a request and dies may have died of it."""

    async def serve(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(OK)
        await server.request(reader)

    async with Server(says(b"", close=True)) as server, EngineClient(idle_s=5) as client:
        with pytest.raises(aiohttp.ClientError) as caught:
            await ask(client, server)
        assert not isinstance(caught.value, StaleConnection)
    async with Server(serve) as server, EngineClient(idle_s=5) as client:
        await ask(client, server)
        with pytest.raises(StaleConnection):
            await ask(client, server)
        assert not client._kept


@pytest.mark.parametrize("unasked", [OK, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n", b"\0\xff"])
async def test_what_an_engine_says_unasked_is_nobodys_answer(unasked: bytes) -> None:
    spoken = asyncio.Event()

    async def serve(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if server.connections > 1:
            await answers(server, reader, writer)
        await server.request(reader)
        writer.write(OK)
        await spoken.wait()
        writer.write(unasked)
        server.changed.set()
        await reader.read()

    async with Server(serve) as server, EngineClient(idle_s=5) as client:
        await ask(client, server)
        spoken.set()
        await asyncio.sleep(0.05)
        try:
            assert await ask(client, server) == b"{}"
        except aiohttp.ClientError:
            assert await ask(client, server) == b"{}"


@pytest.mark.parametrize(
    ("said", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", b"abcde"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
    ],
)
@pytest.mark.parametrize("piece_bytes", [1, 1000])
async def test_answers_of_every_framing_are_read_whole_and_their_connection_kept(said: bytes, body: bytes, piece_bytes: int) -> None:
    pieces = [said[at : at + piece_bytes] for at in range(0, len(said), piece_bytes)]
    async with Server(says(*pieces)) as server, EngineClient(idle_s=5) as client:
        assert await ask(client, server) == body
        assert await ask(client, server) == body
        assert server.connections == 1


async def test_answer_that_ends_with_its_connection_is_read_to_there() -> None:
    async with Server(says(b"HTTP/1.0 200 OK\r\n\r\nall of it", close=True)) as server, EngineClient(idle_s=5) as client:
        assert await ask(client, server) == b"all of it"
        assert await ask(client, server) == b"all of it"
        assert server.connections == 2


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
    ],
)
async def test_broken_answers_are_errors_of_the_connection_and_it_is_closed(said: bytes) -> None:
    async with Server(says(said, close=True)) as server, EngineClient(idle_s=5) as client:
        with pytest.raises((aiohttp.ClientError, OSError)):
            await ask(client, server)
        await server.until(lambda: server.ended == 1)
        assert not client._kept


@pytest.mark.parametrize("when", ["before the head", "in the body"])
async def test_whoever_stops_listening_closes_the_connection(when: str) -> None:
    async def serve(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        if when == "in the body":
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:\r\n")
        server.changed.set()
        assert await reader.read() == b""

    async with Server(serve) as server, EngineClient(idle_s=5) as client:
        asking = asyncio.create_task(ask(client, server))
        await server.until(lambda: server.requests)
        await asyncio.sleep(0)
        asking.cancel()
        await server.until(lambda: server.ended == 1)
        assert asking.cancelled()


async def test_large_body_goes_in_pieces_no_faster_than_it_is_taken() -> None:
    taking = asyncio.Event()
    made = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal made
        for _ in range(320):
            made += 1
            yield bytes(65_536)

    async def serve(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await taking.wait()
        await answers(server, reader, writer)

    async with Server(serve) as server, EngineClient(idle_s=5) as client:
        asking = asyncio.create_task(ask(client, server, pieces(), **{"Content-Length": str(320 * 65_536)}))
        await asyncio.sleep(0.1)
        assert 0 < made < 320
        taking.set()
        assert await asking == b"{}"
        assert len(server.requests[0][2]) == 320 * 65_536


async def test_engine_that_refuses_a_large_body_early_is_heard() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield bytes(65_536)

    async def serve(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.write_eof()
        while await reader.read(1 << 20):
            pass

    async with Server(serve) as server, EngineClient(idle_s=5) as client, asyncio.timeout(DEADLINE_S):
        answer = await client.post(server.url, data=pieces(), headers=JSON | {"Content-Length": str(1000 * 65_536)})
        assert answer.status == 413
        assert await read(answer) == b""


async def test_header_with_a_line_break_is_never_sent() -> None:
    async with Server(answers) as server, EngineClient(idle_s=5) as client:
        for value in ("a\r\nX-Evil: 1", "a\nb", "a\rb"):
            with pytest.raises(ValueError, match="line break"):
                await ask(client, server, X_Key=value)
        assert server.connections == 0


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 and its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "engine")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    (folder / "cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return folder / "cert.pem", folder / "key.pem"


async def test_engine_behind_tls_is_asked_if_its_certificate_holds_and_not_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = self_signed(tmp_path)
    server = Server(answers)
    server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.tls.load_cert_chain(cert, key)
    async with server:
        async with EngineClient(idle_s=5) as client:
            with pytest.raises(ssl.SSLCertVerificationError):
                await ask(client, server)
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        async with EngineClient(idle_s=5) as client:
            assert await ask(client, server) == b"{}"
            assert await ask(client, server) == b"{}"
    assert len(server.requests) == 2


async def test_nobody_there_is_an_error_of_the_connection() -> None:
    async with Server(answers) as server:
        url = server.url
    async with EngineClient(idle_s=5) as client:
        with pytest.raises(OSError):  # noqa: PT011
            await client.post(url, data=b"{}", headers=JSON)


async def test_finished_requests_leave_nothing_to_the_cycle_collector() -> None:
    async with Server(answers) as server, EngineClient(idle_s=5) as client:
        await ask(client, server)
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(20):
                await ask(client, server)
            gc.collect()
            left = Counter(type(thing).__name__ for thing in gc.garbage)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert not [name for name, count in left.items() if count >= 20], left
