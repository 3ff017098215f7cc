"""Request smuggling: a corpus of requests that two readers of HTTP may read differently, and what comes of each.

A vector is sent on one connection; the worker behind the proxy notes which prompts reach it and answers each with the prompt itself.
There is no desync if the answers on a connection are those of the requests that reached the worker from it, in their order, each whole,
and if whoever comes after on the same connection to the proxy (a victim, behind nginx) gets the answer to its own request.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mesh.link.link import IncomingStream
from tests.support.answers import read_answer
from tests.support.front import Front, post

CORPUS = Path(__file__).parents[1] / "corpus" / "smuggling.jsonl"
FIRST, SMUGGLED = "first", "smuggled"
QUIET_S = 0.3
PATIENT_S = 3.0
DEADLINE_S = 20.0
NGINX_LANES = 16
AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Vector:
    """``statuses`` of the answers and ``reached`` (which of its prompts) are what happens without anything in front."""

    name: str
    data: str
    statuses: tuple[int, ...] = ()
    reached: tuple[str, ...] = ()

    def bytes(self, key: str, mark: int) -> bytes:
        """To be sent; ``mark`` (up to 999) tells its prompts from those of others, in as many bytes."""
        return self.data.replace("{KEY}", key).replace(SMUGGLED, smuggled(mark)).replace(FIRST, first(mark)).encode("latin-1")


def first(mark: int) -> str:
    return f"fi{mark:03}"


def smuggled(mark: int) -> str:
    return f"smugg{mark:03}"


def read_corpus() -> list[Vector]:
    found = []
    for line in CORPUS.read_text().splitlines():
        fields = json.loads(line)
        found.append(Vector(**{**fields, "statuses": tuple(fields.get("statuses", ())), "reached": tuple(fields.get("reached", ()))}))
    return found


class Echo:
    """The worker: answers with the prompt, and keeps what reached it, in order."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    async def __call__(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        body = json.loads(await stream.read_body(max_bytes=head["size"]))
        (message,) = body["messages"]
        self.reached.append(message["content"])
        answer = json.dumps({"echo": message["content"]}).encode()
        stream.send_head({"status": 200, "type": "application/json", "length": len(answer)})
        await stream.send(answer)
        stream.end({})

    def of(self, mark: int) -> list[str]:
        return [prompt for prompt in self.reached if prompt in (first(mark), smuggled(mark))]


@dataclass
class Outcome:
    """What a client read on its connection. ``broken``: bytes that are no HTTP answer."""

    statuses: list[int] = field(default_factory=list)
    echoes: list[str] = field(default_factory=list)
    closed: bool = False
    broken: str = ""


async def send_and_read(
    port: int, data: bytes, *, done: Callable[[Outcome], bool], head_request: bool = False, one: bool = False, quiet_s: float = QUIET_S
) -> Outcome:
    """Send, then read until the connection ends, or nothing more comes for ``quiet_s`` and ``done(outcome)`` holds.

    ``one``: one answer will do.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = bytearray()
    outcome = Outcome()
    with suppress(ConnectionError):
        writer.write(data)
        await writer.drain()
    loop = asyncio.get_running_loop()
    until, quiet = loop.time() + DEADLINE_S, 0
    try:
        while loop.time() < until:
            try:
                async with asyncio.timeout(quiet_s):
                    piece = await reader.read(65536)
            except TimeoutError:
                outcome = read_outcome(bytes(got), ended=False, head=head_request)
                quiet += 1
                if done(outcome) and (outcome.statuses or quiet > 2):
                    break
                continue
            except ConnectionError:
                piece = b""
            if not piece:
                outcome = read_outcome(bytes(got), ended=True, head=head_request)
                outcome.closed = True
                break
            got += piece
            quiet = 0
            if one and (outcome := read_outcome(bytes(got), ended=False)).statuses:
                break
    finally:
        writer.transport.abort()
    return outcome


def read_outcome(data: bytes, *, ended: bool, head: bool = False) -> Outcome:
    """Every answer in ``data``, by the strict reader. ``head``: the first answers a HEAD and has no body."""
    outcome = Outcome()
    while data:
        try:
            if head:
                start, _, data = data.partition(b"\r\n\r\n")
                head = False
                outcome.statuses.append(int(start[9:12]))
                continue
            if not data.startswith(b"HTTP/1."):
                outcome.broken = repr(data[:80])
                break
            answer = read_answer(data, ended=ended)
        except AssertionError as error:
            outcome.broken = str(error) or "not an answer"
            break
        if answer is None or not answer.complete:
            outcome.broken = "half an answer" if ended else ""
            break
        if answer.status != 100:
            outcome.statuses.append(answer.status)
            if answer.status == 200 and b'"echo"' in answer.body:
                outcome.echoes.append(json.loads(answer.body)["echo"])
        data = answer.rest
    return outcome


def asks_head(vector: Vector) -> bool:
    return vector.data.startswith("HEAD ")


async def run_direct(front: Front, echo: Echo, vectors: Sequence[Vector]) -> list[tuple[Outcome, list[str]]]:
    """Every vector on a connection of its own, many at once: what was read, and what reached the worker."""
    key, turn = front.key(), asyncio.Semaphore(AT_ONCE)

    async def one(mark: int, vector: Vector) -> tuple[Outcome, list[str]]:
        async with turn:
            outcome = await send_and_read(
                front.port, vector.bytes(key, mark), done=lambda read: read.echoes == echo.of(mark), head_request=asks_head(vector)
            )
        return outcome, echo.of(mark)

    return list(await asyncio.gather(*(one(mark, vector) for mark, vector in enumerate(vectors))))


@asynccontextmanager
async def nginx(front: Front) -> AsyncIterator[list[int]]:
    """nginx before the proxy: ports of `NGINX_LANES` servers, each with one kept connection. Every other passes bodies on as they come."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    with tempfile.TemporaryDirectory(prefix="infermesh-nginx-") as folder:
        ports = [await _free_port() for _ in range(NGINX_LANES)]
        servers = "".join(
            f"upstream lane{lane} {{ server 127.0.0.1:{front.port}; keepalive 1; }}\n"
            f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://lane{lane}; proxy_http_version 1.1; "
            f'proxy_set_header Connection ""; proxy_request_buffering {"off" if lane % 2 else "on"}; }} }}\n'
            for lane, port in enumerate(ports)
        )
        config = Path(folder) / "nginx.conf"
        temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        config.write_text(
            f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
            "events { worker_connections 1024; }\n"
            f"http {{ access_log off; {temporary} {servers} }}\n"
        )
        process = await asyncio.create_subprocess_exec(
            program, "-e", f"{folder}/error.log", "-p", folder, "-c", str(config), stderr=asyncio.subprocess.DEVNULL
        )
        try:
            for port in ports:
                await _listening(port)
            yield ports
        finally:
            process.terminate()
            await process.wait()


async def run_behind_nginx(front: Front, echo: Echo, vectors: Sequence[Vector]) -> list[str]:
    """Every vector through each kind of lane, and after each a victim. Returns the desyncs, in words."""
    key, desyncs = front.key(), list[str]()
    async with nginx(front) as ports:

        async def lane(number: int) -> None:
            for index, vector in enumerate(vectors):
                if index % (NGINX_LANES // 2) != number // 2:  # once in a lane of each kind
                    continue
                if await attack(number, ports[number], vector, QUIET_S):  # it may be that the client left early: a desync shows again
                    desyncs.extend(await attack(number, ports[number], vector, PATIENT_S))

        async def attack(number: int, port: int, vector: Vector, quiet_s: float) -> list[str]:
            before = len(echo.of(number))

            def reached() -> list[str]:
                return echo.of(number)[before:]

            read = await send_and_read(
                port,
                vector.bytes(key, number),
                done=lambda outcome: outcome.echoes == reached(),
                head_request=asks_head(vector),
                quiet_s=quiet_s,
            )
            found = []
            if read.echoes != reached():
                found.append(f"{vector.name}: {reached()} reached the worker, the client read {read.echoes} {read}")
            for _ in range(2):
                body = json.dumps({"model": "m", "messages": [{"role": "user", "content": first(100 + number)}]})
                request = post("/v1/chat/completions", body.encode(), key)
                victim = await send_and_read(port, request, done=lambda outcome: bool(outcome.statuses), one=True)
                if (victim.statuses, victim.echoes) != ([200], [first(100 + number)]):
                    found.append(f"{vector.name}: a victim read {victim}")
            if len(reached()) != len(read.echoes):
                found.append(f"{vector.name}: {reached()} reached the worker in the end, the client had read {read.echoes}")
            return found

        await asyncio.gather(*(lane(number) for number in range(NGINX_LANES)))
    return desyncs


async def _free_port() -> int:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


async def _listening(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            with suppress(ConnectionError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.transport.abort()
                return
            await asyncio.sleep(0.05)
