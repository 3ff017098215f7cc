"""Endpoints at a proxy's front: which model answers, who may call, what they limit, and what is written down of a call."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mesh.documents import Document
from mesh.ledger import LEDGER_FILE, Ledger, Query, signer
from mesh.limits import Limit, Limits, encode_limits
from mesh.link.link import IncomingStream
from mesh.receipts import Receipt, parse_receipt
from mesh.records import ModelEntry
from mesh.trust import Role
from tests.support.authority import make_mesh
from tests.support.fake_engine import FakeEngine
from tests.support.front import Front

MESH = make_mesh(now=time.time() - 3600)
QWEN, LLAMA = ModelEntry(name="Qwen/Qwen3-8B"), ModelEntry(name="llama")


async def whole(stream: IncomingStream, head: dict[str, Any]) -> None:
    await stream.read_body(max_bytes=head["size"])
    answer = json.dumps({"choices": [{"message": {"content": "hello"}}], "model": head["model"]}).encode()
    stream.accept()
    stream.send_head({"status": 200, "type": "application/json", "length": len(answer)})
    await stream.send(answer)
    stream.end({"in": 3, "out": 2})


async def never(stream: IncomingStream, head: dict[str, Any]) -> None:
    await asyncio.Event().wait()


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    async with Front(MESH, tmp_path) as front:
        yield front


async def ask(front: Front, model: str, key: str, **headers: str) -> tuple[int, dict[str, str], dict[str, Any]]:
    body = {"model": model, "messages": [{"role": "user", "content": "Say something"}], "max_tokens": 16}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{front.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}", **headers}) as response,
    ):
        return response.status, {name.lower(): value for name, value in response.headers.items()}, await response.json()


async def get(front: Front, path: str, key: str) -> tuple[int, dict[str, Any]]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{front.url}{path}", headers={"Authorization": f"Bearer {key}"}) as response,
    ):
        return response.status, await response.json()


async def names(front: Front, key: str) -> list[str]:
    _, listed = await get(front, "/v1/models", key)
    return [entry["id"] for entry in listed["data"]]


async def test_an_endpoint_is_called_by_its_name_and_its_model_answers(front: Front) -> None:
    worker = await front.worker(whole, models=(QWEN,))
    front.endpoint("chat", model="Qwen/Qwen3-8B")
    status, _, body = await ask(front, "chat", front.key())
    assert (status, body["model"]) == (200, "Qwen/Qwen3-8B")
    assert (worker.heads[0]["model"], worker.heads[0]["ep"]) == ("Qwen/Qwen3-8B", "chat")
    assert (await ask(front, "Qwen/Qwen3-8B", front.key()))[0] == 200
    assert "ep" not in worker.heads[1]


async def test_the_engine_gets_its_models_name_whatever_the_client_wrote(front: Front) -> None:
    async with FakeEngine() as engine, front.gateway(engine):
        front.endpoint("chat", model="m")
        status, _, body = await ask(front, "chat", front.key())
        assert (status, body.get("model")) == (200, engine.model), "it refuses any other name"


async def test_an_endpoint_goes_before_a_model_of_its_name_and_only_in_its_project(front: Front) -> None:
    await front.worker(whole, models=(QWEN,))
    await front.worker(whole, models=(LLAMA,))
    front.endpoint("llama", model="Qwen/Qwen3-8B")
    assert (await ask(front, "llama", front.key()))[2]["model"] == "Qwen/Qwen3-8B"
    assert (await ask(front, "llama", front.key(project="other")))[2]["model"] == "llama"


async def test_a_change_holds_for_the_next_call_and_what_is_gone_is_no_model(front: Front) -> None:
    await front.worker(whole, models=(QWEN, LLAMA))
    front.endpoint("chat", model="llama")
    assert (await ask(front, "chat", front.key()))[2]["model"] == "llama"
    front.endpoint("chat", model="Qwen/Qwen3-8B")
    assert (await ask(front, "chat", front.key()))[2]["model"] == "Qwen/Qwen3-8B"
    front.endpoint("chat")
    status, _, body = await ask(front, "chat", front.key())
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert (await ask(front, "chat", front.key(project="other")))[0] == 404


async def test_an_endpoint_whose_model_nobody_serves_is_there_but_not_ready(front: Front) -> None:
    await front.worker(whole, models=(QWEN,))
    front.endpoint("chat", model="llama")
    status, headers, body = await ask(front, "chat", front.key())
    assert (status, body["error"]["code"]) == (503, "no_worker")
    assert "retry-after" in headers
    assert "chat" not in await names(front, front.key())


@pytest.mark.parametrize(
    ("claims", "through", "directly"),
    [
        ({}, 200, 200),
        ({"models": frozenset({"Qwen/Qwen3-8B"})}, 200, 200),
        ({"models": frozenset({"llama", "chat"})}, 403, 403),
        ({"endpoints": frozenset({"chat"})}, 200, 403),
        ({"endpoints": frozenset({"other"})}, 403, 403),
        ({"endpoints": frozenset({"chat"}), "models": frozenset({"llama"})}, 403, 403),
        ({"endpoints": frozenset({"chat"}), "models": frozenset({"Qwen/Qwen3-8B"})}, 200, 403),
        ({"roles": frozenset({"viewer"})}, 403, 403),
    ],
    ids=str,
)
async def test_a_key_gets_no_further_through_an_endpoint(front: Front, claims: dict[str, Any], through: int, directly: int) -> None:
    await front.worker(whole, models=(QWEN, LLAMA))
    front.endpoint("chat", model="Qwen/Qwen3-8B")
    key = front.key(**claims)
    assert (await ask(front, "chat", key))[0] == through
    assert (await ask(front, "Qwen/Qwen3-8B", key))[0] == directly
    if "roles" not in claims:
        seen = await names(front, key)
        assert ("chat" in seen, "Qwen/Qwen3-8B" in seen) == (through == 200, directly == 200)


async def test_limits_of_an_endpoint_hold_for_its_calls_alone(front: Front) -> None:
    worker = await front.worker(never, models=(QWEN,))
    front.endpoint("chat", model="Qwen/Qwen3-8B", limit=Limit(concurrency=1))
    key = front.key()
    running = asyncio.create_task(ask(front, "chat", key))
    await worker.until(lambda: len(worker.heads) == 1)
    worker.serve = whole
    status, headers, body = await ask(front, "chat", front.key(id=b"another."))
    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
    assert "the endpoint 'chat'" in body["error"]["message"]
    assert int(headers["retry-after"]) >= 1
    assert (await ask(front, "Qwen/Qwen3-8B", key))[0] == 200, "the model itself is not limited"
    front.endpoint("chat", project="other", model="Qwen/Qwen3-8B", limit=Limit(concurrency=1))
    assert (await ask(front, "chat", front.key(project="other")))[0] == 200, "another project's of that name is another"
    front.endpoint("chat", model="Qwen/Qwen3-8B")
    assert (await ask(front, "chat", key))[0] == 200, "a limit that is taken away is gone at once"
    running.cancel()


async def test_limits_of_the_model_hold_through_an_endpoint_as_well(front: Front) -> None:
    await front.worker(whole, models=(QWEN,))
    front.endpoint("chat", model="Qwen/Qwen3-8B", limit=Limit(concurrency=5))
    limits = Limits(models={"Qwen/Qwen3-8B": Limit(concurrency=0)})
    front.limits.take_document(Document(kind="limits", name="models", seq=1, previous=b"", issued=0.0, body=encode_limits(limits)))
    status, _, body = await ask(front, "chat", front.key())
    assert (status, "the model 'Qwen/Qwen3-8B'" in body["error"]["message"]) == (429, True)


async def test_an_endpoints_deadline_holds_where_the_client_names_none(front: Front) -> None:
    worker = await front.worker(never, models=(QWEN,))
    front.endpoint("chat", model="Qwen/Qwen3-8B", timeout_s=0.2)
    status, _, body = await ask(front, "chat", front.key())
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
    assert worker.heads[0]["dl"] <= 200
    await worker.until(lambda: worker.cancelled == 1)
    worker.serve = whole
    await ask(front, "chat", front.key(), **{"x-request-timeout": "60"})
    assert 200 < worker.heads[1]["dl"] <= 60_000, "who says how long waits so long"
    await ask(front, "Qwen/Qwen3-8B", front.key())
    assert "dl" not in worker.heads[2]


async def test_both_receipts_name_the_endpoint(tmp_path: Path) -> None:
    identity = MESH.identity(Role.PROXY, now=time.time())
    ledgers = []
    for name in ("proxy", "worker"):
        (tmp_path / name).mkdir()
        front_clock = Front(MESH, tmp_path).clock
        ledgers.append(Ledger(tmp_path / name / LEDGER_FILE, sign=signer(identity, front_clock), clock=front_clock, keep_s=3600.0))
        ledgers[-1].start()
    try:
        async with Front(MESH, tmp_path, ledger=ledgers[0]) as front, FakeEngine() as engine, front.gateway(engine, ledger=ledgers[1]):
            front.endpoint("chat", model="m")
            assert (await ask(front, "chat", front.key()))[0] == 200
            assert (await ask(front, "chat", front.key(models=frozenset())))[0] == 403
            proxys = [await read(ledgers[0], 2), await read(ledgers[1], 1)]
    finally:
        for ledger in ledgers:
            await ledger.stop()
    (served, refused), (workers,) = proxys
    assert (served.endpoint, served.model, served.status) == ("chat", "m", "ok")
    assert (refused.endpoint, refused.model, refused.status) == ("chat", "m", "key_not_allowed")
    assert replace(workers, digest="") == replace(workers, endpoint="chat", model="m", digest="", side=Role.WORKER)


async def read(ledger: Ledger, count: int) -> list[Receipt]:
    """Once there are so many receipts: by when they were written."""
    async with asyncio.timeout(20):
        while len(found := (await ledger.page(Query(since=0, until=1 << 62))).receipts) < count:
            await asyncio.sleep(0.02)
    return sorted(map(parse_receipt, found), key=lambda receipt: receipt.at)


async def test_viewers_see_their_projects_endpoints_and_what_leads_nowhere(front: Front) -> None:
    await front.worker(whole, models=(QWEN,))
    front.endpoint("chat", model="Qwen/Qwen3-8B", timeout_s=30.0, limit=Limit(rps=5.0))
    front.endpoint("spare", model="llama")
    front.endpoint("chat", project="other", model="llama")
    assert (await get(front, "/mesh/v1/endpoints", front.key()))[0] == 403
    status, told = await get(front, "/mesh/v1/endpoints", front.key(roles=frozenset({"viewer"})))
    assert status == 200
    assert [(entry["name"], entry["ready"], entry["limits"], entry["seq"]) for entry in told["endpoints"]] == [
        ("chat", True, {"rps": 5.0}, 1),
        ("spare", False, {}, 1),
    ]
    _, all_of_them = await get(front, "/mesh/v1/endpoints", front.key(project="mesh", roles=frozenset({"admin"})))
    assert len(all_of_them["endpoints"]) == 3
    _, own = await get(front, "/mesh/v1/endpoints", front.key(project="other", roles=frozenset({"admin"})))
    assert len(own["endpoints"]) == 1
