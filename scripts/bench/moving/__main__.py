"""`scripts/bench/run moving`: what a streamed token costs a proxy and a worker whose streams can move, and whose cannot.

Two meshes stand in front of the same engine stand-in, which tells token ids where asked to. Both are measured in the same seconds and held
against each other, so that what the machine does meanwhile counts for both.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench import infermesh, native
from bench.frontdoor import measure
from bench.frontdoor.target import HERE as FRONTDOOR
from bench.frontdoor.target import Target, engine

Json = dict[str, Any]
console = Console(stderr=True)
APART_S = 0.3


def start(stack: ExitStack, engine_port: int, *, moving: bool, cores: tuple[int, ...]) -> Target:
    wish = infermesh.Wish(
        engine_urls=(f"http://127.0.0.1:{engine_port}",),
        proxy_cores=cores,
        other_cores=cores,
        env=(("MESH_PROXY_MOVE_STREAMS", str(moving).lower()),),
    )
    mesh = infermesh.start_infermesh(wish)
    stack.callback(infermesh.stop_infermesh, mesh)
    return Target(
        name="moving" if moving else "still",
        port=mesh.ports[0],
        auth=mesh.api_key,
        proxy_roots=mesh.pids["proxy"],
        worker_roots=mesh.pids["worker"],
    )


def ratios(rounds: list[Json]) -> Json:
    """By whose CPU: the medians of both, and of what moving adds, in parts of a token's cost."""
    found: Json = {}
    for who in ("proxy", "worker", "both"):
        still, moving = ([one[name][who] for one in rounds] for name in ("still", "moving"))
        added = [more / less - 1 for more, less in zip(moving, still, strict=True)]
        found[who] = {"still_us": statistics.median(still), "moving_us": statistics.median(moving), "added": statistics.median(added)}
        found[who]["added_each"] = sorted(round(value, 3) for value in added)
    return found


@click.command(help=__doc__)
@click.option("--streams", default=200, show_default=True, help="Open at once at each of the two, 50 tokens/s each.")
@click.option("--rounds", default=7, show_default=True, help="How often both are measured.")
@click.option("--window", "window_s", default=5.0, show_default=True, help="Seconds of one measurement.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every figure here.")
def main(streams: int, rounds: int, window_s: float, json_file: Path | None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cores = tuple(range(os.cpu_count() or 1))
    seen: list[Json] = []
    with ExitStack() as stack:
        engine_pid, engine_port = stack.enter_context(engine(cores, False, "--token-ids"))
        lab = measure.Lab(
            load=str(native.build(FRONTDOOR / "load.c")),
            engine_pid=engine_pid,
            engine_port=engine_port,
            proxy_cores=cores,
            other_cores=cores,
            window_s=window_s,
            warm_s=1.0,
        )
        try:
            targets = [start(stack, engine_port, moving=moving, cores=cores) for moving in (False, True)]
        except infermesh.NotYet as error:
            sys.exit(str(error))
        both = stack.enter_context(ThreadPoolExecutor(len(targets)))
        for number in range(rounds):
            costs: Json = {}
            results = []
            for target in targets if number % 2 else targets[::-1]:  # whose streams are opened first gets its tokens last in each step
                results.append((target, both.submit(measure.streams, lab, target, streams, sample=0.1, trials=1)))
                time.sleep(APART_S)
            for target, measured in results:
                result = measured.result()
                if result["errors"]:
                    sys.exit(f"{result['errors']} streams failed")
                costs[target.name] = each = {who: result["us_each"][who] for who in ("proxy", "worker")}
                each["both"] = each["proxy"] + each["worker"]
            seen.append(costs)
            console.print(json.dumps(costs))
    found = ratios(seen)
    table = Table("CPU for a token", "streams stay", "streams can move", "added")
    for who, row in found.items():
        table.add_row(who, f"{row['still_us']:.1f} µs", f"{row['moving_us']:.1f} µs", f"{row['added']:+.1%}")
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps({"streams": streams, "rounds": seen, "found": found}, indent=1))


main()
