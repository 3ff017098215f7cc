"""A second worker is asked where the first lets its client wait: who answers, who is cancelled, and what the receipts say of both."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import EngineUnavailable
from mesh.ledger import Ledger, Query
from mesh.link.link import IncomingStream
from mesh.receipts import Receipt, parse_receipt
from mesh.records import ModelEntry
from mesh.trust import Role
from proxy import retry
from proxy.hedge import OUTRUN
from tests.support.authority import make_mesh
from tests.support.fake_engine import FakeEngine, Misbehaviour, Mode, answer_to
from tests.support.front import DEADLINE_S, Front, Serve, Wire, Worker, post
from tests.support.ledgers import open_ledger

MESH = make_mesh(now=time.time() - 3600)
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Say something"}]
ANY = (ModelEntry(name="m", tasks=("chat", "responses")),)
SOON_S = 0.05


class Stage:
    """A front that hedges, its ledger, and workers in the order in which they are asked."""

    def __init__(self, front: Front, ledger: Ledger) -> None:
        self.front = front
        self.ledger = ledger

    async def workers(self, *serve: Serve) -> list[Worker]:
        """Taking turns begins with the one that was linked second, and goes on with the first."""
        linked = [await self.front.worker(one, models=ANY) for one in (*serve[1::-1], *serve[2:])]
        return [*linked[1::-1], *linked[2:]]

    async def begin(self, path: str = CHAT, **body: Any) -> Wire:
        wire = await self.front.connect()
        given = {"model": "m", "messages": MESSAGES, **body} if path == CHAT else {"model": "m", "input": "Hi", **body}
        await wire.send(post(path, json.dumps(given).encode(), self.front.key()))
        return wire

    async def receipts(self) -> list[tuple[int, str, bool, int]]:
        """Number, status, whether it is the request's end, and bytes passed on, of each attempt."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.ledger.written or self.ledger.waiting:
                await asyncio.sleep(0.01)
        page = await self.ledger.page(Query())
        found: list[Receipt] = [parse_receipt(body) for body in page.receipts]
        return sorted((one.attempt, one.status, one.final, one.size_bytes) for one in found)

    @property
    def hedged(self) -> int:
        return self.front.inference.counts()["retries"]["retried"]


@asynccontextmanager
async def staged(folder: Path, **settings: Any) -> AsyncIterator[Stage]:
    ledger = open_ledger(folder, MESH.identity(Role.PROXY, now=time.time()))
    given = {"routing": "round-robin", "hedge_after_s": SOON_S} | settings
    async with Front(MESH, folder, ledger=ledger, **given) as front:
        yield Stage(front, ledger)


def says(text: str, *, after: asyncio.Event | None = None) -> Serve:
    async def serve(stream: IncomingStream, head: dict[str, Any]) -> None:
        stream.accept()
        if after is not None:
            await after.wait()
        body = json.dumps({"said": text}).encode()
        stream.send_head({"status": 200, "type": "application/json", "length": len(body)})
        await stream.send(body)
        stream.end({"in": 3, "out": 2})

    return serve


def fails(after: asyncio.Event) -> Serve:
    async def serve(stream: IncomingStream, head: dict[str, Any]) -> None:
        await after.wait()
        stream.fail(EngineUnavailable("broken"))

    return serve


async def silent(stream: IncomingStream, head: dict[str, Any]) -> None:
    stream.accept()
    await asyncio.Event().wait()


async def test_second_worker_answers_for_one_that_lets_its_client_wait(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        first, second = await stage.workers(silent, says("second"))
        answer = await (await stage.begin()).answer()
        assert (answer.status, answer.json()) == (200, {"said": "second"})
        await first.until(lambda: first.cancelled)
        assert [worker.heads[0]["try"] for worker in (first, second)] == [1, 2]
        assert await stage.receipts() == [(1, OUTRUN, False, 0), (2, "ok", True, len(answer.body))]
        assert stage.hedged == 1
        assert [worker.in_flight for worker in stage.front.fleet.workers.values()] == [0, 0]
        assert stage.front.fleet.workers[first.record.node_id].failed == 0


async def test_first_worker_may_still_be_the_first(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        go = asyncio.Event()
        _, second = await stage.workers(says("first", after=go), silent)
        wire = await stage.begin()
        await second.until(lambda: second.heads)
        go.set()
        answer = await wire.answer()
        assert answer.json() == {"said": "first"}
        await second.until(lambda: second.cancelled)
        assert await stage.receipts() == [(1, "ok", True, len(answer.body)), (2, OUTRUN, False, 0)]


async def test_nobody_else_is_asked_while_the_first_is_in_time(tmp_path: Path) -> None:
    async with staged(tmp_path, hedge_after_s=60.0) as stage:
        _, second = await stage.workers(says("first"), says("second"))
        assert (await (await stage.begin()).answer()).json() == {"said": "first"}
        assert (second.heads, stage.hedged) == ([], 0)
        assert [row[:3] for row in await stage.receipts()] == [(1, "ok", True)]


async def test_one_of_two_that_fails_is_made_good_by_the_other(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        broken, go = asyncio.Event(), asyncio.Event()
        first, second = await stage.workers(fails(broken), says("second", after=go))
        wire = await stage.begin()
        await second.until(lambda: second.heads)
        broken.set()
        known = stage.front.fleet.workers[first.record.node_id]
        async with asyncio.timeout(DEADLINE_S):
            while known.in_flight:
                await asyncio.sleep(0.01)
        go.set()
        assert (await wire.answer()).json() == {"said": "second"}
        assert [row[:3] for row in await stage.receipts()] == [(1, "engine_unavailable", False), (2, "ok", True)]
        assert known.failed == 1


async def test_request_that_fails_at_both_is_tried_at_a_third(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        broken = asyncio.Event()
        _, second, third = await stage.workers(fails(broken), fails(broken), says("third"))
        wire = await stage.begin()
        await second.until(lambda: second.heads)
        broken.set()
        assert (await wire.answer()).json() == {"said": "third"}
        assert third.heads[0]["try"] == 3


async def test_client_that_goes_away_is_gone_for_both(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        first, second = await stage.workers(silent, silent)
        wire = await stage.begin()
        await second.until(lambda: second.heads)
        wire.close()
        for worker in (first, second):
            await worker.until(lambda worker=worker: worker.cancelled)
        assert [row[1] for row in await stage.receipts()] == ["cancelled", "cancelled"]


@pytest.mark.parametrize("why", ["unsafe", "budget", "alone", "off"])
async def test_what_must_not_be_doubled_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    monkeypatch.setattr(retry, "FLOOR", 0 if why == "budget" else 64)
    settings = {"retry_share": 0.0} if why == "budget" else {"hedge_after_s": 0.0} if why == "off" else {}
    async with staged(tmp_path, **settings) as stage:
        go = asyncio.Event()
        others = await stage.workers(says("first", after=go), *((silent,) if why != "alone" else ()))
        wire = await stage.begin("/v1/responses" if why == "unsafe" else CHAT)
        await others[0].until(lambda: others[0].heads)
        await asyncio.sleep(6 * SOON_S)
        assert [len(worker.heads) for worker in others] == [1] + [0] * (len(others) - 1)
        go.set()
        assert (await wire.answer()).json() == {"said": "first"}
        assert stage.hedged == 0


async def test_stream_of_the_second_worker_moves_like_any_other(tmp_path: Path) -> None:
    """The first says nothing, the second dies in the middle of its answer, the third goes on."""
    async with (
        staged(tmp_path) as stage,
        FakeEngine(tokens_per_s=100) as mute,
        FakeEngine(tokens_per_s=100) as frail,
        FakeEngine() as sound,
        stage.front.gateway(frail, token_ids=True),
        stage.front.gateway(mute, token_ids=True),
        stage.front.gateway(sound, token_ids=True),
    ):
        mute.misbehave(Misbehaviour(mode=Mode.HANG))
        frail.misbehave(Misbehaviour(mode=Mode.CUT, after_tokens=5))
        answer = await (await stage.begin(stream=True, max_tokens=14)).answer()
        chunks = [event for event in answer.events() if event != "[DONE]"]
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == answer_to(MESSAGES, 14)
        assert answer.events()[-1] == "[DONE]"
        assert [row[1] for row in await stage.receipts()] == [OUTRUN, "engine_unavailable", "ok"]
