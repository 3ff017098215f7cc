"""Nodes killed at random moments under load, and the books held against what clients got and engines counted.

What an `Ordeal` holds them to:

* A receipt that any node has told of is there ever after, once, the same to the byte (``lost``, ``twice``). One reads along all the time.
* A call whose client got the whole answer is charged with what its engine counted, to the token (``missing``, ``miscounted``), and
  no two nodes contradict each other on it (``flagged``).
* One that was cut off is charged with no more than its engine made and no less than its client got (``overcharged``, ``undercharged``).
* Every node's signed batches form one chain, and each holds the receipts that it says (``broken``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgpack
from aiohttp import web

from mesh.client import Client
from mesh.commands.asking import Asked
from mesh.commands.documents import operator_settings
from mesh.errors import ApiError, MeshError
from mesh.ledger import LEDGER_FILE, Query
from mesh.merkle import leaf_hash, root_hash
from mesh.receipts import Receipt, check_chain, parse_batch, parse_receipt
from mesh.trust import Role
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


PROBLEMS = ("lost", "twice", "missing", "miscounted", "overcharged", "undercharged", "flagged", "broken")
READ_EVERY_S = 0.1
BETWEEN_S = 1.0
"""Between two kills in one mesh, at least: each receipt has to reach one disk of its two, and a commit is due every 0.2 s."""

STREAMS = 0.8
LEAVERS = 0.1
"""So many of the calls are streams, and so many clients go away in the middle of one."""
GUESSED_TOKENS = 2
"""An estimate may be so far below what a client got, and a twentieth of it."""
WEIGHTS = (12, 12, 1)
"""How often proxies, workers and the bootstrap node, which keeps no receipts, are chosen."""

Place = tuple[bytes, tuple[int, str, int]]
"""A node and where on it a receipt lies."""


@dataclass
class Call:
    """One request as its client saw it."""

    asked: int
    id: str = ""
    got: int = 0
    whole: bool = False


@dataclass
class Findings:
    """What ordeals came to; every list of ``problems`` is empty if the books are right.

    ``struck``: kills of a node that had requests. ``exact``: whole answers of one engine, whose count and the ledger's are the same.
    """

    kills: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    struck: int = 0
    calls: int = 0
    whole: int = 0
    moved: int = 0
    cut: int = 0
    acknowledged: int = 0
    tokens: int = 0
    made: int = 0
    exact: int = 0
    batches: int = 0
    problems: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in PROBLEMS})

    @property
    def right(self) -> bool:
        return not any(self.problems.values())

    def add(self, other: Findings) -> None:
        self.kills.update(other.kills)
        self.refused.update(other.refused)
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, found in other.problems.items():
            self.problems[name] += found

    def describe(self) -> dict[str, Any]:
        counts = {name: len(found) for name, found in self.problems.items()}
        return {"kills": dict(self.kills), "refused": dict(self.refused), **{name: getattr(self, name) for name in _COUNTS}, **counts}


_COUNTS = ("struck", "calls", "whole", "moved", "cut", "acknowledged", "tokens", "made", "exact", "batches")


class Ordeal:
    """Clients that ask without end, of proxies and workers that are killed and come back."""

    def __init__(self, mesh: Deployment, engines: dict[str, CountingEngine], *, rng: random.Random, clients: int = 8) -> None:
        self._mesh = mesh
        self._engines = engines
        self._rng = rng
        self._clients = clients
        self._bootstraps: list[Node] = []
        self._proxies: list[Node] = []
        self._workers: list[Node] = []
        self._key = mesh.key(project="ordeal")
        self._calls: list[Call] = []
        self._running: Counter[str] = Counter()
        self._told: dict[Place, Receipt] = {}
        self.findings = Findings()

    async def start(self, proxies: int = 2) -> None:
        (port,) = self._mesh.free_ports(1)
        self._bootstraps = [await self._mesh.bootstrap("b1", "--port", str(port))]
        self._proxies = [await self._mesh.proxy(f"p{number}") for number in range(proxies)]
        self._workers = [await self._worker(name) for name in self._engines]
        for proxy in self._proxies:
            await self._mesh.until_ready(proxy, *self._workers)

    async def _worker(self, name: str, *, fresh: bool = True) -> Node:
        return await self._mesh.worker(name, "--engine", "external", "--engine-url", self._engines[name].url, fresh=fresh)

    async def run(self, kills: int, *, most_s: float = 1.5) -> Findings:
        """So many kills, each at a random time under load; then the audit."""
        tasks = [asyncio.create_task(self._ask_on()) for _ in range(self._clients)]
        tasks.append(asyncio.create_task(self._read_on()))
        try:
            for _ in range(kills):
                await asyncio.sleep(self._rng.uniform(BETWEEN_S, BETWEEN_S + most_s))
                await self._kill_one()
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error
        await self._audit()
        return self.findings

    # -- load

    async def _ask_on(self) -> None:
        while True:
            call = Call(asked=self._rng.randint(5, 60))
            self._calls.append(call)
            proxy = self._rng.choice(self._proxies)
            self._running[proxy.name] += 1
            try:
                async with asyncio.timeout(30):
                    await self._ask(proxy, call)
            except (aiohttp.ClientError, TimeoutError, OSError):
                pass
            finally:
                self._running[proxy.name] -= 1
            if not call.got:
                await asyncio.sleep(0.05)

    async def _ask(self, proxy: Node, call: Call) -> None:
        stream = self._rng.random() < STREAMS
        leave_at = self._rng.randint(1, call.asked) if self._rng.random() < LEAVERS else 0
        messages = [{"role": "user", "content": f"{call.asked} words"}]
        body = {"model": "fake", "stream": stream, "max_tokens": call.asked, "messages": messages}
        headers = {"Authorization": f"Bearer {self._key}"}
        async with self._mesh.http.post(f"{proxy.api}/chat/completions", json=body, headers=headers) as response:
            call.id = response.headers.get("x-request-id", "")
            if response.status != 200:
                code = (await response.json(content_type=None))["error"]["code"]
                self.findings.refused[code] += 1
                return
            if not stream:
                call.got = (await response.json())["usage"]["completion_tokens"]
                call.whole = True
                return
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    call.whole = True
                elif line.startswith(b"data:"):
                    choices = json.loads(line[5:]).get("choices") or [{}]
                    call.got += bool(choices[0].get("delta", {}).get("content"))
                    if leave_at and call.got == leave_at:
                        return

    # -- kills

    async def _kill_one(self) -> None:
        """Kill a node; return when it is back. Nobody waits until it has found the others."""
        kinds = (self._proxies, self._workers, self._bootstraps)
        (group,) = self._rng.choices(kinds, WEIGHTS)
        at = self._rng.randrange(len(group))
        victim = group[at]
        self.findings.kills[str(victim.role)] += 1
        if victim.role == Role.PROXY:
            self.findings.struck += self._running[victim.name] > 0
            await victim.kill()
            group[at] = await self._mesh.proxy(victim.name, fresh=False)
        elif victim.role == Role.WORKER:
            self.findings.struck += self._engines[victim.name].stats.running > 0
            await victim.kill()
            group[at] = await self._worker(victim.name, fresh=False)
        else:
            port = victim.about["addresses"][0].rpartition(":")[2]
            await victim.kill()
            group[at] = await self._mesh.bootstrap(victim.name, "--port", port)

    # -- books

    async def _read_on(self) -> None:
        """Follow what nodes tell, in the order in which they wrote it, as `mesh logs --follow` does."""
        reached: dict[bytes, int] = {}
        while True:
            with contextlib.suppress(ApiError):
                await self._read(self._told, reached)
            await asyncio.sleep(READ_EVERY_S)

    async def _read(self, found: dict[Place, Receipt], reached: dict[bytes, int]) -> set[bytes]:
        """Read on after the places ``reached``; who could be asked. Nothing may come twice. Raises `ApiError`."""
        answered: set[bytes] = set()
        settings = operator_settings(self._mesh.authority, self._mesh.home, url=self._rng.choice(self._proxies).root)
        async with Client(settings) as client:
            asked = Asked(client)
            for node in await asked.nodes():
                with contextlib.suppress(ApiError):
                    while True:
                        page = await asked.page(node, Query(project="ordeal", written=reached.get(node, 0)))
                        reached[node] = page.last
                        for receipt in map(parse_receipt, page.receipts):
                            if (node, receipt.order) in found:
                                self.findings.problems["twice"].append(receipt.id)
                            found[node, receipt.order] = receipt
                        if not page.more:
                            break
                    answered.add(node)
        return answered

    async def _audit(self) -> None:
        """Once nothing is on its way any more."""
        findings = self.findings
        everyone = {bytes.fromhex(node.id) for node in (*self._proxies, *self._workers)}
        found: dict[Place, Receipt] = {}

        async def quiet() -> bool:
            before = len(found)
            with contextlib.suppress(ApiError):
                return await self._read(found, reached) == everyone and len(found) == before
            return False

        reached: dict[bytes, int] = {}
        await asyncio.sleep(0.5)
        await until(quiet, what="the books to be closed")
        findings.acknowledged = len(self._told)
        findings.problems["lost"] = [receipt.id for place, receipt in self._told.items() if found.get(place) != receipt]
        requests: dict[str, list[Copy]] = {}
        for (node_id, _), receipt in found.items():
            requests.setdefault(receipt.id, []).append(Copy(receipt=receipt, node_id=node_id))
        now = int(time.time() * 1000)
        charges = {request_id: settle(copies, answered=frozenset(everyone), now=now) for request_id, copies in requests.items()}
        for call in self._calls:
            if call.id:
                self._check(call, charges.get(call.id, []))
        for node in (*self._proxies, *self._workers):
            self._check_chain(node)

    def _check(self, call: Call, charges: list[Charge]) -> None:
        findings, problems = self.findings, self.findings.problems
        engines = [engine for engine in self._engines.values() if engine.made[call.id]]
        made = sum(engine.made[call.id] for engine in engines)
        completion, prompt = sum(charge.completion for charge in charges), sum(charge.prompt for charge in charges)
        told = f"{call.id}: {[(charge.attempt, charge.completion, charge.status, charge.confirmed) for charge in charges]}"
        told = f"{told}, asked {call.asked}, got {call.got}, made {made}"
        findings.calls += 1
        findings.tokens += completion
        findings.made += made
        findings.moved += len(engines) > 1
        if not call.whole:
            findings.cut += 1
            if completion > made:
                problems["overcharged"].append(told)
            guessed = any(charge.estimated for charge in charges)
            if completion < call.got - (GUESSED_TOKENS + call.got // 20 if guessed else 0):
                problems["undercharged"].append(told)
            return
        findings.whole += 1
        if not charges:
            problems["missing"].append(call.id)
            return
        alone = len(engines) == 1
        if call.got != call.asked or completion != call.asked or (alone and len(charges) == 1 and made != completion):
            problems["miscounted"].append(told)
        elif alone and prompt != engines[0].prompts[call.id]:
            problems["miscounted"].append(f"{told}, prompt {prompt} of {engines[0].prompts[call.id]}")
        findings.exact += alone and made == completion
        if any(charge.flags - {"unmatched"} for charge in charges):
            problems["flagged"].append(f"{told} {[sorted(charge.flags) for charge in charges]}")

    def _check_chain(self, node: Node) -> None:
        with contextlib.closing(sqlite3.connect(f"file:{node.state_dir / LEDGER_FILE}?mode=ro", uri=True)) as db:
            signed = db.execute("SELECT last, signed FROM batches ORDER BY number").fetchall()
            packs = db.execute("SELECT receipts FROM packs ORDER BY last").fetchall()
        bodies = [body for (pack,) in packs for body in msgpack.unpackb(pack)]
        try:
            batches = [parse_batch(batch, self._mesh.authority.trust, now=time.time()) for _, batch in signed]
            check_chain(batches)
        except MeshError as error:
            self.findings.problems["broken"].append(f"{node.name}: {error.message}")
            return
        self.findings.batches += len(batches)
        first = 0
        for (last, _), batch in zip(signed, batches, strict=True):
            leaves = [leaf_hash(body) for body in bodies[first:last]]
            if len(leaves) != batch.count or root_hash(leaves) != batch.root:
                self.findings.problems["broken"].append(f"{node.name}: batch {batch.number}")
            first = last
