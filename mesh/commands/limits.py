"""For whoever runs a mesh: say who may use how much."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from mesh.authority import Authority, open_mesh
from mesh.client import Client
from mesh.commands.documents import change_document, operator_settings, read_document
from mesh.commands.shared import F, MeshCommand, home_option, json_option, note, print_json, print_table, short
from mesh.commands.user import cell, objects
from mesh.documents import ENDPOINT_KIND, MAX_PROJECT_CHARS, Document
from mesh.endpoints import NAME, changeable_endpoint, encode_endpoint, parse_endpoint
from mesh.errors import UsageError
from mesh.limits import DEFAULT_NAME, KIND, MODELS_NAME, OWN_NAME, PROJECT_PREFIX, Limit, Limits, encode_limits, parse_limits, project_name

T = TypeVar("T")
NONE = "none"
COLUMNS = ("rps", "tps", "concurrency", "tokens_per_day", "money_per_month", "burst_s")


class Amount(click.ParamType[float]):
    """A number, with ``k``, ``m`` or ``g`` for thousands, millions and billions; or ``none`` for no limit, which is minus one here."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip().lower()
        if text == NONE:
            return -1.0
        factor = {"k": 1e3, "m": 1e6, "g": 1e9}.get(text[-1:], 1.0)
        try:
            number = float(text[:-1] if factor > 1 else text) * factor
        except ValueError:
            number = -1.0
        if not 0 <= number <= 1e15:
            self.fail(f"'{value}' is neither a number from 0 to 1e15 nor '{NONE}'", param, ctx)
        return number


def subject_options(command: F) -> F:
    for decorate in (
        click.option("--endpoint", metavar="NAME", help="With --project: only for calls of this endpoint."),
        click.option("--own", is_flag=True, help="With --project: limits the project sets itself, besides the operator's."),
        click.option("--model", metavar="M", help="Only for this model; without --project, for all who use it together."),
        click.option("--default", "default", is_flag=True, help="Every project without limits of its own."),
        click.option("--project", metavar="P", help="This project."),
    ):
        command = decorate(command)
    return command


def amount_options(command: F) -> F:
    for flag, name, text in reversed(
        (
            ("--rps", "rps", "Requests a second."),
            ("--tps", "tps", "Tokens a second, of prompts and answers."),
            ("--concurrency", "concurrency", "Requests at once."),
            ("--tokens-per-day", "tokens_per_day", "Tokens in a UTC day."),
            (
                "--money-per-month",
                "money_per_month",
                "In the currency of the mesh's prices, in a UTC month; holds for models with a price.",
            ),
            ("--burst", "burst_s", "Seconds' worth of --rps and --tps that may be used at once. [1 of --rps, 10 of --tps]"),
        )
    ):
        command = click.option(flag, name, type=Amount(), metavar="N", help=text)(command)
    return command


def read_amounts(options: Mapping[str, Any]) -> dict[str, float | None]:
    """What `amount_options` name, and nothing else; None takes a limit away. Raises `UsageError`."""
    amounts = {name: None if value < 0 else value for name in COLUMNS if (value := options.get(name)) is not None}
    if (burst := amounts.get("burst_s")) is not None and burst < 0.1:
        raise UsageError("--burst: at least 0.1")
    return amounts


def url_option(command: F) -> F:
    return click.option("--url", metavar="URL", help="A proxy's base URL.  (MESH_URL, else what `mesh init` stored)")(command)


@click.group()
def limits() -> None:
    """Limits: set, look at, list. They hold over all proxies together, within a second or two of being set."""


@limits.command("set", cls=MeshCommand, epilog="Example: mesh limits set --project search --rps 100 --tps 10k --tokens-per-day 50m")
@subject_options
@amount_options
@url_option
@home_option
@json_option
def set_limits(
    project: str | None,
    default: bool,
    model: str | None,
    own: bool,
    endpoint: str | None,
    url: str | None,
    home: Path,
    as_json: bool,
    **amounts: float | None,
) -> None:
    """Change the limits that are named and leave the others; 'none' takes one away.

    What is not limited is free: a mesh begins without limits. A limit of 0 lets nothing pass. Those of an endpoint are a part of it, as
    `mesh endpoint set` writes it.
    """
    changes = read_amounts(amounts)
    if endpoint is not None and (default or own or model is not None or project is None):
        raise UsageError("--endpoint NAME goes with --project P alone: whose endpoint it is")
    name, owner = _document(project, default=default, model=model, own=own)
    if not changes:
        raise UsageError(
            "say which limit to change: --rps N, --tps N, --concurrency N, --tokens-per-day N, --money-per-month N or --burst N"
        )
    if name == MODELS_NAME and model is None:
        raise UsageError("for whom? --project P, --default, --model M, or --project P --endpoint NAME")
    if endpoint is not None and project is not None:
        _set_endpoint(project, endpoint, changes, home, url, as_json)
        return

    def change(former: Document | None) -> bytes:
        found = parse_limits(former.body) if former is not None else Limits()
        if model is None:
            return encode_limits(replace(found, whole=replace(found.whole, **changes)))
        models = dict(found.models) | {model: replace(found.models.get(model, Limit()), **changes)}
        return encode_limits(replace(found, models={name: limit for name, limit in models.items() if limit != Limit()}))

    async def main(client: Client, authority: Authority) -> tuple[Document, dict[str, Any]]:
        return await change_document(client, authority, KIND, name, change, project=owner)

    document, answer = _run(home, url, main, project=owner)
    found = parse_limits(document.body)
    if as_json:
        print_json({"name": name, "project": owner, "seq": document.seq, "holders": answer.get("holders"), "limits": found.describe()})
        return
    print_table(("whose", "model", *COLUMNS), _rows(name, owner, found))
    note(f"version {document.seq}, on its way to every proxy")


@limits.command("get", cls=MeshCommand, epilog="Example: mesh limits get --project search")
@subject_options
@url_option
@home_option
@json_option
def get_limits(
    project: str | None,
    default: bool,
    model: str | None,
    own: bool,
    endpoint: str | None,
    url: str | None,
    home: Path,
    as_json: bool,
) -> None:
    """Show what holds for a project: its own limits or else the default, what it sets itself, what its models may serve in all, and what
    its endpoints say."""
    if (own or endpoint is not None) and not project:
        raise UsageError("--own and --endpoint go with --project P")
    wanted = [(DEFAULT_NAME, ""), (MODELS_NAME, "")] if not project else [(project_name(project), ""), (OWN_NAME, project)]
    if default:
        wanted = [(DEFAULT_NAME, "")]
    elif project and not own:
        wanted += [(DEFAULT_NAME, ""), (MODELS_NAME, "")]
    elif own and project:
        wanted = [(OWN_NAME, project)]
    elif model:
        wanted = [(MODELS_NAME, "")]
    if endpoint is not None:
        wanted = []

    async def main(client: Client, authority: Authority) -> tuple[dict[tuple[str, str], Limits], list[dict[str, Any]]]:
        entries = await _endpoints(client, project) if project and not own and not default and model is None else []
        return await _read(client, authority, wanted), [entry for entry in entries if endpoint in (None, entry["name"])]

    found, endpoints = _run(home, url, main, project=project or "")
    if project and (project_name(project), "") in found:
        found.pop((DEFAULT_NAME, ""), None)
    _show(found, endpoints, as_json, model)


@limits.command("list", cls=MeshCommand, epilog="Example: mesh limits list --json")
@url_option
@home_option
@json_option
def list_limits(url: str | None, home: Path, as_json: bool) -> None:
    """List all limits there are, those of endpoints among them."""

    async def main(client: Client, authority: Authority) -> tuple[dict[tuple[str, str], Limits], list[dict[str, Any]]]:
        listed = objects(await client.get(f"/mesh/v1/documents?kind={KIND}"), "documents")
        wanted = [(str(entry.get("name")), str(entry.get("project") or "")) for entry in listed]
        return await _read(client, authority, wanted), await _endpoints(client)

    _show(*_run(home, url, main), as_json, None)


def _set_endpoint(project: str, endpoint: str, changes: dict[str, float | None], home: Path, url: str | None, as_json: bool) -> None:
    check_endpoint(endpoint)

    def change(former: Document | None) -> bytes:
        found = changeable_endpoint(former, project, endpoint)
        return encode_endpoint(replace(found, limit=replace(found.limit, **changes)))

    async def main(client: Client, authority: Authority) -> tuple[Document, dict[str, Any]]:
        return await change_document(client, authority, ENDPOINT_KIND, endpoint, change, project=project)

    document, answer = _run(home, url, main, project=project)
    written = parse_endpoint(document)
    limit = written.limit if written is not None else Limit()
    if as_json:
        told = {"name": endpoint_name(endpoint), "project": project, "seq": document.seq, "holders": answer.get("holders")}
        print_json({**told, "limits": limit.describe()})
        return
    print_table(("whose", "model", *COLUMNS), [_endpoint_row(project, endpoint, limit.describe())])
    note(f"version {document.seq} of the endpoint, on its way to every proxy")


async def _endpoints(client: Client, project: str | None = None) -> list[dict[str, Any]]:
    """Name, project and limits of the endpoints that have limits, of one project or of all that the key may see."""
    listed = objects(await client.get("/mesh/v1/endpoints"), "endpoints")
    return [
        {"name": str(entry.get("name")), "project": str(entry.get("project")), "limits": limits}
        for entry in listed
        if isinstance(limits := entry.get("limits"), dict) and limits and project in (None, entry.get("project"))
    ]


def check_endpoint(name: str) -> str:
    """The same name. Raises `UsageError` if no endpoint can have it."""
    if NAME.fullmatch(name) is None:
        raise UsageError("an endpoint's name is 1 to 63 letters, digits, '.', '_' or '-'")
    return name


def endpoint_name(endpoint: str) -> str:
    """How an endpoint stands beside the documents of limits."""
    return f"endpoint:{endpoint}"


def _endpoint_row(project: str, endpoint: str, limits: Mapping[str, Any]) -> tuple[Any, ...]:
    values = (limits.get(column) for column in COLUMNS)
    shown = (_number(float(value)) if isinstance(value, int | float) else "" for value in values)
    return (cell(f"{project}, endpoint {endpoint}"), "", *shown)


def _document(project: str | None, *, default: bool, model: str | None, own: bool) -> tuple[str, str]:
    """Name and project of the document that says something of these. Raises `UsageError`."""
    if default and project:
        raise UsageError("either --project P or --default")
    if own and not project:
        raise UsageError("--own goes with --project P")
    if project is not None:
        short("--project", project, MAX_PROJECT_CHARS)
    if model is not None:
        short("--model", model, 256)
    if project:
        return (OWN_NAME, project) if own else (project_name(project), "")
    return (DEFAULT_NAME, "") if default else (MODELS_NAME, "")


async def _read(client: Client, authority: Authority, wanted: list[tuple[str, str]]) -> dict[tuple[str, str], Limits]:
    found = {}
    for name, project in wanted:
        document = await read_document(client, authority, KIND, name, project=project)
        if document is not None and (limits := parse_limits(document.body)) != Limits():
            found[name, project] = limits
    return found


def _show(found: dict[tuple[str, str], Limits], endpoints: list[dict[str, Any]], as_json: bool, model: str | None) -> None:
    if as_json:
        told = [{"name": name, "project": project, **limits.describe()} for (name, project), limits in sorted(found.items())]
        told += [{"name": endpoint_name(entry["name"]), "project": entry["project"], **entry["limits"]} for entry in endpoints]
        print_json({"limits": told})
        return
    rows = [row for (name, project), limits in sorted(found.items()) for row in _rows(name, project, limits) if model in (None, row[1])]
    rows += [_endpoint_row(entry["project"], entry["name"], entry["limits"]) for entry in endpoints]
    if not rows:
        note("no limits: everybody may use all there is; `mesh limits set --default --rps 100 --tps 10k` changes that")
    print_table(("whose", "model", *COLUMNS), rows)


def _rows(name: str, project: str, limits: Limits) -> list[tuple[Any, ...]]:
    whose = {DEFAULT_NAME: "(every other project)", MODELS_NAME: "(all together)", OWN_NAME: f"{project} (its own)"}
    who = cell(whose.get(name, name.removeprefix(PROJECT_PREFIX)))
    parts = (
        [("", limits.whole), *sorted(limits.models.items())]
        if limits.whole != Limit() or not limits.models
        else sorted(limits.models.items())
    )
    return [(who, cell(model), *(_number(getattr(limit, column)) for column in COLUMNS)) for model, limit in parts]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _run(home: Path, url: str | None, main: Callable[[Client, Authority], Awaitable[T]], *, project: str = "") -> T:
    authority = open_mesh(home / "mesh")

    async def call() -> T:
        async with Client(operator_settings(authority, home, url=url, project=project)) as client:
            return await main(client, authority)

    return asyncio.run(call())
