"""From receipts to what was used: the copies of both sides laid side by side, each attempt counted once, sums by whatever is asked. Pure.

A request's receipts lie on two nodes at least, its proxy and its worker, so whoever adds up all nodes' receipts is right with any one of
them lost. `settle` makes of all copies of one request what is charged:

* What was not delivered is not charged; what was cut off is charged for what had been delivered.
* The prompt is charged once a request, with its first attempt that delivered anything; completions add up over the attempts.
* The worker's own numbers count. Where the proxy's contradict them, the lower ones do, and the charge is flagged.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any

from mesh.errors import MeshError, UsageError
from mesh.ledger import Page, Query
from mesh.receipts import Kind, Receipt, parse_receipt
from mesh.trust import Role

MESH_PROJECT = "mesh"
"""The project of those who run the mesh: its admins see every project's usage, all others their own project's."""
GRACE_MS = 10_000
"""A receipt whose other side is missing is no wonder while it is so young: that side may not have written its own yet."""


class Flag(StrEnum):
    """What does not fit together; see `settle`."""

    CLAIM = "claim"
    """What the worker told the proxy at the end is not what it wrote down."""
    BYTES = "bytes"
    """Of a complete answer the proxy got more or fewer bytes than the worker sent."""
    IDENTITY = "identity"
    """The two sides name different projects, keys or models, or a third node claims the attempt."""
    UNMATCHED = "unmatched"
    """The other side is there and knows nothing of a complete answer."""
    IMPLAUSIBLE = "implausible"
    """More tokens than bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A receipt and the node it lies on."""

    receipt: Receipt
    node_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What one attempt comes to, or one stretch of warm time. ``prompt`` includes ``cached``; moments and stretches in ms.

    ``confirmed``: both sides have it. ``estimated``: the tokens are a node's own count, since the engine gave none. ``ends``: the one
    charge by which its request is counted.
    """

    id: str
    attempt: int
    at: int
    kind: Kind
    project: str
    key: str
    endpoint: str
    model: str
    worker: str
    proxy: str
    status: str
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    took_ms: int = 0
    gpus: int = 0
    partial: bool = False
    estimated: bool = False
    confirmed: bool = False
    ends: bool = False
    flags: frozenset[Flag] = frozenset()

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        told = {item.name: getattr(self, item.name) for item in fields(self)}
        return told | {"flags": sorted(self.flags), "kind": str(self.kind)}


@dataclass(slots=True, eq=False)
class _Sides:
    """The copies of one attempt that count. ``before`` are tokens that later attempts say had been delivered by its end."""

    attempt: int
    worker: Copy | None = None
    proxy: Copy | None = None
    flags: frozenset[Flag] = frozenset()


def settle(copies: Sequence[Copy], *, answered: frozenset[bytes] = frozenset(), now: int = 0) -> list[Charge]:
    """The charges of one request, by attempt, whatever the order of its copies and however often each comes.

    ``answered``: the nodes all of whose receipts are known. ``now`` in ms.
    """
    attempts: dict[int, list[Copy]] = {}
    for copy in copies:
        attempts.setdefault(copy.receipt.attempt, []).append(copy)
    last = _sides(0, attempts.pop(0)).proxy if len(attempts) > 1 and 0 in attempts else None
    sides = [_sides(attempt, attempts[attempt]) for attempt in sorted(attempts)]
    charges = [_charge(each, answered, now) for each in sides]
    _share_out(charges, sides)
    prompt_charged = False
    for at, charge in enumerate(charges):
        if prompt_charged:
            charges[at] = replace(charge, prompt=0, cached=0)
        prompt_charged = prompt_charged or charge.prompt > 0
    charges[-1] = replace(charges[-1], ends=charges[-1].kind == Kind.CALL)
    if last is not None:  # no worker went on with what the last attempt had begun: how that ended is said apart
        charges[-1] = replace(charges[-1], status=last.receipt.status, took_ms=last.receipt.took_ms)
    return charges


def _sides(attempt: int, copies: Sequence[Copy]) -> _Sides:
    """One copy of each side. Of several that contradict each other the choice is the same everywhere, and flagged."""
    unique = sorted({(copy.node_id, copy.receipt): copy for copy in copies}.values(), key=lambda copy: (copy.node_id, repr(copy.receipt)))
    found = _Sides(attempt)
    proxies = [copy for copy in unique if copy.receipt.side == Role.PROXY]
    workers = [copy for copy in unique if copy.receipt.side == Role.WORKER]
    if proxies:
        found.proxy = proxies[0]
        meant = [copy for copy in workers if copy.node_id == proxies[0].receipt.peer]
        found.worker = meant[0] if meant else None
    elif workers:
        found.worker = workers[0]
    if len(proxies) > 1 or len(workers) > 1 or (workers and found.worker is None):
        found.flags = frozenset({Flag.IDENTITY})
    return found


def _charge(sides: _Sides, answered: frozenset[bytes], now: int) -> Charge:
    worker = sides.worker.receipt if sides.worker else None
    proxy = sides.proxy.receipt if sides.proxy else None
    main = worker or proxy
    assert main is not None
    flags = set(sides.flags)
    asked = proxy or main
    prompt, cached, completion, reasoning = main.prompt, main.cached, main.completion, main.reasoning
    delivered, complete, estimated = main.size_bytes, main.complete, main.own_count
    if worker is not None and proxy is not None:
        if (worker.project, worker.key) != (proxy.project, proxy.key) or proxy.model not in (worker.model, worker.adapter):
            flags.add(Flag.IDENTITY)
        complete = worker.complete and proxy.complete
        delivered = min(worker.size_bytes, proxy.size_bytes)
        if complete:
            if worker.size_bytes != proxy.size_bytes:
                flags.add(Flag.BYTES)
            if (worker.prompt, worker.cached, worker.completion) != (proxy.prompt, proxy.cached, proxy.completion):
                flags.add(Flag.CLAIM)
                prompt, completion = min(prompt, proxy.prompt), min(completion, proxy.completion)
        elif delivered < worker.size_bytes:
            completion, reasoning = (count * delivered // worker.size_bytes for count in (completion, reasoning))
            estimated = True
    elif complete and main.delivered and main.peer in answered and main.at + main.took_ms < now - GRACE_MS:
        flags.add(Flag.UNMATCHED)
    if not delivered:
        prompt = cached = completion = reasoning = 0
    prompt = max(0, prompt - main.resumed)
    if completion > delivered and main.kind == Kind.CALL:
        flags.add(Flag.IMPLAUSIBLE)
    worker_id = sides.worker.node_id if sides.worker else asked.peer
    proxy_id = sides.proxy.node_id if sides.proxy else main.peer
    return Charge(
        id=main.id,
        attempt=sides.attempt,
        at=main.at,
        kind=main.kind,
        project=asked.project,
        key=asked.key.hex(),
        endpoint=asked.endpoint,
        model=asked.model if proxy is not None else main.adapter or main.model,
        worker=worker_id.hex(),
        proxy=proxy_id.hex(),
        status=asked.status if not complete else "ok",
        prompt=prompt,
        cached=min(cached, prompt),
        completion=completion,
        reasoning=min(reasoning, completion),
        took_ms=asked.took_ms,
        gpus=main.gpus,
        partial=bool(delivered) and not complete,
        estimated=estimated and completion > 0,
        confirmed=worker is not None and proxy is not None,
        flags=frozenset(flags),
    )


def _share_out(charges: list[Charge], sides: Sequence[_Sides]) -> None:
    """Where a stream went on at another worker, that one was told exactly how many tokens the client had had: what a lost worker cannot
    tell, and what others passed on in vain is not charged. If the attempts before left no receipt at all, that one tells for them."""
    for later, each in enumerate(sides):
        receipts = [copy.receipt for copy in (each.worker, each.proxy) if copy is not None]
        resumed = max(receipt.resumed for receipt in receipts)
        if not resumed and not any(receipt.size_bytes for receipt in receipts):
            continue  # it says nothing of what had been before it
        begun = [at for at in range(later) if charges[at].partial]
        if begun:
            last, worker = begun[-1], sides[begun[-1]].worker
            passed_on = max(copy.receipt.size_bytes for copy in (worker, sides[last].proxy) if copy is not None)
            had = min(passed_on, max(0, resumed - sum(charge.completion for charge in charges[:last])))
            if worker is not None and not worker.receipt.own_count:
                had = min(had, worker.receipt.completion)
            charges[last] = replace(charges[last], completion=had, reasoning=min(charges[last].reasoning, had), estimated=False)
        if each.attempt - 1 > later and not any(side.proxy for side in sides):
            untold = max(0, resumed - sum(charge.completion for charge in charges[:later]))
            prompt = max(0, receipts[0].prompt - resumed) if untold else 0
            charge = charges[later]
            charges[later] = replace(charge, prompt=max(charge.prompt, prompt), completion=charge.completion + untold)


# -- all nodes together

Fetch = Callable[[Query], Awaitable[Page]]
"""A page of one node's receipts. Raises a `MeshError` if the node cannot be asked."""


@dataclass(slots=True, eq=False)
class _Source:
    node_id: bytes
    fetch: Fetch
    query: Query
    ready: list[Receipt]
    more: bool = True

    async def refill(self) -> None:
        """The next page, the last receipt first. Raises a `MeshError`."""
        page = await self.fetch(self.query)
        self.ready = [parse_receipt(body) for body in reversed(page.receipts)]
        self.more = page.more and bool(page.receipts)
        if self.ready:
            self.query = replace(self.query, after=self.ready[0].order)


class Survey:
    """The receipts of all nodes, merged as they are read: holds a page of each node, whatever their number.

    After `requests`: ``lost`` says which nodes could not be asked to the end, and why; ``away`` which others have receipts of.
    """

    def __init__(self, sources: Mapping[bytes, Fetch], query: Query) -> None:
        self.lost: dict[bytes, str] = {}
        self.away: set[bytes] = set()
        self._sources = sources
        self._query = query

    @property
    def answered(self) -> frozenset[bytes]:
        """The nodes all of whose receipts are known, as far as has been read."""
        return frozenset(self._sources) - frozenset(self.lost)

    @property
    def complete(self) -> bool:
        """Whether nothing can be missing: with one node lost, its partners still have all."""
        return len(self.away | set(self.lost)) <= 1

    async def requests(self) -> AsyncIterator[list[Copy]]:
        """All copies of one request after the other, in `Receipt.order`."""
        heap: list[tuple[tuple[int, str, int], int]] = []
        sources = [_Source(node_id, fetch, self._query, []) for node_id, fetch in sorted(self._sources.items())]

        async def advance(index: int) -> None:
            source = sources[index]
            try:
                if not source.ready and source.more:
                    await source.refill()
            except MeshError as error:
                self.lost[source.node_id] = error.message
                return
            if source.ready:
                heapq.heappush(heap, (source.ready[-1].order, index))

        for index in range(len(sources)):
            await advance(index)
        request: list[Copy] = []
        while heap:
            _, index = heapq.heappop(heap)
            source = sources[index]
            receipt = source.ready.pop()
            if request and (receipt.at, receipt.id) != (request[0].receipt.at, request[0].receipt.id):
                yield request
                request = []
            if receipt.peer and receipt.peer not in self._sources:
                self.away.add(receipt.peer)
            request.append(Copy(receipt=receipt, node_id=source.node_id))
            await advance(index)
        if request:
            yield request

    async def charges(self, *, now: int) -> AsyncIterator[Charge]:
        """What it all comes to. Nodes that turn out to be lost half-way are not held to have answered."""
        async for request in self.requests():
            for charge in settle(request, answered=self.answered, now=now):
                yield charge


# -- sums

DIMENSIONS: dict[str, Callable[[Charge], str]] = {
    "project": lambda charge: charge.project,
    "model": lambda charge: charge.model,
    "key": lambda charge: charge.key,
    "endpoint": lambda charge: charge.endpoint,
    "status": lambda charge: charge.status,
    "worker": lambda charge: charge.worker[:12],
    "month": lambda charge: time.strftime("%Y-%m", time.gmtime(charge.at // 1000)),
    "day": lambda charge: time.strftime("%Y-%m-%d", time.gmtime(charge.at // 1000)),
    "hour": lambda charge: time.strftime("%Y-%m-%dT%H:00Z", time.gmtime(charge.at // 1000)),
}
"""What sums can be made by. Days are UTC's."""


@dataclass(slots=True, kw_only=True)
class Totals:
    """Sums of charges. ``cost`` is in 10⁻¹² of the currency; ``unpriced`` counts charges for which there is no price."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    replica_ms: int = 0
    gpu_ms: int = 0
    failed: int = 0
    partial: int = 0
    estimated: int = 0
    unconfirmed: int = 0
    flagged: int = 0
    unpriced: int = 0
    cost: int = 0

    def add(self, charge: Charge, cost: int | None) -> None:
        if charge.kind == Kind.UPTIME:
            self.replica_ms += charge.took_ms
            self.gpu_ms += charge.took_ms * charge.gpus
        self.requests += charge.ends
        self.failed += charge.ends and charge.status != "ok"
        self.prompt_tokens += charge.prompt
        self.cached_tokens += charge.cached
        self.completion_tokens += charge.completion
        self.reasoning_tokens += charge.reasoning
        self.partial += charge.partial
        self.estimated += charge.estimated
        self.unconfirmed += not charge.confirmed and charge.kind == Kind.CALL and charge.attempt > 0
        self.flagged += bool(charge.flags)
        self.unpriced += cost is None
        self.cost += cost or 0

    def describe(self) -> dict[str, int]:
        """JSON-ready."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


class Summary:
    """Charges summed by some of `DIMENSIONS`. Raises `UsageError` for one there is not."""

    def __init__(self, by: Iterable[str] = (), *, price: Callable[[Charge], int | None] = lambda charge: 0) -> None:
        self.by = tuple(dict.fromkeys(by))
        self.rows: dict[tuple[str, ...], Totals] = {}
        self.total = Totals()
        unknown = [name for name in self.by if name not in DIMENSIONS]
        if unknown:
            raise UsageError(f"cannot sum by '{unknown[0][:32]}'; there are {', '.join(DIMENSIONS)}")
        self._readers = [DIMENSIONS[name] for name in self.by]
        self._price = price

    def add(self, charge: Charge) -> None:
        cost = self._price(charge)
        row = tuple(read(charge) for read in self._readers)
        totals = self.rows.get(row)
        if totals is None:
            totals = self.rows[row] = Totals()
        totals.add(charge, cost)
        self.total.add(charge, cost)

    def describe(self) -> list[dict[str, Any]]:
        """JSON-ready rows, sorted."""
        return [dict(zip(self.by, row, strict=True)) | totals.describe() for row, totals in sorted(self.rows.items())]
