"""`scripts/bench/run crowd`: valid traffic beside thousands of connections that are idle, dribble heads or bodies, or do not read."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import aiohttp
import click
import uvloop
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from bench import processes  # noqa: E402
from mesh.runtime import raise_file_limit  # noqa: E402
from tests.support.deployment import Deployment, Node  # noqa: E402
from tests.support.front import post  # noqa: E402

KINDS = ("idle", "kept", "head", "body", "unread")
SHARES = (400, 300, 215, 80, 5)
BODY: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
DRIP_S = 5.0
OPENERS = 50


class Member(asyncio.Protocol):
    """One of the crowd."""

    def __init__(self, crowd: Crowd, kind: str) -> None:
        self.crowd, self.kind = crowd, kind
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.crowd.members.add(self)
        begun = {
            "kept": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
            "head": b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ",
            "body": post("/v1/chat/completions", b"{", self.crowd.key, content_length="100000"),
            "unread": post("/v1/chat/completions", self.crowd.long, self.crowd.key),
        }.get(self.kind)
        if begun:
            self.transport.write(begun)
        if self.kind == "unread":
            self.transport.pause_reading()

    def drip(self) -> None:
        if self.transport is not None and self.kind in ("head", "body"):
            self.transport.write(b" ")

    def connection_lost(self, exc: Exception | None) -> None:
        self.crowd.members.discard(self)
        self.crowd.closed[self.kind] += 1


class Crowd:
    """Keeps itself at ``size`` connections: who is closed comes again."""

    def __init__(self, proxy: Node, key: str, size: int) -> None:
        self.host, self.port = "127.0.0.1", int(proxy.root.rsplit(":", 1)[1])
        self.key, self.size = key, size
        self.long = json.dumps(
            {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2000, "stream": True}
        ).encode()
        self.members: set[Member] = set()
        self.closed: Counter[str] = Counter()
        self._rng = random.Random(1)

    async def gather(self) -> None:
        loop = asyncio.get_running_loop()

        async def open_some() -> None:
            while len(self.members) < self.size:
                kind = self._rng.choices(KINDS, SHARES)[0]
                await loop.create_connection(lambda: Member(self, kind), self.host, self.port)  # noqa: B023

        await asyncio.gather(*(open_some() for _ in range(OPENERS)), return_exceptions=True)

    async def live(self) -> None:
        """Drip, and fill up. Never returns."""
        while True:
            members = list(self.members)
            step = max(1, len(members) // int(DRIP_S * 10))
            for at in range(0, len(members), step):
                for member in members[at : at + step]:
                    member.drip()
                await asyncio.sleep(0.1)
            await self.gather()

    def leave(self) -> None:
        for member in list(self.members):
            if member.transport is not None:
                member.transport.abort()


async def measure(proxies: list[Node], key: str, seconds: float, clients: int) -> list[dict[str, float]]:
    """Valid requests in a closed loop, to each proxy in turn, so that what else the machine does slows them alike. Figures by proxy."""
    body = {**BODY, "max_tokens": 1}
    took: list[list[float]] = [[] for _ in proxies]
    failed = [0 for _ in proxies]
    until = time.monotonic() + seconds

    async def client(http: aiohttp.ClientSession) -> None:
        while time.monotonic() < until:
            for number, proxy in enumerate(proxies):
                began = time.monotonic()
                try:
                    async with http.post(f"{proxy.api}/chat/completions", json=body) as response:
                        await response.read()
                        failed[number] += response.status != 200
                except aiohttp.ClientError:
                    failed[number] += 1
                took[number].append((time.monotonic() - began) * 1000)
                await asyncio.sleep(0.01)

    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}, timeout=aiohttp.ClientTimeout(total=60)) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return [_figures(times, count) for times, count in zip(took, failed, strict=True)]


def _figures(took: list[float], failed: int) -> dict[str, float]:
    cuts = statistics.quantiles(took, n=1000)
    return {"requests": len(took), "failed": failed, "p50_ms": round(cuts[499], 1), "p99_ms": round(cuts[989], 1)}


async def run(size: int, seconds: float, clients: int, engine_url: str) -> dict[str, Any]:
    """Two proxies: the crowd comes to the second, the first is there to compare with."""
    with tempfile.TemporaryDirectory(prefix="infermesh-crowd-") as folder:
        async with Deployment(Path(folder)) as mesh:
            await mesh.bootstrap()
            proxies = [await mesh.proxy("p1"), await mesh.proxy("p2")]
            worker = await mesh.worker("w1", "--engine", "external", "--engine-url", engine_url)
            for proxy in proxies:
                await mesh.until_ready(proxy, worker)
            key, pid = mesh.key(), proxies[1].process.pid
            await measure(proxies, key, 3.0, clients)
            phases: list[dict[str, Any]] = []
            crowd, living = Crowd(proxies[1], key, size), None
            for name in ("alone", "crowd", "crowd, later", "alone again"):
                if name == "crowd":
                    await crowd.gather()
                    living = asyncio.create_task(crowd.live())
                    await asyncio.sleep(3.0)
                if name == "alone again" and living is not None:
                    living.cancel()
                    crowd.leave()
                    await asyncio.sleep(3.0)
                before = processes.cpu_s([pid])
                quiet, crowded = await measure(proxies, key, seconds, clients)
                cpu = (processes.cpu_s([pid]) - before) / seconds
                phases.append(
                    {
                        "phase": name,
                        "open": len(crowd.members),
                        "requests": quiet["requests"] + crowded["requests"],
                        "failed": quiet["failed"] + crowded["failed"],
                        "p50_ms": f"{quiet['p50_ms']} / {crowded['p50_ms']}",
                        "p99_ms": f"{quiet['p99_ms']} / {crowded['p99_ms']}",
                        "ratio": round(crowded["p99_ms"] / quiet["p99_ms"], 2),
                        "cores": round(cpu, 3),
                        "rss_mib": processes.rss_bytes([pid]) >> 20,
                    }
                )
    report: dict[str, Any] = {"connections": size, "phases": phases, "closed": dict(crowd.closed)}
    report["p99_ratio"] = max(phase["ratio"] for phase in phases if "crowd" in phase["phase"])
    report["held"] = report["p99_ratio"] < 2 and not any(phase["failed"] for phase in phases)
    return report


@click.command(help=__doc__)
@click.option("--connections", default=10_000, show_default=True, help="How many there are in the crowd.")
@click.option("--seconds", default=20.0, show_default=True, help="Of each of the four phases.")
@click.option("--clients", default=8, show_default=True, help="Valid ones, each with one request at a time.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
def main(connections: int, seconds: float, clients: int, json_path: Path | None) -> None:
    raise_file_limit()
    command = [sys.executable, str(ROOT / "tests/support/fake_engine.py"), "--port", "0", "--tokens-per-s", "50"]
    report = uvloop.run(_with_engine(command, connections, seconds, clients))
    table = Table(*report["phases"][0])
    for phase in report["phases"]:
        table.add_row(*map(str, phase.values()))
    console = Console()
    console.print(table)
    console.print(f"p99 beside {connections} connections: {report['p99_ratio']} times that of a proxy without; target: less than 2")
    if json_path:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if report["held"] else 1)


async def _with_engine(command: list[str], connections: int, seconds: float, clients: int) -> dict[str, Any]:
    engine = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert engine.stdout is not None
    try:
        url = json.loads(await engine.stdout.readline())["url"]
        return await run(connections, seconds, clients, url)
    finally:
        engine.terminate()
        await engine.wait()


if __name__ == "__main__":
    main()
