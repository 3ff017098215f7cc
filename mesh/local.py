"""A whole mesh on one machine: what `mesh up` starts and `mesh down` stops.

Each node is a real process in a session of its own, with its state under ``HOME/nodes/NAME`` and its output in
``HOME/logs/NAME.log``. ``HOME/up.json`` lists what runs: pid and start time together name a process, so nothing else is ever
signalled, whatever the machine did meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError, LocalMeshError
from mesh.identity import write_private
from mesh.runtime import CLOSING_S, process_start, read_announced
from mesh.trust import Role

UP_FILE = "up.json"
POLL_S = 0.05
START_S = 60.0
"""For a node to listen; an engine may take much longer to load."""
TAIL_LINES = 15

_NOT_INHERITED = ("MESH_API_KEY", "MESH_URL", "MESH_JOIN", "MESH_BOOTSTRAP", "MESH_HOME")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalNode:
    """One running node. ``started`` is the process's start time in clock ticks since boot."""

    role: str
    name: str
    pid: int
    started: int
    log: str
    id: str = ""

    @property
    def alive(self) -> bool:
        return process_start(self.pid) == self.started


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """What became of a node: ``stopped`` by itself when asked, ``killed`` after the deadline, or ``gone`` before."""

    name: str
    pid: int
    outcome: str


class LocalMesh:
    """The nodes of one HOME. Use as a context: on an error inside, whatever was started is stopped."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.nodes: list[LocalNode] = []
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def state_dir(self, name: str) -> Path:
        return self.home / "nodes" / name

    def start(self, role: Role, name: str, arguments: Sequence[str], environ: Mapping[str, str]) -> LocalNode:
        """Start a node's process. Raises `LocalMeshError`."""
        logs = self.home / "logs"
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = logs / f"{name}.log"
        self.state_dir(name).mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.state_dir(name) / "node.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", str(role), "--home", str(self.home), "--state-dir", str(self.state_dir(name))]
        command += ["--name", name, "--preset", "local", *arguments]
        kept = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
        with path.open("wb") as output:
            path.chmod(0o600)
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in this terminal is for us; nodes are told by us
                env=kept | dict(environ) | {"PYTHONUNBUFFERED": "1"},
            )
        self._children[child.pid] = child
        started = process_start(child.pid)
        node = LocalNode(role=str(role), name=name, pid=child.pid, started=started or 0, log=str(path))
        self.nodes.append(node)
        self.save()
        return node

    def wait_announced(self, nodes: Iterable[LocalNode], deadline_s: float = START_S) -> Iterator[dict[str, Any]]:
        """Each node's ``node.json``, in order, as they come. Raises `LocalMeshError` if one dies or does not come."""
        end = time.monotonic() + deadline_s
        for node in list(nodes):
            while (about := read_announced(self.state_dir(node.name))) is None or about["pid"] != node.pid:
                self.check_alive()
                if time.monotonic() > end:
                    raise LocalMeshError(f"{node.name} did not come up within {deadline_s:g} s\n{tail(Path(node.log))}")
                time.sleep(POLL_S)
            self.nodes = [replace(item, id=str(about["id"])) if item == node else item for item in self.nodes]
            self.save()
            yield about

    def check_alive(self) -> None:
        """Raises `LocalMeshError`, with the end of its log, if a node has died."""
        for node in self.dead():
            code = self._children[node.pid].returncode if node.pid in self._children else None
            ended = f"ended with exit code {code}" if code is not None else "ended"
            raise LocalMeshError(f"{node.name} {ended}; the end of {node.log}:\n{tail(Path(node.log))}")

    def dead(self) -> list[LocalNode]:
        for child in self._children.values():
            child.poll()
        return [node for node in self.nodes if not node.alive]

    def save(self, **more: Any) -> None:
        """Write ``HOME/up.json``; ``more`` is what people will want to know of the running mesh."""
        known = {} if not (self.home / UP_FILE).exists() else _read_up(self.home)
        known.update(more)
        known["nodes"] = [asdict(node) for node in self.nodes]
        write_private(self.home / UP_FILE, json.dumps(known, indent=1).encode())

    def stop(self, drain_s: float, report: Callable[[Stopped], None] = lambda _stopped: None) -> list[Stopped]:
        """Stop every node: those that carry traffic first, the bootstrap node last. Forgets them."""
        carrying = [node for node in self.nodes if node.role != Role.BOOTSTRAP]
        others = [node for node in self.nodes if node.role == Role.BOOTSTRAP]
        outcomes: list[Stopped] = []
        for group in (carrying, others):
            for outcome in _stop_group(group, drain_s + CLOSING_S + 1.0):
                report(outcome)
                outcomes.append(outcome)
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1.0)
        self.nodes.clear()
        (self.home / UP_FILE).unlink(missing_ok=True)
        return outcomes


def running(home: Path) -> LocalMesh | None:
    """The mesh that `mesh up` left running under ``home``, if any of its nodes still lives. Raises `ConfigError`."""
    if not (home / UP_FILE).exists():
        return None
    mesh = LocalMesh(home)
    try:
        mesh.nodes = [LocalNode(**item) for item in _read_up(home)["nodes"]]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{home / UP_FILE} cannot be read: {error}; remove it once its nodes are stopped") from None
    if not any(node.alive for node in mesh.nodes):
        return None
    return mesh


def check_port_free(host: str, port: int) -> None:
    """Raises `LocalMeshError` if nothing can listen there. Port 0 always passes."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LocalMeshError(f"port {port} cannot be used ({error.strerror}); choose another with --port") from None


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, made safe to print."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16384))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return "  (no log)"
    kept = text.splitlines()[-lines:]
    return "\n".join("  " + "".join(c if c.isprintable() or c == "\t" else "?" for c in line)[:400] for line in kept)


def _stop_group(nodes: Sequence[LocalNode], deadline_s: float) -> Iterator[Stopped]:
    """SIGTERM to all, then a deadline for all together, then SIGKILL to each that is left and to what it started."""
    waiting: dict[int, LocalNode] = {}
    for node in nodes:
        descriptor = _open_process(node)
        if descriptor is None:
            yield Stopped(name=node.name, pid=node.pid, outcome="gone")
        else:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            waiting[descriptor] = node
    end = time.monotonic() + deadline_s
    while waiting and (left_s := end - time.monotonic()) > 0:
        ended, _, _ = select.select(list(waiting), [], [], left_s)
        for descriptor in ended:
            os.close(descriptor)
            node = waiting.pop(descriptor)
            yield Stopped(name=node.name, pid=node.pid, outcome="stopped")
    for descriptor, node in waiting.items():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)  # its group is its own session: the engine goes with it
        select.select([descriptor], [], [], 5.0)
        os.close(descriptor)
        yield Stopped(name=node.name, pid=node.pid, outcome="killed")


def _open_process(node: LocalNode) -> int | None:
    """A descriptor that can only ever mean this process, or None if it is gone."""
    try:
        descriptor = os.pidfd_open(node.pid)
    except OSError:
        return None
    if node.alive:
        return descriptor
    os.close(descriptor)
    return None


def _read_up(home: Path) -> dict[str, Any]:
    try:
        found = json.loads((home / UP_FILE).read_bytes())
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return found
    except (OSError, ValueError) as error:
        raise ConfigError(f"{home / UP_FILE} cannot be read: {error}; remove it once its nodes are stopped") from None
