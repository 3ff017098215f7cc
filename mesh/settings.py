"""Settings: one frozen dataclass per room, and one way to fill it.

    flag  >  environment  >  TOML file  >  preset  >  default

A field written with `setting` carries its own help text; the command-line options (`mesh.options`), the environment variables,
the TOML keys and the documentation are all made from it. The public name of a field is the field's name without its unit:
``drain_s`` is ``--drain 30s``, ``MESH_PROXY_DRAIN=30s`` and ``drain = "30s"`` under ``[proxy]``.

The TOML file is ``--config FILE`` or ``HOME/config.toml``: a section per room, ``[node]`` for what all share, and ``preset``.
Values are validated once, in ``__post_init__``; an error names the setting and says where its value came from.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mesh.errors import ConfigError, UsageError
from mesh.trust import Role

PRESETS = ("local", "lan", "wan")
DEFAULT_HOME = "~/.infermesh"
SHARED_SECTION = "node"
_SECTIONS = (SHARED_SECTION, *(str(role) for role in Role))
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_UNITS_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

C = TypeVar("C", bound="Settings")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The base of a room's dataclass of settings. ``presets`` is preset → field → value, and only where it differs."""

    role: ClassVar[Role]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a field says about itself. ``shared`` ones are also read from ``MESH_NAME`` and ``[node]``; ``rest`` takes what
    follows ``--`` on the command line."""

    help: str
    secret: bool = False
    metavar: str = ""
    choices: tuple[str, ...] = ()
    shared: bool = False
    rest: bool = False


def setting(
    default: Any,
    *,
    help: str,
    secret: bool = False,
    metavar: str = "",
    choices: tuple[str, ...] = (),
    shared: bool = False,
    rest: bool = False,
) -> Any:
    """A dataclass field that is a setting. Secrets stay out of the repr."""
    about = Setting(help=help, secret=secret, metavar=metavar, choices=choices, shared=shared, rest=rest)
    return dataclasses.field(default=default, repr=not secret, metadata={"setting": about})


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """One setting as people meet it: for options, documentation and messages."""

    field: str
    name: str
    kind: Any
    default: Any
    about: Setting

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def many(self) -> bool:
        return typing.get_origin(self.kind) is tuple


def describe(config: type[Settings]) -> tuple[Described, ...]:
    """The settings of a room in the order they were written."""
    hints = typing.get_type_hints(config)
    return tuple(
        Described(
            field=field.name,
            name=re.sub(r"_(s|bytes)$", "", field.name),
            kind=_without_none(hints[field.name]),
            default=field.default,
            about=field.metadata["setting"],
        )
        for field in dataclasses.fields(config)
    )


def _without_none(hint: Any) -> Any:
    """``Path | None`` → ``Path``: what a given value is; ``None`` only ever is a default."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if isinstance(hint, types.UnionType) else hint


def variables(config: type[Settings], described: Described) -> tuple[str, ...]:
    """The environment variables of a setting, the winning one first."""
    own = f"MESH_{config.role.upper()}_{described.name.upper()}"
    return (own, f"MESH_{described.name.upper()}") if described.about.shared else (own,)


def load(
    config: type[C],
    flags: Mapping[str, Any],
    *,
    environ: Mapping[str, str],
    file: Path | None = None,
    preset: str | None = None,
) -> C:
    """Fill a room's settings from all sources.

    ``flags`` is field → text (or texts), ``None`` where not given. Raises `ConfigError`, naming the setting and its source.
    """
    given = _from_flags(config, flags)
    from_environment = _from_environment(config, environ)
    tables, path = _read_file(file, given.get("home") or from_environment.get("home"))
    from_file = _from_tables(config, tables, path)
    chosen = _choose_preset(preset, environ, tables, path)
    merged = _from_preset(config, chosen) | from_file | from_environment | given
    values = {field: _convert(_find(config, field), raw, source) for field, (raw, source) in merged.items()}
    try:
        return config(**values)
    except ConfigError as error:
        raise _explain(config, error, merged) from None


def parse_duration_s(text: str) -> float:
    """``250ms``, ``30s``, ``5m``, ``1h``, ``30d`` or a plain number of seconds. Raises `UsageError`."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*(ms|s|m|h|d)?", text.strip())
    if match is None:
        raise UsageError(f"'{text[:40]}' is not a time; write 250ms, 30s, 5m, 1h or 30d")
    return float(match[1]) * _UNITS_S[match[2] or "s"]


def parse_size_bytes(text: str) -> int:
    """``64MiB``, ``10MB``, ``512KiB`` or a plain number of bytes. Raises `UsageError`."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kmg]i?b|b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"'{text[:40]}' is not a size; write 512KiB, 64MiB or 2GB")
    return int(float(match[1]) * _UNITS_BYTES[(match[2] or "b").lower()])


Raw = dict[str, tuple[Any, str]]
"""field → (value as written, where it was written)"""


def _from_flags(config: type[Settings], flags: Mapping[str, Any]) -> Raw:
    return {
        item.field: (flags[item.field], item.flag)
        for item in describe(config)
        if flags.get(item.field) is not None and flags[item.field] != ()
    }


def _from_environment(config: type[Settings], environ: Mapping[str, str]) -> Raw:
    found: Raw = {}
    for item in describe(config):
        for variable in reversed(variables(config, item)):
            if variable in environ:
                found[item.field] = (environ[variable], variable)
    return found


def _from_preset(config: type[Settings], preset: str | None) -> Raw:
    found: Raw = {}
    for owner in reversed(config.__mro__):
        deltas = vars(owner).get("presets", {}).get(preset, {})
        found.update({field: (value, f"preset '{preset}'") for field, value in deltas.items()})
    return found


def _read_file(file: Path | None, home: tuple[Any, str] | None) -> tuple[dict[str, Any], Path]:
    path = file or Path(home[0] if home else DEFAULT_HOME).expanduser() / "config.toml"
    try:
        with path.open("rb") as opened:
            return tomllib.load(opened), path
    except FileNotFoundError:
        if file is not None:
            raise ConfigError(f"{path} does not exist") from None
        return {}, path
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _from_tables(config: type[Settings], tables: Mapping[str, Any], path: Path) -> Raw:
    _check_known(tables, ("preset", *_SECTIONS), f"{path}: ")
    found: Raw = {}
    for section in (SHARED_SECTION, str(config.role)):
        table = tables.get(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: [{section}] must be a table")
        items = {item.name: item for item in describe(config) if section != SHARED_SECTION or item.about.shared}
        _check_known(table, tuple(items), f"{path}: [{section}] ")
        found.update({items[name].field: (value, f"{path}, [{section}] {name}") for name, value in table.items()})
    return found


def _check_known(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in table:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"{where}'{name}' is not a setting; {hint}")


def _choose_preset(preset: str | None, environ: Mapping[str, str], tables: Mapping[str, Any], path: Path) -> str | None:
    candidates = ((preset, "--preset"), (environ.get("MESH_PRESET"), "MESH_PRESET"), (tables.get("preset"), str(path)))
    for value, source in candidates:
        if value is not None:
            if value not in PRESETS:
                raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, not '{value}' (from {source})")
            return str(value)
    return None


def _find(config: type[Settings], field: str) -> Described:
    return next(item for item in describe(config) if item.field == field)


def _convert(item: Described, raw: Any, source: str) -> Any:
    try:
        if not item.many:
            return _convert_one(item, item.kind, raw)
        kind = typing.get_args(item.kind)[0]
        return tuple(_convert_one(item, kind, part) for part in _split(item, raw))
    except (UsageError, ValueError) as error:
        shown = "" if item.about.secret else f" '{str(raw)[:80]}'"
        raise ConfigError(f"{item.flag}: {error} (got{shown} from {source})", param=item.field) from None


def _split(item: Described, raw: Any) -> Iterator[Any]:
    if isinstance(raw, list | tuple):
        yield from raw
    elif isinstance(raw, str):
        yield from shlex.split(raw) if item.about.rest else (part.strip() for part in raw.split(",") if part.strip())
    else:
        raise UsageError("must be a list")


def _convert_one(item: Described, kind: Any, raw: Any) -> Any:
    if kind is bool:
        return _read_bool(raw)
    if isinstance(raw, bool) or not isinstance(raw, str | int | float | Path):
        raise UsageError("has the wrong type")
    if item.field.endswith("_s") and kind is float:
        return parse_duration_s(raw) if isinstance(raw, str) else float(str(raw))
    if item.field.endswith("_bytes") and isinstance(raw, str):
        return parse_size_bytes(raw)
    if kind in (int, float):
        if isinstance(raw, float) and kind is int and not raw.is_integer():
            raise UsageError("must be a whole number")
        try:
            return kind(raw)
        except ValueError:
            raise UsageError("must be a whole number" if kind is int else "must be a number") from None
    if kind is Path:
        return Path(str(raw)).expanduser()
    if not isinstance(raw, str | Path):
        raise UsageError("must be text")
    return str(raw)


def _read_bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if not isinstance(raw, str) or raw.lower() not in words:
        raise UsageError("must be true or false")
    return words[raw.lower()]


def _explain(config: type[Settings], error: ConfigError, merged: Raw) -> ConfigError:
    if error.param is None:
        return error
    item = _find(config, error.param)
    raw, source = merged.get(error.param, (item.default, "default"))
    shown = "" if item.about.secret else f" '{str(raw)[:80]}'"
    return ConfigError(f"{item.flag}: {error.message} (got{shown} from {source})", param=error.param)
