"""The figures as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

Json = dict[str, Any]
PHASES = (("healthy", "0% dead"), ("dead", "just killed"))
KINDS = ("store", "get", "whole")
WORDS = {"store": "store", "get": "get, first answer", "whole": "get, all holders heard", "only": "get, first answer only"}
FIGURES = ("p50", "p99", "mean", "cpu_p50")
OURS = {
    "store": ("infermesh", "store"),
    "get": ("infermesh", "get"),
    "only": ("infermesh-first", "get"),
    "whole": ("infermesh", "whole"),
}
"""Where each kind of ours is found: the fleet, and its kind there."""
ALIKE = (("store", "store"), ("get", "get"), ("get", "only"), ("whole", "whole"))
"""A kind of theirs, and a kind of ours that is like for like."""
PAIRS = (*ALIKE, ("get", "whole"))


def quantile(values: list[float], share: float) -> float:
    """The nearest-rank quantile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ms(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def summary(samples: Json) -> Json:
    times = samples["ms"]
    return {
        "mean_ms": sum(times) / len(times),
        "cpu_p50_ms": quantile(samples["cpu_ms"], 0.5) if samples["cpu_ms"] else None,
        "p50_ms": quantile(times, 0.5),
        "p99_ms": quantile(times, 0.99),
        "n": len(times),
        "success": samples["ok"] / len(times),
        "cpu_ms_each": samples.get("cpu_ms_each"),
    }


def summaries(results: Json) -> Json:
    """By fleet, phase and kind: quantiles, count and success rate. What the table shows; the samples stay out."""
    return {
        name: {phase: {kind: summary(samples) for kind, samples in fleet[phase].items()} for phase, _ in PHASES}
        | {"name": fleet["name"], "nodes": fleet["nodes"], "up_s": fleet["up_s"]}
        for name, fleet in results["fleets"].items()
    }


def loopback_table(results: Json, found: Json) -> Table:
    plan = results["plan"]
    where = "in a process each (hyperdht's in one)" if plan["apart"] else "in one process"
    title = f"{plan['nodes']} nodes {where} on loopback UDP, {plan['concurrency']} operations at once; ms, failed operations included"
    table = Table("nodes", "operation", "DHT", title=title)
    for column in ("p50", "p99", "mean", "CPU p50", "CPU each", "right"):
        table.add_column(column, justify="right")
    for phase, label in PHASES:
        share = label if phase == "healthy" else f"{plan['dead']:.0%} {label}"
        for kind in KINDS:
            for fleet in found.values():
                cell = fleet[phase].get(kind)
                if cell is None:
                    continue
                each = cell.get("cpu_ms_each")
                figures = [ms(cell[name]) if cell[name] is not None else "-" for name in ("p50_ms", "p99_ms", "mean_ms", "cpu_p50_ms")]
                right = f"{cell['success']:.1%} of {cell['n']}"
                table.add_row(share, WORDS[kind], fleet["name"], *figures, "-" if each is None else f"{each:.1f}", right)
            table.add_section()
    return table


def ratios(found: Json, concurrency: int) -> list[Json]:
    """By how much each other DHT takes longer than ours, by phase, kind and figure: below 1, it is faster.

    Where one ends a look-up with the first answer, that is held against the first answer of ours that goes on, of ours that ends with
    it too, and against our whole look-up, which is not like for like. CPU time until the answer is told where nothing else was going on.
    """
    ours = {fleet for fleet, _ in OURS.values()}

    def mine(kind: str, phase: str) -> Json | None:
        fleet, its_kind = OURS[kind]
        return found[fleet][phase].get(its_kind) if fleet in found else None

    return [
        {"peer": fleet["name"], "phase": phase, "kind": kind, "our_kind": own, "figure": which, "ratio": its[f"{which}_ms"] / value}
        for name, fleet in found.items()
        if name not in ours
        for phase, _ in PHASES
        for kind, own in PAIRS
        if (its := fleet[phase].get(kind)) is not None
        if (beside := mine(own, phase)) is not None
        for which in (FIGURES if phase == "healthy" and concurrency == 1 else FIGURES[:3])
        if its[f"{which}_ms"] is not None and (value := beside[f"{which}_ms"])
    ]


def ratio_table(rows: list[Json]) -> Table:
    table = Table("nodes", "its operation", "ours", "DHT", title="How many times as long as ours (below 1: faster than ours)")
    for which in FIGURES:
        table.add_column(which, justify="right")
    cells = {(row["phase"], row["kind"], row["our_kind"], row["peer"], row["figure"]): row["ratio"] for row in rows}
    for phase, kind, own, peer in dict.fromkeys(key[:4] for key in cells):
        values = (f"{cells[key]:.2f}" if (key := (phase, kind, own, peer, which)) in cells else "-" for which in FIGURES)
        table.add_row(dict(PHASES)[phase], WORDS[kind], WORDS[own], peer, *values)
    return table


def verdicts(found: Json, rows: list[Json]) -> list[Json]:
    """The loopback row of the targets: faster than stock kademlia with all alive, ten times with many dead.

    Stock's look-up ends with the first answer, and is held against ours to the first, whether they go on or not."""
    stock = found.get("kademlia")
    if stock is None:
        return []
    made = []
    for row in rows:
        if row["peer"] == stock["name"] and (row["kind"], row["our_kind"]) in ALIKE:
            least = 1.0 if row["phase"] == "healthy" else 10.0
            name = f"loopback, {row['phase']}: {WORDS[row['our_kind']]}, {row['figure']}, stock kademlia's over ours"
            text = f"{row['ratio']:.2f} times"
            made.append({"row": name, "measured": text, "target": f"> {least:.0f} times", "met": row["ratio"] > least})
    return made


def target_table(rows: Iterable[Json], title: str) -> Table:
    table = Table("row", "measured", "target", "met", title=title)
    words = {True: "yes", False: "NO", None: "not measured"}
    for row in rows:
        table.add_row(row["row"], row["measured"], row["target"], words[row["met"]])
    return table
