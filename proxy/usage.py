"""Usage over HTTP: a key's holder gets its own sums; whoever may look gets receipts, page by page, and adds them up at home.

Adding up a month of a busy mesh is work, and a proxy has better things to do: for `mesh usage`, `mesh bill` and `mesh logs` it only passes
pages on, from any node that it or another proxy is linked with. What a page may hold is decided here, by the key that asks.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from aiohttp import web

from mesh import prices
from mesh.apikey import ApiKey, KeyRole
from mesh.books import Books, ask
from mesh.clock import Clock
from mesh.errors import InvalidRequest, MeshError, RateLimited, UsageError
from mesh.ledger import START, Page, Query
from mesh.link.link import Link
from mesh.prices import PriceList, parse_prices
from mesh.records import Record
from mesh.usage import Fetch, Summary, Survey
from proxy.access import Routes
from proxy.documents import Keeper
from proxy.gate import Gate

RECEIPTS_PATH = "/mesh/v1/receipts"
USAGE_PATH = "/v1/usage"
PAGES_AT_ONCE = 16
SUMS_AT_ONCE = 4
MAX_SUMMED = 200_000
"""Requests added up for one GET /v1/usage: some seconds of this process, in small pieces."""
BREATHE_EVERY = 16
MAX_SPAN_S = 400 * 86400


class UsageRoutes:
    """The handlers. ``workers`` and ``proxies`` are the links there are, ``known`` all workers the directory knows of."""

    def __init__(
        self,
        books: Books,
        gate: Gate,
        *,
        own: bytes,
        workers: Callable[[], Mapping[bytes, Link]],
        proxies: Callable[[], Mapping[bytes, Link]],
        known: Callable[[], list[Record]],
        prices: Callable[[], PriceList | None],
        clock: Clock,
    ) -> None:
        self._books = books
        self._gate = gate
        self._own = own
        self._workers = workers
        self._proxies = proxies
        self._known = known
        self._prices = prices
        self._clock = clock
        self._pages = 0
        self._summing: Counter[bytes] = Counter()

    def routes(self) -> Routes:
        return {USAGE_PATH: {"GET": self.usage}, RECEIPTS_PATH: {"GET": self.receipts}}

    # -- for those who hold a key

    async def usage(self, request: web.BaseRequest, request_id: str) -> web.Response:
        """What this key has used, over all nodes; with ``?of=project`` and the role viewer, its project. ``since``, ``until``, ``by``."""
        key = self._key(request)
        asked = request.query
        now = self._clock.wall()
        since = _moment(asked, "since", month_start(now))
        until = _moment(asked, "until", now + 1)
        if until - since > MAX_SPAN_S:
            raise InvalidRequest(f"'since' is more than {MAX_SPAN_S // 86400} days before 'until'", param="since")
        of_project = asked.get("of") == "project"
        if of_project:
            self._gate.require(key, KeyRole.VIEWER)
        query = Query(since=int(since * 1000), until=int(until * 1000), project=key.project, key=None if of_project else key.id)
        price_list = self._prices()
        try:
            summary = Summary(
                filter(None, asked.get("by", "").split(",")), price=price_list.cost if price_list is not None else lambda charge: 0
            )
        except UsageError as error:
            raise InvalidRequest(error.message, param="by") from None
        async with self._one_sum(key.id):
            survey = Survey(await self.sources(), query)
            await self._sum(survey, summary, now)
        answer: dict[str, Any] = {
            "object": "usage",
            "project": key.project,
            "key": None if of_project else key.id.hex(),
            "since": since,
            "until": until,
            "data": summary.describe(),
            "total": summary.total.describe(),
            "currency": price_list.currency if price_list is not None else None,
            "complete": survey.complete,
            "lost": [{"node": node.hex(), "reason": reason} for node, reason in sorted(survey.lost.items())],
        }
        return web.json_response(answer, headers={"x-request-id": request_id})

    async def _sum(self, survey: Survey, summary: Summary, now: float) -> None:
        count = 0
        async for charge in survey.charges(now=int(now * 1000)):
            summary.add(charge)
            count += 1
            if count > MAX_SUMMED:
                raise InvalidRequest(f"That is more than {MAX_SUMMED} requests: ask for a shorter time with 'since'", param="since")
            if count % BREATHE_EVERY == 0:
                await asyncio.sleep(0)

    @asynccontextmanager
    async def _one_sum(self, key_id: bytes) -> AsyncIterator[None]:
        """One at a time for a key, a few at a time for all. Raises `RateLimited`."""
        if self._summing[key_id] or self._summing.total() >= SUMS_AT_ONCE:
            raise RateLimited("Usage is being added up already; try again in a moment", retry_after_s=1.0)
        self._summing[key_id] += 1
        try:
            yield
        finally:
            del self._summing[key_id]

    # -- for those who may look

    async def receipts(self, request: web.BaseRequest, request_id: str) -> web.Response:
        """Without ``?node=``: which nodes there are to ask. With it, a page of its receipts, those that the key may see."""
        key = self._key(request)
        asked = request.query
        project = self._visible_project(key, asked.get("project"))
        if "node" not in asked:
            nodes = [{"id": node.hex(), "role": role} for node, role in sorted((await self._nodes()).items())]
            return web.json_response({"nodes": nodes}, headers={"x-request-id": request_id})
        query = Query(
            since=read_number(asked, "since", 0),
            until=read_number(asked, "until", 1 << 62),
            after=(read_number(asked, "after_at", 0), asked.get("after_id", "")[:64], read_number(asked, "after_n", 0))
            if "after_at" in asked
            else START,
            project=project,
            key=read_hex(asked, "key", 8) if "key" in asked else None,
            written=read_number(asked, "written", 0) if "written" in asked else None,
            prove=asked.get("prove", "")[:64],
        )
        if self._pages >= PAGES_AT_ONCE:
            raise RateLimited("Too many receipts are being read at once; try again in a moment", retry_after_s=1.0)
        node = read_hex(asked, "node", 32)
        self._pages += 1
        try:
            page = await self._page(node, query)
        finally:
            self._pages -= 1
        packed = [base64.b64encode(receipt).decode() for receipt in page.receipts]
        return web.json_response({"receipts": packed, "more": page.more, "last": page.last}, headers={"x-request-id": request_id})

    def _visible_project(self, key: ApiKey, wanted: str | None) -> str | None:
        """The one project whose receipts may be shown, None for all: those are for an admin of the mesh itself."""
        if self._gate.project(key) is None:
            return wanted
        if wanted not in (None, key.project):
            raise InvalidRequest(f"This key may look at the project '{key.project}' alone", param="project")
        return key.project

    # -- nodes

    async def sources(self) -> dict[bytes, Fetch]:
        """How to get a page of each node's receipts."""
        return {node: partial(self._page, node) for node in await self._nodes()}

    async def _nodes(self) -> dict[bytes, str]:
        found = {worker: "worker" for worker in (*self._workers(), *(record.node_id for record in self._known()))}
        return found | {proxy: "proxy" for proxy in self._proxies()} | {self._own: "proxy"}

    async def _page(self, node: bytes, query: Query) -> Page:
        """From the node itself where it is linked, else through a proxy that it is linked with. Raises a `MeshError`."""
        if node == self._own:
            return await self._books.page(query)
        link = self._workers().get(node) or self._proxies().get(node)
        if link is not None:
            return await ask(link, query)
        problem: MeshError = InvalidRequest("This node is not linked with any proxy", param="node")
        for proxy in list(self._proxies().values()):
            try:
                return await ask(proxy, query, node=node)
            except MeshError as error:
                problem = error
        raise problem

    def _key(self, request: web.BaseRequest) -> ApiKey:
        return self._gate.authenticate(request.headers.get("Authorization"))


def held_prices(keeper: Keeper) -> PriceList | None:
    """The price list that this node holds; None without one that can be read."""
    document = keeper.held_document(prices.KIND, prices.NAME)
    try:
        return parse_prices(document.body) if document is not None else None
    except UsageError:
        return None


def month_start(now: float) -> float:
    """The first moment of the month, by UTC."""
    today = time.gmtime(now)
    return now - ((today.tm_mday - 1) * 86400 + today.tm_hour * 3600 + today.tm_min * 60 + today.tm_sec) - now % 1


def _moment(asked: Mapping[str, str], name: str, default: float) -> float:
    """Wall-clock seconds."""
    return float(read_number(asked, name, int(default)))


def read_number(asked: Mapping[str, str], name: str, default: int) -> int:
    text = asked.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise InvalidRequest(f"'{name}' must be a whole number", param=name)
    return min(int(text), 1 << 62)


def read_hex(asked: Mapping[str, str], name: str, size: int) -> bytes:
    try:
        found = bytes.fromhex(asked[name])
    except ValueError:
        found = b""
    if len(found) != size:
        raise InvalidRequest(f"'{name}' must be {size * 2} hexadecimal digits", param=name)
    return found
