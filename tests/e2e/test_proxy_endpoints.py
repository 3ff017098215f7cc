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
import structlog
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from mesh.documents import Document
from mesh.endpoints import Recording
from mesh.ledger import LEDGER_FILE, Ledger, Query, signer
from mesh.limits import Limit, Limits, encode_limits
from mesh.link.link import IncomingStream
from mesh.prompts import Kept, PromptQuery, open_record
from mesh.receipts import Receipt, parse_receipt
from mesh.records import ModelEntry
from mesh.trust import Role
from proxy.prompts import keeper
from tests.support.authority import make_mesh
from tests.support.clocks import StoppedClock
from tests.support.fake_engine import FakeEngine
from tests.support.front import Front

MESH = make_mesh(now=time.time() - 3600)
PROMPT_KEY = X25519PrivateKey.generate()
PUBLIC = PROMPT_KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
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


async def streamed(stream: IncomingStream, head: dict[str, Any]) -> None:
    await stream.read_body(max_bytes=head["size"])
    stream.accept()
    stream.send_head({"status": 200, "type": "text/event-stream"})
    for piece in ("write to bo", "b@exam", "ple.org"):
        event = {"choices": [{"index": 0, "delta": {"content": piece}}]}
        await stream.send(b"data: %b\n\n" % json.dumps(event).encode())
    await stream.send(b"data: [DONE]\n\n")
    stream.end({"in": 3, "out": 3})


async def kept_by(front: Front, count: int) -> list[Kept]:
    async with asyncio.timeout(20):
        while front.prompts.kept < count:
            await asyncio.sleep(0.02)
    return list((await front.prompts.page(PromptQuery(project="p", endpoint="chat"))).kept)


async def test_prompts_are_kept_where_the_endpoint_says_so_and_nowhere_else(front: Front, tmp_path: Path) -> None:
    await front.worker(streamed, models=(QWEN,))
    front.endpoint("chat", model="Qwen/Qwen3-8B", recording=Recording(public_key=PUBLIC, keep_s=3600))
    front.endpoint("quiet", model="Qwen/Qwen3-8B")
    with structlog.testing.capture_logs() as log:
        for model in ("Qwen/Qwen3-8B", "quiet", "chat", "chat"):
            status, text = await ask_for_stream(front, model, "My number is +49 30 901820")
            assert (status, "ple.org" in text) == (200, True), "what the client gets is whole"
        kept = await kept_by(front, 2)
    assert "901820" not in str(log)
    assert len(kept) == front.prompts.kept == 2
    record = json.loads(open_record(kept[0].sealed, PROMPT_KEY, project="p", endpoint="chat", request_id=kept[0].id))
    assert (record["request"], record["model"], record["status"], record["task"]) == (kept[0].id, "Qwen/Qwen3-8B", "ok", "chat")
    assert record["prompt"]["messages"] == [{"role": "user", "content": "My number is [phone]"}]
    assert record["answer"] == {"choices.0.delta.content": "write to [email]"}
    on_disk = contents(tmp_path)
    assert on_disk
    for secret in (b"901820", b"My number", b"[phone]", b"write to"):
        assert secret not in on_disk, "it is sealed"
    front.endpoint("chat", model="Qwen/Qwen3-8B", recording=Recording(public_key=PUBLIC, keep_s=3600, full=True))
    await ask_for_stream(front, "chat", "My number is +49 30 901820")
    last = (await kept_by(front, 3))[-1]
    assert b"901820" in open_record(last.sealed, PROMPT_KEY, project="p", endpoint="chat", request_id=last.id)
    front.endpoint("chat", model="Qwen/Qwen3-8B")
    await ask_for_stream(front, "chat", "My number is +49 30 901820")
    assert len(await kept_by(front, 3)) == 3


def contents(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.glob("prompts.db*"))


async def ask_for_stream(front: Front, model: str, text: str) -> tuple[int, str]:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True}
    headers = {"Authorization": f"Bearer {front.key()}"}
    async with aiohttp.ClientSession() as session, session.post(f"{front.url}/v1/chat/completions", json=body, headers=headers) as response:
        return response.status, await response.text()


async def test_a_disk_that_takes_nothing_and_a_queue_that_is_full_fail_no_request(
    front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await front.worker(whole, models=(QWEN,))
    front.endpoint("chat", model="Qwen/Qwen3-8B", recording=Recording(public_key=PUBLIC, keep_s=3600))
    (tmp_path / "prompts.db").mkdir()
    assert (await ask(front, "chat", front.key()))[0] == 200
    async with asyncio.timeout(20):
        while front.prompts.dropped < 1:
            await asyncio.sleep(0.02)
    monkeypatch.setattr(keeper, "MAX_WAITING", 0)
    assert (await ask(front, "chat", front.key()))[0] == 200
    assert (front.prompts.kept, front.prompts.dropped) == (0, 2)


async def test_only_deployers_of_the_project_read_what_was_kept(front: Front) -> None:
    await front.worker(whole, models=(QWEN,))
    front.endpoint("chat", model="Qwen/Qwen3-8B", recording=Recording(public_key=PUBLIC, keep_s=3600))
    assert (await ask(front, "chat", front.key()))[0] == 200
    await kept_by(front, 1)
    deployer = front.key(roles=frozenset({"deployer"}))
    status, told = await get(front, "/mesh/v1/prompts", deployer)
    page = f"/mesh/v1/prompts?node={told['nodes'][0]}&endpoint=chat"
    status, told = await get(front, page, deployer)
    assert (status, len(told["kept"]), told["more"]) == (200, 1, False)
    for roles in ({"viewer"}, {"invoker"}):
        assert (await get(front, page, front.key(roles=frozenset(roles))))[0] == 403
    for project in ("other", "mesh"):
        status, told = await get(front, page + "&project=p", front.key(roles=frozenset({"deployer"}), project=project))
        assert (status, told["error"]["param"]) == (400, "project")
    status, told = await get(front, page, front.key(roles=frozenset({"deployer"}), project="other"))
    assert (status, told["kept"]) == (200, [])
    status, told = await get(front, page + "&project=p", front.key(roles=frozenset({"admin"}), project="mesh"))
    assert (status, len(told["kept"])) == (200, 1)
    status, told = await get(front, f"/mesh/v1/prompts?node={'00' * 32}&endpoint=chat", deployer)
    assert (status, told["error"]["param"]) == (400, "node")


async def test_what_is_over_is_gone_from_the_disk_by_itself(front: Front, tmp_path: Path) -> None:
    await front.worker(whole, models=(QWEN,))
    front.endpoint("chat", model="Qwen/Qwen3-8B", recording=Recording(public_key=PUBLIC, keep_s=3600))
    assert (await ask(front, "chat", front.key()))[0] == 200
    (kept,) = await kept_by(front, 1)
    assert kept.sealed[-100:] in contents(tmp_path)
    front.prompts._clock = StoppedClock(time.time() + 3601)
    sweeping = asyncio.create_task(front.prompts.run())
    async with asyncio.timeout(20):
        while kept.sealed[-100:] in contents(tmp_path):
            await asyncio.sleep(0.02)
    sweeping.cancel()
    assert (await front.prompts.page(PromptQuery(project="p", endpoint="chat"))).kept == ()


async def test_a_proxy_that_has_not_heard_of_an_endpoint_looks_for_it_before_it_says_no(front: Front) -> None:
    await front.worker(whole, models=(QWEN,))
    only = front.key(endpoints=frozenset({"chat"}))
    for _ in range(3):
        assert (await ask(front, "chat", front.key()))[0] == 404
    assert front.shelf.asked == [("endpoint", "chat")], "not with every call"
    assert (await ask(front, "Qwen/Nobody", front.key()))[0] == 404
    assert (await ask(front, "Qwen/Qwen3-8B", front.key()))[0] == 200
    assert front.shelf.asked == [("endpoint", "chat")], "a name that no endpoint can have is not looked for, nor one that is served"
    front.endpoints._looked.clear()
    found = front.shelf.get_document

    async def get_document(kind: str, name: str, *, project: str = "", seq: int = 0) -> Document | None:
        assert await found(kind, name, project=project, seq=seq) is None
        front.endpoint(name, project=project, model="Qwen/Qwen3-8B")
        return None

    front.shelf.get_document = get_document  # type: ignore[method-assign]
    assert (await ask(front, "chat", only))[0] == 200, "it was in the directory"
    assert (await ask(front, "chat", only))[0] == 200
    assert front.shelf.asked == [("endpoint", "chat")] * 2


async def test_what_waits_is_written_when_the_proxy_stops(tmp_path: Path) -> None:
    async with Front(MESH, tmp_path) as front:
        await front.worker(whole, models=(QWEN,))
        front.endpoint("chat", model="Qwen/Qwen3-8B", recording=Recording(public_key=PUBLIC, keep_s=3600))
        for _ in range(3):
            assert (await ask(front, "chat", front.key()))[0] == 200
    again = keeper.Prompts(tmp_path / "prompts.db", clock=front.clock)
    assert len((await again.page(PromptQuery(project="p", endpoint="chat"))).kept) == 3
    await again.stop()
