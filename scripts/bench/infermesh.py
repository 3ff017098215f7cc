"""Our own side: a whole mesh on this machine, its proxy held to one core and the rest to others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench import processes
from bench.native import ROOT

UP_TIMEOUT_S = 120
WORKER_ENV = {"MESH_WORKER_MAX_CONCURRENCY": "20000", "MESH_WORKER_QUEUE_LIMIT": "20000"}
DOWN_TIMEOUT_S = 60
LINK_TIMEOUT_S = 60


class NotYet(RuntimeError):
    """The product cannot be started here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A running mesh: where it answers, the key to it, and its processes by kind. `extra` are those that `mesh up` did not start."""

    base_urls: list[str]
    api_key: str
    home: Path
    pids: dict[str, list[int]]
    up_s: float
    extra: list[subprocess.Popen[bytes]]

    @property
    def ports(self) -> list[int]:
        """The proxies' ports on loopback."""
        return [urlsplit(url).port or 80 for url in self.base_urls]

    def tree(self, role: str) -> list[int]:
        """All processes of the nodes of a kind, children included."""
        return [pid for root in self.pids.get(role, ()) for pid in processes.tree(root)]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What to start: a worker for each engine, how many proxies, which cores. `worker_program` stands in for `mesh-worker`."""

    engine_urls: tuple[str, ...]
    proxy_cores: tuple[int, ...]
    other_cores: tuple[int, ...]
    model: str = "bench"
    proxies: int = 1
    worker_program: Path | None = None
    env: tuple[tuple[str, str], ...] = ()
    favoured: bool = False


def program(name: str) -> str:
    """A program of the project's environment. Raises NotYet."""
    path = ROOT / ".venv" / "bin" / name
    if not path.exists():
        raise NotYet(f"`{name}` is not installed in .venv (pip install -e .)")
    return str(path)


def start_infermesh(wish: Wish) -> Mesh:
    """`mesh up` in front of the first engine, more workers and proxies joined to it, every node on its cores. Raises NotYet."""
    home = Path(tempfile.mkdtemp(prefix="mesh-bench-"))
    extra: list[subprocess.Popen[bytes]] = []
    began = time.monotonic()
    try:
        answer = _up(wish, home)
        mesh = Mesh(
            base_urls=[answer["base_url"]], api_key=answer["api_key"], home=home, pids={}, up_s=time.monotonic() - began, extra=extra
        )
        for node in answer["nodes"]:
            mesh.pids.setdefault(node["role"], []).append(int(node["pid"]))
        _join(wish, mesh)
    except NotYet as error:
        _stop(home, extra)
        raise NotYet(f"{error} (logs under {home})") from None
    except BaseException:
        _stop(home, extra)
        raise
    for role in mesh.pids:
        for pid in mesh.tree(role):
            if wish.favoured:
                processes.favour(pid)
            processes.pin(pid, wish.proxy_cores if role == "proxy" else wish.other_cores)
    return mesh


def stop_infermesh(mesh: Mesh) -> None:
    """Stop what was joined, then `mesh down`; nothing is left."""
    _stop(mesh.home, mesh.extra)
    shutil.rmtree(mesh.home, ignore_errors=True)


def _stop(home: Path, extra: list[subprocess.Popen[bytes]]) -> None:
    for process in extra:
        processes.stop(process, patience_s=3)
    argv = [program("mesh"), "down", "--drain", "3s", "--home", str(home)]
    subprocess.run(argv, capture_output=True, timeout=DOWN_TIMEOUT_S, check=False)


def _call(wish: Wish, argv: list[str], timeout_s: float) -> dict[str, Any]:
    """Run a command that prints one JSON object. Raises NotYet with its words when it fails.

    Not from the current folder: `python -m` would take the project's code from there, whatever is installed."""
    others = set(wish.other_cores)
    env = {**os.environ, **WORKER_ENV, **dict(wish.env)}
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=env,
            cwd=tempfile.gettempdir(),
            preexec_fn=lambda: os.sched_setaffinity(0, others),
        )
    except subprocess.TimeoutExpired as error:
        raise NotYet(f"`{' '.join(argv[1:3])}` did not answer in {timeout_s:.0f} s") from error
    if done.returncode != 0:
        raise NotYet(f"`mesh {argv[1]}` exited {done.returncode}: {(done.stderr or done.stdout).strip()[-400:]}")
    answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return answer


def _up(wish: Wish, home: Path) -> dict[str, Any]:
    argv = [program("mesh"), "up", "--engine", "external", "--engine-url", wish.engine_urls[0], "--model", wish.model]
    argv += ["--workers", "1", "--port", str(processes.free_port()), "--home", str(home), "--detach", "--json"]
    return _call(wish, argv, UP_TIMEOUT_S)


def _join(wish: Wish, mesh: Mesh) -> None:
    """Further workers and proxies; with a `worker_program`, it in the place of the first worker too."""
    stand_in = [sys.executable, str(wish.worker_program)] if wish.worker_program else [program("mesh-worker")]
    first = 0 if wish.worker_program else 1
    for number, url in enumerate(wish.engine_urls[first:], start=first):
        options = ["--engine", "external", "--engine-url", url, "--model", wish.model]
        _start_node(wish, mesh, "worker", number, [*stand_in, *options])
    for number in range(1, wish.proxies):
        port = processes.free_port()
        _start_node(wish, mesh, "proxy", number, [program("mesh-proxy"), "--port", str(port)])
        mesh.base_urls.append(f"http://127.0.0.1:{port}/v1")
    if wish.worker_program:
        os.kill(mesh.pids["worker"].pop(0), signal.SIGTERM)
    _wait_linked(wish, mesh)


def _start_node(wish: Wish, mesh: Mesh, role: str, number: int, argv: list[str]) -> None:
    """A node of that kind with a join token of its own."""
    token = _call(wish, [program("mesh"), "invite", role, "--home", str(mesh.home), "--json"], DOWN_TIMEOUT_S)["token"]
    name = f"bench-{role}-{number}"
    state = mesh.home / "nodes" / name
    state.mkdir(parents=True, mode=0o700)
    argv = [*argv, "--home", str(mesh.home), "--state-dir", str(state), "--name", name, "--preset", "local"]
    env = {**WORKER_ENV, **dict(wish.env), "MESH_JOIN": token}
    python_path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    cores = wish.proxy_cores if role == "proxy" else wish.other_cores
    process = processes.start(argv, cores, mesh.home / f"{name}.log", {**env, "PYTHONPATH": python_path}, cwd=mesh.home)
    mesh.extra.append(process)
    mesh.pids.setdefault(role, []).append(process.pid)


def _wait_linked(wish: Wish, mesh: Mesh) -> None:
    """Until every proxy is linked to every worker. Raises NotYet."""
    deadline = time.monotonic() + LINK_TIMEOUT_S
    for url in mesh.base_urls:
        argv = [program("mesh"), "workers", "--url", url, "--api-key", mesh.api_key, "--json"]
        while True:
            try:
                listed = _call(wish, argv, DOWN_TIMEOUT_S)["workers"]
            except NotYet:
                listed = []
            ready = [item for item in listed if item.get("state") == "ready" and item.get("linked")]
            if len(ready) == len(wish.engine_urls) == len(listed):
                break
            if time.monotonic() > deadline:
                raise NotYet(f"{len(ready)} of {len(wish.engine_urls)} workers linked to {url} after {LINK_TIMEOUT_S} s")
            time.sleep(0.2)
