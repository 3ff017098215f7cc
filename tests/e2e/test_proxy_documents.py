"""Documents over a proxy's HTTP, and who may call which of its routes; real sockets, a store in memory."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mesh.apikey import KeyRole
from mesh.authority import KEYS_KID, NODES_KID
from mesh.dht.documents import PROJECT_ROOM
from mesh.documents import Document, next_version, parse_document, seal_document
from mesh.envelope import MAX_ENVELOPE_BYTES
from proxy.access import ACCESS, ROLES, Access, access_of
from proxy.documents import PATH, POSTS_AT_ONCE
from proxy.openai import TASKS
from tests.support.authority import make_mesh
from tests.support.front import Front

MESH = make_mesh(now=time.time() - 3600)


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    async with Front(MESH, tmp_path) as front:
        yield front


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def write(former: Document | None = None, body: bytes = b"limits", *, project: str = "", name: str = "default") -> Document:
    version = next_version(former, kind="limits", name=name, project=project, body=body, now=time.time())
    return seal_document(version, MESH.keys_issuer, KEYS_KID)


async def posted(http: aiohttp.ClientSession, front: Front, data: bytes) -> tuple[int, dict[str, Any]]:
    async with http.post(front.url + PATH, data=data) as response:
        return response.status, await response.json()


async def read(http: aiohttp.ClientSession, front: Front, path: str, **headers: str) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {front.key(roles=frozenset({'viewer'}))}"} | headers
    async with http.get(front.url + path, headers=headers) as response:
        return response.status, await response.json()


async def test_what_is_posted_can_be_read_back_as_it_was_signed(http: aiohttp.ClientSession, front: Front) -> None:
    first = write()
    second = write(first, b"more")
    assert await posted(http, front, first.signed) == (200, {"kind": "limits", "name": "default", "project": "", "seq": 1, "holders": 3})
    assert (await posted(http, front, second.signed))[0] == 200
    status, body = await read(http, front, f"{PATH}/limits/default")
    assert status == 200
    assert parse_document(base64.b64decode(body["signed"]), MESH.trust(), now=time.time()) == second
    assert base64.b64decode(body["body"]) == b"more"
    assert (body["seq"], body["signer"], body["digest"]) == (2, KEYS_KID, second.digest.hex())
    headers = {"Authorization": f"Bearer {front.key(roles=frozenset({'viewer'}))}", "Accept": "application/octet-stream"}
    async with http.get(f"{front.url}{PATH}/limits/default?seq=1", headers=headers) as response:
        assert await response.read() == first.signed
    status, body = await read(http, front, f"{PATH}/limits/default?history=1")
    assert [version["seq"] for version in body["versions"]] == [2, 1]


async def test_documents_of_a_project_are_apart_and_its_own_matter(http: aiohttp.ClientSession, front: Front) -> None:
    def bearer(project: str, role: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {front.key(project=project, roles=frozenset({role}))}"}

    await posted(http, front, write().signed)
    await posted(http, front, write(project="search", body=b"theirs").signed)
    for may in (bearer("search", "viewer"), bearer("mesh", "admin")):
        _, body = await read(http, front, f"{PATH}/limits/default?project=search", **may)
        assert base64.b64decode(body["body"]) == b"theirs"
        _, body = await read(http, front, f"{PATH}?kind=limits", **may)
        assert [entry["project"] for entry in body["documents"]] == ["", "search"]
    for may_not in (bearer("p", "viewer"), bearer("p", "admin"), bearer("mesh", "viewer")):
        for query in ("", "&history=1", "&seq=1"):
            assert (await read(http, front, f"{PATH}/limits/default?project=search{query}", **may_not))[0] == 404
        _, body = await read(http, front, f"{PATH}?kind=limits", **may_not)
        assert [entry["project"] for entry in body["documents"]] == [""]
    await posted(http, front, write(name="project:search", body=b"granted").signed)
    for may, seen in ((bearer("search", "viewer"), 200), (bearer("mesh", "admin"), 200), (bearer("p", "viewer"), 404)):
        for query in ("", "?history=1"):
            assert (await read(http, front, f"{PATH}/limits/project:search{query}", **may))[0] == seen
        _, body = await read(http, front, f"{PATH}?kind=limits", **may)
        assert ("project:search" in [entry["name"] for entry in body["documents"]]) == (seen == 200)
    assert (await read(http, front, f"{PATH}?kind=other"))[1] == {"documents": []}
    assert (await read(http, front, f"{PATH}/limits/other"))[0] == 404
    assert (await read(http, front, f"{PATH}/limits/default?seq=x"))[0] == 400


async def test_of_two_writers_the_second_is_told_what_there_is(http: aiohttp.ClientSession, front: Front) -> None:
    first = write()
    await posted(http, front, first.signed)
    await posted(http, front, write(first, b"alice").signed)
    status, body = await posted(http, front, write(first, b"bob").signed)
    assert (status, body["error"]["code"]) == (409, "document_conflict")
    assert "the newest is 2" in body["error"]["message"]
    assert (await posted(http, front, first.signed))[0] == 409
    assert front.shelf.held_document("limits", "default").body == b"alice"


async def test_a_writer_is_told_where_there_is_no_room_for_a_new_document(http: aiohttp.ClientSession, front: Front) -> None:
    front.shelf.holders = 0
    for number in range(PROJECT_ROOM.documents + 1):
        version = next_version(None, kind="endpoint", name=f"e{number}", project="search", body=b"", now=time.time())
        status, body = await posted(http, front, seal_document(version, MESH.keys_issuer, KEYS_KID).signed)
        if number < PROJECT_ROOM.documents:
            assert status == 200
    assert (status, body["error"]["code"], "'search'" in body["error"]["message"]) == (503, "no_room", True)


async def test_the_same_again_is_no_conflict(http: aiohttp.ClientSession, front: Front) -> None:
    first = write()
    assert [(await posted(http, front, first.signed))[0] for _ in range(2)] == [200, 200]


async def test_a_signature_and_nothing_else_lets_a_document_in(http: aiohttp.ClientSession, front: Front) -> None:
    document = write()
    by_another = seal_document(document, MESH.admission.key, NODES_KID).signed
    for data in (b"", b"x", document.signed[:-1], by_another, bytes([*document.signed[:-1], document.signed[-1] ^ 1])):
        status, body = await posted(http, front, data)
        assert (status, body["error"]["code"]) == (403, "document_refused")
    status, body = await posted(http, front, bytes(MAX_ENVELOPE_BYTES + 1))
    assert (status, body["error"]["code"]) == (413, "body_too_large")
    assert front.shelf.held_documents() == []


async def test_who_posts_slowly_holds_up_so_many_and_no_more(http: aiohttp.ClientSession, front: Front) -> None:
    wires = [await front.connect() for _ in range(POSTS_AT_ONCE)]
    for wire in wires:
        await wire.send(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode())
    async with asyncio.timeout(10):
        while (await posted(http, front, write().signed))[0] != 503:
            await asyncio.sleep(0.01)
    for wire in wires:
        wire.close()
    async with asyncio.timeout(10):
        while (await posted(http, front, write().signed))[0] != 200:
            await asyncio.sleep(0.01)


# -- who may call what


def test_every_route_says_who_may_call_it(front: Front) -> None:
    """Also: nothing is said of routes that are not there."""
    assert set(front.app.routes()) == set(ACCESS)


def test_a_route_that_nobody_listed_takes_an_admin() -> None:
    assert access_of("GET", "/mesh/v1/forgotten") is Access.ADMIN


@pytest.mark.parametrize("held", [*KeyRole, None])
@pytest.mark.parametrize(("method", "path"), ACCESS)
async def test_a_route_takes_the_role_it_names_and_no_other(
    http: aiohttp.ClientSession, front: Front, method: str, path: str, held: KeyRole | None
) -> None:
    access = ACCESS[method, path]
    headers = {"X-Forwarded-For": "192.0.2.1"}  # not from this machine, then
    if held is not None:
        headers["Authorization"] = f"Bearer {front.key(roles=frozenset({held}))}"
    body = b'{"model": "m", "messages": [{}], "prompt": "", "input": ""}' if path in TASKS else None
    async with http.request(
        method, front.url + path + ("thing/more" if path.endswith("/") else ""), headers=headers, data=body
    ) as response:
        answer = await response.text()
    if access in (Access.PUBLIC, Access.SIGNED):
        assert response.status != 401
    elif held is None:
        assert response.status == 401
    else:
        allowed = access is Access.KEY or held == ROLES[access] or (held is KeyRole.ADMIN and access is not Access.INVOKER)
        assert (response.status not in (401, 403)) == allowed, answer
        if not allowed:
            assert "role" in answer
