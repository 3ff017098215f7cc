"""What limits, metering and revocation cost a request together: CPU of the whole process, the ledger's threads and disk included."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mesh.apikey import ApiKey, mint
from mesh.authority import KEYS_KID
from mesh.client import Client, ClientSettings
from mesh.clock import SystemClock
from mesh.commands.documents import change_document
from mesh.documents import Document
from mesh.freshness import Freshness
from mesh.ledger import COMMIT_EVERY_S
from mesh.limits import KIND, Limit, Limits, encode_limits, project_name
from mesh.revocations import NONE, RevocationList
from mesh.runtime import settle_memory
from mesh.trust import Role
from proxy.gate import Gate
from proxy.limits.limiter import Limiter
from proxy.metering import Meter
from tests.support.authority import make_mesh
from tests.support.deployment import Deployment, Node
from tests.support.fake_engine import FakeEngine
from tests.support.ledgers import open_ledger
from tests.support.limits import call_of

Json = dict[str, Any]
MOST_US, MOST_TOKEN_US = 10.0, 0.2
SECONDS, ROUNDS, BURST_S = 1.0, 8, 0.1
TRAILER = {"in": 100, "out": 50, "cached": 40, "queue_ms": 1, "engine_ms": 30}
UNLIMITED = 1e12
WARM_ROUNDS, REAL_ROUNDS, REAL_REQUESTS, AT_ONCE = 2, 16, 400, 32
BODY = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
BARE = Path(__file__).with_name("bare.py")


class Reader:
    """In `proxy.downstream.Downstream`'s place."""

    bytes_sent = 0
    pieces = 0


def measure() -> list[Json]:
    """At so many requests a second, what they cost more than with a key's signature alone."""
    return [asyncio.run(_measure(per_s)) for per_s in (2000, 1000)] + [_token()]


async def _measure(per_s: int) -> Json:
    now, mesh = time.time(), make_mesh(now=time.time() - 60)
    claims = ApiKey(id=b"12345678", project="p", roles=frozenset({"invoker"}), not_before=now - 60, expires=now + 3600)
    limited = mint(replace(claims, rps=UNLIMITED, tps=UNLIMITED), mesh.keys_issuer, KEYS_KID)
    plain = Gate(mesh.trust(), clock=SystemClock())
    revoked = RevocationList()
    revoked.newest = replace(NONE, seq=1, keys={os.urandom(8): now + 9 for _ in range(5000)})
    gate = Gate(
        mesh.trust(), clock=SystemClock(), revoked=revoked, freshness=Freshness(stale_s=3600.0, looked=True, fresh_until=now + 3600)
    )
    limiter = Limiter(b"m" * 32, 1, send=lambda peer, kind, fields: None, clock=SystemClock())
    limiter.shares.looked = True
    body = encode_limits(Limits(whole=Limit(rps=UNLIMITED, tps=UNLIMITED)))
    limiter.take_document(Document(kind=KIND, name=project_name("p"), seq=1, previous=b"", issued=0.0, body=body))
    call, header, downstream = call_of(max_tokens=100), f"Bearer {limited}", Reader()
    with tempfile.TemporaryDirectory() as folder:
        ledger = open_ledger(Path(folder), mesh.identity(Role.PROXY, now=now))
        ledger.start()
        meter = Meter(ledger)
        sharing = asyncio.create_task(limiter.run())
        async with asyncio.timeout(60):
            while True:
                if limiter.shares.entitled:
                    break
                await asyncio.sleep(0.1)

        def on() -> None:
            noted = meter.open("req_0123456789abcdef01234567", "chat", 1.0)
            key = noted.key = gate.authenticate(header)
            meter.check()
            noted.model = "m"
            hold = limiter.enter(key, call)
            assert hold is not None
            assert not isinstance(hold, str)
            attempt = noted.begin(b"w" * 32, downstream)  # type: ignore[arg-type]
            hold.headers()
            attempt.trailer, attempt.status = TRAILER, "ok"
            downstream.bytes_sent, downstream.pieces = 4000, 50
            attempt.end(2.0)
            downstream.bytes_sent = downstream.pieces = 0
            hold.seen(accepted=True, sent_bytes=4000)
            hold.settle(100, 50, 40)
            hold.end()
            meter.close(noted, "ok", 3.0)

        def off() -> None:
            plain.authenticate(header)

        settle_memory()
        rounds = []
        for _ in range(ROUNDS):
            without = await _paced(off, per_s)
            await ledger.settled()
            rounds.append((*await _paced(on, per_s), *without))
        sharing.cancel()
        await ledger.stop()
    whole, loop, idle, loop_idle = map(min, zip(*rounds, strict=True))
    cost_us = whole - idle
    figures = {"us": round(cost_us, 2), "event_loop_us": round(loop - loop_idle, 2), "target": f"≤ {MOST_US:g} µs a request"}
    return {"name": f"four limits, receipts, 5,000 revoked; {per_s} requests/s", **figures, "ok": cost_us <= MOST_US}


async def _paced(step: Callable[[], None], per_s: int) -> tuple[float, float]:
    """Microseconds of CPU for each of so many steps a second, in bursts: of the process, and of this thread."""
    share = round(per_s * BURST_S)
    loop = asyncio.get_running_loop()
    due, began, thread_began = loop.time(), time.process_time_ns(), time.thread_time_ns()
    bursts = round(SECONDS / BURST_S)
    for _ in range(bursts):
        for _ in range(share):
            step()
        due += BURST_S
        await asyncio.sleep(max(0.0, due - loop.time()))
    steps = 1000 * bursts * share
    return (time.process_time_ns() - began) / steps, (time.thread_time_ns() - thread_began) / steps


def _token() -> Json:
    """What is counted with each piece of an answer."""
    downstream, count, costs = Reader(), 1_000_000, []

    def cpu(steps: int) -> int:
        began = time.process_time_ns()
        for _ in range(steps):
            downstream.pieces += 1
        return time.process_time_ns() - began

    def empty(steps: int) -> int:
        began = time.process_time_ns()
        for _ in range(steps):
            pass
        return time.process_time_ns() - began

    for _ in range(ROUNDS):
        costs.append((cpu(count) - empty(count)) / count / 1000)
    cost_us = max(0.0, min(costs))
    return {"name": "a token", "us": round(cost_us, 3), "target": f"≤ {MOST_TOKEN_US:g} µs a token", "ok": cost_us <= MOST_TOKEN_US}


# -- a real proxy


def real() -> list[Json]:
    """Two real proxies, one that limits and meters and one that does neither, asked in turns."""
    return asyncio.run(_real())


async def _real() -> list[Json]:
    with tempfile.TemporaryDirectory(prefix="infermesh-limits-") as folder:
        async with Deployment(Path(folder)) as mesh, FakeEngine() as engine:
            await mesh.bootstrap()
            full = await mesh.proxy("full")
            bare = await mesh.proxy("bare", program=BARE)
            worker = await mesh.worker("w1", "--engine", "external", "--engine-url", engine.url)
            for proxy in (full, bare):
                await mesh.until_ready(proxy, worker)
            async with Client(ClientSettings(url=full.root, api_key=mesh.key("viewer", "admin"))) as client:
                body = encode_limits(Limits(whole=Limit(rps=1e6, tps=1e9, concurrency=1e4, tokens_per_day=1e12)))
                await change_document(client, mesh.authority, KIND, project_name("limited"), lambda former: body)
            await asyncio.sleep(8)
            limited, free = mesh.key(project="limited"), mesh.key(project="free")
            began = time.monotonic()
            rounds = [(await _asked(mesh, full, limited), await _asked(mesh, bare, free)) for _ in range(REAL_ROUNDS)][WARM_ROUNDS:]
            per_s = 2 * REAL_ROUNDS * REAL_REQUESTS / (time.monotonic() - began)
    with_us, without_us = (statistics.median(side) for side in zip(*rounds, strict=True))
    pairs = [one - other for one, other in rounds]
    return [
        {
            "name": f"a real proxy, four limits and receipts; {per_s:.0f} requests/s, commits and beats with them",
            "us": round(with_us, 1),
            "without_us": round(without_us, 1),
            "more_us": round(statistics.median(pairs), 1),
            "ratio": round(with_us / without_us, 3),
            "target": "told, not judged",
            "ok": True,
        }
    ]


async def _asked(mesh: Deployment, proxy: Node, key: str) -> float:
    """Microseconds of the proxy's CPU for each of some requests, a few at a time."""
    headers = {"Authorization": f"Bearer {key}"}
    left = iter(range(REAL_REQUESTS))

    async def ask() -> None:
        for _ in left:
            async with mesh.http.post(f"{proxy.api}/chat/completions", json=BODY, headers=headers) as response:
                await response.read()
                assert response.status == 200, await response.text()

    before = _cpu_ns(proxy.process.pid)
    await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
    await asyncio.sleep(2 * COMMIT_EVERY_S)  # the last receipts' commit counts
    return (_cpu_ns(proxy.process.pid) - before) / 1000 / REAL_REQUESTS


def _cpu_ns(pid: int) -> int:
    """Of all threads, by the scheduler's own count."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())
