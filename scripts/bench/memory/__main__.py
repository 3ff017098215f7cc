"""`scripts/bench/run memory`: what a linked worker and an open stream cost a proxy, and whether its memory stays flat."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench import infermesh, native, processes
from bench.frontdoor.target import HERE as FRONTDOOR
from bench.frontdoor.target import engine

SETTLE_S = 3.0
SAMPLE_S = 5.0
KIB = 1024

Json = dict[str, Any]
console = Console(stderr=True)


def load(mesh: infermesh.Mesh, arguments: list[str]) -> Json:
    argv = [str(native.build(FRONTDOOR / "load.c")), *arguments, "--port", str(mesh.ports[0]), "--auth", mesh.api_key]
    seen: Json = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return seen


def watch(mesh: infermesh.Mesh, arguments: list[str]) -> tuple[list[int], Json]:
    """The proxy's resident bytes every `SAMPLE_S` while the generator runs, and what that saw."""
    seen: list[Json] = []
    runner = threading.Thread(target=lambda: seen.append(load(mesh, arguments)))
    runner.start()
    sizes = []
    while runner.is_alive():
        sizes.append(processes.rss_bytes(mesh.tree("proxy")))
        runner.join(SAMPLE_S)
    return sizes, seen[0]


@contextmanager
def running_mesh(workers: int) -> Iterator[infermesh.Mesh]:
    """A mesh whose workers make the tokens in place."""
    cores = tuple(range(os.cpu_count() or 1))
    with engine(cores) as (_, port):
        urls, stand_in = (f"http://127.0.0.1:{port}",) * workers, FRONTDOOR / "token_worker.py"
        mesh = infermesh.start_infermesh(infermesh.Wish(engine_urls=urls, proxy_cores=cores, other_cores=cores, worker_program=stand_in))
        try:
            yield mesh
        finally:
            infermesh.stop_infermesh(mesh)


def idle_bytes(workers: int) -> int:
    """Of a proxy that is linked to so many workers and has served nothing."""
    with running_mesh(workers) as mesh:
        time.sleep(SETTLE_S)
        return processes.rss_bytes(mesh.tree("proxy"))


def follow(mesh: infermesh.Mesh, results: Json, streams: int, tokens: int, minutes: float) -> None:
    """Streams, then plain requests, for so long each."""
    load(mesh, ["plain", "-c", "32", "-t", "3"])  # whatever is made once is there
    before, seconds = processes.rss_bytes(mesh.tree("proxy")), str(minutes * 60)
    renewed = ["--tokens", str(tokens)] if tokens else []
    for name, arguments in (
        ("streams", ["streams", "-s", str(streams), "-t", seconds, "--sample", "0.2", *renewed]),
        ("plain", ["plain", "-c", "32", "-t", seconds]),
    ):
        sizes, seen = watch(mesh, arguments)
        third = max(1, len(sizes) // 3)
        results[name] = {
            "rss_bytes": sizes,
            "errors": seen["errors"],
            "per_s": seen["tokens_per_s"] or seen["requests_per_s"],
            "grown_bytes": statistics.median(sizes[-third:]) - statistics.median(sizes[third : 2 * third] or sizes),
        }
    results["stream_bytes"] = (max(results["streams"]["rss_bytes"]) - before) / streams


@click.command(help=__doc__)
@click.option("--workers", default=12, show_default=True, help="Idle ones, against a single one.")
@click.option("--streams", default=1000, show_default=True, help="Open at once.")
@click.option("--tokens", default=1000, show_default=True, help="Of a stream, on average; another one begins when one ends. 0: none ends.")
@click.option("--minutes", default=10.0, show_default=True, help="How long the memory is watched under streams, then under plain requests.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every figure here.")
def main(workers: int, streams: int, tokens: int, minutes: float, json_file: Path | None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results: Json = {"workers": workers, "streams": streams, "tokens": tokens, "minutes": minutes}
    try:
        one, many = idle_bytes(1), idle_bytes(workers)
        results["worker_bytes"] = (many - one) / (workers - 1)
        console.print(f"idle: {one / KIB:.0f} KiB with one worker, {many / KIB:.0f} with {workers}")
        with running_mesh(1) as mesh:
            follow(mesh, results, streams, tokens, minutes)
    except infermesh.NotYet as error:
        sys.exit(str(error))
    out = Console()
    out.print(f"an idle linked worker: {results['worker_bytes'] / KIB:.0f} KiB")
    out.print(f"an open stream, its client's connection included: {results['stream_bytes'] / KIB:.1f} KiB")
    for name in ("streams", "plain"):
        grown = results[name]["grown_bytes"] / KIB
        out.print(f"{name} for {minutes:g} minutes: last third over the middle one {grown:+.0f} KiB, {results[name]['errors']} errors")
    if json_file:
        json_file.write_text(json.dumps(results, indent=1))


main()
