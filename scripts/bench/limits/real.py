"""Limits with real processes: a bootstrap node, proxies, a worker over a stand-in engine, clients that ask for three times the limit."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp

from mesh.client import Client, ClientSettings
from mesh.commands.documents import change_document
from mesh.limits import KIND, Limit, Limits, encode_limits, project_name
from proxy.limits.shares import ID_BYTES, rank
from tests.support.deployment import Deployment, Node
from tests.support.fake_engine import FakeEngine
from tests.support.faults import TcpProxy, freeze, thaw
from tests.support.limits import most_in_window, zipf

Json = dict[str, Any]
WINDOW_S = 60.0
SETTLE_S = 8.0
PARTED_S = 25.0
PROJECT = "search"
PATIENCE = aiohttp.ClientTimeout(total=15)
BODY = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


class Clients:
    """An open loop of requests over the proxies, more at one than at another."""

    def __init__(self, session: aiohttp.ClientSession, proxies: list[Node], key: str, rng: random.Random) -> None:
        self.session = session
        self.proxies = proxies
        self.headers = {"Authorization": f"Bearer {key}"}
        self.rng = rng
        self.admitted: list[tuple[float, float]] = []
        self.outcomes: Counter[str] = Counter()

    async def run(self, rate: float, seconds: float) -> None:
        sums = list(itertools.accumulate(zipf(len(self.proxies))))
        end = time.monotonic() + seconds
        at = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while time.monotonic() < end:
                at += self.rng.expovariate(rate)
                await asyncio.sleep(max(0.0, at - time.monotonic()))
                proxy = self.rng.choices(self.proxies, cum_weights=sums)[0]
                tasks.create_task(self._ask(proxy))

    async def _ask(self, proxy: Node) -> None:
        began = time.monotonic()
        try:
            async with self.session.post(f"{proxy.api}/chat/completions", json=BODY, headers=self.headers) as response:
                await response.read()
                self.outcomes[str(response.status)] += 1
                if response.status == 200:
                    self.admitted.append((began, 1.0))
        except (aiohttp.ClientError, TimeoutError) as error:
            self.outcomes[type(error).__name__] += 1


Fault = Callable[[Deployment, list[Node], list[TcpProxy]], Coroutine[Any, Any, None]]


async def _owner_killed(mesh: Deployment, proxies: list[Node], between: list[TcpProxy]) -> None:
    await _owner(proxies).kill()


async def _other_killed(mesh: Deployment, proxies: list[Node], between: list[TcpProxy]) -> None:
    owner = _owner(proxies)
    at, other = next((at, node) for at, node in reversed(list(enumerate(proxies))) if node is not owner)
    await other.kill()
    await asyncio.sleep(3)
    proxies[at] = await mesh.proxy(other.name, *_addresses(between[at]), fresh=False)


async def _owner_frozen(mesh: Deployment, proxies: list[Node], between: list[TcpProxy]) -> None:
    pid = _owner(proxies).process.pid
    freeze(pid)
    await asyncio.sleep(10)
    thaw(pid)


async def _parted(mesh: Deployment, proxies: list[Node], between: list[TcpProxy]) -> None:
    for each in between:
        each.blackhole()
    await asyncio.sleep(PARTED_S)
    for each in between:
        each.blackhole(False)
        each.reset()


FAULTS: dict[str, Fault] = {
    "owner killed": _owner_killed,
    "another killed, back after 3 s": _other_killed,
    "owner stands still for 10 s": _owner_frozen,
    f"all apart for {PARTED_S:.0f} s": _parted,
}


def _owner(proxies: list[Node]) -> Node:
    """Who keeps the count of the one limit there is."""
    bucket = hashlib.blake2b(f"project:{PROJECT}:rps".encode(), digest_size=16).digest()
    first = rank(bucket, (bytes.fromhex(node.id)[:ID_BYTES] for node in proxies))[0]
    return next(node for node in proxies if bytes.fromhex(node.id)[:ID_BYTES] == first)


def _addresses(between: TcpProxy) -> tuple[str, ...]:
    return "--link-port", str(between.target[1]), "--advertise", between.address


def measure(*, proxies: int, rps: float, seconds: float, fault: str = "") -> Json:
    """One row. A fault comes when a third of the time is over."""
    return asyncio.run(_measure(proxies, rps, seconds, fault))


async def _measure(count: int, rps: float, seconds: float, fault: str) -> Json:
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="infermesh-limits-"))
        mesh = await stack.enter_async_context(Deployment(Path(folder)))
        engine = await stack.enter_async_context(FakeEngine())
        await mesh.bootstrap()
        between = [await stack.enter_async_context(TcpProxy(("127.0.0.1", port))) for port in mesh.free_ports(count)]
        proxies = [await mesh.proxy(f"p{number}", *_addresses(each)) for number, each in enumerate(between)]
        worker = await mesh.worker("w1", "--engine", "external", "--engine-url", engine.url)
        for proxy in proxies:
            await mesh.until_ready(proxy, worker)
        await _limit(mesh, proxies[0], rps)
        await asyncio.sleep(SETTLE_S)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=PATIENCE))
        clients = Clients(session, proxies, mesh.key(project=PROJECT), random.Random(1))
        began = time.monotonic()
        loading = asyncio.create_task(clients.run(3 * rps, seconds))
        if fault:
            await asyncio.sleep(seconds / 3)
            await FAULTS[fault](mesh, proxies, between)
        await loading
    events = sorted(clients.admitted)
    window_s = min(WINDOW_S, seconds)
    most = most_in_window(events, window_s) / (rps * window_s)
    allowed = 1 + 1 / window_s + 0.02
    warm = seconds / 6
    used = sum(1 for at, _ in events if at >= began + warm) / (rps * (seconds - warm))
    name = f"{count} processes" + (f", {fault}" if fault else "")
    figures = {"most_in_60s": round(most, 4), "allowed": round(allowed, 4), "used": round(used, 4), "outcomes": dict(clients.outcomes)}
    target = "60 s ≤ limit + burst + 2%" + ("" if fault else ", ≥ 98% used")
    return {"name": name, **figures, "target": target, "ok": most <= allowed and (bool(fault) or used >= 0.98)}


async def _limit(mesh: Deployment, proxy: Node, rps: float) -> None:
    settings = ClientSettings(url=proxy.root, api_key=mesh.key("viewer", "admin"))
    async with Client(settings) as client:
        body = encode_limits(Limits(whole=Limit(rps=rps)))
        await change_document(client, mesh.authority, KIND, project_name(PROJECT), lambda former: body)
