"""A steady load of requests, and what became of each: for tests and benchmarks of what goes wrong.

The client behaves as HTTP clients do: it keeps connections, and where a name has several addresses and one refuses the connection, it tries
the next. It never asks again once a request is on its way.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp

from tests.support.deployment import Deployment, Node
from tests.support.fake_engine import answer_to


@dataclass(slots=True)
class Outcome:
    """One request. ``problem`` is empty if the answer was right and whole; times are the loop's, in seconds."""

    began: float
    ended: float = 0.0
    status: int = 0
    worker: str = ""
    problem: str = ""

    @property
    def took_s(self) -> float:
        return self.ended - self.began


@dataclass
class Load:
    """``per_s`` requests a second from ``async with`` to `stop`, half of them streams, each answer compared with what the engine says."""

    mesh: Deployment
    proxies: list[Node]
    per_s: float
    max_tokens: int = 4
    model: str = "fake"
    outcomes: list[Outcome] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._rng = random.Random(7)
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None
        self._running: asyncio.Task[None] | None = None
        self._key = self.mesh.key()

    async def __aenter__(self) -> Load:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120))
        self._running = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    @property
    def problems(self) -> Counter[str]:
        return Counter(outcome.problem for outcome in self.outcomes if outcome.problem)

    async def until(self, count: int) -> None:
        """Return once so many requests are over."""
        while len(self.outcomes) < count:
            await asyncio.sleep(0.02)

    async def more(self, count: int) -> list[Outcome]:
        """The next so many to be over."""
        seen = len(self.outcomes)
        await self.until(seen + count)
        return self.outcomes[seen : seen + count]

    async def stop(self) -> None:
        """Begin no more, and wait for those under way."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await asyncio.gather(*self._tasks)
        if self._session is not None:
            await self._session.close()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += 1 / self.per_s
            await asyncio.sleep(max(0.0, due - loop.time()))
            task = asyncio.create_task(self._one())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _one(self) -> None:
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        outcome = Outcome(loop.time())
        stream = bool(number % 2)
        messages = [{"role": "user", "content": f"number {number}"}]
        body = {"model": self.model, "messages": messages, "max_tokens": self.max_tokens, "stream": stream}
        try:
            text = await self._ask(outcome, body)
            if outcome.status != 200:
                outcome.problem = f"{outcome.status}: {text[:300]}"
            elif text != answer_to(messages, self.max_tokens):
                outcome.problem = f"not the answer: {text[:200]!r}"
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError) as error:
            outcome.problem = f"{type(error).__name__}: {error}"
        outcome.ended = loop.time()
        self.outcomes.append(outcome)

    async def _ask(self, outcome: Outcome, body: dict[str, Any]) -> str:
        assert self._session is not None
        headers = {"Authorization": f"Bearer {self._key}", **self.headers}
        addresses = self._rng.sample(self.proxies, len(self.proxies))
        for left, proxy in zip(reversed(range(len(addresses))), addresses, strict=True):
            try:
                async with self._session.post(f"{proxy.api}/chat/completions", json=body, headers=headers) as response:
                    outcome.status, outcome.worker = response.status, response.headers.get("x-mesh-worker", "")
                    data = await response.read()
            except aiohttp.ClientConnectorError:
                if not left:
                    raise
                continue
            return _text(data, stream=body["stream"]) if response.status == 200 else data.decode(errors="replace")
        raise AssertionError("unreachable")


def _text(data: bytes, *, stream: bool) -> str:
    """What the answer says. Raises `ValueError` if a stream did not end as it should."""
    if not stream:
        return str(json.loads(data)["choices"][0]["message"]["content"])
    events = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise ValueError(f"a stream without its end: {data[-200:]!r}")
    deltas = [json.loads(event)["choices"] for event in events[:-1]]
    return "".join(choices[0]["delta"].get("content") or "" for choices in deltas if choices)
