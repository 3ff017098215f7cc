"""Each DHT in a process of its own, one after the other, at the same work; what cannot be installed is named with the reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.directory.workload import Plan
from bench.native import CACHE
from bench.peers import VENVS, Missing, ensure_venv

HERE = Path(__file__).resolve().parent
NPM = CACHE / "npm"
HYPERDHT = "hyperdht@6"
HIVEMIND = "hivemind==1.1.12"
TORCH = "torch==2.13.0"
"""hivemind needs it; asked for by itself first, so that pip may choose the build for CPUs."""
INSTALL_TIMEOUT_S = 300
Launch = tuple[list[str], dict[str, str]]


def _python(name: str) -> Callable[[], Launch]:
    return lambda: ([sys.executable, str(HERE / "fleets.py"), name], {})


def _hyperdht(mode: str) -> Callable[[], Launch]:
    def launch() -> Launch:
        node, npm = shutil.which("node"), shutil.which("npm")
        if node is None or npm is None:
            raise Missing("node and npm are needed")
        if not (NPM / "node_modules" / "hyperdht").exists():
            NPM.mkdir(parents=True, exist_ok=True)
            (NPM / "package.json").write_text('{"private": true}\n')
            _install([npm, "install", "--no-audit", "--no-fund", HYPERDHT], NPM)
        return [node, str(HERE / "hyperdht.js")], {"NODE_PATH": str(NPM / "node_modules")}

    return launch


def _install(argv: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{argv[0]} failed: {error}") from None
    if done.returncode:
        raise Missing(f"{' '.join(argv[1:])} failed: {' '.join(done.stderr.split())[-200:]}")


def _hivemind() -> Launch:
    if not (VENVS / "hivemind" / ".holds").exists():
        ensure_venv("hivemind", TORCH)
    return [str(ensure_venv("hivemind", HIVEMIND)), str(HERE / "hivemind_fleet.py")], {}


PEERS: dict[str, Callable[[], Launch]] = {
    "infermesh": _python("infermesh"),
    "infermesh-first": _python("infermesh-first"),
    "kademlia": _python("kademlia"),
    "hyperdht": _hyperdht("newest"),
    "hyperdht-first": _hyperdht("first"),
    "hivemind": _hivemind,
}
MODES = {"hyperdht": ["newest"], "hyperdht-first": ["first"]}


def measure(names: Iterable[str], plan: Plan, *, hivemind_nodes: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run each; what it found, or under ``missing`` why it did not."""
    results: dict[str, Any] = {"plan": asdict(plan), "fleets": {}, "missing": {}}
    for name in names:
        say(f"{name}: {plan.nodes if name != 'hivemind' else hivemind_nodes} nodes")
        try:
            argv, env = PEERS[name]()
            its_plan = replace(plan, nodes=hivemind_nodes) if name == "hivemind" else plan
            results["fleets"][name] = run(argv, its_plan, MODES.get(name, []), env)
        except Missing as reason:
            results["missing"][name] = str(reason)
            say(f"{name}: {reason}")
    return results


def run(argv: list[str], plan: Plan, mode: list[str], env: dict[str, str]) -> dict[str, Any]:
    """One fleet in a process group of its own, ended with everything it started. Raises Missing with its last words."""
    longest_s = 120 + plan.nodes + plan.settle_s + 3 * (plan.budget_s + plan.limit_s)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*argv, json.dumps(asdict(plan)), *mode],
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
            process_group=0,
            env={**os.environ, **env},
        )
        try:
            out, _ = process.communicate(timeout=longest_s)
        except subprocess.TimeoutExpired:
            raise Missing(f"not done after {longest_s:.0f} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        lines = [line for line in out.splitlines() if line.startswith("{")]
        if process.returncode or not lines:
            raise Missing(f"it failed: {' '.join(errors.read().split())[-300:]}")
        return dict(json.loads(lines[-1]))
