"""Which endpoint a call is for, and what this proxy tells of endpoints.

An endpoint goes before a model of the same name. Otherwise a worker that joins with a name which a project already uses for an endpoint
would take that endpoint's calls, past its limits; so only who may sign for the project decides what a name means to it.

Other proxies tell a new one of all endpoints when they link. Where there is none yet that could, a name that nobody here knows is looked
for in the directory, once in a while, before its caller hears that there is no such model.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import structlog
from aiohttp import web

from mesh.apikey import ApiKey
from mesh.documents import ENDPOINT_KIND, Document
from mesh.endpoints import NAME, Catalogue
from mesh.envelope import signer_of
from mesh.errors import MalformedEnvelope, MeshError
from mesh.trust import Trust
from proxy.access import Routes
from proxy.gate import Gate
from proxy.openai import Call

log = structlog.get_logger(__name__)

PATH = "/mesh/v1/endpoints"

LOOK_S = 2.0
LOOK_AGAIN_S = 15.0
LOOKS_AT_ONCE = 8
MAX_LOOKED = 1_000


class Keeper(Protocol):
    """What is asked of `mesh.directory.Directory`."""

    def held_documents(self, kind: str = "") -> list[Document]: ...

    def on_document(self, callback: Callable[[Document], None]) -> None: ...

    async def get_document(self, kind: str, name: str, *, project: str = "") -> Document | None: ...


class Endpoints:
    """The endpoints in force at this proxy. ``on_change`` is called after each change."""

    def __init__(self) -> None:
        self._catalogue = Catalogue()
        self._projects = self._catalogue.projects
        self.on_change: Callable[[], None] = lambda: None
        self._keeper: Keeper | None = None
        self._looked: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._looking = 0

    def follow(self, keeper: Keeper, trust: Trust) -> None:
        """Take the endpoints that are held, and hear of changes. With an issuer that goes, what it signed goes: then all are read anew."""

        def read() -> None:
            self._projects.clear()
            for document in keeper.held_documents(ENDPOINT_KIND):
                self._take(document)
            self.on_change()

        def hear(document: Document) -> None:
            if self._take(document):
                self.on_change()

        read()
        self._keeper = keeper
        keeper.on_document(hear)
        trust.on_change(read)

    def find(self, key: ApiKey, call: Call) -> Call:
        """The call as it is, or as its endpoint makes it: of the endpoint's model."""
        named = self._projects.get(key.project)
        if named is None or (endpoint := named.get(call.model)) is None:
            return call
        return call._replace(model=endpoint.model, endpoint=endpoint)

    async def look(self, key: ApiKey, call: Call) -> Call:
        """As `find`, for a name that no worker serves either: after asking the directory, if that has not been done just now."""
        asked, loop = (key.project, call.model), asyncio.get_running_loop()
        again = self._looked.get(asked, 0.0) > loop.time()
        if again or self._keeper is None or self._looking >= LOOKS_AT_ONCE or NAME.fullmatch(call.model) is None:
            return call
        self._looked[asked] = loop.time() + LOOK_AGAIN_S
        self._looked.move_to_end(asked)
        if len(self._looked) > MAX_LOOKED:
            self._looked.popitem(last=False)
        self._looking += 1
        try:
            async with asyncio.timeout(LOOK_S):
                await self._keeper.get_document(ENDPOINT_KIND, call.model, project=key.project)
        except (TimeoutError, MeshError) as error:
            log.info("endpoints.not_looked", error=type(error).__name__)
        finally:
            self._looking -= 1
        return self.find(key, call)

    def names(self, key: ApiKey, ready: set[str]) -> set[str]:
        """What a key may call, of the models that are ready and of endpoints that lead to one of these."""
        named = self._projects.get(key.project, {})
        names = {name for name in ready if name not in named and key.may_use(name)}
        return names | {name for name, endpoint in named.items() if endpoint.model in ready and key.may_use(endpoint.model, name)}

    def _take(self, document: Document) -> bool:
        try:
            return self._catalogue.take(document)
        except MalformedEnvelope as error:
            log.warning("endpoints.document_refused", document=document.title, seq=document.seq, reason=error.message)
            return False

    def describe(self, project: str | None, documents: list[Document], ready: set[str]) -> list[dict[str, Any]]:
        """Those of a project, or all, JSON-ready; ``documents`` are where they come from."""
        written = {(document.project, document.name): document for document in documents}
        listed = []
        for endpoint in self._catalogue.listed(project):
            document = written.get((endpoint.project, endpoint.name))
            about: dict[str, Any] = {"ready": endpoint.model in ready}
            if document is not None:
                signer = signer_of(document.signed).decode("ascii", "replace")
                about |= {"seq": document.seq, "issued": document.issued, "signer": signer}
            listed.append(endpoint.describe() | about)
        return listed


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
        listed = self._endpoints.describe(self._gate.project(key), self._keeper.held_documents(ENDPOINT_KIND), self._ready())
        return web.json_response({"endpoints": listed}, headers={"x-request-id": request_id})
