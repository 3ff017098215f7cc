"""Endpoints over real processes: made by a command, called as a model, limited, timed, logged; and who may make them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.conftest import external
from tests.e2e.test_mesh_limits import two_proxies
from tests.support.deployment import Deployment, Node, until
from tests.support.fake_engine import FakeEngine

MESSAGES: list[Any] = [{"role": "user", "content": "Say something"}]


async def command(home: Path, *arguments: str) -> tuple[int, str, str]:
    """``mesh …`` in its own process: exit code, output, what it said to the person."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MESH_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mesh", *arguments, "--home", str(home)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environ,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def mesh(home: Path, proxy: Node, *arguments: str) -> dict[str, Any]:
    """An answer of an operator's command."""
    code, output, errors = await command(home, *arguments, "--url", proxy.root, "--json")
    assert code == 0, errors
    answer: dict[str, Any] = json.loads(output)
    return answer


async def test_an_endpoint_is_made_called_limited_and_logged(deployment: Deployment) -> None:
    async with FakeEngine() as engine:
        one, other, worker = await two_proxies(deployment, engine)
        made = await mesh(
            deployment.home, one, "endpoint", "create", "chat", "--project", "search", "--model", "fake", "--timeout", "30s", "--rps", "50"
        )
        assert (made["limits"], made["timeout_s"], made["seq"]) == ({"rps": 50}, 30, 1)
        key = deployment.key(project="search")

        async def listed() -> bool:
            return "chat" in await deployment.models(other, key)

        await until(listed, what="the other proxy to hear of it")
        client = openai.AsyncOpenAI(base_url=other.api, api_key=key, max_retries=0)
        called = await client.chat.completions.with_raw_response.create(model="chat", messages=MESSAGES, max_tokens=8)
        assert called.parse().model == "fake", "what answered"
        assert called.headers["x-ratelimit-limit-requests"] == "50"
        assert (await deployment.get(f"{one.api}/models/chat", deployment.key(project="ads")))[0] == 404

        of_endpoint = ("--project", "search", "--endpoint", "chat")
        held = await mesh(deployment.home, one, "limits", "set", *of_endpoint, "--rps", "none", "--tokens-per-day", "10")
        assert (held["limits"], held["seq"]) == ({"tokens_per_day": 10}, 2)
        for arguments in (("get", *of_endpoint), ("get", "--project", "search"), ("list",)):

            async def told(arguments: tuple[str, ...] = arguments) -> bool:
                answer = await mesh(deployment.home, other, "limits", *arguments)
                return bool(answer["limits"] == [{"name": "endpoint:chat", "project": "search", "tokens_per_day": 10}])

            await until(told, what="the other proxy to tell of the endpoint's limits")
        refused: list[openai.RateLimitError] = []

        async def spent() -> bool:
            with pytest.raises(openai.RateLimitError) as error:
                await client.chat.completions.create(model="chat", messages=MESSAGES, max_tokens=500)
            refused.append(error.value)
            return error.value.code == "insufficient_quota"

        await until(spent, what="the keeper of the budget to say that it is too small")
        headers = refused[-1].response.headers
        assert (headers["x-should-retry"], 0 < float(headers["retry-after"]) <= 86_400) == ("false", True)
        assert "the endpoint 'chat'" in refused[-1].message

        engine.tokens_per_s = 2.0
        await mesh(
            deployment.home, other, "endpoint", "set", "chat", "--project", "search", "--tokens-per-day", "none", "--timeout", "500ms"
        )
        with pytest.raises(openai.InternalServerError) as late:
            await client.chat.completions.create(model="chat", messages=MESSAGES, max_tokens=100)
        assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
        engine.tokens_per_s = None
        await client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=8)

        async def written() -> bool:
            code, output, errors = await command(
                deployment.home, "logs", "--endpoint", "chat", "--since", "10m", "--all", "--url", one.root, "--json"
            )
            assert code == 0, errors
            lines = [json.loads(line) for line in output.splitlines()]
            told = [(line["endpoint"], line["model"], line["status"]) for line in lines]
            wanted = ["ok", *(str(error.code) for error in refused), "deadline_exceeded"]
            return told == [("chat", "fake", status) for status in wanted]

        await until(written, what="all calls of the endpoint in the log, and no other")
        used = await mesh(deployment.home, one, "usage", "--all", "--by", "endpoint", "--since", "10m")
        assert {row["endpoint"]: row["requests"] for row in used["data"]} == {"": 1, "chat": 2 + len(refused)}
        shown = await mesh(deployment.home, one, "endpoint", "show", "chat", "--project", "search")
        assert (shown["ready"], shown["seq"], shown["signer"]) == (True, 3, "keys-1")
        await mesh(deployment.home, one, "endpoint", "delete", "chat", "--project", "search")

        async def gone() -> bool:
            return "chat" not in await deployment.models(other, key)

        await until(gone, what="the other proxy to hear that it is gone")
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="chat", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        await client.close()
        again = await mesh(deployment.home, one, "endpoint", "create", "chat", "--project", "search", "--model", "fake")
        assert again["seq"] == 5, "what is gone can be made again; its versions go on"
        for proxy in (one, other):
            await proxy.terminate()
        fresh = await deployment.proxy("p3")
        await deployment.until_ready(fresh, worker)
        client = openai.AsyncOpenAI(base_url=fresh.api, api_key=key, max_retries=0)
        assert (await client.chat.completions.create(model="chat", messages=MESSAGES, max_tokens=8)).model == "fake", "from the directory"
        await client.close()


async def test_prompts_are_read_back_by_who_has_the_key_from_all_proxies(deployment: Deployment, tmp_path: Path) -> None:
    key_file, text = tmp_path / "prompts.key", "I am alice@example.org and that is a secret"
    async with FakeEngine() as engine:
        await deployment.bootstrap()
        one, other = await deployment.proxy("p1"), await deployment.proxy("p2")
        worker = await external(deployment, "w1", engine)
        for proxy in (one, other):
            await deployment.until_ready(proxy, worker)
        keeping = ("--prompts", "redacted", "--keep", "1h", "--key", str(key_file))
        made = await mesh(deployment.home, one, "endpoint", "create", "chat", "--project", "search", "--model", "fake", *keeping)
        assert (made["prompts"]["mode"], made["prompts"]["keep_s"]) == ("redacted", 3600)
        assert key_file.stat().st_mode & 0o777 == 0o600
        key = deployment.key(project="search")

        async def known() -> bool:
            return all(["chat" in await deployment.models(proxy, key) for proxy in (one, other)])

        await until(known, what="both proxies to hear of it")
        for proxy, stream in ((one, False), (other, True)):
            body = {"model": "chat", "messages": [{"role": "user", "content": text}], "stream": stream, "max_tokens": 8}
            async with deployment.http.post(
                f"{proxy.api}/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}
            ) as response:
                assert response.status == 200
                await response.read()

        async def read(key_file: Path, *more: str) -> list[dict[str, Any]]:
            asked = ("logs", "--endpoint", "chat", "--prompts", "--key", str(key_file), "--url", one.root, "--json", *more)
            code, output, errors = await command(deployment.home, *asked)
            assert code == 0, errors
            return [json.loads(line) for line in output.splitlines()]

        deployer = ("--api-key", deployment.key("deployer", project="search"))

        async def both() -> bool:
            asked, counts = f"{one.root}/mesh/v1/prompts", []
            _, told = await deployment.get(asked, deployer[1])
            for node in told["nodes"]:
                status, page = await deployment.get(f"{asked}?endpoint=chat&node={node}", deployer[1])
                counts.append(len(page["kept"]) if status == 200 else 0)
            return counts == [1, 1]

        await until(both, what="each proxy to have kept one, and the first to be linked with the other")
        found = await read(key_file, "--all", "--project", "search")
        assert len(found) == 2
        for record in found:
            assert record["prompt"]["messages"][0]["content"] == "I am [email] and that is a secret"
            assert (record["status"], record["model"]) == ("ok", "fake")
            assert record["answer"]
        await mesh(
            deployment.home,
            one,
            "endpoint",
            "create",
            "spare",
            "--project",
            "search",
            "--model",
            "fake",
            *keeping[:4],
            "--key",
            f"{key_file}.2",
        )
        assert await read(Path(f"{key_file}.2"), *deployer) == [], "sealed to another key"
        code, _, errors = await command(
            deployment.home, "logs", "--endpoint", "chat", "--prompts", "--key", str(key_file), "--url", one.root, "--api-key", key
        )
        assert (code, "deployer" in errors) == (1, True)
    for path in deployment.home.rglob("*"):
        if path.is_file():
            assert b"that is a secret" not in path.read_bytes(), path


async def test_deployers_make_endpoints_of_their_project_and_nobody_else_does(deployment: Deployment, tmp_path: Path) -> None:
    await deployment.bootstrap()
    proxy = await deployment.proxy()
    for name, role in (("deployer", "deployer"), ("caller", "invoker")):
        bounds = ("--project", "search", "--role", role, "--role", "viewer", "--may", "document", "--may", "key")
        file = tmp_path / f"{name}.issuer"
        await mesh(deployment.home, proxy, "issuer", "create", name, *bounds, "--out", str(file))
        code, _, errors = await command(tmp_path / name, "issuer", "import", str(file))
        assert code == 0, errors
    create = ("endpoint", "create", "chat", "--model", "fake", "--url", proxy.root)
    code, _, errors = await command(tmp_path / "caller", *create, "--project", "search")
    assert (code, "document_refused" in errors, "role deployer" in errors) == (1, True, True), errors
    code, _, errors = await command(tmp_path / "deployer", *create, "--project", "ads")
    assert (code, "document_refused" in errors, "outside the projects" in errors) == (1, True, True), errors
    made = await mesh(tmp_path / "deployer", proxy, "endpoint", "create", "chat", "--model", "fake", "--project", "search")
    assert made["seq"] == 1
    for home in ("deployer", "caller"):
        listed = await mesh(tmp_path / home, proxy, "endpoint", "list")
        assert [(entry["name"], entry["ready"]) for entry in listed["endpoints"]] == [("chat", False)], "whoever may look sees it"
    told = await mesh(deployment.home, proxy, "issuer", "retire", "deployer")
    assert (told["published"], told["signed_again"]) == (True, 1)

    async def gone() -> bool:
        status, told = await deployment.get(f"{proxy.root}/mesh/v1/endpoints", deployment.key("viewer", project="search"))
        assert status == 200
        return [entry["signer"] for entry in told["endpoints"]] == ["keys-1"]

    await until(gone, what="what the retired issuer signed to be signed by another")
