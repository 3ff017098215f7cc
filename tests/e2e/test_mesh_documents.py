"""Documents among real processes: posted at one proxy, held by every other a moment later, and by the disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesh.authority import KEYS_KID
from mesh.client import Client, ClientSettings
from mesh.commands.documents import change_document, read_document
from mesh.documents import Document, next_version, seal_document
from mesh.identity import load_private_key
from mesh.trust import KEYSET_KIND, seal_keyset
from tests.support.deployment import Deployment, Node, until


async def held(mesh: Deployment, node: Node, kind: str) -> list[dict[str, Any]]:
    """What a proxy itself holds of a kind; it asks nobody for that."""
    status, body = await mesh.get(f"{node.root}/mesh/v1/documents?kind={kind}", mesh.key("viewer"))
    assert status == 200, body
    return list(body["documents"])


async def until_held(mesh: Deployment, node: Node, kind: str, seq: int) -> None:
    async def there() -> bool:
        return [entry["seq"] for entry in await held(mesh, node, kind)] == [seq]

    await until(there, what=f"{node.name} to hold {kind} {seq}")


async def test_a_document_posted_at_one_proxy_is_everywhere_and_outlives_a_restart(tmp_path: Path) -> None:
    async with Deployment(tmp_path) as mesh:
        bootstrap = await mesh.bootstrap()
        one, two = await asyncio.gather(mesh.proxy("p1"), mesh.proxy("p2"))

        async with Client(ClientSettings(url=one.root, api_key=mesh.key("viewer"))) as client:

            def writer(name: bytes) -> Callable[[Document | None], bytes]:
                return lambda former: (former.body if former is not None else b"") + name

            names = (b"a", b"b", b"c")
            results = await asyncio.gather(*(change_document(client, mesh.authority, "limits", "default", writer(name)) for name in names))
            assert sorted(document.seq for document, _ in results) == [1, 2, 3], "each of three writers at once got its turn"
            await until_held(mesh, two, "limits", 3)
            newest = await read_document(client, mesh.authority, "limits", "default")
            assert newest is not None
            assert sorted(newest.body) == sorted(b"abc")

        for node in (one, two, bootstrap):
            await node.kill()
        again = await mesh.proxy("p2", fresh=False)
        assert [entry["seq"] for entry in await held(mesh, again, "limits")] == [3], "from its own disk: nobody else is there"


async def test_a_keyset_reaches_every_node_and_its_disk_without_a_restart(tmp_path: Path) -> None:
    async with Deployment(tmp_path) as mesh:
        bootstrap = await mesh.bootstrap()
        one, two = await asyncio.gather(mesh.proxy("p1"), mesh.proxy("p2"))
        worker = await mesh.worker("w1", "--engine", "external", "--engine-url", "http://127.0.0.1:9", "--model", "m")
        key = mesh.key()

        async def linked() -> bool:
            return all([(await mesh.workers(proxy, key)).get(worker.id, {}).get("linked") for proxy in (one, two)])

        await until(linked, what="the worker to be linked")
        folder = tmp_path / "mesh"
        keyset, now = mesh.authority.keyset, time.time()
        root = load_private_key(folder / "root" / "root.key")
        body = seal_keyset(root, name="e2e", seq=keyset.seq + 1, issued=now, issuers=keyset.issuers)
        version = next_version(None, kind=KEYSET_KIND, name=KEYSET_KIND, body=body, now=now)
        version = Document(**{name: getattr(version, name) for name in ("kind", "name", "issued", "body")}, seq=2, previous=bytes(32))
        signed = seal_document(version, load_private_key(folder / "issuers" / f"{KEYS_KID}.key"), KEYS_KID).signed
        async with mesh.http.post(f"{one.root}/mesh/v1/documents", data=signed) as response:
            assert response.status == 200, await response.text()

        for node in (one, two, worker, bootstrap):

            async def stored(node: Node = node) -> bool:
                return body.hex() in (node.state_dir / "credentials.json").read_text()

            await until(stored, what=f"{node.name} to keep the new keyset", within_s=40)
