"""`scripts/bench/run revocation`: revoke keys under load on several proxies, and what the list costs a request."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from mesh.apikey import ApiKey, KeyVerifier, mint  # noqa: E402
from mesh.authority import KEYS_KID  # noqa: E402
from mesh.client import Client, ClientSettings  # noqa: E402
from mesh.clock import SystemClock  # noqa: E402
from mesh.commands.documents import change_document  # noqa: E402
from mesh.documents import Document, next_version, seal_document  # noqa: E402
from mesh.freshness import Freshness  # noqa: E402
from mesh.revocations import KIND, NAME, NONE, RevocationList, Revocations, encode_revocations, parse_revocations  # noqa: E402
from proxy.gate import Gate  # noqa: E402
from tests.support.authority import make_mesh  # noqa: E402
from tests.support.deployment import Deployment, Node  # noqa: E402
from tests.support.fake_engine import FakeEngine  # noqa: E402

BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


async def ask(mesh: Deployment, node: Node, key: str) -> int:
    async with mesh.http.post(f"{node.api}/chat/completions", json=BODY, headers={"Authorization": f"Bearer {key}"}) as response:
        await response.read()
        return response.status


async def load(mesh: Deployment, proxies: list[Node], key: str, per_s: float, refused: list[int]) -> None:
    """Calls with a key that nobody revokes, spread over the proxies; every one must succeed."""

    async def one() -> None:
        if (status := await ask(mesh, random.choice(proxies), key)) != 200:
            refused.append(status)

    async with asyncio.TaskGroup() as calls:
        while True:
            calls.create_task(one())
            await asyncio.sleep(1 / per_s)


async def last_success(mesh: Deployment, node: Node, key: str, began: asyncio.Event, pause_s: float) -> tuple[float, float]:
    """Keep calling until refused: when the last call that succeeded was sent, and when the first refusal came."""
    last = 0.0
    while True:
        sent = time.monotonic()
        status = await ask(mesh, node, key)
        if status == 401:
            return last, time.monotonic()
        assert status == 200, status
        if began.is_set():
            last = sent
        await asyncio.sleep(pause_s)


async def measure_spread(count: int, rounds: int, per_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as home:
        async with Deployment(Path(home)) as mesh, FakeEngine() as engine:
            await mesh.bootstrap()
            proxies = [await mesh.proxy(f"p{number}") for number in range(count)]
            worker = await mesh.worker("w0", "--engine", "external", "--engine-url", engine.url)
            for proxy in proxies:
                await mesh.until_ready(proxy, worker)
            good, refused = mesh.key(), []
            loading = asyncio.create_task(load(mesh, proxies, good, per_s, refused))
            took, posts = [], []
            for _ in range(rounds):
                last, posted = await one_round(mesh, proxies)
                took += last
                posts.append(posted)
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            return {"refused_after_s": sorted(took), "post_s": sorted(posts), "others_refused": len(refused)}


async def one_round(mesh: Deployment, proxies: list[Node]) -> tuple[list[float], float]:
    """Seconds from the operator's command to the last call that still got through, at each proxy; and how long the command took."""
    now = time.time()
    claims = ApiKey(id=os.urandom(8), project="p", roles=frozenset({"invoker"}), not_before=now - 1, expires=now + 3600)
    key = mesh.authority.mint_key(claims)
    began = asyncio.Event()
    asking = [asyncio.create_task(last_success(mesh, node, key, began, pause_s=0.05)) for node in proxies]
    await asyncio.sleep(1.0)

    def add(former: Document | None) -> bytes:
        revoked = parse_revocations(former) if former is not None else NONE
        return encode_revocations(revoked.with_key(claims.id, end=claims.expires).pruned(time.time()))

    async with Client(ClientSettings(url=random.choice(proxies).root, api_key=mesh.key("viewer"))) as client:
        started = time.monotonic()
        began.set()
        await change_document(client, mesh.authority, KIND, NAME, add)
        posted = time.monotonic() - started
    return [max(0.0, last - started) for last, _ in await asyncio.gather(*asking)], posted


def measure_cost(keys: int = 10_000, ids: int = 5_000, calls: int = 200_000) -> dict[str, float]:
    """CPU time of one accepted key, without and with a full list, and of taking a new list while ``keys`` keys are remembered."""
    now = time.time()
    mesh = make_mesh(now=now - 3600)
    base = ApiKey(id=bytes(8), project="p", roles=frozenset({"invoker"}), not_before=now - 60, expires=now + 3600)
    texts = [mint(replace(base, id=number.to_bytes(8)), mesh.keys_issuer, KEYS_KID) for number in range(64)]
    full = replace(NONE, keys={os.urandom(8): now + 9 for _ in range(ids)})
    figures: dict[str, float] = {}

    def gate(revoked: RevocationList, freshness: Freshness | None) -> Gate:
        return Gate(mesh.trust(), clock=SystemClock(), revoked=revoked, freshness=freshness)

    def per_call(gate: Gate) -> float:
        headers = [f"Bearer {text}" for text in texts]
        for header in headers:
            gate.authenticate(header)
        best = float("inf")
        for _ in range(5):
            began = time.process_time()
            for number in range(calls // 5):
                gate.authenticate(headers[number & 63])
            best = min(best, (time.process_time() - began) / (calls // 5))
        return best * 1e6

    figures["without_us"] = per_call(gate(RevocationList(), None))
    revoked = RevocationList()
    revoked.take(listed(mesh, full, now))
    figures["with_us"] = per_call(gate(revoked, Freshness(stale_s=3600.0, looked=True, fresh_until=now + 3600)))
    verifier = KeyVerifier(mesh.trust(), revoked=revoked, size=keys)
    claims = verifier.verify(texts[0], now=now)
    verifier._known.update((number.to_bytes(32), (claims.expires, claims)) for number in range(keys))
    document = listed(mesh, full, now)
    began = time.process_time()
    revoked.take(document)
    figures["new_list_ms"] = (time.process_time() - began) * 1e3
    return figures


def listed(mesh: Any, revoked: Revocations, now: float) -> Document:
    return seal_document(next_version(None, kind=KIND, name=NAME, body=encode_revocations(revoked), now=now), mesh.keys_issuer, KEYS_KID)


def share(values: list[float], part: float) -> float:
    return values[min(len(values) - 1, int(part * len(values)))]


@click.command(epilog="Example: scripts/bench/run revocation --proxies 8 --rounds 25")
@click.option("--proxies", default=8, show_default=True, help="Proxy processes; 0 measures the cost alone.")
@click.option("--rounds", default=25, show_default=True, help="Keys revoked one after the other.")
@click.option("--load", "per_s", default=60.0, show_default=True, help="Calls per second with other keys, over all proxies.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def main(proxies: int, rounds: int, per_s: float, as_json: bool) -> None:
    """Revoke keys that are in use on several proxies under load; when does the last call with them get through?"""
    figures: dict[str, Any] = {"cost": measure_cost()}
    if proxies:
        figures["spread"] = uvloop.run(measure_spread(proxies, rounds, per_s))
    if as_json:
        print(json.dumps(figures))
        return
    table = Table(title="Revocation", box=None, header_style="bold")
    for column in ("what", "figure"):
        table.add_column(column)
    if proxies:
        took = figures["spread"]["refused_after_s"]
        table.add_row(f"refused everywhere, {rounds} keys at {proxies} proxies: p50", f"{statistics.median(took) * 1e3:.0f} ms")
        table.add_row("p99", f"{share(took, 0.99) * 1e3:.0f} ms")
        table.add_row("slowest", f"{took[-1] * 1e3:.0f} ms")
        table.add_row("the operator's command, p50", f"{statistics.median(figures['spread']['post_s']) * 1e3:.0f} ms")
        table.add_row("calls with other keys that failed meanwhile", str(figures["spread"]["others_refused"]))
    cost = figures["cost"]
    table.add_row("accepting a known key, no list", f"{cost['without_us']:.2f} µs")
    table.add_row("the same with 5,000 revoked ids and a staleness", f"{cost['with_us']:.2f} µs")
    table.add_row("taking a new list with 10,000 keys remembered", f"{cost['new_list_ms']:.1f} ms")
    Console().print(table)


main()
