"""A mesh as `mesh up --detach` starts it, for tests that use it as a user does: by its command, its base URL and its key."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from mesh.apikey import ApiKey
from mesh.authority import open_mesh


@dataclass(frozen=True)
class LocalUp:
    """What ``mesh up --detach --json`` printed, and where it lives."""

    home: Path
    about: dict[str, Any]

    @property
    def base_url(self) -> str:
        return str(self.about["base_url"])

    @property
    def key(self) -> str:
        return str(self.about["api_key"])

    def client(self, key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, api_key=key or self.key, max_retries=0, timeout=120)

    def mint(self, **claims: Any) -> str:
        now = time.time()
        defaults: dict[str, Any] = {
            "id": os.urandom(8),
            "project": "default",
            "roles": frozenset(["invoker"]),
            "not_before": now - 1,
            "expires": now + 600,
        }
        return open_mesh(self.home / "mesh").mint_key(ApiKey(**(defaults | claims)))

    def mesh(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return mesh_command(*arguments, home=self.home, **environ)


def mesh_command(*arguments: str, home: Path, timeout_s: float = 170, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MESH_")}
    return subprocess.run(
        [sys.executable, "-m", "mesh", *arguments],
        env=clean | {"MESH_HOME": str(home)} | environ,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@contextlib.contextmanager
def mesh_up(home: Path, *arguments: str, timeout_s: float = 170, **environ: str) -> Iterator[LocalUp]:
    """Up, and down again at the end."""
    started = mesh_command("up", "--port", "0", "--detach", "--json", *arguments, home=home, timeout_s=timeout_s, **environ)
    assert started.returncode == 0, started.stderr
    try:
        yield LocalUp(home, json.loads(started.stdout))
    finally:
        stopped = mesh_command("down", home=home)
    assert stopped.returncode == 0, stopped.stderr
