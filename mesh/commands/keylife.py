"""The end of a key's life: revoke it, replace it, revoke a join token."""

from __future__ import annotations

import asyncio
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from mesh.apikey import ApiKey, read_key
from mesh.authority import Authority, open_mesh
from mesh.client import Client
from mesh.commands.documents import change_document, operator_settings
from mesh.commands.shared import Duration, MeshCommand, day, home_option, json_option, note, print_json
from mesh.documents import Document, parse_document
from mesh.envelope import read_unverified
from mesh.errors import MeshError, TrustError, UsageError
from mesh.identity import write_private
from mesh.invite import PREFIX as TOKEN_PREFIX
from mesh.invite import parse_token
from mesh.issued import IssuedKeys, RevocationRecord, issue
from mesh.revocations import KIND, NAME, NONE, Revocations, encode_revocations, parse_revocations
from mesh.scope import MAX_LIFETIME_S
from mesh.settings import parse_duration_s

url_option = click.option("--url", metavar="URL", help="Any proxy of the mesh.  (MESH_URL, else what `mesh init` stored)")


class Moment(click.ParamType[float]):
    """``now``, ``2026-11-21``, ``2026-11-21T10:00Z`` or how long ago, ``2h`` → wall seconds."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value)
        if text == "now":
            return time.time()
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            try:
                return time.time() - parse_duration_s(text)
            except UsageError:
                self.fail(f"'{text}' is no moment: write now, 2026-11-21, 2026-11-21T10:00Z, or 2h for two hours ago", param, ctx)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


@click.command(
    "revoke",
    cls=MeshCommand,
    epilog="Example: mesh key revoke 4f1c0a9be2d37788 --reason 'laptop stolen'\nExample: mesh key revoke --project search --before now",
)
@click.argument("key", metavar="[ID|KEY|-]", required=False)
@click.option("--project", metavar="P", help="All keys of a project that begin before --before.")
@click.option("--issuer", metavar="K", help="All keys of an issuer that begin before --before.")
@click.option("--before", type=Moment(), metavar="T", help="now, 2026-11-21, 2026-11-21T10:00Z or 2h (ago); alone: all keys of the mesh.")
@click.option("--reason", default="", metavar="TEXT", help="For your own record; nobody else is told.")
@url_option
@home_option
@json_option
def revoke(
    key: str | None,
    project: str | None,
    issuer: str | None,
    before: float | None,
    reason: str,
    url: str | None,
    home: Path,
    as_json: bool,
) -> None:
    """Take keys back before they end: one by its id (or the key itself, better read from - than written here), or many by when they began.

    Every proxy refuses them within seconds. What has been revoked stays so; make a new key instead.
    """
    authority, now = open_mesh(home / "mesh"), time.time()
    if sum(item is not None for item in (key, project, issuer)) > 1 or (key is not None and before is not None):
        raise UsageError("one thing at a time: an ID, or --project, or --issuer, or --before alone")
    moment = now if before is None else before
    change: Callable[[Revocations], Revocations]
    if key is not None:
        key_id, end = _which(key, home, now)
        change, told = lambda revoked: revoked.with_key(key_id, end=end), f"key {key_id.hex()}"
        what = {"id": key_id.hex()}
    elif project is not None:
        change, told = lambda revoked: revoked.with_project(project, before=moment), f"keys of project {project} from before {day(moment)}"
        what = {"project": project}
    elif issuer is not None:
        change, told = lambda revoked: revoked.with_issuer(issuer, before=moment), f"keys of issuer {issuer} from before {day(moment)}"
        what = {"issuer": issuer}
    elif before is not None:
        change, told, what = lambda revoked: revoked.with_all(before=moment), f"all keys from before {day(moment)}", {}
    else:
        raise UsageError("what should be revoked? an ID (see `mesh key list`), --project, --issuer or --before")
    answer = revoke_in_mesh(authority, home, url, change, what=what | ({} if key is not None else {"before": moment}), reason=reason)
    if as_json:
        print_json({"revoked": what, "before": None if key is not None else moment} | answer)
        return
    click.echo(f"revoked: {told}")
    _tell(answer)


@click.command("rotate", cls=MeshCommand, epilog="Example: mesh key rotate 4f1c0a9be2d37788 --overlap 1d")
@click.argument("key", metavar="ID|KEY|-")
@click.option("--overlap", type=Duration(), default="1h", show_default=True, metavar="TIME", help="How long the old key still works.")
@click.option("--ttl", type=Duration(), metavar="TIME", help="How long the new one lives. [as long as the old one did]")
@url_option
@home_option
@json_option
def rotate(key: str, overlap: float, ttl: float | None, url: str | None, home: Path, as_json: bool) -> None:
    """Make a successor with the same rights and revoke the old key once the overlap is over. The new key is printed once."""
    authority, now = open_mesh(home / "mesh"), time.time()
    key_id, end = _which(key, home, now)
    entry = next((entry for entry in reversed(IssuedKeys(home / "mesh").all()) if entry.get("id") == key_id.hex()), None)
    if entry is None:
        raise UsageError(
            f"key {key_id.hex()} was not made from this --home: make a new one with `mesh key create`, then revoke the old one"
        )
    claims = claims_of(entry)
    lifetime_s = ttl or claims.expires - claims.not_before
    successor = replace(claims, id=os.urandom(8), not_before=now, expires=now + lifetime_s)
    remark = str(entry.get("note") or "")
    text = issue(authority, successor, now=now, remark=remark, kid=claims.kid if _is_here(authority, claims.kid) else None)
    begin = float(math.ceil(now + overlap))  # the list counts whole seconds, and the old key is promised all of them

    def change(revoked: Revocations) -> Revocations:
        return revoked.with_key(key_id, end=end, begin=begin if overlap else 0.0)

    try:
        answer = revoke_in_mesh(authority, home, url, change, what={"id": key_id.hex(), "from": begin}, reason="rotated")
    except MeshError as error:
        click.echo(text)
        note(f"the new key is good, but the old one is not revoked: {error.message}\nlater: mesh key revoke {key_id.hex()}")
        sys.exit(1)
    if as_json:
        print_json({"key": text, **successor.describe(), "replaces": key_id.hex(), "old_ends": begin} | answer)
        return
    click.echo(text)
    note(f"replaces {key_id.hex()}, which works until {day(begin)}")
    _tell(answer)


@click.command("revoke", cls=MeshCommand, epilog="Example: mesh invite revoke imjoin_…")
@click.argument("token", metavar="ID|TOKEN|-")
@click.option("--reason", default="", metavar="TEXT", help="For your own record; nobody else is told.")
@url_option
@home_option
@json_option
def revoke_invite(token: str, reason: str, url: str | None, home: Path, as_json: bool) -> None:
    """Take a join token back: no further node enrols with it. Nodes that already have keep their membership."""
    authority, now = open_mesh(home / "mesh"), time.time()
    text = _read(token)
    if text.startswith(TOKEN_PREFIX):
        payload = read_unverified(parse_token(text).signed).payload
        invite_id, end = bytes(payload["id"]), float(payload["exp"])
    else:
        invite_id, end = _hex(text, (8, 16)), now + 30 * 86400
    what = {"invite": invite_id[:8].hex()}
    answer = revoke_in_mesh(authority, home, url, lambda revoked: revoked.with_invite(invite_id, end=end), what=what, reason=reason)
    if as_json:
        print_json({"revoked": what} | answer)
        return
    click.echo(f"revoked: join token {invite_id[:8].hex()}")
    _tell(answer)


def revoke_in_mesh(
    authority: Authority, home: Path, url: str | None, change: Callable[[Revocations], Revocations], *, what: dict[str, Any], reason: str
) -> dict[str, Any]:
    """Change the mesh's list; returns its seq and how many holders have it. What this operator has ever revoked is in it in any case."""
    own = _own_list(authority, home)

    def body(former: Document | None) -> bytes:
        newest = parse_revocations(former) if former is not None else NONE
        return encode_revocations(change(newest.union(own)).pruned(time.time()))

    async def work() -> tuple[Document, dict[str, Any]]:
        async with Client(operator_settings(authority, home, url=url)) as client:
            return await change_document(client, authority, KIND, NAME, body)

    document, answer = asyncio.run(work())
    write_private(home / "mesh" / "revocations.doc", document.signed)
    RevocationRecord(home / "mesh").add(what, now=time.time(), reason=reason)
    return {"seq": document.seq, "holders": answer.get("holders")}


def _own_list(authority: Authority, home: Path) -> Revocations:
    """The list as this operator last signed it, so that no proxy can make him forget."""
    try:
        signed = (home / "mesh" / "revocations.doc").read_bytes()
        return parse_revocations(parse_document(signed, authority.trust, now=time.time()))
    except (OSError, TrustError):
        return NONE


def revoked_here(home: Path, authority: Authority) -> Revocations:
    """For `mesh key list`."""
    return _own_list(authority, home)


def _which(text: str, home: Path, now: float) -> tuple[bytes, float]:
    """A key's id and when it ends in any case."""
    text = _read(text)
    if text.startswith("im_"):
        claims = read_key(text)
        return claims.id, claims.expires
    key_id = _hex(text, (8,))
    known = next((entry for entry in IssuedKeys(home / "mesh").all() if entry.get("id") == key_id.hex()), None)
    return key_id, float(known["expires"]) if known is not None else now + MAX_LIFETIME_S


def claims_of(entry: dict[str, Any]) -> ApiKey:
    """From the operator's own record."""

    def listed(name: str) -> frozenset[str] | None:
        return frozenset(entry[name]) if entry.get(name) is not None else None

    return ApiKey(
        id=bytes.fromhex(entry["id"]),
        project=entry["project"],
        roles=frozenset(entry["roles"]),
        not_before=entry["not_before"],
        expires=entry["expires"],
        kid=str(entry.get("kid") or ""),
        models=listed("models"),
        endpoints=listed("endpoints"),
        region=entry.get("region"),
        rps=entry.get("rps"),
        tps=entry.get("tps"),
        concurrency=entry.get("concurrency"),
        tokens_per_day=entry.get("tokens_per_day"),
        budget=entry.get("budget"),
    )


def _is_here(authority: Authority, kid: str) -> bool:
    """A key of a bounded issuer is replaced by one of the same; of an issuer that is no longer here, by one of today's."""
    return re.fullmatch(r"[\w.-]+", kid) is not None and (authority.directory / "issuers" / f"{kid}.chain").exists()


def _read(text: str) -> str:
    return (sys.stdin.readline() if text == "-" else text).strip()


def _hex(text: str, sizes: tuple[int, ...]) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) not in sizes:
        raise UsageError(
            f"'{text[:40]}' is no id: {' or '.join(str(2 * size) for size in sizes)} hexadecimal digits, as `mesh key list` shows"
        )
    return value


def _tell(answer: dict[str, Any]) -> None:
    note(f"list {answer['seq']}, sent to every proxy; held by {answer['holders']} nodes of the directory")
