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
from mesh.documents import MAX_PROJECT_CHARS, Document
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
    url: str | None,
    home: Path,
    as_json: bool,
    **amounts: float | None,
) -> None:
    """Change the limits that are named and leave the others; 'none' takes one away.

    What is not limited is free: a mesh begins without limits. A limit of 0 lets nothing pass.
    """
    name, owner = _document(project, default=default, model=model, own=own)
    changes = read_amounts(amounts)
    if not changes:
        raise UsageError(
            "say which limit to change: --rps N, --tps N, --concurrency N, --tokens-per-day N, --money-per-month N or --burst N"
        )
    if name == MODELS_NAME and model is None:
        raise UsageError("for whom? --project P, --default or --model M")

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
def get_limits(project: str | None, default: bool, model: str | None, own: bool, url: str | None, home: Path, as_json: bool) -> None:
    """Show what holds for a project: its own limits or else the default, what it sets itself, and what its models may serve in all."""
    if own and not project:
        raise UsageError("--own goes with --project P")
    wanted = [(DEFAULT_NAME, ""), (MODELS_NAME, "")] if not project else [(project_name(project), ""), (OWN_NAME, project)]
    if default:
        wanted = [(DEFAULT_NAME, "")]
    elif project and not own:
        wanted += [(DEFAULT_NAME, ""), (MODELS_NAME, "")]
    elif own and project:
        wanted = [(OWN_NAME, project)]
    elif model:
        wanted = [(MODELS_NAME, "")]
    found = _run(home, url, lambda client, authority: _read(client, authority, wanted), project=project or "")
    if project and (project_name(project), "") in found:
        found.pop((DEFAULT_NAME, ""), None)
    _show(found, as_json, model)


@limits.command("list", cls=MeshCommand, epilog="Example: mesh limits list --json")
@url_option
@home_option
@json_option
def list_limits(url: str | None, home: Path, as_json: bool) -> None:
    """List all limits there are."""

    async def main(client: Client, authority: Authority) -> dict[tuple[str, str], Limits]:
        listed = objects(await client.get(f"/mesh/v1/documents?kind={KIND}"), "documents")
        return await _read(client, authority, [(str(entry.get("name")), str(entry.get("project") or "")) for entry in listed])

    _show(_run(home, url, main), as_json, None)


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


def _show(found: dict[tuple[str, str], Limits], as_json: bool, model: str | None) -> None:
    if as_json:
        print_json(
            {"limits": [{"name": name, "project": project, **limits.describe()} for (name, project), limits in sorted(found.items())]}
        )
        return
    rows = [row for (name, project), limits in sorted(found.items()) for row in _rows(name, project, limits) if model in (None, row[1])]
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
