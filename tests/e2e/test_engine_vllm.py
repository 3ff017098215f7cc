"""Real vLLM below the real supervisor. Needs `eval "$(scripts/real-vllm --export)"`; each start takes half a minute."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.processes import gone, processes_of
from tests.support.vllm import ENVIRON, MARKS, MODEL, NAME, vllm_arguments, vllm_command
from worker.engine import EngineKind, EngineSpec, Stage, Supervisor, Task, Timing, make_engine

ROOT = Path(__file__).parents[2]

pytestmark = MARKS


def vllm_spec(cache_dir: Path) -> EngineSpec:
    return EngineSpec(
        kind=EngineKind.VLLM,
        source=MODEL,
        served_name=NAME,
        cache_dir=cache_dir,
        vllm_command=vllm_command(),
        args=vllm_arguments("bfloat16"),
        env=ENVIRON,
    )


async def chat(supervisor: Supervisor, client: aiohttp.ClientSession, **options: Any) -> aiohttp.ClientResponse:
    body = {"model": NAME, "messages": [{"role": "user", "content": "Say hi"}], "temperature": 0, **options}
    return await client.post(f"{supervisor.base_url}/v1/chat/completions", json=body)


async def until_load(supervisor: Supervisor, running: int) -> None:
    """Return when vLLM's own metrics tell of so many running requests; they lag behind by up to seconds."""
    async with asyncio.timeout(30):
        while supervisor.load is None or supervisor.load.running != running:
            await asyncio.sleep(0.05)


async def test_vllm_gets_ready_answers_notices_cancel_and_the_death_of_its_core(tmp_path: Path) -> None:
    changed = asyncio.Event()
    supervisor = Supervisor(
        make_engine(vllm_spec(tmp_path)),
        state_dir=tmp_path,
        rng=random.Random(1),
        timing=Timing(health_every_s=0.2, backoff_first_s=0.1),
        on_change=lambda _: changed.set(),
    )
    async with asyncio.timeout(300), asyncio.TaskGroup() as group:
        group.create_task(supervisor.run())
        await supervisor.wait_ready()
        (served,) = supervisor.models
        assert served.tasks == {Task.CHAT, Task.COMPLETIONS, Task.RESPONSES}  # no embeddings: found out by asking
        assert served.context_tokens == 1_024
        assert supervisor.load is not None
        assert supervisor.load.kv_use is not None

        async with aiohttp.ClientSession(headers=dict(supervisor.engine.headers)) as client:
            answer = await (await chat(supervisor, client, max_tokens=5)).json()
            assert answer["usage"]["completion_tokens"] == 5
            endless = await chat(supervisor, client, max_tokens=900, stream=True, ignore_eos=True)
            await endless.content.readline()
            await until_load(supervisor, 1)
            endless.close()
            await until_load(supervisor, 0)

        assert supervisor.pid is not None
        below = processes_of(supervisor.pid)
        core = next(pid for pid, name in below.items() if "EngineCore" in name)
        changed.clear()
        os.kill(core, signal.SIGKILL)
        await changed.wait()
        assert not supervisor.readiness.is_ready
        for pid in below:
            await gone(pid)
        while supervisor.readiness.stage is not Stage.LOADING:
            changed.clear()
            await changed.wait()
        again = supervisor.pid
        await supervisor.stop()
        assert again is None or not processes_of(again)
    assert supervisor.readiness.restarts == 1


WORKER = """
import asyncio, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from tests.e2e.test_engine_vllm import vllm_spec
from worker.engine import Supervisor, Timing, make_engine
async def main(state):
    supervisor = Supervisor(make_engine(vllm_spec(state)), state_dir=state, timing=Timing(grace_s=5))
    async with asyncio.TaskGroup() as group:
        group.create_task(supervisor.run())
        await supervisor.wait_ready()
        print(f'{{"group": {supervisor.pid}}}', flush=True)
asyncio.run(main(Path(sys.argv[2])))
"""


async def test_worker_killed_leaves_no_vllm_behind(tmp_path: Path) -> None:
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, str(ROOT), str(tmp_path), stdout=asyncio.subprocess.PIPE)
    assert worker.stdout is not None
    async with asyncio.timeout(200):
        line = b""
        while not line.startswith(b'{"group"'):
            line = await worker.stdout.readline()
            assert line, "the worker ended by itself"
    below = processes_of(json.loads(line)["group"])
    assert len(below) >= 3, below  # the launcher, the API server, EngineCore
    worker.kill()
    await worker.wait()
    for pid in below:
        await gone(pid)
