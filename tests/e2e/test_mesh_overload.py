"""More than the mesh can do: who is turned away, and that memory stays where it is. Real processes."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from tests.e2e.conftest import chat_body, external
from tests.support.deployment import Deployment, Node, until
from tests.support.fake_engine import FakeEngine

LIMITS = ("--max-concurrency", "2", "--queue-limit", "6")


async def ask(
    mesh: Deployment, proxy: Node, key: str, *, priority: str = "interactive", text: str = "x", tokens: int = 4
) -> tuple[int, str]:
    """Status, and what ``retry-after`` says."""
    headers = {"Authorization": f"Bearer {key}", "x-priority": priority}
    body = chat_body(text, max_tokens=tokens)
    async with mesh.http.post(f"{proxy.api}/chat/completions", json=body, headers=headers) as response:
        await response.read()
        return response.status, response.headers.get("retry-after", "")


async def test_one_project_cannot_starve_another_and_who_is_shed_is_told_when_to_come_back(deployment: Deployment) -> None:
    async with FakeEngine(tokens_per_s=40, slots=2) as engine:
        await deployment.bootstrap()
        proxy = await deployment.proxy()
        worker = await external(deployment, "w1", engine, *LIMITS)
        await deployment.until_ready(proxy, worker)
        greedy, modest = deployment.key(project="greedy"), deployment.key(project="modest")
        told: list[tuple[int, str]] = []
        done = asyncio.Event()

        async def flood() -> None:
            while not done.is_set():
                told.append(await ask(deployment, proxy, greedy))
                await asyncio.sleep(0.02)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(30):
                tasks.create_task(flood())
            await until(lambda: _refused(told), what="the mesh to be full")
            answers = [await ask(deployment, proxy, modest) for _ in range(10)]
            done.set()
        assert [status for status, _ in answers] == [200] * 10
        statuses = Counter(status for status, _ in told)
        assert set(statuses) == {200, 429}
        assert all(retry_after for status, retry_after in told if status == 429)


async def _refused(told: list[tuple[int, str]]) -> bool:
    return any(status == 429 for status, _ in told)


async def test_less_urgent_requests_are_shed_first(deployment: Deployment) -> None:
    async with FakeEngine(tokens_per_s=40, slots=2) as engine:
        await deployment.bootstrap()
        proxy = await deployment.proxy()
        worker = await external(deployment, "w1", engine, *LIMITS)
        await deployment.until_ready(proxy, worker)
        key = deployment.key()
        batch = [asyncio.create_task(ask(deployment, proxy, key, priority="batch", tokens=20)) for _ in range(8)]
        async with asyncio.timeout(20):
            await engine.until(lambda stats: stats.running == 2)
        urgent = await asyncio.gather(*(ask(deployment, proxy, key) for _ in range(6)))
        assert [status for status, _ in urgent] == [200] * 6
        statuses = Counter([status for status, _ in await asyncio.gather(*batch)])
        assert statuses[429] >= 4, "those that waited made room"
        assert statuses[200] >= 2, "those that ran were left alone"


async def test_memory_stays_flat_under_a_flood_of_large_bodies(deployment: Deployment) -> None:
    async with FakeEngine(tokens_per_s=5) as engine:
        await deployment.bootstrap()
        proxy = await deployment.proxy("p1", "--max-body", "4MiB", "--max-bodies", "16MiB")
        worker = await external(deployment, "w1", engine, "--max-bodies", "16MiB")
        await deployment.until_ready(proxy, worker)
        key = deployment.key()
        large = "x" * 3_000_000
        assert (await ask(deployment, proxy, key, text=large[:1000]))[0] == 200
        before = [(node, _resident_bytes(node)) for node in (proxy, worker)]
        peaks: Counter[str] = Counter()
        flood = asyncio.gather(*(ask(deployment, proxy, key, text=large) for _ in range(60)))
        while not flood.done():
            for node, bytes_before in before:
                peaks[node.name] = max(peaks[node.name], _resident_bytes(node) - bytes_before)
            await asyncio.sleep(0.05)
        statuses = Counter(status for status, _ in await flood)
        assert statuses[429] + statuses[503] > 30, statuses
        for name, grown in peaks.items():
            assert grown < 120 << 20, f"{name} grew by {grown >> 20} MiB under 180 MiB of bodies"

        async def served() -> bool:
            return (await ask(deployment, proxy, key))[0] == 200

        await until(served, what="the mesh to serve as before")


def _resident_bytes(node: Node) -> int:
    pages = int(Path(f"/proc/{node.process.pid}/statm").read_text().split()[1])
    return pages * 4096
