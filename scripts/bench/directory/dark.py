"""The whole DHT goes dark under load: real processes, real HTTP, and not one datagram through for minutes."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from tests.support.deployment import Deployment, Node
from tests.support.fake_engine import FakeEngine

BLACKHOLE = Path(__file__).resolve().parent / "blackhole"
MODEL = "bench"
WORKERS = 2
PROXIES = 2
WARM_S = 10.0
REQUESTS_PER_S = 10.0
LIMIT_S = 30.0


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


async def _ask(http: aiohttp.ClientSession, proxy: Node, key: str, *, stream: bool) -> str:
    """One request; what became of it: `ok`, or why not."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "stream": stream}
    headers = {"Authorization": f"Bearer {key}"}
    try:
        async with http.post(f"{proxy.api}/chat/completions", json=body, headers=headers) as response:
            answer = await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        return type(error).__name__
    if response.status != 200:
        return f"status {response.status}"
    return "ok" if not stream or answer.rstrip().endswith(b"data: [DONE]") else "cut"


async def _load(mesh: Deployment, proxies: list[Node], for_s: float) -> Counter[str]:
    """An open loop of requests, every other one streamed, turn by turn over the proxies."""
    outcomes: Counter[str] = Counter()
    key = mesh.key()
    pending: set[asyncio.Task[None]] = set()

    async def one(http: aiohttp.ClientSession, number: int) -> None:
        proxy = proxies[number % len(proxies)]
        outcomes[await _ask(http, proxy, key, stream=number // len(proxies) % 2 == 0)] += 1

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=LIMIT_S)) as http:
        began, number = time.monotonic(), 0
        while (elapsed := time.monotonic() - began) < for_s:
            task = asyncio.create_task(one(http, number))
            pending.add(task)
            task.add_done_callback(pending.discard)
            number += 1
            await asyncio.sleep(max(0.0, number / REQUESTS_PER_S - elapsed))
        await asyncio.gather(*pending)
    return outcomes


def _swallowed(switch: Path, pid: int) -> list[str]:
    return [way for way in ("in", "out") if Path(f"{switch}.{pid}.{way}").exists()]


async def _measure(for_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as home:
        switch = Path(home) / "dark"
        with _environment(PYTHONPATH=str(BLACKHOLE), BENCH_BLACKHOLE=str(switch)):
            async with Deployment(Path(home)) as mesh, FakeEngine(model=MODEL) as engine:
                bootstrap = await mesh.bootstrap()
                proxies = [await mesh.proxy(f"p{number}") for number in range(PROXIES)]
                workers = [await mesh.worker(f"w{number}", "--engine", "external", "--engine-url", engine.url) for number in range(WORKERS)]
                for proxy in proxies:
                    await mesh.until_ready(proxy, *workers)
                before = await _load(mesh, proxies, WARM_S)
                switch.touch()
                await bootstrap.kill()
                during = await _load(mesh, proxies, for_s)
                fired = {node.name: _swallowed(switch, node.process.pid) for node in (*proxies, *workers)}
    return {"before": before, "during": during, "swallowed": fired, "for_s": for_s}


def measure(for_s: float) -> dict[str, Any]:
    """Outcomes of the requests before and during the dark, and which nodes had datagrams swallowed which way."""
    return uvloop.run(_measure(for_s))
