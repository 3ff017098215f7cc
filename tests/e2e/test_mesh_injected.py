"""Faults put in on purpose, into real processes: a link that swallows everything, a client that says it will send no more, a full disk,
a clock that jumps. Nothing crashes, nothing is silently lost, and all is well again once the fault is over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.conftest import chat_body, external
from tests.support.deployment import Deployment, Node, until
from tests.support.fake_engine import FakeEngine, answer_to
from tests.support.faults import ClockShift, Faults, TcpProxy, UdpProxy, full_disk
from tests.support.front import post
from tests.support.processes import listening_ports

SAID = answer_to([{"role": "user", "content": "Say something"}], 4)


async def ask(mesh: Deployment, proxy: Node, key: str, *, timeout_s: float = 30.0) -> str:
    """The answer's text, or what came instead."""
    try:
        async with mesh.http.post(
            f"{proxy.api}/chat/completions",
            json=chat_body(max_tokens=4),
            headers={"Authorization": f"Bearer {key}"},
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        ) as response:
            body = await response.json()
    except (aiohttp.ClientError, TimeoutError) as error:
        return type(error).__name__
    return str(body["choices"][0]["message"]["content"] if response.status == 200 else body["error"]["code"])


async def well(mesh: Deployment, proxy: Node, key: str) -> None:
    async def served() -> bool:
        return await ask(mesh, proxy, key) == SAID

    await until(served, what="the mesh to be well again")


# -- the tools themselves


@contextlib.asynccontextmanager
async def echo_server() -> AsyncIterator[tuple[str, int]]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1000):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[:2]
    server.close()


async def test_tcp_proxy_passes_holds_and_resets() -> None:
    async with echo_server() as target, TcpProxy(target) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        proxy.blackhole()
        writer.write(b"two")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        proxy.blackhole(False)
        assert await reader.readexactly(3) == b"two"
        assert proxy.faults.fired["blackhole"]
        proxy.half_close()
        assert await reader.read() == b""
        proxy.reset()
        await asyncio.sleep(0.05)
        writer.write(b"three")
        await asyncio.sleep(0.05)
        with pytest.raises(ConnectionError):
            await writer.drain()
        assert proxy.connections == 0


async def test_udp_proxy_passes_and_loses() -> None:
    class Echo(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.transport.sendto(data, addr)  # type: ignore[attr-defined]

    class Client(asyncio.DatagramProtocol):
        got = 0

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.got += 1

    loop = asyncio.get_running_loop()
    server, _ = await loop.create_datagram_endpoint(Echo, local_addr=("127.0.0.1", 0))
    client = Client()
    async with UdpProxy(server.get_extra_info("sockname"), faults=Faults(loss=0.5)) as proxy:
        transport, _ = await loop.create_datagram_endpoint(lambda: client, remote_addr=("127.0.0.1", proxy.port))
        for _ in range(200):
            transport.sendto(b"x")
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            while client.got + proxy.faults.fired["loss"] < 200:
                await asyncio.sleep(0.01)
        assert 20 < client.got < 80, "a half each way"
        transport.close()
    server.close()


# -- real nodes


@contextlib.asynccontextmanager
async def outbound_mesh(deployment: Deployment, engine: FakeEngine) -> AsyncIterator[tuple[Node, Node, TcpProxy]]:
    """A proxy whose door for links is a `TcpProxy`, and a worker that dials out, so that their link passes it."""
    await deployment.bootstrap()
    async with TcpProxy(("127.0.0.1", 0)) as door:
        proxy = await deployment.proxy("p1", "--advertise", door.address)
        door.target = ("127.0.0.1", link_port_of(proxy))
        worker = await external(deployment, "w1", engine, "--outbound")
        await deployment.until_ready(proxy, worker)
        assert door.connections == 1
        yield proxy, worker, door


def link_port_of(node: Node) -> int:
    """Where a node really listens for links: its only TCP port that is not the API's."""
    (port,) = listening_ports(node.process.pid) - {int(node.api.rsplit(":", 1)[1].split("/")[0])}
    return port


async def test_link_that_swallows_everything_is_given_up_and_made_anew(deployment: Deployment) -> None:
    key = deployment.key()
    async with FakeEngine() as engine, outbound_mesh(deployment, engine) as (proxy, worker, door):
        assert await ask(deployment, proxy, key) == SAID
        door.blackhole()
        began = time.monotonic()
        said = await ask(deployment, proxy, key)
        assert said in ("worker_lost", "no_worker", "upstream_timeout"), "told, and not for ever waited for"
        assert time.monotonic() - began < 20

        async def unlinked() -> bool:
            return not (await deployment.workers(proxy, key)).get(worker.id, {"linked": False})["linked"]

        await until(unlinked, what="the dead link to be noticed")
        assert door.faults.fired["blackhole"]
        door.blackhole(False)
        await well(deployment, proxy, key)


async def test_stream_over_a_link_that_is_reset_ends_with_an_error_event_or_goes_on(deployment: Deployment) -> None:
    key = deployment.key()
    async with FakeEngine(tokens_per_s=20) as engine, outbound_mesh(deployment, engine) as (proxy, _, door):
        body: dict[str, Any] = chat_body(max_tokens=30, stream=True)
        got, broken = b"", False
        try:
            async with deployment.http.post(
                f"{proxy.api}/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}
            ) as response:
                async for piece in response.content.iter_any():
                    got += piece
                    if got.count(b"\n\n") == 5:
                        door.reset()
        except aiohttp.ClientPayloadError:
            broken = True
        assert door.faults.fired["reset"] == 1
        said = [json.loads(line[6:]) for line in got.split(b"\n") if line.startswith(b"data: {")]
        choices = [choice for event in said for choice in event.get("choices", ())]
        text, right = "".join(choice["delta"].get("content") or "" for choice in choices), answer_to(body["messages"], 30)
        if got.endswith(b"data: [DONE]\n\n"):
            assert (text, choices[-1]["finish_reason"], broken) == (right, "length", False)
        else:
            assert broken
            assert "error" in said[-1]
            assert right.startswith(text)
        await well(deployment, proxy, key)


async def test_client_that_says_it_will_send_no_more_harms_nobody(deployment: Deployment) -> None:
    key = deployment.key()
    async with FakeEngine(tokens_per_s=50) as engine:
        await deployment.bootstrap()
        proxy = await deployment.proxy()
        worker = await external(deployment, "w1", engine)
        await deployment.until_ready(proxy, worker)
        port = int(proxy.api.rsplit(":", 1)[1].split("/")[0])
        payload = json.dumps(chat_body(max_tokens=10, stream=True)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("/v1/chat/completions", payload, key))
        writer.write_eof()
        got = await asyncio.wait_for(reader.read(), 30)
        assert got == b"" or got.endswith(b"0\r\n\r\n"), "the whole answer, or plainly none"
        await well(deployment, proxy, key)
        async with asyncio.timeout(30):
            await engine.until(lambda stats: stats.running == 0)


async def test_full_disk_stops_no_node_and_no_request(deployment: Deployment) -> None:
    key = deployment.key()
    async with FakeEngine() as engine:
        bootstrap = await deployment.bootstrap()
        proxy = await deployment.proxy()
        worker = await external(deployment, "w1", engine)
        await deployment.until_ready(proxy, worker)
        nodes = (bootstrap, proxy, worker)
        with contextlib.ExitStack() as stack:
            for node in nodes:
                stack.enter_context(full_disk(node.process.pid))
            until_s = time.monotonic() + 6.0  # long enough for records to be signed again and states to be written
            while time.monotonic() < until_s:
                assert await ask(deployment, proxy, key) == SAID
                await asyncio.sleep(0.05)
        assert all(node.process.returncode is None for node in nodes)
        await well(deployment, proxy, key)


async def test_clock_that_jumps_on_one_node_is_survived_and_the_mesh_is_well_when_it_is_right_again(
    deployment: Deployment, tmp_path: Path
) -> None:
    key = deployment.key()
    shift = ClockShift(tmp_path)
    async with FakeEngine() as engine:
        await deployment.bootstrap()
        proxy = await deployment.proxy()
        with shift.environment():
            worker = await external(deployment, "w1", engine)
        await deployment.until_ready(proxy, worker)
        for seconds in (40.0, 0.0, -40.0):
            shift.jump(seconds)
            until_s = time.monotonic() + 4.0
            while time.monotonic() < until_s:
                assert await ask(deployment, proxy, key) == SAID, "links that are up go on serving"
                await asyncio.sleep(0.1)
            assert worker.process.returncode is None
        shift.jump(0.0)
        await deployment.until_ready(proxy, worker)
        await well(deployment, proxy, key)
