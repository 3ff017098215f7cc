"""Processes on this machine: started, watched, stopped, and never mistaken for another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from mesh.errors import ConfigError, LocalMeshError
from mesh.local import LocalMesh, LocalNode, running, tail
from mesh.runtime import process_start

WAIT = "import signal, sys; print('up', flush=True); signal.sigwait({signal.SIGTERM}); sys.exit(0)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\nwhile True: signal.pause()"
Spawn = Callable[..., LocalNode]


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    children: list[subprocess.Popen[bytes]] = []

    def spawn(program: str, role: str = "worker", name: str = "w") -> LocalNode:
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
        children.append(child)
        assert child.stdout is not None
        child.stdout.readline()
        started = process_start(child.pid)
        assert started is not None
        return LocalNode(role=role, name=name, pid=child.pid, started=started, log=str(tmp_path / "log"))

    yield spawn
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def a_mesh(home: Path, *nodes: LocalNode) -> LocalMesh:
    mesh = LocalMesh(home)
    mesh.nodes = list(nodes)
    mesh.save()
    return mesh


def end(node: LocalNode) -> None:
    """Kill it and leave it unreaped, as a parent that has not looked yet does."""
    os.kill(node.pid, signal.SIGKILL)
    os.waitid(os.P_PID, node.pid, os.WEXITED | os.WNOWAIT)


def test_nodes_end_when_told_and_the_bootstrap_node_last(tmp_path: Path, spawn: Spawn) -> None:
    mesh = a_mesh(tmp_path, spawn(WAIT, "bootstrap", "b"), spawn(WAIT, "proxy", "p"), spawn(WAIT, "worker", "w"))
    outcomes = mesh.stop(5.0)
    assert [item.outcome for item in outcomes] == ["stopped"] * 3
    assert outcomes[-1].name == "b"
    assert running(tmp_path) is None
    assert not (tmp_path / "up.json").exists()


def test_node_that_does_not_end_is_killed_after_the_deadline(tmp_path: Path, spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.local.CLOSING_S", -1.0)
    node = spawn(STUBBORN)
    assert [item.outcome for item in a_mesh(tmp_path, node).stop(0.0)] == ["killed"]


def test_node_that_ended_before_is_said_to_be_gone(tmp_path: Path, spawn: Spawn) -> None:
    end(node := spawn(WAIT))
    assert not node.alive
    assert [item.outcome for item in a_mesh(tmp_path, node).stop(1.0)] == ["gone"]


def test_another_process_with_the_same_pid_is_left_alone(tmp_path: Path, spawn: Spawn) -> None:
    bystander = spawn(WAIT)
    imagined = LocalNode(role="worker", name="w", pid=bystander.pid, started=bystander.started - 1, log="")
    mesh = a_mesh(tmp_path, imagined)
    assert running(tmp_path) is None
    assert [item.outcome for item in mesh.stop(1.0)] == ["gone"]
    assert bystander.alive


def test_running_mesh_is_found_again_by_another_process(tmp_path: Path, spawn: Spawn) -> None:
    node = spawn(WAIT)
    a_mesh(tmp_path, node)
    found = running(tmp_path)
    assert found is not None
    assert found.nodes == [node]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"nodes": [1]}', '{"nodes": [{"pid": 1}]}'])
def test_broken_up_file_is_named_and_nothing_is_signalled(tmp_path: Path, content: str) -> None:
    (tmp_path / "up.json").write_text(content)
    with pytest.raises(ConfigError, match=r"up\.json"):
        running(tmp_path)


def test_up_file_is_private_and_keeps_what_people_want_to_know(tmp_path: Path, spawn: Spawn) -> None:
    mesh = a_mesh(tmp_path, node := spawn(WAIT))
    mesh.save(base_url="http://x")
    mesh.save()
    kept = json.loads((tmp_path / "up.json").read_text())
    assert kept == {"nodes": [asdict(node)], "base_url": "http://x"}
    assert (tmp_path / "up.json").stat().st_mode & 0o777 == 0o600


def test_death_of_a_node_is_told_with_the_end_of_its_log(tmp_path: Path, spawn: Spawn) -> None:
    end(node := spawn(WAIT))
    Path(node.log).write_text("".join(f"line {n}\n" for n in range(100)))
    with pytest.raises(LocalMeshError, match=r"(?s)w ended.*line 99") as caught:
        a_mesh(tmp_path, node).check_alive()
    assert "line 50\n" not in caught.value.message


def test_tail_of_a_hostile_log_is_safe_to_print(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\x1b[2Jowned\n\xff\xfe\n" + b"x" * 5000)
    assert "\x1b" not in tail(path)
    assert all(len(line) <= 402 for line in tail(path).splitlines())
    assert tail(tmp_path / "missing") == "  (no log)"
