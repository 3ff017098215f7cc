"""`scripts/bench/run lifecycle`: start, late worker, death, restart without bootstrap nodes; each several times."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from bench import processes  # noqa: E402
from tests.support.deployment import Deployment, Node, until  # noqa: E402
from tests.support.fake_engine import FakeEngine  # noqa: E402
from tests.support.local_up import mesh_up  # noqa: E402

LATE_MODEL = "late"


async def late_worker(mesh: Deployment, proxy: Node, name: str) -> float:
    """Seconds from a worker's engine being ready to its model answering through the proxy. Its clock and ours are the same."""
    async with FakeEngine(model=name) as engine:
        worker = await mesh.worker(name, "--engine", "external", "--engine-url", engine.url)
        body = {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        headers = {"Authorization": f"Bearer {mesh.key()}"}

        async def answers() -> bool:
            async with mesh.http.post(f"{proxy.api}/chat/completions", json=body, headers=headers) as response:
                return response.status == 200

        await until(answers, what="the late worker to be routable")
        answered = time.time()
        ready = next(entry["at"] for entry in worker.refresh()["stages"] if entry["stage"] == "ready")
        await worker.terminate()
        return answered - float(ready)


async def death(mesh: Deployment, proxy: Node, name: str) -> tuple[float, float]:
    """Seconds from kill -9 of a worker to: its link gone at the proxy; its model gone from /v1/models."""
    async with FakeEngine(model=name) as engine:
        worker = await mesh.worker(name, "--engine", "external", "--engine-url", engine.url)
        await mesh.until_ready(proxy, worker)
        key = mesh.key()
        await worker.kill()

        async def unlinked() -> bool:
            entry = (await mesh.workers(proxy, key)).get(worker.id)
            return entry is None or not entry["linked"]

        async def unlisted() -> bool:
            return name not in await mesh.models(proxy, key)

        link_s = await until(unlinked, what="the link to be gone")
        return link_s, link_s + await until(unlisted, what="the model to be gone")


async def restart(mesh: Deployment, proxy: Node, worker: Node) -> float:
    """Seconds from a proxy's start, with every bootstrap node down, to its link with the worker."""
    began = time.monotonic()
    again = await mesh.proxy(proxy.name, fresh=False)
    await mesh.until_ready(again, worker)
    return time.monotonic() - began


async def measure(rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"late_worker_s": [], "death_link_s": [], "death_listing_s": [], "rss_bytes": {}}
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as home:
        async with Deployment(Path(home)) as mesh, FakeEngine() as engine:
            bootstrap = await mesh.bootstrap()
            proxy = await mesh.proxy()
            worker = await mesh.worker("w0", "--engine", "external", "--engine-url", engine.url)
            await mesh.until_ready(proxy, worker)
            for node in (bootstrap, proxy, worker):
                figures["rss_bytes"][str(node.role)] = processes.rss_bytes([node.process.pid])
            for number in range(rounds):
                figures["late_worker_s"].append(await late_worker(mesh, proxy, f"late{number}"))
            for number in range(max(1, rounds // 5)):
                link_s, listing_s = await death(mesh, proxy, f"dead{number}")
                figures["death_link_s"].append(link_s)
                figures["death_listing_s"].append(listing_s)
            await mesh.until_remembered(proxy, worker)
            await bootstrap.kill()
            await proxy.kill()
            figures["restart_s"] = [await restart(mesh, proxy, worker)]
    return figures


def first_answer() -> dict[str, float]:
    """From `mesh up` to a real model's first answer: the command itself waits for one."""
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as home:
        began = time.monotonic()
        with mesh_up(Path(home), "--workers", "2") as up:
            took = time.monotonic() - began
            sizes = {node["role"]: processes.rss_bytes([node["pid"]]) for node in up.about["nodes"]}
    return {"up_s": took, **{f"rss_{role}_llamacpp_bytes": size for role, size in sizes.items()}}


@click.command()
@click.option("--rounds", default=10, show_default=True, help="Late workers to start.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures there.")
def main(rounds: int, path: Path | None) -> None:
    """Time a mesh's life on this machine: real processes over loopback, stand-in engines, and once the real embedded engine."""
    figures = first_answer() | uvloop.run(measure(rounds))
    table = Table("figure", "median", "worst", "n")
    names = {
        "late_worker_s": "late worker: engine ready → answers through the proxy",
        "death_link_s": "kill -9: link gone at the proxy",
        "death_listing_s": "kill -9: model gone from /v1/models (record's life 20 s)",
        "restart_s": "proxy restarted, bootstrap nodes down: linked again",
    }
    table.add_row("mesh up, two real engines → first answer", f"{figures['up_s']:.2f} s", "", "1")
    for name, text in names.items():
        values = figures[name]
        table.add_row(text, f"{statistics.median(values):.3f} s", f"{max(values):.3f} s", str(len(values)))
    for role, size in figures["rss_bytes"].items():
        table.add_row(f"resident memory, {role}", f"{size / 2**20:.1f} MiB", "", "1")
    Console().print(table)
    if path is not None:
        path.write_text(json.dumps(figures, indent=1))


main()
