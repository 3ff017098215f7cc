"""What a request leaves behind on both sides: the engine's own numbers, what had been delivered of what broke, and who asked.

The proxy's front over real sockets, the real gateway behind it, a ledger on each side.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mesh import ledger as ledger_module
from mesh.doctor import Severity
from mesh.ledger import Ledger, Query
from mesh.receipts import Receipt, parse_receipt
from mesh.trust import Role
from proxy.metering import look_at
from tests.support.authority import make_mesh
from tests.support.fake_engine import FakeEngine, Misbehaviour, Mode
from tests.support.front import DEADLINE_S, Front, post
from tests.support.ledgers import open_ledger
from worker.gateway import Gateway

MESH = make_mesh(now=time.time() - 3600)
CHAT = "/v1/chat/completions"
PROJECT_KEY = {"id": b"12345678", "project": "search"}


@dataclass
class Books:
    """A front, a worker's gateway and the ledgers of both."""

    front: Front
    gateway: Gateway
    engine: FakeEngine
    proxys: Ledger
    workers: Ledger

    def body(self, *, stream: bool = True, **fields: Any) -> bytes:
        return json.dumps({"model": "m", "messages": [{"role": "user", "content": "Say it"}], "stream": stream, **fields}).encode()

    async def ask(self, body: bytes, **claims: Any) -> Any:
        wire = await self.front.connect()
        await wire.send(post(CHAT, body, self.front.key(**(PROJECT_KEY | claims))))
        answer = await wire.answer()
        wire.close()
        return answer

    async def receipts(self, ledger: Ledger, count: int = 1) -> list[Receipt]:
        """Once so many are on disk."""
        async with asyncio.timeout(DEADLINE_S):
            while ledger.written < count or ledger.waiting:
                await asyncio.sleep(0.01)
        page = await ledger.page(Query())
        return [parse_receipt(body) for body in page.receipts]

    async def pair(self) -> tuple[Receipt, Receipt]:
        """The worker's receipt and the proxy's of the only request."""
        (worker,), (proxy,) = await self.receipts(self.workers), await self.receipts(self.proxys)
        assert (worker.side, proxy.side) == (Role.WORKER, Role.PROXY)
        assert worker.order == proxy.order
        assert (worker.project, worker.key, worker.model) == (proxy.project, proxy.key, proxy.model) == ("search", b"12345678", "m")
        return worker, proxy


@pytest.fixture
async def books(tmp_path: Path) -> AsyncIterator[Books]:
    ledgers = []
    for role in (Role.PROXY, Role.WORKER):
        (tmp_path / role).mkdir()
        ledgers.append(open_ledger(tmp_path / role, MESH.identity(role, now=time.time())))
    proxys, workers = ledgers
    async with FakeEngine() as engine, Front(MESH, tmp_path, ledger=proxys) as front, front.gateway(engine, ledger=workers) as (_, gateway):
        yield Books(front, gateway, engine, proxys, workers)
    for ledger in ledgers:
        await ledger.stop()


@pytest.mark.parametrize("stream", [True, False])
async def test_both_sides_have_the_engines_own_count_of_a_completed_request(books: Books, stream: bool) -> None:
    answer = await books.ask(books.body(stream=stream, max_tokens=9))
    assert answer.status == 200
    worker, proxy = await books.pair()
    stats = books.engine.stats
    assert (worker.prompt, worker.completion) == (stats.prompt_tokens, stats.completion_tokens) == (proxy.prompt, proxy.completion)
    assert worker.completion == 9
    assert worker.size_bytes == proxy.size_bytes == len(answer.body)
    assert (worker.status, proxy.status, worker.own_count, proxy.own_count) == ("ok", "ok", False, False)
    assert proxy.final
    assert proxy.peer
    assert worker.took_ms >= worker.engine_ms
    assert worker.at == proxy.at


async def test_a_client_that_leaves_is_charged_for_what_it_got(books: Books) -> None:
    books.engine.tokens_per_s = 50
    wire = await books.front.connect()
    await wire.send(post(CHAT, books.body(max_tokens=1000), books.front.key(**PROJECT_KEY)))
    while bytes(wire.got).count(b"\n\n") < 6:
        await wire.more()
    wire.close()
    worker, proxy = await books.pair()
    assert (worker.status, proxy.status) == ("cancelled", "cancelled")
    assert worker.partial
    assert proxy.partial
    assert worker.own_count
    assert 4 <= worker.completion < 1000
    assert worker.completion == worker.events - 1
    assert proxy.size_bytes <= worker.size_bytes


async def test_an_engine_that_breaks_off_is_paid_for_what_was_delivered(books: Books) -> None:
    books.engine.misbehave(Misbehaviour(mode=Mode.CUT, after_tokens=4))
    await books.ask(books.body(max_tokens=9))
    worker, proxy = await books.pair()
    assert (worker.status, proxy.status) == ("engine_unavailable", "not_movable")
    assert (worker.completion, worker.own_count) == (4, True)
    assert worker.size_bytes == proxy.size_bytes
    assert proxy.own_count


async def test_an_attempt_that_failed_before_its_first_byte_has_its_receipt_and_so_has_the_next(books: Books) -> None:
    books.engine.misbehave(Misbehaviour(mode=Mode.STATUS))
    asked = 0
    async with FakeEngine() as other, books.front.gateway(other):
        while not books.engine.stats.failed:
            assert (await books.ask(books.body(max_tokens=3))).status == 200
            asked += 1
    receipts = await books.receipts(books.proxys, asked + 1)
    failed, served = receipts[-2:]
    assert (failed.id, failed.attempt, failed.status, failed.final, failed.delivered) == (served.id, 1, "engine_unavailable", False, False)
    assert (served.attempt, served.status, served.final) == (2, "ok", True)
    (broken,) = await books.receipts(books.workers)
    assert (broken.order, broken.status, broken.completion) == (failed.order, "engine_unavailable", 0)


async def test_a_refused_call_is_in_the_audit_log_without_an_attempt(books: Books) -> None:
    answer = await books.ask(books.body(), roles=frozenset({"viewer"}))
    assert answer.status == 403
    answer = await books.ask(json.dumps({"model": "no\x1b such\ud800", "messages": []}).encode())
    assert answer.status in (400, 404)
    first, second = await books.receipts(books.proxys, 2)
    assert (first.attempt, first.status, first.model, first.key) == (0, "key_not_allowed", "m", b"12345678")
    assert first.final
    assert second.status in ("model_not_found", "invalid_request")
    assert await books.receipts(books.workers, 0) == []


async def test_a_stranger_leaves_nothing(books: Books) -> None:
    wire = await books.front.connect()
    await wire.send(post(CHAT, books.body(), "im_nonsense"))
    assert (await wire.answer()).status == 401
    wire.close()
    await books.ask(books.body(max_tokens=1))
    assert len(await books.receipts(books.proxys)) == 1


async def test_a_proxy_that_cannot_write_receipts_takes_no_requests_and_says_so(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_WAITING", 0)
    answer = await books.ask(books.body())
    assert answer.status == 503
    assert b"cannot write down" in answer.body
    wire = await books.front.connect()
    await wire.send(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
    ready = await wire.answer()
    wire.close()
    assert ready.status == 503
    assert b"receipts" in ready.body


async def test_a_worker_that_cannot_write_receipts_is_passed_over(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(books.workers), "full", property(lambda ledger: ledger is books.workers))
    async with FakeEngine() as other, books.front.gateway(other):
        for _ in range(4):
            assert (await books.ask(books.body(max_tokens=1))).status == 200
        assert other.stats.finished == 4
    assert books.engine.stats.started == 0


async def test_the_doctor_sees_a_ledger_that_cannot_write(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(finding.check, finding.severity) for finding in look_at(books.proxys)] == [("receipts", Severity.OK)]
    books.proxys.trouble = "OperationalError: database or disk is full"
    (finding,) = look_at(books.proxys)
    assert finding.severity == Severity.FAIL
    assert "disk is full" in finding.detail
    assert finding.advice
    books.proxys.trouble = ""
    monkeypatch.setattr(ledger_module, "MAX_WAITING", 0)
    assert look_at(books.proxys)[0].severity == Severity.FAIL
