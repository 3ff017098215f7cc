"""The proxy's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mesh.config import NodeConfig
from mesh.neighbours import LINKED_WORKERS
from mesh.settings import setting
from mesh.trust import Role
from proxy.choose import POLICIES
from proxy.openai import MOST_TIMEOUT_S


@dataclass(frozen=True, kw_only=True)
class ProxyConfig(NodeConfig):
    """One proxy process. Sizes in bytes, durations in seconds."""

    role: ClassVar[Role] = Role.PROXY
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"wan": {"first_byte_timeout_s": 60.0}}

    port: int = setting(8080, metavar="PORT", help="Port of the OpenAI API; 0 takes any free one.")
    link_port: int = setting(0, metavar="PORT", help="Port where other proxies, and workers that only dial out, reach this; 0 takes any.")
    tls_cert: Path | None = setting(None, metavar="FILE", help="Certificate chain (PEM) of the API; reloaded when it changes.")
    tls_key: Path | None = setting(None, metavar="FILE", help="Private key (PEM) of that certificate.")
    processes: int = setting(
        1,
        metavar="N",
        help="Processes that share the port; each is a node of its own: the join token needs --uses N, peers N ports from those given on.",
    )
    reuse_port: bool = setting(False, help="Let other processes listen on the same port; set for the children of --processes.")
    max_body_bytes: int = setting(64 << 20, metavar="SIZE", help="Largest request body taken.")
    first_byte_timeout_s: float = setting(
        30.0, metavar="TIME", help="How long a worker may be silent before its first byte, unless it reports progress."
    )
    request_timeout_s: float = setting(
        600.0, metavar="TIME", help="How long an answer may take to begin, however much progress is reported."
    )
    max_bodies_bytes: int = setting(2 << 30, metavar="SIZE", help="Request bodies in memory at once, all together.")
    max_head_bytes: int = setting(64 << 10, metavar="SIZE", help="Largest head of a request taken.")
    max_headers: int = setting(128, metavar="N", help="Most headers of a request taken.")
    max_connections: int = setting(16384, metavar="N", help="Clients' connections at once; when all are taken, an idle one is closed.")
    max_connections_per_address: int = setting(
        0, metavar="N", help="Connections from one address at once; 0: no limit, as behind a balancer, where all come from one."
    )
    head_timeout_s: float = setting(15.0, metavar="TIME", help="How long the head of a request may take from its first byte to its last.")
    idle_timeout_s: float = setting(75.0, metavar="TIME", help="How long a connection may wait for its next request.")
    body_timeout_s: float = setting(60.0, metavar="TIME", help="How long a request body may take to arrive.")
    routing: str = setting("prefix", choices=tuple(POLICIES), help="How a worker is chosen: by cached prefix and load, or more simply.")
    linked_workers: int = setting(
        LINKED_WORKERS, metavar="N", help="Workers linked with where the mesh has more; proxies share them out. 0: all of them."
    )
    keep_receipts_s: float = setting(
        92 * 86400.0, metavar="TIME", help="How long this node keeps its receipts, from which usage and bills are made."
    )
    move_streams: bool = setting(True, help="Go on at another worker with a stream that has lost its own, where that is exact.")
    retry_limit: int = setting(2, metavar="N", help="Other workers tried for a request that failed before its first byte.")
    retry_share: float = setting(
        0.2, metavar="SHARE", help="Retries over requests, at most, within 10 s; 64 are always allowed, and so are those whose worker died."
    )
    hedge_after_s: float = setting(
        0.0,
        metavar="TIME",
        help="Ask a second worker too where no byte has come for so long, within the retry share; whoever answers first goes on. 0: never.",
    )
    deadline_s: float = setting(
        0.0,
        metavar="TIME",
        help="How long a whole answer may take where its request does not say (x-request-timeout); 0: as long as it takes.",
    )
    revocations_stale_s: float = setting(
        3600.0,
        metavar="TIME",
        help="How long keys are accepted without a word that the list of revoked keys is the newest; 0 for ever.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.link_port <= 65535, "link_port", "must be a port from 0 to 65535")
        self.require(self.tls_cert is None or self.tls_key is not None, "tls_cert", "needs --tls-key beside it")
        self.require(self.tls_key is None or self.tls_cert is not None, "tls_key", "needs --tls-cert beside it")
        self.require(1 <= self.processes <= 256, "processes", "must be from 1 to 256")
        for name in ("link_port", "dht_port"):
            self.require(getattr(self, name) + self.processes <= 65536, name, "leaves no ports for the other processes")
        self.require(1024 <= self.max_body_bytes <= 4 << 30, "max_body_bytes", "must be from 1KiB to 4GiB")
        self.require(self.max_bodies_bytes >= self.max_body_bytes, "max_bodies_bytes", "must be at least --max-body")
        self.require(1024 <= self.max_head_bytes <= 1 << 20, "max_head_bytes", "must be from 1KiB to 1MiB")
        self.require(8 <= self.max_headers <= 10_000, "max_headers", "must be from 8 to 10000")
        self.require(self.max_connections >= 1, "max_connections", "must be at least 1")
        self.require(self.max_connections_per_address >= 0, "max_connections_per_address", "must not be negative")
        for name in ("head_timeout_s", "idle_timeout_s", "body_timeout_s"):
            self.require(getattr(self, name) > 0, name, "must be more than zero")
        self.require(self.first_byte_timeout_s > 0, "first_byte_timeout_s", "must be more than zero")
        self.require(self.linked_workers >= 0, "linked_workers", "must not be negative")
        self.require(self.keep_receipts_s >= 3600, "keep_receipts_s", "must be at least 1h")
        self.require(self.revocations_stale_s >= 0, "revocations_stale_s", "must not be negative")
        self.require(0 <= self.retry_limit <= 10, "retry_limit", "must be from 0 to 10")
        self.require(0 <= self.retry_share <= 1, "retry_share", "must be from 0 to 1")
        self.require(0 <= self.deadline_s <= MOST_TIMEOUT_S, "deadline_s", "must be at most 1d")
