"""The bootstrap node's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mesh.config import NodeConfig
from mesh.settings import setting
from mesh.trust import Role


@dataclass(frozen=True, kw_only=True)
class BootstrapConfig(NodeConfig):
    """One bootstrap node: enrolment on a TCP port, the directory on the UDP port of the same number."""

    role: ClassVar[Role] = Role.BOOTSTRAP

    port: int = setting(7600, metavar="PORT", help="TCP port of enrolment, and UDP port of the directory; 0 takes a free pair.")
    dht_port: int = setting(0, metavar="PORT", help="UDP port of the directory: always the same as --port.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.dht_port in (0, self.port), "dht_port", "a bootstrap node has one port number, for TCP and UDP")
