"""`scripts/bench/run scale`: plain requests through one proxy process and through several on one port."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench import infermesh, native, processes
from bench.frontdoor.target import HERE as FRONTDOOR
from bench.frontdoor.target import Target, answers, engine

READY_TIMEOUT_S = 60
IN_A_ROW = 40
"""New connections that must all be answered before a front counts as ready: the kernel spreads them over its processes."""

Json = dict[str, Any]
console = Console(stderr=True)


@contextmanager
def running_mesh(engine_port: int, cores: tuple[int, ...]) -> Iterator[infermesh.Mesh]:
    """A mesh whose worker makes the tokens in place."""
    url, stand_in = f"http://127.0.0.1:{engine_port}", FRONTDOOR / "token_worker.py"
    mesh = infermesh.start_infermesh(infermesh.Wish(engine_urls=(url,), proxy_cores=cores, other_cores=cores, worker_program=stand_in))
    try:
        yield mesh
    finally:
        infermesh.stop_infermesh(mesh)


def start_front(mesh: infermesh.Mesh, count: int, cores: tuple[int, ...]) -> Target:
    """`mesh-proxy --processes COUNT` joined to the mesh, linked to its worker in every process. Raises NotYet."""
    argv = [infermesh.program("mesh"), "invite", "proxy", "--uses", str(count), "--home", str(mesh.home), "--json"]
    token = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout)["token"]
    name, port = f"bench-scale-{count}", processes.free_port()
    state = mesh.home / "nodes" / name
    state.mkdir(parents=True, mode=0o700)
    argv = [infermesh.program("mesh-proxy"), "--processes", str(count), "--port", str(port), "--home", str(mesh.home)]
    argv += ["--state-dir", str(state), "--name", name, "--preset", "local"]
    process = processes.start(argv, cores, mesh.home / f"{name}.log", {"MESH_JOIN": token}, cwd=mesh.home)
    mesh.extra.append(process)
    target = Target(name=name, port=port, auth=mesh.api_key, proxy_roots=[process.pid])
    deadline, good = time.monotonic() + READY_TIMEOUT_S, 0
    while good < IN_A_ROW:
        good = good + 1 if answers(target) else 0
        if not good:
            time.sleep(0.2)
        if time.monotonic() > deadline or process.poll() is not None:
            raise infermesh.NotYet(f"{count} processes did not get ready (log: {mesh.home / name}.log)")
    return target


def serving(target: Target) -> list[int]:
    """The processes that answer requests: the parent of several answers none."""
    pids = target.proxy_pids()
    return [pid for pid in pids if len(pids) == 1 or pid not in target.proxy_roots]


def once(target: Target, workers: list[int], connections: int, window_s: float, cores: set[int]) -> Json:
    """One closed-loop window: rate, CPU a request, how evenly the processes shared it."""
    argv = [str(native.build(FRONTDOOR / "load.c")), "plain", "-c", str(connections), "-t", str(window_s), "--warm", "1"]
    argv += ["--port", str(target.port), "--auth", target.auth or ""]
    fronts = serving(target)
    seen: Json = {}
    before = after = (0.0, [0.0], 0.0)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, cores)) as generator:
        assert generator.stdout is not None
        for line in generator.stdout:
            now = (time.monotonic(), [processes.cpu_s([pid]) for pid in fronts], processes.cpu_s(workers))
            if line.startswith("begin"):
                before = now
            elif line.startswith("end"):
                after = now
            else:
                seen = json.loads(line)
    count = seen["requests_per_s"] * (after[0] - before[0])
    used = [late - early for early, late in zip(before[1], after[1], strict=True)]
    return {
        "requests_per_s": seen["requests_per_s"],
        "errors": seen["errors"],
        "cpu_us": sum(used) / count * 1e6,
        "worker_us": (after[2] - before[2]) / count * 1e6,
        "busiest_share": max(used) / sum(used),
    }


def summary(windows: list[Json]) -> Json:
    return {name: statistics.median(window[name] for window in windows) for name in windows[0]}


@click.command(help=__doc__)
@click.option("--processes", "count", default=2, show_default=True, help="How many to compare with one.")
@click.option("--connections", default=256, show_default=True, help="The kernel spreads connections by chance: the more, the more evenly.")
@click.option("--rounds", default=3, show_default=True, help="Windows of each, in turn.")
@click.option("--window", "window_s", default=5.0, show_default=True, help="Seconds of a window.")
@click.option("--core", "share", default=0.35, show_default=True, help="What each process gets of a core; 1: all it can take.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every figure here.")
def main(count: int, connections: int, rounds: int, window_s: float, share: float, json_file: Path | None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    windows: dict[int, list[Json]] = {1: [], count: []}
    cores = tuple(range(os.cpu_count() or 1))
    try:
        with engine(cores) as (_, port), running_mesh(port, cores) as mesh, ExitStack() as held:
            targets = {number: start_front(mesh, number, cores) for number in windows}
            if share < 1:
                held.enter_context(processes.core_share([pid for target in targets.values() for pid in serving(target)], share))
            for _ in range(rounds):
                for number, target in targets.items():
                    windows[number].append(once(target, mesh.tree("worker"), connections, window_s, set(cores)))
                    console.print(f"{number}: {windows[number][-1]['requests_per_s']:.0f}/s")
    except infermesh.NotYet as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"CPU time cannot be limited here ({error}); `--core 1` measures without, on as many cores as there are")
    results: Json = {str(number): summary(each) for number, each in windows.items()}
    results["core"] = share
    one, several = results["1"], results[str(count)]
    results["scaling"] = {
        "cpu_ratio": several["cpu_us"] / one["cpu_us"],
        "capacity": one["cpu_us"] / (several["cpu_us"] * several["busiest_share"]),
        "measured": several["requests_per_s"] / one["requests_per_s"],
    }
    show(results, count)
    if json_file:
        json_file.write_text(json.dumps({"connections": connections, **results, "windows": windows}, indent=1))


def show(results: Json, count: int) -> None:
    table = Table("processes", "requests/s", "proxy µs", "worker µs", "busiest's share", "errors", title="Plain requests, closed loop")
    for number in ("1", str(count)):
        run = results[number]
        figures = (run["cpu_us"], run["worker_us"])
        table.add_row(
            number,
            f"{run['requests_per_s']:.0f}",
            *(f"{figure:.1f}" for figure in figures),
            f"{run['busiest_share']:.2f}",
            str(run["errors"]),
        )
    out, scaling = Console(), results["scaling"]
    out.print(table)
    out.print(f"CPU a request, {count} processes over one: {scaling['cpu_ratio']:.2f} x")
    limited = results["core"] < 1
    best = scaling["measured" if limited else "capacity"]
    verdict = "met " if best >= 0.9 * count else "MISS"
    if limited:
        out.print(f"{verdict} {count} processes over one, each with {results['core']:g} of a core: {best:.2f} x (target {0.9 * count:.1f})")
    else:
        out.print(f"{verdict} what {count} cores of their own would carry: {best:.2f} x one (target {0.9 * count:.1f})")
        out.print(f"measured on this machine's {os.cpu_count()} cores, worker and generator on the same: {scaling['measured']:.2f} x")


main()
