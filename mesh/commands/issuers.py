"""Issuers: who may sign for the mesh, made, rotated and retired with the root key; delegations, made without."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import click

from mesh.apikey import KeyRole
from mesh.authority import Authority, open_mesh
from mesh.client import Client
from mesh.commands.documents import operator_settings, post_document, read_document
from mesh.commands.keylife import url_option
from mesh.commands.shared import Duration, F, MeshCommand, ago, day, home_option, json_option, note, print_json, print_table
from mesh.documents import next_version
from mesh.errors import ApiError, ConfigError, MeshError
from mesh.identity import load_private_key
from mesh.issuers import (
    Handover,
    adopt_keyset,
    create_issuer,
    delegate,
    keyset_document,
    load_root,
    retire_issuer,
    rotate_issuer,
    take_over,
)
from mesh.scope import Scope
from mesh.trust import KEYSET_KIND, Purpose, parse_keyset

PATIENCE = 4
PAUSE_S = 0.5


def root_option(command: F) -> F:
    return click.option("--root", type=click.Path(path_type=Path), metavar="PATH", help="Where the root key is kept. [HOME/mesh/root]")(
        command
    )


def scope_options(command: F) -> F:
    for decorate in reversed(
        (
            click.option("--project", multiple=True, metavar="P", help="Keys of this project; repeat for more. [any]"),
            click.option("--model", multiple=True, metavar="M", help="Keys for this model; repeat for more. [any]"),
            click.option("--endpoint", multiple=True, metavar="E", help="Keys for this endpoint; repeat for more. [any]"),
            click.option("--region", multiple=True, metavar="R", help="Keys of this region; repeat for more. [any]"),
            click.option("--role", multiple=True, type=click.Choice([str(role) for role in KeyRole]), help="Keys of this role. [any]"),
            click.option("--rps", type=click.FloatRange(0, min_open=True), help="Most requests per second of one key."),
            click.option("--tps", type=click.FloatRange(0, min_open=True), help="Most tokens per second of one key."),
            click.option("--concurrency", type=click.IntRange(1), help="Most requests at once of one key."),
            click.option("--tokens-per-day", type=click.FloatRange(0, min_open=True), help="Most tokens per day of one key."),
            click.option("--budget", type=click.FloatRange(0, min_open=True), help="Largest budget of one key."),
            click.option("--max-ttl", type=Duration(), metavar="TIME", help="Longest life of one key, up to 90d."),
        )
    ):
        command = decorate(command)
    return command


def _scope(options: dict[str, Any]) -> Scope:
    def listed(name: str) -> frozenset[str] | None:
        return frozenset(options.pop(name)) or None

    return Scope(
        projects=listed("project"),
        models=listed("model"),
        endpoints=listed("endpoint"),
        regions=listed("region"),
        roles=listed("role"),
        rps=options.pop("rps"),
        tps=options.pop("tps"),
        concurrency=options.pop("concurrency"),
        tokens_per_day=options.pop("tokens_per_day"),
        budget=options.pop("budget"),
        ttl_s=options.pop("max_ttl"),
    )


@click.group()
def issuer() -> None:
    """Issuers: who may sign API keys and the rest, within which bounds."""


@issuer.command(
    "create",
    cls=MeshCommand,
    epilog="Example: mesh issuer create search-1 --project search --model qwen3-8b --max-ttl 30d --out search.issuer",
)
@click.argument("name", metavar="NAME")
@click.option(
    "--may",
    multiple=True,
    type=click.Choice([str(purpose) for purpose in Purpose]),
    default=[str(Purpose.KEY)],
    show_default=True,
    help="What it may sign; repeat for more.",
)
@click.option("--ttl", type=Duration(), default="365d", show_default=True, metavar="TIME", help="How long it may sign.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Also write what its holder needs, to be handed over.")
@scope_options
@root_option
@url_option
@home_option
@json_option
def create(
    name: str,
    may: tuple[str, ...],
    ttl: float,
    out: Path | None,
    root: Path | None,
    url: str | None,
    home: Path,
    as_json: bool,
    **bounds: Any,
) -> None:
    """Make an issuer and put it into the keyset. Needs the root key. Running nodes hear of it within seconds.

    The API keys it makes can only be narrower than the bounds given here; every proxy checks that.
    """
    authority, scope, now = open_mesh(home / "mesh"), _scope(bounds), time.time()
    key = load_root(authority, root)
    authority = _catch_up(authority, home, url)
    known = authority
    authority = create_issuer(known, key, kid=name, may=frozenset(may), scope=scope, now=now, lifetime_s=ttl)
    if out is not None:
        Handover(authority=authority, kid=name, key=load_private_key(home / "mesh" / "issuers" / f"{name}.key")).write(out)
    told = _publish(authority, home, url, known=known)
    if as_json:
        print_json({"kid": name, "may": sorted(may), "bounds": scope.describe(), "expires": now + ttl, "file": out and str(out)} | told)
        return
    click.echo(f"made issuer '{name}': signs {' and '.join(sorted(may))}, {_bounds(scope)}, until {day(now + ttl)}")
    if out is not None:
        note(f"hand {out} to whoever is to sign, over a safe way: `mesh issuer import` takes it")
    _say(told)


@issuer.command("delegate", cls=MeshCommand, epilog="Example: mesh issuer delegate search-admin --project search --out search.issuer")
@click.argument("name", metavar="NAME")
@click.option("--issuer", "kid", metavar="K", help="Which issuer or delegation here signs it. [the one that makes keys here]")
@click.option("--ttl", type=Duration(), default="90d", show_default=True, metavar="TIME", help="How long it may sign.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", required=True, help="Where to write what its holder needs.")
@scope_options
@home_option
@json_option
def delegate_command(name: str, kid: str | None, ttl: float, out: Path, home: Path, as_json: bool, **bounds: Any) -> None:
    """Let somebody else make API keys, within bounds. Needs no root key, and no node has to be told: it travels in the keys.

    Whoever holds it can delegate further, and only ever less. Its id revokes it, and all below it: `mesh key revoke ID`.
    """
    authority, now = open_mesh(home / "mesh"), time.time()
    signer = authority.signer(kid, now=now)
    scope = narrowed(_scope(bounds), signer.scope)
    made = delegate(authority, name=name, signer=signer, scope=scope, lifetime_s=ttl, now=now)
    made.write(out)
    delegation = made.made
    assert delegation is not None
    if as_json:
        print_json({"id": delegation.id.hex(), "name": name, "bounds": scope.describe(), "expires": delegation.expires, "file": str(out)})
        return
    click.echo(f"made delegation {delegation.id.hex()} '{name}': {_bounds(scope)}, until {day(delegation.expires)}")
    note(f"hand {out} to whoever is to sign, over a safe way: `mesh issuer import` takes it")


@issuer.command("import", cls=MeshCommand, epilog="Example: mesh issuer import search.issuer")
@click.argument("file", type=click.Path(path_type=Path))
@home_option
@json_option
def import_command(file: Path, home: Path, as_json: bool) -> None:
    """Take an issuer or delegation that was handed over; `mesh key create` then signs with it."""
    authority, kid = take_over(file, home / "mesh")
    signer = authority.signer(kid, now=time.time())
    if as_json:
        print_json({"kid": kid, "mesh": authority.name, "bounds": signer.scope.describe(), "expires": signer.expires})
        return
    click.echo(f"may now make keys of the mesh '{authority.name}' as '{kid}': {_bounds(signer.scope)}, until {day(signer.expires)}")
    note(f"{file} is no longer needed: delete it")


@issuer.command("list", cls=MeshCommand, epilog="Example: mesh issuer list")
@home_option
@json_option
def list_issuers(home: Path, as_json: bool) -> None:
    """List the keyset's issuers, and the delegations that were handed over to this home."""
    authority, now = open_mesh(home / "mesh"), time.time()
    folder = home / "mesh" / "issuers"
    found: list[dict[str, Any]] = [
        {
            "kid": item.kid,
            "may": sorted(item.may),
            "bounds": item.scope.describe(),
            "begins": item.not_before,
            "expires": item.expires,
            "here": (folder / f"{item.kid}.key").exists(),
        }
        for item in authority.keyset.issuers
    ]
    for path in sorted(folder.glob("*.chain")):
        try:
            signer = authority.signer(path.stem, now=now)
            found.append({"kid": path.stem, "may": ["key"], "bounds": signer.scope.describe(), "expires": signer.expires, "here": True})
        except MeshError as error:
            found.append({"kid": path.stem, "may": [], "bounds": {}, "expires": 0.0, "here": True, "problem": error.message})
    if as_json:
        print_json({"seq": authority.keyset.seq, "issuers": found})
        return
    rows = (
        (
            item["kid"],
            ", ".join(item["may"]),
            item.get("problem") or "; ".join(f"{name} {_value(value)}" for name, value in item["bounds"].items()) or "none",
            f"ended {ago(item['expires'], now)}" if item["expires"] <= now else ago(item["expires"], now),
            "here" if item["here"] else "",
        )
        for item in found
    )
    print_table(("issuer", "may sign", "bounds", "ends", "key"), rows)
    note(f"keyset {authority.keyset.seq}")


@issuer.command("rotate", cls=MeshCommand, epilog="Example: mesh issuer rotate keys-1")
@click.argument("name", metavar="NAME")
@click.option(
    "--overlap", type=Duration(), default="90d", show_default=True, metavar="TIME", help="How long what the old one signed still holds."
)
@root_option
@url_option
@home_option
@json_option
def rotate(name: str, overlap: float, root: Path | None, url: str | None, home: Path, as_json: bool) -> None:
    """Put a successor with the same rights beside an issuer, and let the old one end. Needs the root key.

    With the default overlap no API key ends early, as none lives longer than 90 days. Documents that the old one signed are signed again.
    """
    authority, now = open_mesh(home / "mesh"), time.time()
    key = load_root(authority, root)
    authority = _catch_up(authority, home, url)
    known = authority
    authority, successor = rotate_issuer(known, key, name, overlap_s=overlap, now=now)
    told = _publish(authority, home, url, known=known, outgoing=name)
    if as_json:
        print_json({"kid": successor, "replaces": name, "old_ends": now + overlap} | told)
        return
    click.echo(f"made issuer '{successor}'; '{name}' ends {day(now + overlap)}")
    made = authority.keyset.issuer(successor)
    if made is not None and Purpose.NODE in made.may:
        note(
            "bootstrap nodes admit with the old one until they are given the new: restart the one that uses this folder;\n"
            "for each other, remove its admission.json and start it once with a token from `mesh invite bootstrap`"
        )
    _say(told)


@issuer.command("retire", cls=MeshCommand, epilog="Example: mesh issuer retire keys-1")
@click.argument("name", metavar="NAME")
@root_option
@url_option
@home_option
@json_option
def retire(name: str, root: Path | None, url: str | None, home: Path, as_json: bool) -> None:
    """Take an issuer out of the keyset now: all that it ever signed stops to hold within seconds. Needs the root key.

    For one whose key is in wrong hands. Documents that it signed are first signed again by another.
    """
    authority, now = open_mesh(home / "mesh"), time.time()
    key = load_root(authority, root)
    authority = _catch_up(authority, home, url)
    retired = retire_issuer(authority, key, name, now=now)
    told = _publish(retired, home, url, outgoing=name, reader=authority)
    if as_json:
        print_json({"kid": name} | told)
        return
    click.echo(f"retired issuer '{name}'")
    _say(told)


@issuer.command("publish", cls=MeshCommand, epilog="Example: mesh issuer publish --url https://llm.example.org")
@url_option
@home_option
@json_option
def publish(url: str | None, home: Path, as_json: bool) -> None:
    """Send the keyset to the mesh: after a change that was made while no proxy could be reached."""
    authority = _catch_up(open_mesh(home / "mesh"), home, url)
    told = _publish(authority, home, url)
    if as_json:
        print_json(told)
        return
    _say(told)


def narrowed(asked: Scope, outer: Scope) -> Scope:
    """What was left open takes the bound of what stands above: asking for nothing special is no mistake."""
    fields = ("projects", "models", "endpoints", "regions", "roles", "rps", "tps", "concurrency", "tokens_per_day", "budget", "ttl_s")
    return Scope(**{name: getattr(asked, name) if getattr(asked, name) is not None else getattr(outer, name) for name in fields})


def _catch_up(authority: Authority, home: Path, url: str | None) -> Authority:
    """The newest keyset there is, ours or the mesh's: somebody else may have changed it."""

    async def newest() -> Authority:
        async with Client(operator_settings(authority, home, url=url)) as client:
            document = await read_document(client, authority, KEYSET_KIND, KEYSET_KIND)
        return authority if document is None else adopt_keyset(authority, parse_keyset(document.body, mesh_id=authority.mesh_id))

    try:
        return asyncio.run(newest())
    except (ApiError, ConfigError):
        return authority


def _publish(
    authority: Authority,
    home: Path,
    url: str | None,
    *,
    known: Authority | None = None,
    outgoing: str = "",
    reader: Authority | None = None,
) -> dict[str, Any]:
    """Send the keyset, and have documents that ``outgoing`` signed signed again by another. What went wrong is in ``problem``.

    ``known`` is the mesh as its nodes know it, where they have yet to hear of the issuer that signs here from now on: then documents are
    signed again after the keyset is there. Else before, so that none is lost with the issuer; ``reader`` is then the mesh that
    still knows it.
    """

    async def again(patience: int) -> int:
        for attempt in range(patience):
            try:
                async with Client(operator_settings(authority, home, url=url)) as client:
                    return await _sign_again(client, authority, outgoing, reader=reader or authority)
            except ApiError as error:
                if error.status not in (401, 403) or attempt == patience - 1:
                    raise
                await asyncio.sleep(PAUSE_S)  # behind the same name may be a proxy that has yet to hear of the issuer
        return 0

    async def send() -> dict[str, Any]:
        signed = await again(1) if outgoing and known is None else 0
        told: dict[str, Any] = {"seq": authority.keyset.seq, "published": True}
        async with Client(operator_settings(known or authority, home, url=url)) as client:
            former = await read_document(client, authority, KEYSET_KIND, KEYSET_KIND)
            if former is None or former.body != authority.keyset.signed:
                document = authority.sign_document(keyset_document(authority, former, now=time.time()))
                told["holders"] = (await post_document(client, document)).get("holders")
        if outgoing and known is not None:
            signed = await again(PATIENCE)
        return told | ({"signed_again": signed} if outgoing else {})

    try:
        return asyncio.run(send())
    except MeshError as error:
        return {"seq": authority.keyset.seq, "published": False, "problem": error.message}


async def _sign_again(client: Client, authority: Authority, kid: str, *, reader: Authority) -> int:
    """Documents whose newest version ``kid`` signed get a next version, the same but for who signed it."""
    listed = (await client.get("/mesh/v1/documents")).get("documents")
    count = 0
    for entry in listed if isinstance(listed, list) else []:
        if not isinstance(entry, dict) or entry.get("signer") != kid or entry.get("kind") == KEYSET_KIND:
            continue
        kind, name, project = (str(entry.get(field, "")) for field in ("kind", "name", "project"))
        for attempt in range(PATIENCE):
            former = await read_document(client, reader, kind, name, project=project)
            if former is None:
                break
            version = next_version(former, kind=kind, name=name, project=project, body=former.body, now=time.time(), expires=former.expires)
            try:
                await post_document(client, authority.sign_document(version))
            except ApiError as error:
                if error.status != 409 or attempt == PATIENCE - 1:
                    raise
            else:
                count += 1
                break
    return count


def _bounds(scope: Scope) -> str:
    said = ", ".join(f"{name} {_value(value)}" for name, value in scope.describe().items())
    return f"keys within {said}" if said else "without bounds"


def _value(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else f"{value:g}"


def _say(told: dict[str, Any]) -> None:
    if told["published"]:
        note(
            f"keyset {told['seq']} is with the mesh"
            + (f"; {told['signed_again']} documents signed again" if told.get("signed_again") else "")
        )
        return
    note(f"keyset {told['seq']} is made but not yet with the mesh: {told['problem']}\nlater: mesh issuer publish --url URL")
    raise SystemExit(1)
