"""What was kept of prompts, sealed, over HTTP: for those who deploy."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping

from aiohttp import web

from mesh.errors import InvalidRequest, RateLimited
from mesh.link.link import Link
from mesh.prompts import PromptPage, PromptQuery, ask
from proxy.access import Routes
from proxy.gate import Gate
from proxy.prompts.keeper import Prompts
from proxy.usage import read_hex, read_number

PATH = "/mesh/v1/prompts"
PAGES_AT_ONCE = 8


class PromptRoutes:
    """What was kept of a project's prompts, here or on a proxy that this one is linked with, page by page. ``proxies`` are these links."""

    def __init__(self, prompts: Prompts, gate: Gate, *, own: bytes, proxies: Callable[[], Mapping[bytes, Link]]) -> None:
        self._prompts = prompts
        self._gate = gate
        self._own = own
        self._proxies = proxies
        self._pages = 0

    def routes(self) -> Routes:
        return {PATH: {"GET": self.read}}

    async def read(self, request: web.BaseRequest, request_id: str) -> web.Response:
        """Without ``?node=``: which proxies there are to ask. With it, a page of what it has of ``endpoint``."""
        key = self._gate.authenticate(request.headers.get("Authorization"))
        asked, headers = request.query, {"x-request-id": request_id}
        project = asked.get("project", key.project)
        if self._gate.project(key) not in (None, project):
            raise InvalidRequest(f"This key may look at the project '{key.project}' alone", param="project")
        if "node" not in asked:
            nodes = sorted(node.hex() for node in (self._own, *self._proxies()))
            return web.json_response({"nodes": nodes}, headers=headers)
        query = PromptQuery(
            project=project,
            endpoint=asked.get("endpoint", "")[:128],
            since=read_number(asked, "since", 0),
            until=read_number(asked, "until", 1 << 62),
            after=read_number(asked, "after", 0),
        )
        if self._pages >= PAGES_AT_ONCE:
            raise RateLimited("Too much is being read at once; try again in a moment", retry_after_s=1.0)
        self._pages += 1
        try:
            page = await self._page(read_hex(asked, "node", 32), query)
        finally:
            self._pages -= 1
        kept = [{"id": record.id, "at": record.at, "sealed": base64.b64encode(record.sealed).decode()} for record in page.kept]
        return web.json_response({"kept": kept, "more": page.more, "last": page.last}, headers=headers)

    async def _page(self, node: bytes, query: PromptQuery) -> PromptPage:
        if node == self._own:
            return await self._prompts.page(query)
        link = self._proxies().get(node)
        if link is None:
            raise InvalidRequest("This proxy is not linked with the one asked for", param="node")
        return await ask(link, query)
