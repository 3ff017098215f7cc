"""What every node needs to know, whatever its room. The rooms' own settings extend `NodeConfig`; `mesh.settings` fills them."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mesh.address import Address, parse_address, reachable_host
from mesh.errors import ConfigError, UsageError
from mesh.settings import DEFAULT_HOME, Settings, describe, setting


@dataclass(frozen=True, kw_only=True)
class NodeConfig(Settings):
    """The settings all nodes share. Rooms subclass it and set ``role``."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"local": {"host": "127.0.0.1"}}

    home: Path = setting(Path(DEFAULT_HOME), shared=True, metavar="DIR", help="Folder under which the mesh and its nodes keep their state.")
    state_dir: Path = setting(
        Path(), metavar="DIR", help="This node's own folder: key, certificate, remembered peers. [HOME/nodes/ROLE[-NAME]]"
    )
    name: str = setting("", help="A name for people; it keeps apart the state of several nodes of a kind on one machine.")
    join: str = setting("", shared=True, secret=True, metavar="TOKEN", help="Join token from `mesh invite`; needed once, to enrol.")
    bootstrap: tuple[str, ...] = setting(
        (),
        shared=True,
        metavar="HOST:PORT",
        help="A bootstrap node, by IP address or DNS name. Learned from the join token and remembered when not given.",
    )
    host: str = setting("0.0.0.0", metavar="IP", help="Address to listen on.")
    port: int = setting(0, metavar="PORT", help="Port to listen on; 0 takes any free one.")
    dht_port: int = setting(0, metavar="PORT", help="UDP port of the directory; 0 takes any free one.")
    advertise: tuple[str, ...] = setting(
        (), metavar="HOST[:PORT]", help="Address at which others reach this node. Detected when not given."
    )
    region: str = setting("", shared=True, help="Where this node is, in the operator's own words: eu-1, home, rack-7.")
    drain_s: float = setting(30.0, shared=True, metavar="TIME", help="How long a stopping node may take to finish what it is doing.")
    preemption_command: str = setting(
        "",
        shared=True,
        metavar="COMMAND",
        help="Run every 2 s; once it ends with exit code 0, this machine is about to go: drain and stop.",
    )
    preemption_file: Path | None = setting(
        None, shared=True, metavar="FILE", help="Once this file exists, this machine is about to go: drain and stop."
    )
    log_level: str = setting("info", shared=True, choices=("debug", "info", "warning", "error"), help="Least important event to log.")
    log_format: str = setting("console", shared=True, choices=("console", "json"), help="How log lines look.")

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        put("home", self.home.expanduser().absolute())
        self.require(re.fullmatch(r"[A-Za-z0-9._-]{0,64}", self.name) is not None, "name", "letters, digits, '.', '_' and '-' only")
        folder = f"{self.role}-{self.name}" if self.name else str(self.role)
        put("state_dir", self.home / "nodes" / folder if self.state_dir == Path() else self.state_dir.expanduser().absolute())
        for field in ("port", "dht_port"):
            self.require(0 <= getattr(self, field) <= 65535, field, "must be a port from 0 to 65535")
        self.require(self.drain_s >= 0, "drain_s", "must not be negative")
        self.require(len(self.region) <= 64 and self.region.isprintable(), "region", "must be at most 64 printable characters")
        self.require(_is_command(self.preemption_command), "preemption_command", "is not a command line")
        put("bootstrap", tuple(self._address("bootstrap", text) for text in self.bootstrap))
        for text in self.advertise:
            self._address("advertise", text, default_port=self.port or 1)
        for described in describe(type(self)):
            choices, value = described.about.choices, getattr(self, described.field)
            self.require(not choices or value in choices, described.field, f"must be one of {', '.join(choices)}")

    def require(self, holds: bool, field: str, why: str) -> None:
        """Raise a `ConfigError` about ``field`` unless ``holds``."""
        if not holds:
            raise ConfigError(why, param=field)

    def addresses(self, port: int) -> tuple[str, ...]:
        """What to tell others for a listener on ``port``: what the operator said, or what can be detected."""
        if self.advertise:
            return tuple(str(parse_address(text, default_port=port)) for text in self.advertise)
        return (str(Address(reachable_host(self.host), port)),)

    def _address(self, field: str, text: str, default_port: int | None = None) -> str:
        try:
            return str(parse_address(text, default_port=default_port))
        except UsageError as error:
            raise ConfigError(error.message, param=field) from None


def _is_command(text: str) -> bool:
    try:
        return not text or bool(shlex.split(text))
    except ValueError:
        return False
