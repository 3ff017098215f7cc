"""Our own side: a whole mesh on this machine, its proxy held to one core and the rest to others."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import processes
from bench.native import ROOT

UP_TIMEOUT_S = 120
DOWN_TIMEOUT_S = 60


class NotYet(RuntimeError):
    """The product cannot be started here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A running mesh: where it answers, the key to it, and its processes by kind."""

    base_url: str
    api_key: str
    home: Path
    pids: dict[str, list[int]]
    up_s: float
    argv: list[str]

    def tree(self, role: str) -> list[int]:
        """All processes of the nodes of a kind, children included."""
        return [pid for root in self.pids.get(role, ()) for pid in processes.tree(root)]


def mesh_command() -> str:
    """The `mesh` program of the project's environment. Raises NotYet."""
    program = ROOT / ".venv" / "bin" / "mesh"
    if not program.exists():
        raise NotYet("the `mesh` command is not installed in .venv (pip install -e .)")
    return str(program)


def start_infermesh(
    engine_urls: Sequence[str],
    *,
    proxy_cores: Sequence[int],
    other_cores: Sequence[int],
    model: str = "bench",
    proxies: int = 1,
    extra: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> Mesh:
    """`mesh up` in front of running engines, one worker for each; then every node to its cores. Raises NotYet."""
    program = mesh_command()
    home = Path(tempfile.mkdtemp(prefix="mesh-bench-"))
    argv = [program, "up", "--engine", "external"]
    for url in engine_urls:
        argv += ["--engine-url", url]
    argv += [
        "--model",
        model,
        "--workers",
        str(len(engine_urls)),
        "--port",
        str(processes.free_port()),
        "--home",
        str(home),
    ]
    if proxies > 1:
        argv += ["--proxies", str(proxies)]
    argv += [*extra, "--detach", "--json"]
    others = set(other_cores)
    began = time.monotonic()
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=UP_TIMEOUT_S,
            check=False,
            env={**os.environ, **(env or {})},
            preexec_fn=lambda: os.sched_setaffinity(0, others),
        )
    except subprocess.TimeoutExpired as error:
        _down(program, home)
        raise NotYet(f"mesh up did not answer in {UP_TIMEOUT_S} s") from error
    if done.returncode != 0:
        _down(program, home)
        raise NotYet(f"mesh up exited {done.returncode}: {(done.stderr or done.stdout).strip()[-400:]}")
    answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    pids: dict[str, list[int]] = {}
    for node in answer["nodes"]:
        pids.setdefault(node["role"], []).append(int(node["pid"]))
    mesh = Mesh(
        base_url=answer["base_url"],
        api_key=answer["api_key"],
        home=home,
        pids=pids,
        up_s=time.monotonic() - began,
        argv=argv,
    )
    for role in pids:
        for pid in mesh.tree(role):
            processes.pin(pid, proxy_cores if role == "proxy" else other_cores)
    return mesh


def stop_infermesh(mesh: Mesh) -> None:
    """`mesh down`."""
    _down(mesh_command(), mesh.home)


def _down(program: str, home: Path) -> None:
    subprocess.run([program, "down", "--home", str(home)], capture_output=True, timeout=DOWN_TIMEOUT_S, check=False)
