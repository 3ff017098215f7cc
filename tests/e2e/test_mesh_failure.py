"""Workers that die, fall silent, stand still or become slow under load: no request is lost, and the sick get no more.

Real processes. How long each takes is measured by `scripts/bench/run failure`; here it is only that it happens.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tests.e2e.conftest import chat_body, external
from tests.support import fake_engine
from tests.support.deployment import Deployment, Node, events, until
from tests.support.fake_engine import FakeEngine, Misbehaviour, Mode
from tests.support.load import Load
from tests.support.processes import command_line, descendants


@dataclass
class Trio:
    """One proxy and three workers."""

    mesh: Deployment
    proxy: Node
    workers: list[Node]
    engines: list[FakeEngine]
    key: str

    async def about(self, number: int) -> dict[str, Any]:
        return (await self.mesh.workers(self.proxy, self.key)).get(self.workers[number].id, {})

    async def until_standing(self, number: int, *standings: str) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        async def there() -> bool:
            seen.update(await self.about(number))
            return seen.get("standing") in standings

        await until(there, what=f"{self.workers[number].name} to be {' or '.join(standings)}")
        return seen

    def served_by(self, number: int) -> str:
        return self.workers[number].id[:12]


@asynccontextmanager
async def trio(mesh: Deployment, *arguments: str, **engine: Any) -> AsyncIterator[Trio]:
    async with AsyncExitStack() as stack:
        await mesh.bootstrap()
        proxy = await mesh.proxy()
        engines = [await stack.enter_async_context(FakeEngine(**engine)) for _ in range(3)]
        workers = list(await asyncio.gather(*(external(mesh, f"w{n}", one, *arguments) for n, one in enumerate(engines))))
        await mesh.until_ready(proxy, *workers)
        yield Trio(mesh, proxy, workers, engines, mesh.key())


async def test_killed_worker_costs_no_request(deployment: Deployment) -> None:
    async with trio(deployment, tokens_per_s=50) as three, Load(deployment, [three.proxy], per_s=30) as load:
        await load.until(30)
        await three.workers[0].kill()
        after = (await load.more(60))[30:]
        assert three.served_by(0) not in {outcome.worker for outcome in after}
        await load.stop()
        begun_there = sum("without its end" in problem or "ClientPayloadError" in problem for problem in load.problems.elements())
        assert begun_there == load.problems.total(), load.problems


async def test_silent_worker_gets_no_more_and_what_it_had_goes_elsewhere(deployment: Deployment) -> None:
    async with trio(deployment) as three, Load(deployment, [three.proxy], per_s=30) as load:
        await load.until(30)
        three.workers[0].process.send_signal(signal.SIGSTOP)
        try:
            seen = await three.until_standing(0, "suspect", "")
            assert seen.get("standing_reason", "silent").startswith("silent") or not seen["linked"]
            after = (await load.more(90))[60:]
            assert three.served_by(0) not in {outcome.worker for outcome in after}
        finally:
            three.workers[0].process.send_signal(signal.SIGCONT)
        await deployment.until_ready(three.proxy, three.workers[0])
        await load.stop()
        assert not load.problems, "none had had a byte: all are answered elsewhere"


async def test_proxy_that_stood_still_loses_no_request_that_has_had_no_byte(deployment: Deployment) -> None:
    """Its workers have given their links up meanwhile, all of them."""
    async with trio(deployment) as three:
        for engine in three.engines:
            engine.prefill_s = 60
        asking = [asyncio.create_task(_whole(three)) for _ in range(6)]
        async with asyncio.timeout(20):
            while sum(engine.stats.running for engine in three.engines) < len(asking):
                await asyncio.sleep(0.05)
        three.proxy.process.send_signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(30):  # engines learn that nobody waits
                while any(engine.stats.running for engine in three.engines):
                    await asyncio.sleep(0.05)
            for engine in three.engines:
                engine.prefill_s = 0
        finally:
            three.proxy.process.send_signal(signal.SIGCONT)
        assert await asyncio.gather(*asking) == [200] * len(asking)


async def _whole(three: Trio) -> int:
    headers = {"Authorization": f"Bearer {three.key}"}
    async with three.mesh.http.post(
        f"{three.proxy.api}/chat/completions", json=chat_body("once", max_tokens=2), headers=headers
    ) as response:
        await response.read()
        return response.status


async def test_wedged_engine_is_seen_by_its_worker_and_its_requests_move(deployment: Deployment) -> None:
    """It answers its health check, and computes nothing."""
    async with trio(deployment) as three, Load(deployment, [three.proxy], per_s=30) as load:
        await load.until(30)
        three.engines[0].misbehave(Misbehaviour(mode=Mode.HANG))
        seen = await three.until_standing(0, "suspect")
        assert "stands still" in seen["standing_reason"]
        assert seen["state"] == "ready", "its state says nothing of it"
        await load.more(60)
        started = three.engines[0].stats.started
        await load.more(60)
        asked = three.engines[0].stats.started - started
        assert asked <= 4, "nothing but its worker's own question for a token"
        three.engines[0].misbehave(None)
        await three.until_standing(0, "trusted")
        await load.stop()
        assert not load.problems


async def test_stream_leaves_an_engine_that_was_stopped(deployment: Deployment) -> None:
    """How soon is measured elsewhere: its worker says that it knows, and does not give the engine up for that."""
    await deployment.bootstrap()
    proxy = await deployment.proxy()
    workers = [await deployment.worker(name, *_vllm("--tokens-per-s", "50"), "--stall-timeout", "60s") for name in ("w1", "w2")]
    await deployment.until_ready(proxy, *workers)
    body = {"model": "fake", "messages": [{"role": "user", "content": "Say much"}], "max_tokens": 300, "temperature": 0, "stream": True}
    headers = {"Authorization": f"Bearer {deployment.key()}"}

    async def ask(*, stop: bool) -> str:
        said: list[str] = []
        async with deployment.http.post(f"{proxy.api}/chat/completions", json=body, headers=headers) as response, events(response) as found:
            victim = next(worker for worker in workers if worker.id.startswith(response.headers["x-mesh-worker"]))
            async for data in found:
                if stop and len(said) == 5:
                    os.kill(_engine_of(victim), signal.SIGSTOP)
                said.append("" if data == b"[DONE]" else json.loads(data)["choices"][0]["delta"].get("content") or "")
        if stop:
            assert "engine.halted" in victim.log.read_text()
            os.kill(_engine_of(victim), signal.SIGCONT)
        return "".join(said)

    undisturbed = await ask(stop=False)
    assert await ask(stop=True) == undisturbed
    _, status = await deployment.get(f"{proxy.root}/mesh/v1/status", deployment.key())
    assert status["proxy"]["streams"]["moved"] == 1


async def test_engine_that_stands_still_for_long_is_restarted(deployment: Deployment) -> None:
    await deployment.bootstrap()
    proxy = await deployment.proxy()
    worker = await deployment.worker("w1", *_vllm(), "--stall-timeout", "4s")
    await deployment.until_ready(proxy, worker)
    engine = _engine_of(worker)
    key = deployment.key()
    async with Load(deployment, [proxy], per_s=5) as load:
        await load.until(5)
        os.kill(engine, signal.SIGSTOP)
        states: list[str] = []

        async def restarted() -> bool:
            states.append((await deployment.workers(proxy, key))[worker.id]["state"])
            return states[-1] == "ready" and any(state != "ready" for state in states)

        await until(restarted, what="the engine to be restarted")
        assert _engine_of(worker) != engine
        assert "engine.condemned" in worker.log.read_text()
        last = (await load.more(25))[-10:]
        assert [outcome.problem for outcome in last] == [""] * 10


async def test_worker_that_becomes_ten_times_slower_is_taken_out_and_comes_back(deployment: Deployment) -> None:
    async with trio(deployment, tokens_per_s=200) as three, Load(deployment, [three.proxy], per_s=20, max_tokens=40) as load:
        await load.until(60)
        three.engines[0].tokens_per_s = 10
        seen = await three.until_standing(0, "ejected")
        assert "times slower" in seen["standing_reason"]
        three.engines[0].tokens_per_s = 200
        await three.until_standing(0, "trusted")
        await load.stop()
        assert not load.problems
        async with deployment.http.get(f"{three.proxy.root}/metrics") as response:
            assert 'infermesh_ejections_total{cause="slow"}' in await response.text()


def _vllm(*arguments: str) -> tuple[str, ...]:
    """A worker with a stand-in for vLLM as its child."""
    command = " ".join((sys.executable, str(fake_engine.__file__), *arguments))
    return "--engine", "vllm", "--vllm-command", command, "--model", "test/fake", "--served-name", "fake"


def _engine_of(worker: Node) -> int:
    return next(pid for pid in descendants(worker.process.pid) if "fake_engine" in command_line(pid) and "launch" not in command_line(pid))
