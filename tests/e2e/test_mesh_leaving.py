"""Nodes that leave in good order: drained by an order, preempted, or stopped and started again under load. No request is lost."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from tests.e2e.conftest import chat_body, external
from tests.support.deployment import Deployment, Node, events, until
from tests.support.fake_engine import FakeEngine, answer_to
from tests.support.load import Load


async def command(mesh: Deployment, proxy: Node, *arguments: str) -> tuple[int, str, str]:
    """Run ``mesh …`` on the operator's machine."""
    argv = [sys.executable, "-m", "mesh", *arguments, "--home", str(mesh.home), "--url", proxy.root]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*argv, stdout=pipe, stderr=pipe)
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, out.decode(), err.decode()


async def test_drained_worker_gets_nothing_new_finishes_its_stream_and_comes_back_when_told(deployment: Deployment) -> None:
    async with FakeEngine(tokens_per_s=20) as one, FakeEngine(tokens_per_s=20) as two:
        await deployment.bootstrap()
        carrier, other = await deployment.proxy("p1"), await deployment.proxy("p2")
        worker, second = await external(deployment, "w1", one), await external(deployment, "w2", two)
        for proxy in (carrier, other):
            await deployment.until_ready(proxy, worker, second)
        key = deployment.key()
        stream = asyncio.create_task(_stream(deployment, other, key, one))
        async with asyncio.timeout(20):
            await one.until(lambda stats: stats.running > 0)

        code, out, err = await command(deployment, carrier, "drain", worker.id[:10], "--reason", "new driver", "--wait", "--json")
        assert code == 0, err
        assert json.loads(out)["state"] == "draining"
        assert "new driver" in json.loads(out)["reason"]
        assert (await stream).endswith(answer_to([{"role": "user", "content": "long"}], 60)), "what ran was finished"
        started = one.stats.started
        async with Load(deployment, [carrier, other], per_s=20) as load:
            await load.until(30)
        assert not load.problems
        assert one.stats.started == started
        assert worker.process.returncode is None, "it stays up"

        await worker.terminate()
        worker = await external(deployment, "w1", one, fresh=False)
        seen: dict[str, Any] = {}

        async def drained() -> bool:
            seen.update((await deployment.workers(carrier, key)).get(worker.id, {}))
            return seen.get("state") == "draining"

        await until(drained, what="the restarted worker to be drained still")
        code, _, err = await command(deployment, carrier, "undrain", worker.id)
        assert code == 0, err
        async with Load(deployment, [carrier, other], per_s=20) as load:
            await load.until(30)
        assert one.stats.started > started + 3


async def _stream(mesh: Deployment, proxy: Node, key: str, engine: FakeEngine) -> str:
    """A long stream at the worker of ``engine``; asks until it gets there."""
    text = ""
    body, headers = chat_body("long", stream=True, max_tokens=60), {"Authorization": f"Bearer {key}"}
    while True:
        running = engine.stats.running
        async with mesh.http.post(f"{proxy.api}/chat/completions", json=body, headers=headers) as response:
            await asyncio.sleep(0.2)
            if engine.stats.running == running:
                continue
            async with events(response) as found:
                async for data in found:
                    if data != b"[DONE]" and (choices := json.loads(data)["choices"]):
                        text += choices[0]["delta"].get("content") or ""
        return text


async def test_drained_proxy_is_not_ready_closes_politely_and_serves_what_still_comes(deployment: Deployment) -> None:
    async with FakeEngine() as engine:
        await deployment.bootstrap()
        first, second = await deployment.proxy("p1"), await deployment.proxy("p2")
        worker = await external(deployment, "w1", engine)
        for proxy in (first, second):
            await deployment.until_ready(proxy, worker)
        await until(lambda: _linked(deployment, first, second), what="the proxies to be linked")
        code, out, err = await command(deployment, first, "drain", second.id[:16])
        assert code == 0, err
        assert "draining" in out

        status, body = await deployment.get(f"{second.root}/readyz")
        assert (status, body["status"]) == (503, "draining")
        headers = {"Authorization": f"Bearer {deployment.key()}"}
        async with deployment.http.post(f"{second.api}/chat/completions", json=chat_body(), headers=headers) as response:
            assert response.status == 200
            assert response.headers["connection"] == "close"
        status, _ = await deployment.get(f"{first.root}/readyz")
        assert status == 200
        code, _, err = await command(deployment, first, "undrain", second.id[:16])
        assert code == 0, err
        status, _ = await deployment.get(f"{second.root}/readyz")
        assert status == 200


async def _linked(mesh: Deployment, first: Node, second: Node) -> bool:
    _, status = await mesh.get(f"{first.root}/mesh/v1/status", mesh.key())
    return any(entry["id"] == second.id and entry["linked"] for entry in status["proxies"])


async def test_orders_that_cannot_be_given_say_why(deployment: Deployment, tmp_path: Path) -> None:
    await deployment.bootstrap()
    proxy = await deployment.proxy()
    code, _, err = await command(deployment, proxy, "drain", "ffff")
    assert (code, "no worker or proxy" in err) == (2, True)
    code, _, err = await command(deployment, proxy, "drain", "")
    assert code == 2
    async with deployment.http.post(f"{proxy.root}/mesh/v1/orders", data=b"x" * 100) as response:
        assert response.status == 403
        assert (await response.json())["error"]["code"] == "order_refused"
    async with deployment.http.post(f"{proxy.root}/mesh/v1/orders", data=b"x" * 1000) as response:
        assert response.status == 413
    elsewhere = [sys.executable, "-m", "mesh", "drain", "ffff", "--home", str(tmp_path / "none"), "--url", proxy.root]
    process = await asyncio.create_subprocess_exec(*elsewhere, stderr=asyncio.subprocess.PIPE)
    _, told = await process.communicate()
    assert process.returncode == 2
    assert b"there is no mesh in" in told


async def test_preempted_worker_drains_and_ends(deployment: Deployment, tmp_path: Path) -> None:
    notice = tmp_path / "notice"
    option = ("--preemption-file", str(notice))
    async with FakeEngine(tokens_per_s=20) as engine, FakeEngine() as spare:
        await deployment.bootstrap()
        proxy = await deployment.proxy()
        worker = await external(deployment, "w1", engine, *option)
        other = await external(deployment, "w2", spare)
        await deployment.until_ready(proxy, worker, other)
        async with Load(deployment, [proxy], per_s=20) as load:
            await load.until(20)
            notice.touch()
            assert await asyncio.wait_for(worker.process.wait(), 60) == 0
            await load.more(20)
        assert not load.problems
        assert "node.preempted" in worker.log.read_text()


async def test_restart_of_every_worker_and_proxy_under_load_loses_no_request(deployment: Deployment) -> None:
    """A short one; `scripts/bench/run failure --rolling` does it for ten thousand requests."""
    async with FakeEngine(tokens_per_s=100) as one, FakeEngine(tokens_per_s=100) as two:
        await deployment.bootstrap()
        ports = [("--port", str(port)) for port in deployment.free_ports(2)]
        proxies = [await deployment.proxy(f"p{n}", *port) for n, port in enumerate(ports)]
        workers = [await external(deployment, f"w{n}", engine) for n, engine in enumerate((one, two))]
        for proxy in proxies:
            await deployment.until_ready(proxy, *workers)
        async with Load(deployment, list(proxies), per_s=25) as load:
            for n, engine in enumerate((one, two)):
                assert await workers[n].terminate() == 0
                workers[n] = await external(deployment, f"w{n}", engine, fresh=False)
                for proxy in proxies:
                    await deployment.until_ready(proxy, *workers)
            for n, port in enumerate(ports):
                assert await proxies[n].terminate() == 0
                load.proxies[n] = proxies[n] = await deployment.proxy(f"p{n}", *port, fresh=False)
                await deployment.until_ready(proxies[n], *workers)
            await load.more(25)
        assert not load.problems, load.problems
