"""A front under test: started, held to its core, known by its processes, stopped."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench import infermesh, native, peers, processes

READY_TIMEOUT_S = 120
HERE = Path(__file__).resolve().parent
TOKENS_PER_S = 50
MESHES = {"infermesh": None, "infermesh-proxy": HERE / "token_worker.py"}
"""Ours, as it is and with a worker stand-in that makes the tokens itself."""


@dataclass(kw_only=True)
class Target:
    """Where to send requests, and whose CPU time is whose."""

    name: str
    port: int
    host: str = "127.0.0.1"
    auth: str | None = None
    proxy_roots: list[int] = field(default_factory=list)
    worker_roots: list[int] = field(default_factory=list)
    ready_s: float = 0.0

    def proxy_pids(self) -> list[int]:
        return [pid for root in self.proxy_roots for pid in processes.tree(root)]

    def worker_pids(self) -> list[int]:
        return [pid for root in self.worker_roots for pid in processes.tree(root)]


@contextmanager
def engine(cores: Sequence[int], spread: bool = False, *options: str) -> Iterator[tuple[int, int]]:
    """The stand-in, as (pid, port)."""
    binary = native.build(HERE / "engine.c")
    wanted = set(cores)
    argv = [str(binary), "--rate", str(TOKENS_PER_S), *(["--spread"] if spread else []), *options]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, wanted))
    try:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline().split()[1])
    finally:
        process.terminate()
        process.wait()


def answers(target: Target) -> bool:
    """Whether a plain request gets its 200."""
    body = json.dumps({"model": "bench", "max_tokens": 4, "messages": [{"role": "user", "content": "ready?"}]}).encode()
    headers = {"content-type": "application/json"}
    if target.auth:
        headers["authorization"] = f"Bearer {target.auth}"
    url = f"http://{target.host}:{target.port}/v1/chat/completions"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def accepts(port: int) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def running(name: str, engine_port: int, proxy_cores: Sequence[int], other_cores: Sequence[int], favoured: bool) -> Iterator[Target]:
    """The named front in front of the stand-in. Raises peers.Missing or infermesh.NotYet where it cannot be started."""
    engine_url = f"http://127.0.0.1:{engine_port}"
    if name == "direct":
        yield Target(name=name, port=engine_port)
    elif name in MESHES:
        wish = infermesh.Wish(
            engine_urls=(engine_url,),
            proxy_cores=tuple(proxy_cores),
            other_cores=tuple(other_cores),
            worker_program=MESHES[name],
            favoured=favoured,
        )
        mesh = infermesh.start_infermesh(wish)
        try:
            yield Target(
                name=name,
                port=mesh.ports[0],
                auth=mesh.api_key,
                proxy_roots=mesh.pids["proxy"],
                worker_roots=mesh.pids["worker"],
                ready_s=mesh.up_s,
            )
        finally:
            infermesh.stop_infermesh(mesh)
    else:
        with running_peer(name, [engine_url], proxy_cores) as (target, _):
            yield target


@contextmanager
def running_peer(
    name: str, engine_urls: Sequence[str], cores: Sequence[int], tls: peers.Tls | None = None
) -> Iterator[tuple[Target, subprocess.Popen[bytes]]]:
    """A peer in front of engines, ready. Raises peers.Missing."""
    peer = peers.PEERS[name]
    peers.ensure(peer)
    with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as folder:
        site = peers.Site(
            port=processes.free_port(),
            spare_port=processes.free_port(),
            engine_urls=tuple(engine_urls),
            folder=Path(folder),
            tls=tls,
        )
        launch = peer.command(site)
        log = Path(folder) / "log"
        began = time.monotonic()
        process = processes.start(launch.argv, cores, log, launch.env, Path(folder))
        try:
            target = Target(name=name, port=site.port, proxy_roots=[process.pid])
            while not (accepts(site.port) if tls else answers(target)):
                if process.poll() is not None or time.monotonic() - began > READY_TIMEOUT_S:
                    raise peers.Missing(f"did not get ready: {log.read_text(errors='replace').strip()[-400:]}")
                time.sleep(0.1)
            target.ready_s = time.monotonic() - began
            yield target, process
        finally:
            processes.stop(process)
