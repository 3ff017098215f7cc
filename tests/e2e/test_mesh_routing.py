"""Routing through real processes: a long prompt goes back to the worker that computed it, through any proxy, and spreads under load."""

from __future__ import annotations

import asyncio
from collections import Counter

import aiohttp

from tests.e2e.conftest import SmallMesh, chat_body, external
from tests.support.deployment import Deployment, Node, until
from tests.support.fake_engine import FakeEngine

LONG = " ".join(f"word{n}" for n in range(800))


async def ask(mesh: Deployment, proxy: Node, key: str, text: str, *, max_tokens: int = 2, **headers: str) -> tuple[str, str]:
    """The worker that answered, and why it was chosen."""
    sent = {"Authorization": f"Bearer {key}", **{name.replace("_", "-"): value for name, value in headers.items()}}
    body = chat_body(text, max_tokens=max_tokens)
    async with mesh.http.post(f"{proxy.api}/chat/completions", json=body, headers=sent) as response:
        assert response.status == 200, await response.text()
        await response.read()
        return response.headers["x-mesh-worker"], response.headers["x-mesh-reason"]


async def test_long_prompt_goes_where_it_was_computed_through_every_proxy(small: SmallMesh) -> None:
    second = await small.mesh.proxy("p2")
    await small.mesh.until_ready(second, *small.workers)
    homes = {}
    for name in range(6):
        text = f"prompt {name} {LONG}"
        homes[text], _ = await ask(small.mesh, small.proxy, small.key, text)
    assert set(homes.values()) == {worker.id[:12] for worker in small.workers}, "new prompts spread"

    for text, home in homes.items():

        async def told(text: str = text, home: str = home) -> bool:
            worker, reason = await ask(small.mesh, second, small.key, f"{text} and more")
            return worker == home and reason.startswith("prefix; ")

        for proxy in (small.proxy, second):
            if proxy is second:
                await until(told, what="the other proxy to send a prompt where it is held")
            worker, reason = await ask(small.mesh, proxy, small.key, text + " and so on")
            assert worker == home
            assert reason.startswith("prefix; ")


async def test_hot_prompt_spreads_when_its_worker_has_a_crowd(small: SmallMesh) -> None:
    home, _ = await ask(small.mesh, small.proxy, small.key, LONG)
    answers = await asyncio.gather(*(ask(small.mesh, small.proxy, small.key, f"{LONG} {n}", max_tokens=20) for n in range(40)))
    counts = Counter(worker for worker, _ in answers)
    assert len(counts) == 2
    assert counts[home] > 5
    assert {reason.split(";")[0] for worker, reason in answers if worker != home} & {"spread", "prefix"}


async def test_session_stays_where_it_is_and_what_decided_is_counted(small: SmallMesh) -> None:
    homes = {(await ask(small.mesh, small.proxy, small.key, "hi", x_session_id="conversation 7"))[0] for _ in range(6)}
    assert len(homes) == 1
    async with small.mesh.http.get(f"{small.proxy.root}/metrics") as response:
        text = await response.text()
    assert 'infermesh_choices_total{reason="session"} 6.0' in text


async def test_round_robin_on_request_and_no_reason_for_keys_that_may_not_look(deployment: Deployment) -> None:
    await deployment.bootstrap()
    proxy = await deployment.proxy("p1", "--routing", "round-robin")
    async with FakeEngine() as one, FakeEngine() as two:
        workers = [await external(deployment, name, engine) for name, engine in (("w1", one), ("w2", two))]
        await deployment.until_ready(proxy, *workers)
        key = deployment.key()
        answers = [await ask(deployment, proxy, key, LONG) for _ in range(6)]
        assert Counter(worker for worker, _ in answers) == {worker.id[:12]: 3 for worker in workers}
        assert all(reason.startswith("turn; ") for _, reason in answers)
        headers = {"Authorization": f"Bearer {deployment.key('invoker')}"}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{proxy.api}/chat/completions", json=chat_body(), headers=headers) as response,
        ):
            assert response.status == 200
            assert not {"x-mesh-worker", "x-mesh-reason"} & set(response.headers)


async def test_batch_waits_behind_interactive_requests(deployment: Deployment) -> None:
    await deployment.bootstrap()
    proxy = await deployment.proxy()
    async with FakeEngine(tokens_per_s=100) as engine:
        worker = await external(deployment, "w1", engine, "--max-concurrency", "1")
        await deployment.until_ready(proxy, worker)
        key, order = deployment.key(), []

        async def one(name: str, **headers: str) -> None:
            await ask(deployment, proxy, key, name, max_tokens=20, **headers)
            order.append(name.split()[0])

        first = asyncio.create_task(one("first"))

        async def waiting(count: int) -> bool:
            return (await deployment.workers(proxy, key))[worker.id]["waiting"] == count

        async def taken() -> bool:
            return engine.stats.running == 1

        await until(taken, what="the first request to run")
        batch = [asyncio.create_task(one(f"batch {n}", x_priority="batch")) for n in range(6)]
        await until(lambda: waiting(6), what="the batch to wait")
        urgent = [asyncio.create_task(one(f"urgent {n}")) for n in range(6)]
        await asyncio.gather(first, *batch, *urgent)
        assert order[0] == "first"
        assert order[1:8].count("urgent") == 6
