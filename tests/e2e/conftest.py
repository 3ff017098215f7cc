"""A small mesh of real processes over stand-in engines, fresh for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.deployment import Deployment, Node
from tests.support.fake_engine import FakeEngine


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with Deployment(tmp_path) as mesh:
        yield mesh


@dataclass
class SmallMesh:
    """One bootstrap node, one proxy, two workers, each worker with an engine of its own that emits 20 tokens a second."""

    mesh: Deployment
    bootstrap: Node
    proxy: Node
    workers: tuple[Node, Node]
    engines: tuple[FakeEngine, FakeEngine]
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def chat_url(self) -> str:
        return f"{self.proxy.api}/chat/completions"


def chat_body(text: str = "Say something", *, max_tokens: int = 8, stream: bool = False, **more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": text}]
    return {"model": "fake", "messages": messages, "max_tokens": max_tokens, "stream": stream, **more}


@pytest.fixture
async def small(deployment: Deployment) -> AsyncIterator[SmallMesh]:
    async with FakeEngine(tokens_per_s=20) as one, FakeEngine(tokens_per_s=20) as two:
        bootstrap = await deployment.bootstrap()
        proxy = await deployment.proxy()
        first = await external(deployment, "w1", one)
        second = await external(deployment, "w2", two)
        await deployment.until_ready(proxy, first, second)
        yield SmallMesh(deployment, bootstrap, proxy, (first, second), (one, two), deployment.key())


async def external(mesh: Deployment, name: str, engine: FakeEngine, *arguments: str, fresh: bool = True) -> Node:
    """A worker in front of a stand-in engine."""
    return await mesh.worker(name, "--engine", "external", "--engine-url", engine.url, *arguments, fresh=fresh)
