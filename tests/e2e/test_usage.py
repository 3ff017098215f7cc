"""Usage over a whole mesh: two proxies, two workers, real processes. Asked through any proxy, right with any one node lost, told to each
key what it may know; prices, bills, proofs and logs by the commands that people use."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mesh.cli import main
from mesh.commands.documents import OWN_PROJECT
from mesh.usage import MESH_PROJECT
from tests.e2e.conftest import chat_body, external
from tests.support.deployment import Deployment, Node, until
from tests.support.fake_engine import FakeEngine

SEARCH, ADS = 3, 2
TOKENS = 7


@dataclass
class Books:
    """A mesh that has served `SEARCH` and `ADS` requests of two projects through each proxy."""

    mesh: Deployment
    engines: list[FakeEngine]
    proxies: list[Node]
    workers: list[Node]
    keys: dict[str, str]
    prompt: int
    completion: int
    """What the engines counted for those requests."""

    async def command(self, *arguments: str, proxy: int = 0, key: str | None = None, fails: bool = False) -> Any:
        """One `mesh` command, with a key or as the operator."""
        runner = CliRunner(env=dict.fromkeys(("MESH_API_KEY", "MESH_URL")) | {"MESH_HOME": str(self.mesh.home)})
        told = ["--url", self.proxies[proxy].root, *(("--api-key", key) if key else ())]
        result = await asyncio.to_thread(runner.invoke, main, [*arguments, *told])
        if result.exc_info is not None and not isinstance(result.exception, SystemExit | None):
            raise result.exception
        assert (result.exit_code != 0) == fails, result.output
        return result

    async def json(self, *arguments: str, proxy: int = 0, key: str | None = None) -> Any:
        return json.loads((await self.command(*arguments, "--json", proxy=proxy, key=key)).stdout)


@pytest.fixture
async def books(tmp_path: Path) -> AsyncIterator[Books]:
    async with FakeEngine() as one, FakeEngine() as two, Deployment(tmp_path) as mesh:
        await mesh.bootstrap("b1")
        proxies = [await mesh.proxy(name) for name in ("p1", "p2")]
        workers = [await external(mesh, name, engine) for name, engine in (("w1", one), ("w2", two))]
        for proxy in proxies:
            await mesh.until_ready(proxy, *workers)
        before = _counted(one, two)
        keys = {project: mesh.key("invoker", project=project) for project in ("search", "ads")}
        for proxy in proxies:
            for project, count in (("search", SEARCH), ("ads", ADS)):
                for number in range(count):
                    body = chat_body(f"say {number}", stream=bool(number % 2), max_tokens=TOKENS)
                    headers = {"Authorization": f"Bearer {keys[project]}"}
                    async with mesh.http.post(f"{proxy.api}/chat/completions", json=body, headers=headers) as response:
                        assert response.status == 200
                        await response.read()
        prompt, completion = (after - earlier for after, earlier in zip(_counted(one, two), before, strict=True))
        yield Books(mesh, [one, two], proxies, workers, keys, prompt, completion)


def _counted(*engines: FakeEngine) -> tuple[int, int]:
    """Prompt and completion tokens so far; a worker asks its engine for a few before it is ready."""
    return sum(engine.stats.prompt_tokens for engine in engines), sum(engine.stats.completion_tokens for engine in engines)


def test_the_operators_own_project_is_the_meshs() -> None:
    assert OWN_PROJECT == MESH_PROJECT


async def test_usage_is_the_engines_own_count_whoever_is_asked_and_whoever_is_lost(books: Books) -> None:
    requests = 2 * (SEARCH + ADS)
    found: dict[str, Any] = {}

    async def settled() -> bool:
        found.update(await books.json("usage", "--all", "--by", "project,model"))
        return bool(found["total"]["requests"] == requests and found["total"]["unconfirmed"] == 0)

    await until(settled, what="every receipt to be on both sides")
    assert found["total"]["prompt_tokens"] == books.prompt
    assert found["total"]["completion_tokens"] == books.completion == requests * TOKENS
    assert {row["project"]: row["requests"] for row in found["data"]} == {"search": 2 * SEARCH, "ads": 2 * ADS}
    assert (found["complete"], found["lost"], found["total"]["flagged"]) == (True, [], 0)
    again = await books.json("usage", "--all", "--by", "project,model", proxy=1)
    assert again["data"] == found["data"]

    await _a_key_sees_its_own_and_no_more(books)
    await _bills_add_up(books, requests)
    await _exports_and_proofs_hold(books, requests)
    await _logs_say_who_called(books, requests)
    requests += await _logs_follow_what_comes(books)
    await until(settled, what="the receipts of those calls as well")

    await books.workers[0].kill()
    await _is_right_without(books, found, asked=0)
    await books.workers[0].process.wait()
    revived = await books.mesh.worker("w1", "--engine", "external", "--engine-url", books.engines[0].url, fresh=False)
    await books.mesh.until_ready(books.proxies[1], revived)
    await books.proxies[0].kill()
    await _is_right_without(books, found, asked=1)


async def _is_right_without(books: Books, expected: dict[str, Any], *, asked: int) -> None:
    """The same sums, though a node is gone. Until its record has ended it is said to be lost."""
    told = await books.json("usage", "--all", "--by", "project,model", proxy=asked)
    assert told["complete"]
    names = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")
    assert [[row[name] for name in names] for row in told["data"]] == [[row[name] for name in names] for row in expected["data"]]
    assert told["total"]["unconfirmed"] > 0


async def _a_key_sees_its_own_and_no_more(books: Books) -> None:
    own = await books.json("usage", key=books.keys["search"])
    assert own["total"]["requests"] == 2 * SEARCH
    other = books.mesh.key("invoker", project="search")
    assert (await books.json("usage", key=other))["total"]["requests"] == 0
    viewer = books.mesh.key("viewer", project="search")
    assert (await books.json("usage", key=viewer))["total"]["requests"] == 2 * SEARCH
    refused = await books.command("usage", "--project", "ads", key=viewer, fails=True)
    assert "'search' alone" in refused.output
    admin = books.mesh.key("viewer", "admin", project="search")
    refused = await books.command("usage", "--project", "ads", key=admin, fails=True)
    assert "'search' alone" in refused.output
    status, answer = await books.mesh.get(f"{books.proxies[0].root}/mesh/v1/receipts", books.keys["search"])
    assert status == 403, answer
    status, answer = await books.mesh.get(f"{books.proxies[0].root}/v1/usage?of=project", books.keys["search"])
    assert status == 403, answer
    status, answer = await books.mesh.get(f"{books.proxies[0].root}/v1/usage?by=colour", books.keys["search"])
    assert (status, answer["error"]["param"]) == (400, "by")
    status, _ = await books.mesh.get(f"{books.proxies[0].root}/v1/usage")
    assert status == 401


async def _bills_add_up(books: Books, requests: int) -> None:
    refused = await books.command("bill", fails=True)
    assert "mesh prices set" in refused.output
    await books.command("prices", "set", "--currency", "EUR", "--input", "0.200001", "--cached", "0.05", "--output", "0.6", "--from", "1d")
    told: dict[str, Any] = {}

    async def known() -> bool:
        with contextlib.suppress(AssertionError):
            told.update(await books.json("bill", proxy=1))
        return bool(told)

    await until(known, what="the prices to be at the other proxy")
    assert told["currency"] == "EUR"
    by_project = {statement["project"]: statement for statement in told["statements"]}
    assert sum(day["requests"] for each in by_project.values() for day in each["days"]) == requests
    cost = books.prompt * 200_001 + books.completion * 600_000
    exact = [int(by_project[name]["cost"].replace(".", "").lstrip("0").ljust(1, "0")) for name in ("search", "ads")]
    digits = [len(by_project[name]["cost"].partition(".")[2]) for name in ("search", "ads")]
    assert sum(amount * 10 ** (12 - count) for amount, count in zip(exact, digits, strict=True)) == cost
    day = by_project["search"]["days"][0]
    assert day["begin"] == f"{time.strftime('%Y-%m-%d', time.gmtime())}T00:00:00.000Z"
    assert "due:" in (await books.command("bill", "--project", "ads")).stdout
    assert "0.200001" in (await books.command("prices", "get", "--all")).stdout
    own = await books.json("usage", key=books.keys["ads"])
    assert own["currency"] == "EUR"
    assert own["total"]["cost"] > 0


async def _exports_and_proofs_hold(books: Books, requests: int) -> None:
    exported = await books.command("usage", "export", "--all", "--format", "cloudevents", "--project", "search")
    events = [json.loads(line) for line in exported.stdout.splitlines()]
    assert len({event["id"] for event in events}) == len(events) == 2 * SEARCH
    rows = list(csv.DictReader(io.StringIO((await books.command("usage", "export", "--all", "--format", "csv")).stdout)))
    assert sum(row["kind"] == "call" for row in rows) == requests
    request_id = events[0]["data"]["id"]

    async def proven() -> bool:
        with contextlib.suppress(AssertionError):
            told = await books.json("usage", "prove", request_id, "--all")
            verdicts = {row["side"]: row["verdict"] for row in told["receipts"]}
            return len(verdicts) == 2 and all(verdict.startswith("signed") for verdict in verdicts.values())
        return False

    await until(proven, what="both sides' receipts to be signed")
    viewer = books.mesh.key("viewer", project="ads")
    assert "no node has" in (await books.command("usage", "prove", request_id, key=viewer, fails=True)).output


async def _logs_say_who_called(books: Books, requests: int) -> None:
    logged = (await books.command("logs", "--all", "--json", "--filter", "status=ok and latency<1h")).stdout.splitlines()
    records = [json.loads(line) for line in logged]
    assert len(records) == requests
    assert {record["project"] for record in records} == {"search", "ads"}
    assert records == sorted(records, key=lambda record: record["time"])
    assert len((await books.command("logs", "--all", "--json", "--limit", "2")).stdout.splitlines()) == 2
    assert (await books.command("logs", "--all", "--filter", "status!=ok")).stdout == ""
    viewer = books.mesh.key("viewer", project="ads")
    mine = (await books.command("logs", "--json", key=viewer)).stdout.splitlines()
    assert {json.loads(line)["project"] for line in mine} == {"ads"}
    refused = await books.command("logs", "--filter", "colour=red", key=viewer, fails=True)
    assert "no field 'colour'" in refused.output


async def _logs_follow_what_comes(books: Books) -> int:
    """In a process of its own: it shows what was, then each call once as it comes, at whichever proxy, until Ctrl-C. Returns how many."""
    arguments = ("logs", "--follow", "--all", "--json", "--limit", "1", "--filter", "status=ok", "--url", books.proxies[0].root)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MESH_")} | {"MESH_HOME": str(books.mesh.home)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mesh", *arguments), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environ
    )
    assert process.stdout is not None

    async def line() -> str:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            return str(json.loads(await process.stdout.readline())["request"])

    try:
        seen = [await line()]
        for proxy in (books.proxies[1], books.proxies[0], books.proxies[1]):
            headers = {"Authorization": f"Bearer {books.keys['ads']}"}
            async with books.mesh.http.post(f"{proxy.api}/chat/completions", json=chat_body("follow"), headers=headers) as response:
                assert response.status == 200
                await response.read()
                asked = response.headers["x-request-id"]
            seen.append(await line())
            assert seen[-1] == asked
        assert len(set(seen)) == 4
    finally:
        process.send_signal(signal.SIGINT)
        _, told = await process.communicate()
    assert b"Traceback" not in told
    return len(seen) - 1
