"""Limits over real proxies: set by the operator, known everywhere at once, told to clients, held when a proxy dies."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner

from mesh.cli import main
from tests.e2e.conftest import chat_body, external
from tests.support.deployment import Deployment, Node, until
from tests.support.fake_engine import FakeEngine
from tests.support.limits import most_in_window


async def mesh(deployment: Deployment, proxy: Node, *arguments: str) -> dict[str, Any]:
    """An operator's command, in its own process."""
    command = [sys.executable, "-m", "mesh", *arguments, "--home", str(deployment.home), "--url", proxy.root, "--json"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors.decode()
    answer: dict[str, Any] = json.loads(output)
    return answer


async def ask(deployment: Deployment, proxy: Node, key: str, **more: object) -> tuple[int, dict[str, str], dict[str, Any]]:
    headers = {"Authorization": f"Bearer {key}"}
    async with deployment.http.post(f"{proxy.api}/chat/completions", json=chat_body(**more), headers=headers) as response:
        told = {name.lower(): value for name, value in response.headers.items()}
        return response.status, told, await response.json()


async def two_proxies(deployment: Deployment, engine: FakeEngine) -> tuple[Node, Node, Node]:
    """Two proxies that share limits, one worker."""
    await deployment.bootstrap()
    one, other = await deployment.proxy("p1"), await deployment.proxy("p2")
    worker = await external(deployment, "w1", engine)
    for proxy in (one, other):
        await deployment.until_ready(proxy, worker)

    async def sharing() -> bool:
        for proxy in (one, other):
            async with deployment.http.get(f"{proxy.root}/metrics") as response:
                if "infermesh_limits_share 0.5" not in await response.text():
                    return False
        return True

    await until(sharing, what="both proxies to have half of every limit")
    return one, other, worker


async def test_limits_are_set_once_and_hold_over_all_proxies(deployment: Deployment) -> None:
    async with FakeEngine() as engine:
        one, other, _ = await two_proxies(deployment, engine)
        key = deployment.key(project="search")
        status, headers, _ = await ask(deployment, one, key)
        assert status == 200
        assert not [name for name in headers if name.startswith("x-ratelimit")], "nothing is limited unless somebody says so"
        made = await mesh(deployment, one, "limits", "set", "--project", "search", "--rps", "20", "--tps", "100k")
        assert made["limits"] == {"rps": 20, "tps": 100_000}
        shown = await mesh(deployment, other, "limits", "get", "--project", "search")
        assert [entry["rps"] for entry in shown["limits"]] == [20]

        async def told() -> bool:
            answers = [await ask(deployment, proxy, key) for proxy in (one, other)]
            return all("x-ratelimit-limit-requests" in headers for _, headers, _ in answers)

        await until(told, what="both proxies to know the limit", within_s=20)
        admitted: list[tuple[float, float]] = []
        refused: list[dict[str, str]] = []

        async def client(proxy: Node, end: float) -> None:
            while time.monotonic() < end:
                at = time.monotonic()
                status, headers, body = await ask(deployment, proxy, key)
                if status == 200:
                    admitted.append((at, 1.0))
                else:
                    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
                    refused.append(headers)
                    await asyncio.sleep(0.02)

        end = time.monotonic() + 10
        await asyncio.gather(*(client(proxy, end) for proxy in (one, other) for _ in range(3)))
        assert refused, "there was more than was allowed"
        assert most_in_window(sorted(admitted), 5.0) <= 20 * 5 + 20 + 20, "rate, burst, and what two proxies had in hand"
        assert all(int(headers["x-ratelimit-remaining-requests"]) < 20 and int(headers["retry-after"]) >= 1 for headers in refused)
        await other.kill()

        async def alone() -> bool:
            return (await ask(deployment, one, key))[0] == 200

        await until(alone, what="the other proxy to go on with its own share", within_s=20)
        await mesh(deployment, one, "limits", "set", "--project", "search", "--rps", "none", "--tps", "none")
        listed = await mesh(deployment, one, "limits", "list")
        assert listed["limits"] == []


async def test_spent_budget_is_spent_at_every_proxy_and_after_restarts(deployment: Deployment) -> None:
    async with FakeEngine() as engine:
        one, other, worker = await two_proxies(deployment, engine)
        await mesh(deployment, one, "limits", "set", "--default", "--tokens-per-day", "1000")
        key = deployment.key(project="search")

        async def spend() -> bool:
            status, _, body = await ask(deployment, one, key, max_tokens=50)
            return status == 429 and body["error"]["code"] == "insufficient_quota"

        await until(spend, what="the budget to be spent")
        client = openai.AsyncOpenAI(base_url=other.api, api_key=key)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "x"}], max_tokens=500)
        assert caught.value.code == "insufficient_quota"
        assert caught.value.response.headers["x-should-retry"] == "false"
        await client.close()
        for node in (one, other):
            await node.terminate()
        again = await deployment.proxy("p1", fresh=False)
        await deployment.until_ready(again, worker)

        async def refused() -> bool:
            status, _, body = await ask(deployment, again, key, max_tokens=500)
            assert status == 429, "what was spent is spent"
            return bool(body["error"]["code"] == "insufficient_quota")

        await until(refused, what="the new process to have its share", within_s=60)


def test_commands_say_what_is_missing(tmp_path: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(main, ["create", "--home", str(tmp_path)]).exit_code == 0
    for arguments in (
        ["--rps", "5"],
        ["--project", "p"],
        ["--project", "p", "--default", "--rps", "5"],
        ["--own", "--rps", "5"],
        ["--endpoint", "chat", "--rps", "5"],
        ["--endpoint", "chat", "--project", "p", "--model", "m", "--rps", "5"],
        ["--endpoint", "a/b", "--project", "p", "--rps", "5"],
        ["--endpoint", "chat", "--project", "p"],
        ["--project", "p", "--rps", "many"],
        ["--project", "p", "--burst", "0"],
    ):
        result = runner.invoke(main, ["limits", "set", *arguments, "--home", str(tmp_path)])
        assert result.exit_code == 2, arguments
        assert "Traceback" not in result.output
