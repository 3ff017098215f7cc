"""Command-line options made from settings, and the shape all node commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mesh import __version__, runtime
from mesh.config import NodeConfig
from mesh.errors import MeshError, UsageError
from mesh.settings import PRESETS, Described, describe, load, variables

C = TypeVar("C", bound=NodeConfig)

OK, FAILED, USAGE = 0, 1, 2
"""Exit codes of every command."""


def node_command(
    config: type[C], run: Callable[[C], Callable[[runtime.Stop], Awaitable[int]]], *, help: str, example: str
) -> click.Command:
    """The command that runs one node of a room.

    ``run(settings)`` returns the node's main; it is called once the settings are good, so ``--help`` imports nothing heavy.
    """

    def main(config_file: Path | None, preset: str | None, **flags: Any) -> None:
        with plain_errors():
            settings = load(config, flags, environ=os.environ, file=config_file, preset=preset)
            _forget_secrets(config)
            code = runtime.run(run(settings), settings)
        sys.exit(code)

    options: list[click.Parameter] = [_option(config, item) for item in describe(config)]
    options.append(
        click.Option(["--config", "config_file"], type=click.Path(path_type=Path), help="TOML file with settings. [HOME/config.toml]")
    )
    options.append(click.Option(["--preset"], type=click.Choice(PRESETS), help="Defaults for a kind of network."))
    name = f"mesh-{config.role}"
    command = click.Command(
        name,
        callback=main,
        params=options,
        help=f"{help}\n\n\b\nExample:\n  {example}",
        epilog="Each setting can also come from the environment or a TOML file: flag > environment > file > preset > default.",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    return click.version_option(__version__, prog_name=name)(command)


def _forget_secrets(config: type[NodeConfig]) -> None:
    """Take secrets out of the environment: what the node starts (an engine) has no business with its join token."""
    for item in describe(config):
        if item.about.secret:
            for variable in variables(config, item):
                os.environ.pop(variable, None)


class plain_errors:
    """Turns a `MeshError` into one clear line on stderr and the right exit code."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MeshError):
            click.echo(f"error: {error.message}", err=True)
            sys.exit(USAGE if isinstance(error, UsageError) else FAILED)


def _option(config: type[NodeConfig], item: Described) -> click.Parameter:
    about = item.about
    if about.rest:
        return click.Argument([item.field], nargs=-1, type=click.UNPROCESSED, metavar=f"[-- {item.name.upper()}…]")
    names = [f"{item.flag}/--no-{item.flag[2:]}" if item.kind is bool else item.flag, item.field]
    return click.Option(
        names,
        default=None,
        multiple=item.many,
        metavar=None if item.kind is bool else _metavar(item),
        type=None if item.kind is bool else click.UNPROCESSED,
        help=f"{about.help}{_default(item)}  ({variables(config, item)[-1]})",
    )


def _metavar(item: Described) -> str:
    return item.about.metavar or ("|".join(item.about.choices) if item.about.choices else "TEXT")


def _default(item: Described) -> str:
    if item.default in ("", (), None) or item.kind is bool or "[" in item.about.help:
        return ""
    return f" [{show_default(item)}]"


def show_default(item: Described) -> str:
    """A default as a person would write it."""
    value = item.default
    if item.field.endswith("_s") and isinstance(value, float):
        return f"{value:g}s"
    if item.field.endswith("_bytes") and isinstance(value, int) and value and value % (1 << 20) == 0:
        return f"{value >> 20}MiB"
    return " ".join(value) if isinstance(value, tuple) else str(value)
