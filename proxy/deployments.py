"""Endpoints over HTTP: what there is, for those who may look."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from mesh.apikey import KeyRole
from mesh.documents import ENDPOINT_KIND
from mesh.usage import MESH_PROJECT
from proxy.app import Routes
from proxy.endpoints import Endpoints, Keeper
from proxy.gate import Gate

PATH = "/mesh/v1/endpoints"


class EndpointRoutes:
    """The handlers. What is shown is the key's project's; an admin of the mesh itself sees all."""

    def __init__(self, endpoints: Endpoints, gate: Gate, *, keeper: Keeper, ready: Callable[[], set[str]]) -> None:
        self._endpoints = endpoints
        self._gate = gate
        self._keeper = keeper
        self._ready = ready

    def routes(self) -> Routes:
        return {PATH: {"GET": self.list}}

    async def list(self, request: web.BaseRequest, request_id: str) -> web.Response:
        key = self._gate.authenticate(request.headers.get("Authorization"))
        project = None if key.project == MESH_PROJECT and key.has_role(KeyRole.ADMIN) else key.project
        listed = self._endpoints.describe(project, self._keeper.held_documents(ENDPOINT_KIND), self._ready())
        return web.json_response({"endpoints": listed}, headers={"x-request-id": request_id})
