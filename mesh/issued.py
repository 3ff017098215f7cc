"""Which API keys this operator has issued: their claims, one JSON line each, never the key itself."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from mesh.apikey import ApiKey, mint_with
from mesh.authority import Authority
from mesh.errors import ConfigError


class IssuedKeys:
    """``keys.jsonl`` (0600) in the operator's mesh folder. Losing it loses the list, not the keys."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "keys.jsonl"

    def add(self, claims: ApiKey, *, now: float, note: str = "") -> None:
        _append(self._path, claims.describe() | {"issued": now, "note": note})

    def all(self) -> list[dict[str, Any]]:
        """Oldest first. Raises `ConfigError` naming the line that cannot be read."""
        try:
            lines = self._path.read_text().splitlines()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._path} cannot be read: {error}") from None
        found = []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError("not an object")
                float(entry["expires"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{self._path}, line {number} cannot be read: {error}") from None
            found.append(entry)
        return found


class RevocationRecord:
    """``revoked.jsonl`` (0600) beside it: what this operator took back, when and why. For people; proxies go by the signed list."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "revoked.jsonl"

    def add(self, what: dict[str, Any], *, now: float, reason: str) -> None:
        _append(self._path, what | {"at": now, "reason": reason})


def issue(authority: Authority, claims: ApiKey, *, now: float, remark: str = "", kid: str | None = None) -> str:
    """Mint a key and write its claims into the list of issued ones; returns the key's text."""
    signer = authority.signer(kid, now=now)
    text = mint_with(claims, signer)
    IssuedKeys(authority.directory).add(replace(claims, kid=signer.kid), now=now, note=remark)
    return text


def _append(path: Path, entry: dict[str, Any]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())
