"""How commands change documents: read the newest version, change it, sign it, post it; and again if somebody was faster."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from mesh.apikey import ApiKey, KeyRole
from mesh.authority import Authority
from mesh.client import Client, ClientSettings, resolve
from mesh.documents import Document, next_version, parse_document
from mesh.errors import ApiError, MeshError
from mesh.scope import Scope

PATH = "/mesh/v1/documents"
ATTEMPTS = 8
OWN_KEY_S = 300.0
OWN_PROJECT = "mesh"
"""An operator's commands make themselves a key for the few calls they make, of this project."""


def operator_settings(
    authority: Authority, home: Path, *, url: str | None, api_key: str | None = None, project: str = ""
) -> ClientSettings:
    """Where the mesh is, as for any client; the key is made on the spot where none is given: an operator can.

    ``project`` is whose matters it is for, where who signs here may not look at all projects'.
    """
    now = time.time()
    if not api_key and not os.environ.get("MESH_API_KEY"):
        api_key = authority.mint_key(_own_claims(authority.signer(now=now).scope, project, now=now))
    return resolve(home, url=url, api_key=api_key, environ=os.environ)


def _own_claims(bounds: Scope, project: str, *, now: float) -> ApiKey:
    """For a moment, as much as whoever signs it may give."""
    roles = frozenset[str]({KeyRole.VIEWER, KeyRole.ADMIN})
    begins = now - 30
    return ApiKey(
        id=os.urandom(8),
        project=_own_project(bounds, project),
        roles=roles if bounds.roles is None else roles & bounds.roles,
        not_before=begins,
        expires=begins + min(OWN_KEY_S, bounds.ttl_s or OWN_KEY_S),
        models=bounds.models,
        endpoints=bounds.endpoints,
        region=min(bounds.regions) if bounds.regions else None,
        rps=bounds.rps,
        tps=bounds.tps,
        concurrency=bounds.concurrency,
        tokens_per_day=bounds.tokens_per_day,
        budget=bounds.budget,
    )


def _own_project(bounds: Scope, about: str) -> str:
    """The one whose admin sees all projects, if whoever signs may make that key; else the one that the call is about."""
    allowed = bounds.projects
    if (allowed is None or OWN_PROJECT in allowed) and (bounds.roles is None or KeyRole.ADMIN in bounds.roles):
        return OWN_PROJECT
    if about and (allowed is None or about in allowed):
        return about
    return OWN_PROJECT if allowed is None else min(allowed, default=OWN_PROJECT)


async def read_document(client: Client, authority: Authority, kind: str, name: str, *, project: str = "") -> Document | None:
    """The newest version that the mesh has, verified; None if there is none. Raises `ApiError` or a `TrustError`."""
    query = f"?{urlencode({'project': project})}" if project else ""
    try:
        answer = await client.get(f"{PATH}/{quote(kind, safe='')}/{quote(name, safe='')}{query}")
    except ApiError as error:
        if error.status == 404:
            return None
        raise
    try:
        signed = base64.b64decode(answer["signed"], validate=True)
    except (KeyError, TypeError, ValueError):
        raise ApiError("the answer holds no document: is this the URL of a mesh's proxy?") from None
    document = parse_document(signed, authority.trust, now=time.time())
    if (document.kind, document.name, document.project) != (kind, name, project):
        raise ApiError("the proxy answered with another document than was asked for")
    return document


async def post_document(client: Client, document: Document) -> dict[str, Any]:
    """Raises `ApiError`; its status is 409 if the document does not follow the newest version."""
    return await client.post_bytes(PATH, document.signed)


async def change_document(
    client: Client, authority: Authority, kind: str, name: str, change: Callable[[Document | None], bytes], *, project: str = ""
) -> tuple[Document, dict[str, Any]]:
    """Write a new version with the body that ``change`` makes of the newest; it is asked again whenever somebody else was faster.

    Returns the document and what the proxy answered. Raises `ApiError`, a `TrustError`, or whatever ``change`` raises.
    """
    problem: MeshError = ApiError(f"{kind}/{name} is being changed by others all the time; try again")
    for _ in range(ATTEMPTS):
        former = await read_document(client, authority, kind, name, project=project)
        version = next_version(former, kind=kind, name=name, project=project, body=change(former), now=time.time())
        document = authority.sign_document(version)
        try:
            return document, await post_document(client, document)
        except ApiError as error:
            if error.status != 409:
                raise
            problem = error
    raise problem
