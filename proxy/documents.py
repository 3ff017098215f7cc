"""Documents over HTTP: how operators write them into the mesh and read them back.

What authorizes a write is the document's own signature, not an API key: whoever may sign for the mesh may post from anywhere, and a proxy
adds nothing to what was signed. Reading takes the role viewer, and a key sees the documents of the mesh and of its own project; what the
operator allows another project is not for it to see.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any, Protocol

import structlog
from aiohttp import web

from mesh.clock import Clock
from mesh.documents import Document, parse_document
from mesh.envelope import MAX_ENVELOPE_BYTES, signer_of
from mesh.errors import (
    BodyTooLarge,
    DirectoryError,
    DocumentConflict,
    DocumentNotFound,
    DocumentRefused,
    InvalidRequest,
    NoRoom,
    SlowRequest,
    TrustError,
)
from mesh.limits import KIND as LIMITS_KIND
from mesh.limits import PROJECT_PREFIX
from mesh.trust import Trust
from proxy.access import Routes
from proxy.gate import Gate

log = structlog.get_logger(__name__)

PATH = "/mesh/v1/documents"
BODY_S = 10.0
POSTS_AT_ONCE = 32
"""Anybody may post, as what is posted is signed: this bounds what they hold of this process's memory before that is seen."""
PUT_S = 5.0
"""So long a writer waits to hear how many holders have its document; by then it is on its way to every proxy."""


class Keeper(Protocol):
    """What is asked of `mesh.directory.Directory`."""

    def held_documents(self, kind: str = "") -> list[Document]: ...

    def held_document(self, kind: str, name: str, *, project: str = "") -> Document | None: ...

    async def get_document(self, kind: str, name: str, *, project: str = "", seq: int = 0) -> Document | None: ...

    async def document_history(self, kind: str, name: str, *, project: str = "") -> list[Any]: ...

    async def put_document(self, document: Document) -> int: ...

    def accept_document(self, signed: bytes) -> bool: ...


class DocumentRoutes:
    """The handlers. ``trust`` verifies what is posted, ``gate`` the keys of those who read."""

    def __init__(self, keeper: Keeper, trust: Trust, gate: Gate, *, clock: Clock) -> None:
        self._keeper = keeper
        self._gate = gate
        self._trust = trust
        self._clock = clock
        self._posting = 0

    async def post(self, request: web.BaseRequest, request_id: str) -> web.Response:
        """Take a signed version: 200 with its seq and how many holders have it, 409 if it does not follow the newest."""
        if self._posting >= POSTS_AT_ONCE:
            raise NoRoom("This proxy takes as many documents at once as it may; try again shortly", retry_after_s=1.0)
        self._posting += 1
        try:
            return await self._post(request, request_id)
        finally:
            self._posting -= 1

    async def _post(self, request: web.BaseRequest, request_id: str) -> web.Response:
        signed = await _read(request)
        try:
            document = parse_document(signed, self._trust, now=self._clock.wall())
        except TrustError as error:
            raise DocumentRefused(f"The document is refused: {error.message}") from None
        newest = self._keeper.held_document(document.kind, document.name, project=document.project)
        if newest is not None and newest.digest != document.digest and (document.seq, document.previous) != (newest.seq + 1, newest.digest):
            raise DocumentConflict(_behind(document, newest))
        holders = await self._put(document)
        log.info("document.posted", request_id=request_id, document=document.title, seq=document.seq, holders=holders)
        answer = {"kind": document.kind, "name": document.name, "project": document.project, "seq": document.seq, "holders": holders}
        return web.json_response(answer, headers={"x-request-id": request_id})

    async def _put(self, document: Document) -> int:
        """Into the directory, and to every linked proxy. Where too few holders can be reached, those that are linked have it all the same:
        it is offered to the others for as long as somebody keeps it."""
        holders = 0
        try:
            async with asyncio.timeout(PUT_S):
                holders = await self._keeper.put_document(document)
        except DocumentConflict:
            newest = await self._keeper.get_document(document.kind, document.name, project=document.project)
            raise DocumentConflict(_behind(document, newest)) from None
        except (DirectoryError, TimeoutError) as error:
            log.warning("document.few_holders", document=document.title, seq=document.seq, reason=str(error) or "too slow")
        self._keeper.accept_document(document.signed)
        held = self._keeper.held_document(document.kind, document.name, project=document.project)
        if not holders and (held is None or held.seq < document.seq):
            whose = f"the project '{document.project}'" if document.project else "the mesh"
            raise NoRoom(f"There is no room for another document of {whose}; those of what was deleted count as well", retry_after_s=60.0)
        return holders

    async def list(self, request: web.BaseRequest, request_id: str) -> web.Response:
        """The newest version of each that is held here; ``?kind=`` chooses."""
        held = [
            document
            for document in self._keeper.held_documents(request.query.get("kind", ""))
            if self._shows(request, subject_of(document.kind, document.name, document.project))
        ]
        listed = [_about(document) for document in sorted(held, key=lambda item: (item.kind, item.project, item.name))]
        return web.json_response({"documents": listed}, headers={"x-request-id": request_id})

    async def get(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        """One document: JSON, or with ``Accept: application/octet-stream`` the signed bytes. ``?project=``, ``?seq=``, ``?history=1``."""
        kind, _, name = request.path.removeprefix(PATH + "/").partition("/")
        project = request.query.get("project", "")
        if not self._shows(request, subject_of(kind, name, project)):
            raise DocumentNotFound(f"There is no document {kind[:32]}/{name[:128]} that this key may read")
        if request.query.get("history"):
            return await self._history(kind, name, project, request_id)
        document = await self._keeper.get_document(kind, name, project=project, seq=_seq(request))
        if document is None:
            raise DocumentNotFound(f"There is no document {kind[:32]}/{name[:128]} here")
        headers = {"x-request-id": request_id, "etag": f'"{document.digest.hex()}"'}
        if request.headers.get("Accept") == "application/octet-stream":
            return web.Response(body=document.signed, content_type="application/octet-stream", headers=headers)
        signed = {"signed": base64.b64encode(document.signed).decode(), "body": base64.b64encode(document.body).decode()}
        return web.json_response(_about(document) | signed, headers=headers)

    async def _history(self, kind: str, name: str, project: str, request_id: str) -> web.Response:
        versions = await self._keeper.document_history(kind, name, project=project)
        listed = [{"seq": version.seq, "digest": version.digest.hex(), "issued": version.issued} for version in versions]
        return web.json_response({"kind": kind, "name": name, "versions": listed}, headers={"x-request-id": request_id})

    def _shows(self, request: web.BaseRequest, project: str) -> bool:
        """Whether the key may read what concerns a project; what concerns none, all may."""
        return not project or self._gate.project(self._gate.authenticate(request.headers.get("Authorization"))) in (None, project)

    def routes(self) -> Routes:
        return {PATH: {"POST": self.post, "GET": self.list}, PATH + "/": {"GET": self.get}}


def subject_of(kind: str, name: str, project: str) -> str:
    """Whose matter a document is: its project's, or the one's whose limits the operator sets in it; empty for everybody's."""
    return project or (name.removeprefix(PROJECT_PREFIX) if kind == LIMITS_KIND and name.startswith(PROJECT_PREFIX) else "")


def _about(document: Document) -> dict[str, Any]:
    return {
        "kind": document.kind,
        "name": document.name,
        "project": document.project,
        "seq": document.seq,
        "issued": document.issued,
        "expires": document.expires or None,
        "signer": signer_of(document.signed).decode("ascii", "replace"),
        "digest": document.digest.hex(),
        "bytes": len(document.body),
    }


def _behind(document: Document, newest: Document | None) -> str:
    known = f"; the newest is {newest.seq}, read it and write {newest.seq + 1}" if newest is not None else ""
    return f"Version {document.seq} of {document.title} does not follow the newest there is{known}"


def _seq(request: web.BaseRequest) -> int:
    text = request.query.get("seq", "0")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidRequest("'seq' must be a version's number", param="seq")
    return int(text)


async def _read(request: web.BaseRequest) -> bytes:
    """The body, of at most one envelope's size."""
    if (request.content_length or 0) > MAX_ENVELOPE_BYTES:
        raise BodyTooLarge(f"A signed document has at most {MAX_ENVELOPE_BYTES} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            while piece := await request.content.readany():
                body += piece
                if len(body) > MAX_ENVELOPE_BYTES:
                    raise BodyTooLarge(f"A signed document has at most {MAX_ENVELOPE_BYTES} bytes")
    except TimeoutError:
        raise SlowRequest("The document did not arrive in time") from None
    except web.RequestPayloadError:
        raise InvalidRequest("The request body is not valid HTTP") from None
    return bytes(body)
