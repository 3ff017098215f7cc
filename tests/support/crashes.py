"""Nodes killed at random moments under load, and the books held against what clients got and engines counted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from mesh.client import Client
from mesh.commands.asking import Asked
from mesh.commands.documents import operator_settings
from mesh.errors import ApiError
from mesh.ledger import Query
from mesh.receipts import Receipt, parse_receipt
from mesh.usage import Charge, Copy, settle
from tests.support.deployment import Deployment, Node, until
from tests.support.fake_engine import FakeEngine, Job

_REQUEST: ContextVar[str] = ContextVar("request")


class CountingEngine(FakeEngine):
    """Knows by request id what it made."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.made: Counter[str] = Counter()
        self.prompts: dict[str, int] = {}

    async def _generate(self, request: web.Request, body: dict[str, Any], route: str, ids: list[int], limit: Any) -> web.StreamResponse:
        request_id = request.headers.get("X-Request-Id", "")
        _REQUEST.set(request_id)
        self.prompts.setdefault(request_id, len(ids))
        return await super()._generate(request, body, route, ids, limit)

    async def _tokens(self, job: Job, slow: bool) -> AsyncIterator[int]:
        request_id = _REQUEST.get()
        async for token in super()._tokens(job, slow):
            self.made[request_id] += 1
            yield token


@dataclass
class Call:
    """One request as its client saw it."""

    asked: int
    id: str = ""
    got: int = 0
    whole: bool = False


@dataclass
class Findings:
    """What an ordeal came to; every list of ``problems`` is empty if the books are right."""

    kills: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    whole: int = 0
    moved: int = 0
    cut: int = 0
    acknowledged: int = 0
    tokens: int = 0
    problems: dict[str, list[str]] = field(
        default_factory=lambda: {name: [] for name in ("lost", "twice", "missing", "miscounted", "overcharged", "flagged")}
    )

    @property
    def right(self) -> bool:
        return not any(self.problems.values())

    def describe(self) -> dict[str, Any]:
        counts = {name: len(found) for name, found in self.problems.items()}
        told = {name: getattr(self, name) for name in ("calls", "whole", "moved", "cut", "acknowledged", "tokens")}
        return {"kills": dict(self.kills), **told, **counts}


class Ordeal:
    """Clients that ask without end, of proxies and workers that are killed and come back."""

    def __init__(self, mesh: Deployment, engines: dict[str, CountingEngine], *, rng: random.Random, clients: int = 8) -> None:
        self._mesh = mesh
        self._engines = engines
        self._rng = rng
        self._clients = clients
        self._proxies: list[Node] = []
        self._workers: list[Node] = []
        self._key = mesh.key(project="ordeal")
        self._calls: list[Call] = []
        self._told: dict[tuple[bytes, tuple[int, str, int]], Receipt] = {}
        self.findings = Findings()

    async def start(self, proxies: int = 2) -> None:
        await self._mesh.bootstrap("b1")
        self._proxies = [await self._mesh.proxy(f"p{number}") for number in range(proxies)]
        self._workers = [
            await self._mesh.worker(name, "--engine", "external", "--engine-url", engine.url) for name, engine in self._engines.items()
        ]
        for proxy in self._proxies:
            await self._mesh.until_ready(proxy, *self._workers)

    async def run(self, kills: int, *, most_s: float = 1.5) -> Findings:
        """So many kills, each after a random time under load; then the audit."""
        clients = [asyncio.create_task(self._ask_on()) for _ in range(self._clients)]
        try:
            for _ in range(kills):
                await asyncio.sleep(self._rng.uniform(0.2, most_s))
                await self._note_what_is_told()
                await self._kill_one()
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        await self._audit()
        return self.findings

    # -- load

    async def _ask_on(self) -> None:
        while True:
            call = Call(asked=self._rng.randint(5, 60))
            self._calls.append(call)
            proxy = self._rng.choice(self._proxies)
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                await asyncio.wait_for(self._ask(proxy, call), 30)
            if not call.got:
                await asyncio.sleep(0.05)

    async def _ask(self, proxy: Node, call: Call) -> None:
        body = {"model": "fake", "stream": True, "max_tokens": call.asked, "messages": [{"role": "user", "content": f"{call.asked} words"}]}
        headers = {"Authorization": f"Bearer {self._key}"}
        async with self._mesh.http.post(f"{proxy.api}/chat/completions", json=body, headers=headers) as response:
            call.id = response.headers.get("x-request-id", "")
            if response.status != 200:
                await response.read()
                return
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    call.whole = True
                elif line.startswith(b"data:"):
                    choices = json.loads(line[5:]).get("choices") or [{}]
                    call.got += bool(choices[0].get("delta", {}).get("content"))

    # -- kills

    async def _kill_one(self) -> None:
        group = self._rng.choice((self._proxies, self._workers))
        at = self._rng.randrange(len(group))
        victim = group[at]
        self.findings.kills[str(victim.role)] += 1
        await victim.kill()
        if group is self._proxies:
            group[at] = await self._mesh.proxy(victim.name, fresh=False)
            await self._mesh.until_ready(group[at], *self._workers)
            return
        engine = self._engines[victim.name]
        group[at] = await self._mesh.worker(victim.name, "--engine", "external", "--engine-url", engine.url, fresh=False)
        for proxy in self._proxies:
            await self._mesh.until_ready(proxy, group[at])

    # -- books

    async def _receipts(self) -> dict[tuple[bytes, tuple[int, str, int]], Receipt]:
        """Every receipt that any node tells, by node and place. A node that tells one twice is found out."""
        found: dict[tuple[bytes, tuple[int, str, int]], Receipt] = {}
        settings = operator_settings(self._mesh.authority, self._mesh.home, url=self._rng.choice(self._proxies).root)
        async with Client(settings) as client:
            asked = Asked(client)
            for node in await asked.nodes():
                query = Query(project="ordeal")
                with contextlib.suppress(ApiError):
                    while True:
                        page = await asked.page(node, query)
                        for body in page.receipts:
                            receipt = parse_receipt(body)
                            if (node, receipt.order) in found:
                                self.findings.problems["twice"].append(receipt.id)
                            found[node, receipt.order] = receipt
                        if not page.more:
                            break
                        query = Query(project="ordeal", after=parse_receipt(page.receipts[-1]).order)
        return found

    async def _note_what_is_told(self) -> None:
        with contextlib.suppress(ApiError):
            self._told |= await self._receipts()

    async def _audit(self) -> None:
        """Once nothing is on its way any more."""
        findings, found = self.findings, await self._receipts()

        async def quiet() -> bool:
            nonlocal found
            before, found = found, await self._receipts()
            return len(before) == len(found) and len({node for node, _ in found}) == len(self._proxies) + len(self._workers)

        await asyncio.sleep(0.5)
        await until(quiet, what="the books to be closed")
        findings.acknowledged = len(self._told)
        findings.problems["lost"] = [receipt.id for place, receipt in self._told.items() if found.get(place) != receipt]
        requests: dict[str, list[Copy]] = {}
        for (node, _), receipt in found.items():
            requests.setdefault(receipt.id, []).append(Copy(receipt=receipt, node_id=node))
        answered = frozenset(node for node, _ in found)
        charges = {request_id: settle(copies, answered=answered, now=int(time.time() * 1000)) for request_id, copies in requests.items()}
        for call in self._calls:
            if call.id:
                self._check(call, charges.get(call.id, []))

    def _check(self, call: Call, charges: list[Charge]) -> None:
        findings, problems = self.findings, self.findings.problems
        engines = [engine for engine in self._engines.values() if engine.made[call.id]]
        made = sum(engine.made[call.id] for engine in engines)
        completion, prompt = sum(charge.completion for charge in charges), sum(charge.prompt for charge in charges)
        findings.calls += 1
        findings.tokens += completion
        findings.moved += len(engines) > 1
        if not call.whole:
            findings.cut += 1
            if completion > made:
                problems["overcharged"].append(f"{call.id}: {completion} of {made} made, {call.got} got")
            return
        findings.whole += 1
        if not charges:
            problems["missing"].append(call.id)
            return
        told = f"{call.id}: {[(charge.attempt, charge.completion, charge.status, charge.confirmed) for charge in charges]}"
        if call.got != call.asked or completion != call.asked or (len(engines) == 1 and len(charges) == 1 and made != completion):
            problems["miscounted"].append(f"{told}, asked {call.asked}, got {call.got}, made {made}")
        if prompt != engines[0].prompts[call.id] and len(engines) == 1:
            problems["miscounted"].append(f"{told}, prompt {prompt} of {engines[0].prompts[call.id]}")
        if any(charge.flags - {"unmatched"} for charge in charges):
            problems["flagged"].append(f"{told} {[sorted(charge.flags) for charge in charges]}")
