"""What a client sees when something dies: real processes, kill -9, stand-in engines slow enough to be caught in the act."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import dataclass, field

import aiohttp

from tests.e2e.conftest import SmallMesh, chat_body, external
from tests.support import fake_engine
from tests.support.deployment import Deployment, events, until
from tests.support.fake_engine import FakeEngine, Misbehaviour, Mode, answer_to
from tests.support.processes import alive, command_line, descendants


@dataclass
class Outcome:
    """What one client got."""

    status: int = 0
    data: list[bytes] = field(default_factory=list)
    broken: bool = False
    body: dict[str, object] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return b"[DONE]" in self.data

    @property
    def error_event(self) -> bool:
        return any(b'"error"' in item for item in self.data)

    @property
    def text(self) -> str:
        found = ""
        for item in self.data:
            if item != b"[DONE]":
                choices = json.loads(item).get("choices") or [{}]
                found += choices[0].get("delta", {}).get("content") or ""
        return found


async def ask(small: SmallMesh, text: str, *, stream: bool, max_tokens: int, first: asyncio.Event | None = None, **more: object) -> Outcome:
    outcome = Outcome()
    body = chat_body(text, stream=stream, max_tokens=max_tokens, **more)
    try:
        async with small.mesh.http.post(small.chat_url, json=body, headers=small.headers) as response:
            outcome.status = response.status
            if not stream:
                outcome.body = await response.json()
                return outcome
            async with events(response) as found:
                async for data in found:
                    outcome.data.append(data)
                    if first is not None:
                        first.set()
    except aiohttp.ClientPayloadError:
        outcome.broken = True
    return outcome


async def test_kill_of_a_worker_with_fifty_requests_in_flight_loses_only_streams_that_cannot_move_and_says_so(small: SmallMesh) -> None:
    victim, survivor = small.workers
    victim_engine = small.engines[0]
    plain = [asyncio.create_task(ask(small, f"plain {n}", stream=False, max_tokens=30)) for n in range(20)]
    begun = [asyncio.Event() for _ in range(40)]
    streams = [asyncio.create_task(ask(small, f"stream {n}", stream=True, max_tokens=30, first=begun[n])) for n in range(20)]
    fixed = [
        asyncio.create_task(ask(small, f"fixed {n}", stream=True, max_tokens=30, first=begun[20 + n], presence_penalty=0.1))
        for n in range(20)
    ]
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), 30)
    await asyncio.wait_for(victim_engine.until(lambda stats: stats.running > 0), 30)
    assert victim_engine.stats.running >= 15, "the victim should have its share of the load when it dies"

    await victim.kill()
    seen_by_victim = victim_engine.stats.started
    plain_outcomes = await asyncio.gather(*plain)
    stream_outcomes = await asyncio.gather(*streams)
    fixed_outcomes = await asyncio.gather(*fixed)

    assert [outcome.status for outcome in plain_outcomes] == [200] * 20, "no plain request had had a byte: all succeed elsewhere"
    for n, outcome in enumerate(plain_outcomes):
        message = outcome.body["choices"][0]["message"]["content"]  # type: ignore[index]
        assert message == answer_to([{"role": "user", "content": f"plain {n}"}], 30)
    for n, outcome in enumerate(stream_outcomes):
        assert outcome.text == answer_to([{"role": "user", "content": f"stream {n}"}], 30), "no token missing, none twice"
        assert outcome.done
        assert not outcome.broken
        assert not outcome.error_event
    status = await small.mesh.get(f"{small.proxy.root}/mesh/v1/status", small.key)
    moves = status[1]["proxy"]["streams"]
    assert moves["moved"] > 0, "the victim had begun streams"
    whole = [outcome for outcome in fixed_outcomes if outcome.done]
    lost = [outcome for outcome in fixed_outcomes if not outcome.done]
    assert moves["stuck"] == len(lost) > 0, "the victim had begun streams that cannot move, too"
    assert whole, "so had the survivor"
    for outcome in whole:
        assert not outcome.broken
        assert not outcome.error_event
    for outcome in lost:
        assert outcome.error_event, "a stream that had begun ends with an in-band error"
        assert outcome.broken, "and never with a clean end"

    later = await asyncio.gather(*(ask(small, f"later {n}", stream=False, max_tokens=2) for n in range(10)))
    assert [outcome.status for outcome in later] == [200] * 10
    assert victim_engine.stats.started == seen_by_victim, "nothing more reaches the dead worker's engine"
    assert survivor.process.returncode is None


async def test_killed_worker_leaves_the_listings_and_never_comes_back(small: SmallMesh) -> None:
    victim = small.workers[0]
    await victim.kill()

    async def gone() -> bool:
        return victim.id not in await small.mesh.workers(small.proxy, small.key)

    await until(gone, what="the killed worker to leave the listing")
    for _ in range(60):
        assert await gone()
        await asyncio.sleep(0.1)
    assert await small.mesh.models(small.proxy, small.key) == ["fake"], "the other worker still serves the model"


async def test_model_of_the_last_worker_leaves_the_list_within_the_records_life(deployment: Deployment) -> None:
    await deployment.bootstrap()
    proxy = await deployment.proxy()
    async with FakeEngine() as engine:
        worker = await external(deployment, "w1", engine)
        await deployment.until_ready(proxy, worker)
        key = deployment.key()
        assert await deployment.models(proxy, key) == ["fake"]
        await worker.kill()

        async def empty() -> bool:
            return await deployment.models(proxy, key) == []

        await until(empty, what="the model to leave /v1/models")
        status, _ = await deployment.get(f"{proxy.root}/readyz")
        assert status == 503
        status, _ = await deployment.get(f"{proxy.root}/health")
        assert status == 200


async def test_client_that_goes_away_stops_the_engines_work(small: SmallMesh) -> None:
    body = chat_body(stream=True, max_tokens=2000)
    async with small.mesh.http.post(small.chat_url, json=body, headers=small.headers) as response:
        await response.content.readany()
        assert sum(engine.stats.running for engine in small.engines) == 1
        response.close()
    async with asyncio.timeout(10):
        await _first(*(engine.until(lambda stats: stats.cancelled == 1) for engine in small.engines))
    assert sum(engine.stats.running for engine in small.engines) == 0


async def test_engine_that_cuts_its_stream_becomes_an_error_for_the_client(small: SmallMesh) -> None:
    for engine in small.engines:
        engine.misbehave(Misbehaviour(mode=Mode.CUT, after_tokens=3))
    outcome = await ask(small, "cut me", stream=True, max_tokens=20, presence_penalty=0.1)
    assert outcome.error_event
    assert outcome.broken
    assert not outcome.done


async def test_engine_that_ends_early_but_cleanly_is_not_believed(small: SmallMesh) -> None:
    for engine in small.engines:
        engine.misbehave(Misbehaviour(mode=Mode.END, after_tokens=3))
    outcome = await ask(small, "end me", stream=True, max_tokens=20, presence_penalty=0.1)
    assert outcome.error_event
    assert not outcome.done


async def test_failing_engine_is_tried_elsewhere_before_the_first_byte(small: SmallMesh) -> None:
    small.engines[0].misbehave(Misbehaviour(mode=Mode.STATUS, status=500))
    outcomes = await asyncio.gather(*(ask(small, f"retry {n}", stream=n % 2 == 0, max_tokens=3) for n in range(12)))
    assert [outcome.status for outcome in outcomes] == [200] * 12
    assert small.engines[0].stats.failed > 0, "the sick engine was tried"


async def test_client_mistake_is_told_as_the_engine_told_it_and_not_retried(small: SmallMesh) -> None:
    for engine in small.engines:
        engine.misbehave(Misbehaviour(mode=Mode.STATUS, status=400))
    async with small.mesh.http.post(small.chat_url, json=chat_body(), headers=small.headers) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert error["type"] == "invalid_request_error"
    assert sum(engine.stats.started for engine in small.engines) - sum(_warm_ups(engine) for engine in small.engines) == 1


async def test_drained_worker_finishes_its_stream_and_exits_cleanly(small: SmallMesh) -> None:
    begun = asyncio.Event()
    stream = asyncio.create_task(ask(small, "drain", stream=True, max_tokens=30, first=begun))
    await asyncio.wait_for(begun.wait(), 20)
    busy = next(n for n, engine in enumerate(small.engines) if engine.stats.running)
    leaving = asyncio.create_task(small.workers[busy].terminate())

    async def draining() -> bool:
        seen = (await small.mesh.workers(small.proxy, small.key)).get(small.workers[busy].id)
        return seen is None or seen["state"] == "draining"

    await until(draining, what="the proxy to hear of the drain")
    other = await asyncio.gather(*(ask(small, f"meanwhile {n}", stream=False, max_tokens=2) for n in range(5)))
    assert [outcome.status for outcome in other] == [200] * 5
    outcome = await stream
    assert outcome.done
    assert outcome.text == answer_to([{"role": "user", "content": "drain"}], 30)
    assert await leaving == 0


async def test_drained_proxy_finishes_its_stream_and_exits_cleanly(small: SmallMesh) -> None:
    begun = asyncio.Event()
    stream = asyncio.create_task(ask(small, "drain", stream=True, max_tokens=30, first=begun))
    await asyncio.wait_for(begun.wait(), 20)
    small.proxy.process.send_signal(signal.SIGTERM)
    outcome = await stream
    assert outcome.done
    assert not outcome.broken
    assert await asyncio.wait_for(small.proxy.process.wait(), 60) == 0


async def test_stream_that_outlasts_its_proxys_drain_is_told_so(deployment: Deployment) -> None:
    async with FakeEngine(tokens_per_s=10) as engine:
        await deployment.bootstrap()
        proxy = await deployment.proxy("p1", "--drain", "1s")
        await deployment.until_ready(proxy, await external(deployment, "w1", engine))
        body, headers = chat_body("long", stream=True, max_tokens=1_000), {"Authorization": f"Bearer {deployment.key()}"}
        seen: list[bytes] = []
        whole = False
        async with deployment.http.post(f"{proxy.api}/chat/completions", json=body, headers=headers) as response:
            try:
                async with events(response) as found:
                    async for data in found:
                        if not seen:
                            proxy.process.send_signal(signal.SIGTERM)
                        seen.append(data)
                whole = True
            except aiohttp.ClientPayloadError:
                pass
        assert not whole, "an answer in the middle must not end as if it were whole"
        error = json.loads(seen[-1])["error"]
        assert error["code"] == "unavailable"
        assert "leaving" in error["message"]
        assert await asyncio.wait_for(proxy.process.wait(), 60) == 0
        async with asyncio.timeout(20):
            await engine.until(lambda stats: stats.running == 0)


async def test_crashed_engine_is_restarted_and_announced_as_not_ready_meanwhile(deployment: Deployment) -> None:
    await deployment.bootstrap()
    proxy = await deployment.proxy()
    worker = await deployment.worker(
        "w1", "--engine", "vllm", "--vllm-command", _fake_vllm(), "--model", "test/fake", "--served-name", "fake", "--"
    )
    await deployment.until_ready(proxy, worker)
    key = deployment.key()
    engine = next(
        pid for pid in descendants(worker.process.pid) if "fake_engine" in command_line(pid) and "launch" not in command_line(pid)
    )
    os.kill(engine, signal.SIGKILL)
    states: list[str] = []

    async def restarted() -> bool:
        states.append((await deployment.workers(proxy, key))[worker.id]["state"])
        return "ready" in states and states[-1] == "ready" and any(state != "ready" for state in states)

    await until(restarted, what="the engine to be restarted and ready again")
    assert any(state != "ready" for state in states)
    assert worker.process.returncode is None
    async with deployment.http.post(
        f"{proxy.api}/chat/completions", json=chat_body(), headers={"Authorization": f"Bearer {key}"}
    ) as response:
        assert response.status == 200


async def test_no_engine_outlives_a_killed_worker(deployment: Deployment) -> None:
    await deployment.bootstrap()
    proxy = await deployment.proxy()
    worker = await deployment.worker(
        "w1", "--engine", "vllm", "--vllm-command", _fake_vllm(), "--model", "test/fake", "--served-name", "fake", "--"
    )
    await deployment.until_ready(proxy, worker)
    children = descendants(worker.process.pid)
    assert children
    await worker.kill()

    async def all_gone() -> bool:
        return not any(alive(pid) for pid in children)

    await until(all_gone, what="the engine to end with its worker")


def _warm_ups(engine: FakeEngine) -> int:
    """Requests that the worker itself made to prove the engine."""
    return sum(1 for request in engine.stats.requests if request.get("max_tokens") in (1, None) or "input" in request)


async def _first(*jobs: object) -> None:
    tasks = [asyncio.ensure_future(job) for job in jobs]  # type: ignore[call-overload]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()


def _fake_vllm() -> str:
    return f"{sys.executable} {fake_engine.__file__}"
