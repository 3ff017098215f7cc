"""For a project's deployers: the names under which its clients call models, and what goes with each."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from mesh.apikey import read_key
from mesh.authority import Authority, open_mesh
from mesh.client import Client, ClientSettings, resolve
from mesh.commands.asking import operates
from mesh.commands.documents import OWN_PROJECT, change_document, operator_settings
from mesh.commands.limits import COLUMNS, amount_options, check_endpoint, read_amounts
from mesh.commands.prompts import load_prompt_key
from mesh.commands.shared import Duration, F, MeshCommand, day, json_option, lasting, note, print_json, print_table, run, short
from mesh.commands.user import access_options, get, objects
from mesh.documents import ENDPOINT_KIND, MAX_PROJECT_CHARS, Document
from mesh.endpoints import (
    MAX_KEEP_S,
    MAX_MODEL_CHARS,
    MAX_TIMEOUT_MS,
    MIN_KEEP_S,
    Endpoint,
    Recording,
    changeable_endpoint,
    encode_endpoint,
    parse_endpoint,
)
from mesh.errors import ConfigError, TrustError, UsageError
from mesh.identity import write_private

PATH = "/mesh/v1/endpoints"
KEEP_S = 7 * 86_400
OFF, REDACTED, FULL = "off", "redacted", "full"


@click.group()
def endpoint() -> None:
    """Endpoints: names under which a project's keys call a model, with limits, a default deadline and what is kept of prompts.

    An endpoint is a signed document of its project; every proxy knows of a change within a second or two.
    """


def project_option(command: F) -> F:
    return click.option("--project", metavar="P", help="Whose endpoint. [the project of the API key in use]")(command)


def content_options(command: F) -> F:
    for decorate in (
        click.option("--key", "key_file", type=click.Path(path_type=Path), metavar="FILE", help="Opens what is kept; made if missing."),
        click.option("--keep", type=Duration(), metavar="TIME", help="How long what is kept is kept, 1m to 90d. [7d]"),
        click.option(
            "--prompts",
            type=click.Choice([OFF, REDACTED, FULL]),
            help="Keep prompts and answers, sealed to --key: redacted, or in full. [off]",
        ),
        amount_options,
        click.option(
            "--timeout", type=Duration(), metavar="TIME", help="Longest answer where a request does not say; 0s: the proxy's own."
        ),
    ):
        command = decorate(command)
    return command


@endpoint.command(
    "create", cls=MeshCommand, epilog="Example: mesh endpoint create chat --project search --model qwen3-8b --timeout 30s --rps 100"
)
@click.argument("name", metavar="NAME")
@click.option("--model", required=True, metavar="M", help="What answers: a model, or an adapter of one.")
@content_options
@project_option
@access_options
@json_option
def create(
    name: str,
    model: str,
    project: str | None,
    url: str | None,
    api_key: str | None,
    home: Path,
    as_json: bool,
    **content: Any,
) -> None:
    """Make an endpoint: keys of its project call it as they call a model, by its name. Limits hold beside all others."""
    authority, owner = _signing(home), _project(project, home, api_key)
    fresh = _changed(Endpoint(project=owner, name=check_endpoint(name), model=short("--model", model, MAX_MODEL_CHARS)), content)

    def change(former: Document | None) -> bytes:
        if former is not None and parse_endpoint(former) is not None:
            raise UsageError(f"the project '{owner}' has an endpoint '{name}' already: change it with `mesh endpoint set`")
        return encode_endpoint(fresh)

    _write(authority, home, url, api_key, owner, name, change, as_json)


@endpoint.command("set", cls=MeshCommand, epilog="Example: mesh endpoint set chat --project search --model qwen3-14b --rps none")
@click.argument("name", metavar="NAME")
@click.option("--model", metavar="M", help="What answers from now on.")
@content_options
@project_option
@access_options
@json_option
def set_endpoint(
    name: str,
    model: str | None,
    project: str | None,
    url: str | None,
    api_key: str | None,
    home: Path,
    as_json: bool,
    **content: Any,
) -> None:
    """Change what is named and leave the rest; 'none' takes a limit away. Requests under way are not disturbed."""
    if model is None and all(value is None for value in content.values()):
        raise UsageError("what should change? --model, --timeout, a limit such as --rps, or --prompts")
    authority, owner = _signing(home), _project(project, home, api_key)

    def change(former: Document | None) -> bytes:
        found = changeable_endpoint(former, owner, name)
        return encode_endpoint(
            _changed(found if model is None else replace(found, model=short("--model", model, MAX_MODEL_CHARS)), content)
        )

    _write(authority, home, url, api_key, owner, check_endpoint(name), change, as_json)


@endpoint.command("delete", cls=MeshCommand, epilog="Example: mesh endpoint delete chat --project search")
@click.argument("name", metavar="NAME")
@project_option
@access_options
@json_option
def delete(name: str, project: str | None, url: str | None, api_key: str | None, home: Path, as_json: bool) -> None:
    """Take an endpoint away: calls of it find no such model. What was kept of prompts stays for its time."""
    authority, owner = _signing(home), _project(project, home, api_key)

    def change(former: Document | None) -> bytes:
        if former is None or parse_endpoint(former) is None:
            raise UsageError(f"the project '{owner}' has no endpoint '{name}'")
        return encode_endpoint(None)

    _write(authority, home, url, api_key, owner, check_endpoint(name), change, as_json)


@endpoint.command("list", cls=MeshCommand, epilog="Example: mesh endpoint list --json")
@click.option("--project", metavar="P", help="Only this project's.")
@access_options
@json_option
def list_endpoints(project: str | None, url: str | None, api_key: str | None, home: Path, as_json: bool) -> None:
    """List the endpoints there are: with a key of the role viewer its project's, on the operator's machine every project's."""
    found = _read(home, url, api_key)
    chosen = [entry for entry in found if project in (None, entry.get("project"))]
    if as_json:
        print_json({"endpoints": chosen})
        return
    if not chosen:
        note("there is no endpoint yet: mesh endpoint create --help")
    columns = ("project", "name", "model", "ready", "timeout", "limits", "prompts")
    print_table(columns, (_row(entry) for entry in chosen))


@endpoint.command("show", cls=MeshCommand, epilog="Example: mesh endpoint show chat --project search")
@click.argument("name", metavar="NAME")
@project_option
@access_options
@json_option
def show(name: str, project: str | None, url: str | None, api_key: str | None, home: Path, as_json: bool) -> None:
    """Show one endpoint: what it says, since when, who signed it, and whether a worker is ready for it."""
    owner = _project(project, home, api_key)
    entry = next((item for item in _read(home, url, api_key) if (item.get("project"), item.get("name")) == (owner, name)), None)
    if entry is None:
        raise UsageError(f"the project '{owner}' has no endpoint '{name}'; `mesh endpoint list` shows those there are")
    if as_json:
        print_json(entry)
        return
    limits = {limit: value for limit, value in _limits(entry).items() if limit in COLUMNS}
    shown = {**entry, "limits": ", ".join(f"{limit} {value:g}" for limit, value in limits.items()), "prompts": _prompts(entry)}
    shown |= {"timeout": _timeout(entry), "issued": day(entry["issued"]) if isinstance(entry.get("issued"), int | float) else ""}
    shown.pop("timeout_s", None)
    shown["ready"] = "yes" if entry.get("ready") else "no"
    print_table(("endpoint", ""), [(field, value) for field, value in shown.items() if value not in (None, "")])


def _row(entry: dict[str, Any]) -> tuple[Any, ...]:
    limits = " ".join(f"{name}={value:g}" for name, value in _limits(entry).items())
    return (
        entry.get("project"),
        entry.get("name"),
        entry.get("model"),
        "yes" if entry.get("ready") else "no",
        _timeout(entry),
        limits,
        _prompts(entry),
    )


def _limits(entry: dict[str, Any]) -> dict[str, float]:
    found = entry.get("limits")
    return {name: value for name, value in found.items() if isinstance(value, int | float)} if isinstance(found, dict) else {}


def _prompts(entry: dict[str, Any]) -> str:
    kept = entry.get("prompts")
    return f"{kept.get('mode')} for {lasting(float(kept.get('keep_s') or 0))}" if isinstance(kept, dict) else ""


def _timeout(entry: dict[str, Any]) -> str:
    timeout_s = entry.get("timeout_s")
    return lasting(timeout_s) if isinstance(timeout_s, int | float) and timeout_s else ""


def _read(home: Path, url: str | None, api_key: str | None) -> list[dict[str, Any]]:
    if operates(home, api_key):
        settings = _settings(open_mesh(home / "mesh"), home, url, api_key)
    else:
        settings = resolve(home, url=url, api_key=api_key, environ=os.environ)
    return objects(get(settings, PATH), "endpoints")


def _write(
    authority: Authority,
    home: Path,
    url: str | None,
    api_key: str | None,
    project: str,
    name: str,
    change: Callable[[Document | None], bytes],
    as_json: bool,
) -> None:
    settings = _settings(authority, home, url, api_key, project)

    async def put() -> tuple[Document, dict[str, Any]]:
        async with Client(settings) as client:
            return await change_document(client, authority, ENDPOINT_KIND, name, change, project=project)

    document, answer = run(put)
    written = parse_endpoint(document)
    if as_json:
        told = written.describe() if written is not None else {"name": name, "project": project, "deleted": True}
        print_json({**told, "seq": document.seq, "holders": answer.get("holders")})
        return
    if written is None:
        click.echo(f"deleted endpoint '{name}' of project '{project}'")
        return
    click.echo(f"endpoint '{name}' of project '{project}': {written.model}")
    note(f'version {document.seq}, on its way to every proxy; keys of the project call it as model="{name}"')


def _settings(authority: Authority, home: Path, url: str | None, api_key: str | None, project: str = "") -> ClientSettings:
    """The key that reads what there is. A deployer whose issuer makes none for viewers uses what was given or stored."""
    with suppress(UsageError, TrustError):
        return operator_settings(authority, home, url=url, api_key=api_key, project=project)
    return resolve(home, url=url, api_key=api_key, environ=os.environ)


def _signing(home: Path) -> Authority:
    """Who signs here. Raises `ConfigError`."""
    if not (home / "mesh" / "mesh.json").exists():
        raise ConfigError(
            "an endpoint is signed, which an API key cannot do: ask the mesh's operator for an issuer of your project "
            "(`mesh issuer create NAME --project P --role deployer --role viewer --may document --may key --out FILE`), "
            "then `mesh issuer import FILE`"
        )
    return open_mesh(home / "mesh")


def _project(project: str | None, home: Path, api_key: str | None) -> str:
    """What was said, or the project of the key in use. Raises `UsageError`."""
    if project is None:
        with suppress(ConfigError, TrustError):
            project = read_key(resolve(home, url="http://localhost", api_key=api_key, environ=os.environ).api_key).project
    if project is None or project == OWN_PROJECT:
        raise UsageError("whose endpoint? --project P")
    return short("--project", project, MAX_PROJECT_CHARS)


def _changed(former: Endpoint, content: dict[str, Any]) -> Endpoint:
    """With what the options say. Raises `UsageError`."""
    changed = replace(former, limit=replace(former.limit, **read_amounts(content)), recording=_recording(former.recording, content))
    if (timeout_s := content.get("timeout")) is not None:
        if timeout_s * 1000 > MAX_TIMEOUT_MS:
            raise UsageError("--timeout: at most 1d")
        changed = replace(changed, timeout_s=timeout_s)
    return changed


def _recording(former: Recording | None, content: dict[str, Any]) -> Recording | None:
    mode, keep, key_file = content.get("prompts"), content.get("keep"), content.get("key_file")
    if mode == OFF:
        return None
    if former is None and mode is None:
        if keep is not None or key_file is not None:
            raise UsageError("--keep and --key go with --prompts redacted or --prompts full")
        return None
    if keep is not None and not MIN_KEEP_S <= keep <= MAX_KEEP_S:
        raise UsageError("--keep: 1m to 90d")
    if key_file is not None:
        public_key = _public_key(key_file)
    elif former is not None:
        public_key = former.public_key
    else:
        raise UsageError("who may read them? --key FILE: the key is made there, and what is kept is sealed to it")
    keep_s = math.ceil(keep) if keep is not None else KEEP_S if former is None else former.keep_s
    return Recording(public_key=public_key, keep_s=keep_s, full=mode == FULL if mode is not None or former is None else former.full)


def _public_key(path: Path) -> bytes:
    """Of the key in a file, made if there is none. It never leaves this machine."""
    if not path.exists():
        key = X25519PrivateKey.generate()
        write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        note(f"made {path}: whoever has it can read what is kept, and nobody can without it")
    return load_prompt_key(path).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
