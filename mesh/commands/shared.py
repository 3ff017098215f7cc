"""What all subcommands share: where state lives, ``--json``, how results and errors are shown."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from mesh.errors import UsageError
from mesh.options import plain_errors
from mesh.settings import DEFAULT_HOME, parse_duration_s

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

PIPED_COLUMNS = 240


class MeshCommand(click.Command):
    """A command whose `MeshError` becomes one line on stderr and exit code 1, or 2 for wrong usage."""

    def invoke(self, ctx: click.Context) -> Any:
        with plain_errors():
            return super().invoke(ctx)


def home_option(command: F) -> F:
    return click.option(
        "--home",
        envvar="MESH_HOME",
        default=DEFAULT_HOME,
        show_default=True,
        metavar="DIR",
        type=click.Path(path_type=Path),
        callback=lambda _ctx, _param, value: value.expanduser().absolute(),
        help="Folder under which the mesh keeps its state.  (MESH_HOME)",
    )(command)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(command)


class Duration(click.ParamType[float]):
    """``30s``, ``5m``, ``1h``, ``30d`` → seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return parse_duration_s(str(value))
        except UsageError as error:
            self.fail(error.message, param, ctx)


def print_json(value: Mapping[str, Any]) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]], *, title: str = "") -> None:
    """A table on stdout; cells are text from elsewhere, so markup in them means nothing."""
    columns = tuple(columns)
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.show_header = any(columns)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row))
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPED_COLUMNS  # what reads a pipe wants one line a row
    console.print(table)


def note(text: str) -> None:
    """Something for the person, not for the pipe."""
    click.echo(text, err=True)


def short(flag: str, text: str, most: int = 64) -> str:
    """A name as it may be given. Raises `UsageError`."""
    if not text or len(text) > most or not text.isprintable():
        raise UsageError(f"{flag}: 1 to {most} printable characters")
    return text


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run what asks the mesh. Ctrl-C ends the command with 130, as shells expect."""
    try:
        return asyncio.run(main())
    except KeyboardInterrupt:
        note("")
        sys.exit(130)


def ago(moment: float, now: float) -> str:
    """How far from now, in the largest fitting unit: ``in 29d``, ``3h ago``."""
    delta = abs(moment - now)
    unit_s, unit = next(((size, unit) for size, unit in ((86400, "d"), (3600, "h"), (60, "m")) if delta >= size), (1, "s"))
    amount = f"{int(delta // unit_s)}{unit}"
    return f"in {amount}" if moment >= now else f"{amount} ago"


def lasting(seconds: float) -> str:
    """As `Duration` reads it, in the largest unit of which it is a whole number: ``7d``, ``90m``, ``1.5s``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size and seconds % size == 0:
            return f"{int(seconds // size)}{unit}"
    return f"{seconds:g}s"


def day(moment: float) -> str:
    """``2026-11-21 10:07`` in the local zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


def _plain(cell: object) -> str:
    text = "" if cell is None else str(cell)
    return "".join(char if char.isprintable() else "�" for char in text)
