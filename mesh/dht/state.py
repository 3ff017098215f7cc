"""The peers a node remembers across restarts: versioned JSON, nothing that runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog

from mesh.dht.address import Address, is_dialable, normalise
from mesh.identity import write_private

log = structlog.get_logger(__name__)

_VERSION = 1
_NAME = "peers.json"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPeer:
    """Who was where, and when it last proved it (wall-clock seconds)."""

    node_id: bytes
    address: Address
    seen: float


def save_peers(directory: Path, peers: Iterable[KnownPeer]) -> None:
    """Write the file whole or not at all. Raises `OSError`."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    entries = [{"id": peer.node_id.hex(), "host": peer.address.host, "port": peer.address.port, "seen": round(peer.seen)} for peer in peers]
    write_private(directory / _NAME, json.dumps({"version": _VERSION, "peers": entries}, indent=1).encode())


def load_peers(directory: Path, *, limit: int) -> list[KnownPeer]:
    """The remembered peers, the most recently seen first. A file that cannot be read is worth a warning, not a failed start."""
    path = directory / _NAME
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        data = json.loads(path.read_bytes())
        if data["version"] != _VERSION:
            raise ValueError(f"version {data['version']}")
        peers = [_parse(entry) for entry in data["peers"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("directory.state_unreadable", path=str(path), error=str(error))
        return []
    return sorted(peers, key=lambda peer: peer.seen, reverse=True)[:limit]


def _parse(entry: dict[str, object]) -> KnownPeer:
    node_id, host, port, seen = bytes.fromhex(str(entry["id"])), entry["host"], entry["port"], entry["seen"]
    if len(node_id) != 32 or not isinstance(host, str) or type(port) is not int or not isinstance(seen, int | float):
        raise ValueError("bad peer")
    address = normalise(host, port)
    if not is_dialable(*address):
        raise ValueError("bad address")
    return KnownPeer(node_id=node_id, address=address, seen=float(seen))
