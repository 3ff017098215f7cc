"""For whoever runs a mesh: take a node out of service, and put it back."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import click

from mesh.apikey import ApiKey, KeyRole
from mesh.authority import Authority, open_mesh
from mesh.client import Client, ClientSettings, resolve
from mesh.commands.shared import Duration, MeshCommand, home_option, json_option, note, print_json
from mesh.commands.user import cell, objects
from mesh.errors import ApiError, UsageError
from mesh.orders import MAX_REASON_CHARS, Action

KEY_LIFE_S = 300.0
LOOK_S = 0.2
SEEN_S = 10.0
"""So long a node may take to say that it has heard."""
LISTS = ("workers", "proxies")


@click.command(cls=MeshCommand, epilog='Example: mesh drain 3f9c02 --reason "new driver" --wait')
@click.argument("node")
@click.option("--reason", default="", metavar="TEXT", help=f"Why, for whoever looks; at most {MAX_REASON_CHARS} characters.")
@click.option("--wait", is_flag=True, help="Return once nothing runs there any more.")
@click.option("--timeout", type=Duration(), default="10m", show_default=True, metavar="TIME", help="How long --wait waits.")
@click.option("--url", metavar="URL", help="A proxy's base URL.  (MESH_URL, else what `mesh init` stored)")
@home_option
@json_option
def drain(node: str, reason: str, wait: bool, timeout: float, url: str | None, home: Path, as_json: bool) -> None:
    """Take NODE, a worker or a proxy, out of service: no new requests, what runs is finished, the process stays up.

    NODE is the beginning of its id, as `mesh workers` shows it. It stays drained, also across restarts, until `mesh undrain`. The order is
    signed with the mesh's issuer in --home, so this runs on the operator's machine; any proxy carries it.
    """
    _command(home, url, node, Action.DRAIN, reason, as_json=as_json, wait_s=timeout if wait else 0.0)


@click.command(cls=MeshCommand, epilog="Example: mesh undrain 3f9c02")
@click.argument("node")
@click.option("--url", metavar="URL", help="A proxy's base URL.  (MESH_URL, else what `mesh init` stored)")
@home_option
@json_option
def undrain(node: str, url: str | None, home: Path, as_json: bool) -> None:
    """Put NODE back into service after `mesh drain`."""
    _command(home, url, node, Action.UNDRAIN, "", as_json=as_json)


def _command(home: Path, url: str | None, node: str, action: Action, reason: str, *, as_json: bool, wait_s: float = 0.0) -> None:
    if len(reason) > MAX_REASON_CHARS or not reason.isprintable():
        raise UsageError(f"--reason: at most {MAX_REASON_CHARS} printable characters")
    authority = open_mesh(home / "mesh")
    settings = resolve(home, url=url, api_key=_viewer_key(authority), environ=os.environ)
    found = asyncio.run(_order(authority, settings, node, action, reason, wait_s))
    if as_json:
        print_json(found)
        return
    click.echo(f"{cell(found.get('name'))} is {cell(found.get('state'))}")
    if action is Action.DRAIN and not wait_s:
        note("what runs there is finished; `mesh undrain` puts it back")


async def _order(authority: Authority, settings: ClientSettings, node: str, action: Action, reason: str, wait_s: float) -> dict[str, Any]:
    async with Client(settings) as client:
        about = _find(await client.get("/mesh/v1/status"), node)
        order = authority.order(bytes.fromhex(about["id"]), action, reason=reason, now=time.time())
        await client.post_bytes("/mesh/v1/orders", order.signed)
        return await _until_seen(client, about["id"], action, wait_s)


async def _until_seen(client: Client, node_id: str, action: Action, wait_s: float) -> dict[str, Any]:
    """Look until the node says that it obeys, and with ``wait_s`` until nothing runs there."""
    started = time.monotonic()
    while True:
        about = _find(await client.get("/mesh/v1/status"), node_id)
        waited_s = time.monotonic() - started
        is_drained = about.get("state") == "draining"
        if is_drained == (action is Action.DRAIN):
            if not wait_s or not (about.get("running") or about.get("waiting")):
                return about
            if waited_s > wait_s:
                raise ApiError(f"{about['name']} is draining, but {cell(about.get('running'))} requests still run there")
        elif waited_s > SEEN_S:
            raise ApiError(f"the order was sent, but {about['name']} has not obeyed: it may be down, or its clock wrong; see `mesh doctor`")
        await asyncio.sleep(LOOK_S)


def _find(status: dict[str, Any], node: str) -> dict[str, Any]:
    listed = [item for name in LISTS for item in objects(status, name) if isinstance(item.get("id"), str)]
    matching = [item for item in listed if str(item["id"]).startswith(node.lower())]
    if not node or not matching:
        raise UsageError(f"no worker or proxy has an id that begins with '{node[:64]}'; `mesh status` lists them")
    if len(matching) > 1:
        raise UsageError(f"'{node}' is the beginning of {len(matching)} ids: {', '.join(cell(item.get('name')) for item in matching[:8])}")
    return matching[0]


def _viewer_key(authority: Authority) -> str:
    now = time.time()
    claims = ApiKey(id=os.urandom(8), project="operator", roles=frozenset({KeyRole.VIEWER}), not_before=now - 30, expires=now + KEY_LIFE_S)
    return authority.mint_key(claims)
