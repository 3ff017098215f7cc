"""`scripts/bench/run directory --loopback` or `--simulated`; see README.md in the folder above."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from bench.directory import loopback, report, simulated  # noqa: E402
from bench.directory.workload import Plan  # noqa: E402

Json = dict[str, Any]


def beside_others(console: Console, plan: Plan, peers: str, hivemind_nodes: int) -> Json:
    names = peers.split(",")
    unknown = sorted(set(names) - set(loopback.PEERS))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: known are {', '.join(loopback.PEERS)}", param_hint="--peers")
    results = loopback.measure(names, plan, hivemind_nodes=hivemind_nodes, say=lambda text: console.print(f"[dim]{text}"))
    found = report.summaries(results)
    rows = report.ratios(found, plan.concurrency)
    judged = report.verdicts(found, rows)
    console.print(report.loopback_table(results, found))
    if rows:
        console.print(report.ratio_table(rows))
    if judged:
        console.print(report.target_table(judged, "Against stock kademlia"))
    for name, reason in results["missing"].items():
        console.print(f"not measured: {name}: {reason}")
    return {"plan": results["plan"], "fleets": found, "ratios": rows, "targets": judged, "missing": results["missing"]}


def on_virtual_time(console: Console, only: tuple[str, ...], size: simulated.Size) -> Json:
    unknown = sorted(set(only) - set(simulated.ROWS))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: known are {', '.join(simulated.ROWS)}", param_hint="--only")
    found: list[Json] = []
    for name, measure in simulated.ROWS.items():
        if not only or name in only:
            console.print(f"[dim]{name}")
            rows = simulated.measured(name, measure, size)
            found += rows
            console.print(report.target_table(rows, f"{name}, seed {size.seed}"))
    if len(found) > 1:
        console.print(report.target_table(found, f"All rows, seed {size.seed}"))
    return {"seed": size.seed, "size": size.as_json(), "targets": found}


@click.command()
@click.option("--loopback", "beside", is_flag=True, help="Ours beside other DHTs: many nodes on real loopback sockets.")
@click.option("--simulated", "virtual", is_flag=True, help="Ours on virtual time, against the targets.")
@click.option("--nodes", type=int, help="Nodes (loopback: 200; simulated: 1,000 where a row does not say otherwise).")
@click.option("--seed", default=1, show_default=True)
@click.option("--quick", is_flag=True, help="Small sizes: a look at whether it all works, not figures to quote.")
@click.option("--ops", default=200, show_default=True, help="loopback: operations of each kind in each phase.")
@click.option("--concurrency", default=8, show_default=True, help="loopback: operations at once.")
@click.option("--dead", default=0.3, show_default=True, help="loopback: the share of nodes that die.")
@click.option("--settle", default=60.0, show_default=True, help="loopback: seconds from when all nodes have joined until work begins.")
@click.option("--apart", is_flag=True, help="loopback: a process for each node of ours and of stock kademlia.")
@click.option("--budget", default=60.0, show_default=True, help="loopback: a phase begins nothing more after so many seconds.")
@click.option("--peers", default=",".join(loopback.PEERS), show_default=True, help="loopback: which, in which order.")
@click.option("--hivemind-nodes", default=20, show_default=True, help="loopback: hivemind runs a process for each node.")
@click.option("--only", multiple=True, help=f"simulated: only this row (again for more): {', '.join(simulated.ROWS)}.")
@click.option("--workers", default=10_000, show_default=True, help="simulated: workers of one model in the row `crowd`.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures there.")
def main(
    beside: bool,
    virtual: bool,
    nodes: int | None,
    seed: int,
    quick: bool,
    ops: int,
    concurrency: int,
    dead: float,
    settle: float,
    apart: bool,
    budget: float,
    peers: str,
    hivemind_nodes: int,
    only: tuple[str, ...],
    workers: int,
    path: Path | None,
) -> None:
    """Measure the directory: on loopback beside other DHTs, on virtual time against its targets. Without either flag, both."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    load = os.getloadavg()[0]
    console.print(f"{os.cpu_count()} cores, load {load:.1f} at the start")
    figures: Json = {"cores": os.cpu_count(), "load_at_start": load}
    if beside or not virtual:
        plan = Plan(
            nodes=nodes or 200, ops=ops, concurrency=concurrency, dead=dead, settle_s=settle, budget_s=budget, seed=seed, apart=apart
        )
        if quick:
            plan = replace(plan, nodes=nodes or 40, ops=min(ops, 40), budget_s=min(budget, 15), limit_s=30)
        figures["loopback"] = beside_others(console, plan, peers, min(hivemind_nodes, 8) if quick else hivemind_nodes)
    if virtual or not beside:
        size = simulated.Size.quick() if quick else simulated.Size(workers=workers)
        figures["simulated"] = on_virtual_time(console, only, replace(size, seed=seed, nodes=nodes or size.nodes))
    if path is not None:
        path.write_text(json.dumps(figures, indent=1))


main()
