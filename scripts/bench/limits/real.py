"""Limits with real processes: a bootstrap node, proxies, a worker over a stand-in engine, clients that ask for three times the limit."""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

from mesh.client import Client, ClientSettings
from mesh.commands.documents import change_document
from mesh.limits import KIND, Limit, Limits, encode_limits, project_name
from tests.support.deployment import Deployment, Node
from tests.support.fake_engine import FakeEngine
from tests.support.limits import most_in_window, zipf

Json = dict[str, Any]
WINDOW_S = 60.0
SETTLE_S = 8.0
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


def measure(*, proxies: int, rps: float, seconds: float, kill: bool) -> Json:
    """One row. With ``kill`` one proxy is killed in the middle and started again."""
    return asyncio.run(_measure(proxies, rps, seconds, kill))


async def _measure(count: int, rps: float, seconds: float, kill: bool) -> Json:
    with tempfile.TemporaryDirectory(prefix="infermesh-limits-") as folder:
        async with Deployment(Path(folder)) as mesh, FakeEngine() as engine:
            await mesh.bootstrap()
            proxies = [await mesh.proxy(f"p{number}") for number in range(count)]
            worker = await mesh.worker("w1", "--engine", "external", "--engine-url", engine.url)
            for proxy in proxies:
                await mesh.until_ready(proxy, worker)
            await _limit(mesh, proxies[0], rps)
            await asyncio.sleep(SETTLE_S)
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                clients = Clients(session, proxies, mesh.key(project="search"), random.Random(1))
                began = time.monotonic()
                loading = asyncio.create_task(clients.run(3 * rps, seconds))
                if kill:
                    await asyncio.sleep(seconds / 3)
                    await proxies[-1].kill()
                    await asyncio.sleep(3)
                    await mesh.proxy(f"p{count - 1}", fresh=False)
                await loading
    events = sorted(clients.admitted)
    most = most_in_window(events, min(WINDOW_S, seconds)) / (rps * min(WINDOW_S, seconds))
    allowed = 1 + 1 / min(WINDOW_S, seconds) + 0.02
    warm = seconds / 6
    used = sum(1 for at, _ in events if at >= began + warm) / (rps * (seconds - warm))
    name = f"{count} processes" + (", one killed and back" if kill else "")
    figures = {"most_in_60s": round(most, 4), "allowed": round(allowed, 4), "used": round(used, 4), "outcomes": dict(clients.outcomes)}
    return {"name": name, **figures, "target": "60 s ≤ limit + burst + 2%, ≥ 98% used", "ok": most <= allowed and (kill or used >= 0.98)}


async def _limit(mesh: Deployment, proxy: Node, rps: float) -> None:
    settings = ClientSettings(url=proxy.root, api_key=mesh.key("viewer", "admin"))
    async with Client(settings) as client:
        body = encode_limits(Limits(whole=Limit(rps=rps)))
        await change_document(client, mesh.authority, KIND, project_name("search"), lambda former: body)
