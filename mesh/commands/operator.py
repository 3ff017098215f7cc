"""For whoever runs a mesh: make it, invite nodes, issue keys."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from pathlib import Path

import click

from mesh.address import parse_address
from mesh.apikey import ApiKey, KeyRole, read_key, verify_key
from mesh.authority import Authority, create_mesh, open_mesh
from mesh.commands.keylife import claims_of, revoke, revoke_invite, revoked_here, rotate
from mesh.commands.shared import Duration, MeshCommand, ago, day, home_option, json_option, note, print_json, print_table, short
from mesh.envelope import read_unverified
from mesh.errors import ConfigError, MeshError, UsageError
from mesh.invite import parse_token
from mesh.issued import IssuedKeys, issue
from mesh.runtime import read_announced
from mesh.trust import Role

ROLES = [str(role) for role in KeyRole]
DEFAULT_TTL_S = 30 * 86_400.0


@click.command(cls=MeshCommand, epilog="Example: mesh create --name lab --bootstrap mesh.example.org:7600")
@click.option("--name", default="", metavar="NAME", help="The mesh's name, for people. [this machine's name]")
@click.option("--bootstrap", multiple=True, metavar="HOST:PORT", help="Where its bootstrap nodes will be; join tokens name them.")
@home_option
@json_option
def create(name: str, bootstrap: tuple[str, ...], home: Path, as_json: bool) -> None:
    """Make a mesh: its root key, its first issuers, its network secret."""
    name = name or re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:32] or "mesh"
    if len(name) > 48 or not name.isprintable():
        raise UsageError("--name: at most 48 printable characters")
    addresses = tuple(str(parse_address(text, default_port=7600)) for text in bootstrap)
    authority = create_mesh(home / "mesh", name=name, now=time.time(), bootstraps=addresses)
    if as_json:
        print_json({"name": name, "mesh_id": authority.mesh_id.hex(), "home": str(home), "bootstraps": list(addresses)})
        return
    click.echo(f"made the mesh '{name}' ({authority.mesh_id.hex()[:16]}…) in {home / 'mesh'}")
    note(f"keep {home / 'mesh' / 'root' / 'root.key'} safe: it is the mesh; you may move it offline\nnext: mesh-bootstrap")


@click.group()
def invite() -> None:
    """Join tokens: one lets machines enrol as workers, proxies or bootstrap nodes."""


@click.option("--ttl", type=Duration(), default="1h", show_default=True, metavar="TIME", help="How long the token is good for.")
@click.option("--uses", type=click.IntRange(1, 100_000), default=1, show_default=True, help="How many nodes it admits.")
@click.option("--bootstrap", multiple=True, metavar="HOST:PORT", help="Where to enrol. [as `mesh create` was told, or the one here]")
@home_option
@json_option
def _invite(ctx: click.Context, ttl: float, uses: int, bootstrap: tuple[str, ...], home: Path, as_json: bool) -> None:
    role = str(ctx.info_name)
    authority = open_mesh(home / "mesh")
    if not 1 <= ttl <= 30 * 86400:
        raise UsageError("--ttl: a join token lives from 1s to 30d")
    addresses = tuple(str(parse_address(text, default_port=7600)) for text in bootstrap) or _bootstraps(authority, home)
    now = time.time()
    token = authority.invite(Role(role), ttl_s=ttl, uses=uses, bootstraps=addresses, now=now)
    if as_json:
        print_json({"token": token, "id": token_id(token), "role": role, "uses": uses, "expires": now + ttl, "bootstraps": list(addresses)})
        return
    click.echo(token)
    times = "once" if uses == 1 else f"{uses} times"
    more = " --model SOURCE" if role == Role.WORKER else ""
    note(f"good for {times}, until {day(now + ttl)}, at {', '.join(addresses)}\nuse it: mesh-{role} --join TOKEN{more}")
    note(f"revoke it: mesh invite revoke {token_id(token)}")
    if role == Role.BOOTSTRAP:
        note("a bootstrap node admits others: give this token to nobody you would not give the mesh's issuer key")


for _role in Role:
    _article = "a machine" if _role != Role.BOOTSTRAP else "a machine that admits others"
    invite.command(
        str(_role),
        cls=MeshCommand,
        epilog=f"Example: mesh invite {_role} --uses 8 --ttl 2h",
        help=f"Make a join token: it lets {_article} enrol as a {_role} node.",
    )(click.pass_context(_invite))
invite.add_command(revoke_invite)


@click.group()
def key() -> None:
    """API keys: make, look into, list, revoke, replace."""


key.add_command(revoke)
key.add_command(rotate)


@key.command("create", cls=MeshCommand, epilog="Example: mesh key create --project search --model qwen3-8b --ttl 30d --rps 50")
@click.option("--project", required=True, metavar="P", help="Who uses it; limits and bills are per project.")
@click.option("--model", multiple=True, metavar="M", help="A model it may use; repeat for more. [all]")
@click.option("--role", multiple=True, type=click.Choice(ROLES), default=[str(KeyRole.INVOKER)], show_default=True)
@click.option("--ttl", type=Duration(), metavar="TIME", help="How long it lives, at most 90d. [30d, or what its issuer may give]")
@click.option("--rps", type=click.FloatRange(0, min_open=True), help="Requests per second.")
@click.option("--tps", type=click.FloatRange(0, min_open=True), help="Tokens per second.")
@click.option("--concurrency", type=click.IntRange(1), help="Requests at once.")
@click.option("--tokens-per-day", type=click.FloatRange(0, min_open=True), help="Tokens per day, by UTC.")
@click.option("--budget", type=click.FloatRange(0, min_open=True), help="What it may spend in a month, in the mesh's currency.")
@click.option("--endpoint", multiple=True, metavar="E", help="An endpoint it may use; repeat for more. [all]")
@click.option("--region", metavar="R", help="Only in this region.")
@click.option("--issuer", metavar="K", help="Which issuer or delegation signs it. [the widest here]")
@click.option("--note", "remark", default="", metavar="TEXT", help="A remark for `mesh key list`.")
@home_option
@json_option
def create_key(
    project: str,
    model: tuple[str, ...],
    role: tuple[str, ...],
    ttl: float | None,
    rps: float | None,
    tps: float | None,
    concurrency: int | None,
    tokens_per_day: float | None,
    budget: float | None,
    endpoint: tuple[str, ...],
    region: str | None,
    issuer: str | None,
    remark: str,
    home: Path,
    as_json: bool,
) -> None:
    """Make an API key. It is printed once and kept nowhere."""
    authority, now = open_mesh(home / "mesh"), time.time()
    signer = authority.signer(issuer, now=now)
    bounds = signer.scope
    lifetime_s = ttl if ttl is not None else min(DEFAULT_TTL_S, bounds.ttl_s or DEFAULT_TTL_S)

    def fitted(asked: float | None, most: float | None) -> float | None:
        """What is left open takes its issuer's bound."""
        return most if asked is None else asked

    claims = ApiKey(
        id=os.urandom(8),
        project=short("--project", project),
        roles=frozenset(role),
        not_before=now,
        expires=now + lifetime_s,
        models=frozenset(short("--model", name, 256) for name in model) or bounds.models,
        endpoints=frozenset(short("--endpoint", name, 256) for name in endpoint) or bounds.endpoints,
        region=short("--region", region) if region else None,
        rps=fitted(rps, bounds.rps),
        tps=fitted(tps, bounds.tps),
        concurrency=fitted(concurrency, bounds.concurrency),
        tokens_per_day=fitted(tokens_per_day, bounds.tokens_per_day),
        budget=fitted(budget, bounds.budget),
        kid=signer.kid,
    )
    text = issue(authority, claims, now=now, remark=remark, kid=issuer)
    if as_json:
        print_json({"key": text, **claims.describe()})
        return
    click.echo(text)
    called = ", ".join(model) or ("any model behind them" if endpoint else "all models")
    through = f"endpoints {', '.join(endpoint)}, " if endpoint else ""
    note(f"project {project}, {' and '.join(role)}, {through}{called}, until {day(claims.expires)}")


@key.command("inspect", cls=MeshCommand, epilog="Example: mesh key inspect - < key.txt")
@click.argument("text", metavar="[KEY|-]", required=False)
@home_option
@json_option
def inspect_key(text: str | None, home: Path, as_json: bool) -> None:
    """Show what a key says and whether it holds. KEY may also come from standard input (-) or MESH_API_KEY."""
    text = sys.stdin.readline() if text == "-" else text or os.environ.get("MESH_API_KEY")
    if not text or not text.strip():
        raise UsageError("give a key, '-' to read it from standard input, or set MESH_API_KEY")
    text, now = text.strip(), time.time()
    claims = read_key(text)
    verdict, problem = "not checked: there is no mesh in this --home to check it against", False
    if (home / "mesh" / "mesh.json").exists():
        try:
            verify_key(text, open_mesh(home / "mesh").trust, now=now)
            verdict = "good"
        except MeshError as error:
            verdict, problem = f"refused: {error.message}", True
    if as_json:
        print_json({"valid": None if verdict.startswith("not") else not problem, "verdict": verdict, **claims.describe()})
    else:
        shown = claims.describe()
        for moment in ("not_before", "expires"):
            shown[moment] = f"{day(shown[moment])} ({ago(shown[moment], now)})"
        rows = [(name, ", ".join(value) if isinstance(value, list) else value) for name, value in shown.items()]
        print_table(("", ""), [*((name, "any" if value is None else value) for name, value in rows), ("verdict", verdict)])
    if problem:
        sys.exit(1)


@key.command("list", cls=MeshCommand, epilog="Example: mesh key list --project search")
@click.option("--project", metavar="P", help="Only this project's.")
@home_option
@json_option
def list_keys(project: str | None, home: Path, as_json: bool) -> None:
    """List the keys issued from this home: their claims, never the keys themselves."""
    now = time.time()
    revoked = revoked_here(home, open_mesh(home / "mesh"))
    entries = [entry for entry in IssuedKeys(home / "mesh").all() if project in (None, entry.get("project"))]
    for entry in entries:
        entry |= {"expired": entry["expires"] <= now, "revoked": revoked.refuses(claims_of(entry), now=now) is not None}
    if as_json:
        print_json({"keys": entries})
        return
    rows = (
        (
            entry.get("id"),
            entry.get("project"),
            ", ".join(entry.get("roles") or ()),
            ", ".join(entry.get("models") or ("all",)),
            "revoked" if entry["revoked"] else f"expired {ago(entry['expires'], now)}" if entry["expired"] else ago(entry["expires"], now),
            entry.get("note"),
        )
        for entry in entries
    )
    print_table(("id", "project", "roles", "models", "ends", "note"), rows)


def token_id(token: str) -> str:
    """By which a join token is revoked."""
    return bytes(read_unverified(parse_token(token).signed).payload["id"])[:8].hex()


def _bootstraps(authority: Authority, home: Path) -> tuple[str, ...]:
    if authority.bootstraps:
        return authority.bootstraps
    running = read_announced(home / "nodes" / str(Role.BOOTSTRAP))
    if running is None:
        raise ConfigError("where will nodes enrol? start `mesh-bootstrap` here first, or name its address: --bootstrap HOST:PORT")
    return tuple(str(address) for address in running["addresses"])
