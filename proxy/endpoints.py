"""Which endpoint a call is for, and what this proxy tells of endpoints.

An endpoint goes before a model of the same name. Otherwise a worker that joins with a name which a project already uses for an endpoint
would take that endpoint's calls, past its limits; so only who may sign for the project decides what a name means to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import structlog

from mesh.apikey import ApiKey
from mesh.documents import ENDPOINT_KIND, Document
from mesh.endpoints import Catalogue
from mesh.envelope import signer_of
from mesh.errors import MalformedEnvelope
from mesh.trust import Trust
from proxy.openai import Call

log = structlog.get_logger(__name__)


class Keeper(Protocol):
    """What is asked of `mesh.directory.Directory`."""

    def held_documents(self, kind: str = "") -> list[Document]: ...

    def on_document(self, callback: Callable[[Document], None]) -> None: ...


class Endpoints:
    """The endpoints in force at this proxy. ``on_change`` is called after each change."""

    def __init__(self) -> None:
        self._catalogue = Catalogue()
        self._projects = self._catalogue.projects
        self.on_change: Callable[[], None] = lambda: None

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
        keeper.on_document(hear)
        trust.on_change(read)

    def find(self, key: ApiKey, call: Call) -> Call:
        """The call as it is, or as its endpoint makes it: of the endpoint's model."""
        named = self._projects.get(key.project)
        if named is None or (endpoint := named.get(call.model)) is None:
            return call
        return call._replace(model=endpoint.model, endpoint=endpoint)

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
