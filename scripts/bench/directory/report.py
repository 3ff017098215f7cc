"""The figures as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

Json = dict[str, Any]
PHASES = (("healthy", "0% dead"), ("dead", "just killed"))
KINDS = ("store", "get")


def quantile(values: list[float], share: float) -> float:
    """The nearest-rank quantile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ms(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def summary(samples: Json) -> Json:
    times = samples["ms"]
    return {
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
    title = (
        f"{plan['nodes']} nodes in one process on loopback UDP, {plan['concurrency']} operations at once; ms, failed operations included"
    )
    table = Table("DHT", "nodes", title=title)
    for phase, label in PHASES:
        share = label if phase == "healthy" else f"{plan['dead']:.0%} {label}"
        for kind in KINDS:
            table.add_column(f"{kind} p50 / p99, {share}", justify="right")
            table.add_column("ok of n", justify="right")
            if phase == "healthy":
                table.add_column("CPU ms each", justify="right")
    for fleet in found.values():
        row = [fleet["name"], str(fleet["nodes"])]
        for phase, _ in PHASES:
            for kind in KINDS:
                cell = fleet[phase].get(kind)
                row += [f"{ms(cell['p50_ms'])} / {ms(cell['p99_ms'])}", f"{cell['success']:.1%} of {cell['n']}"] if cell else ["-", "-"]
                if phase == "healthy":
                    each = cell.get("cpu_ms_each") if cell else None
                    row.append("-" if each is None else f"{each:.1f}")
        table.add_row(*row)
    return table


def ratios(found: Json) -> list[Json]:
    """By how much each other DHT takes longer than ours, by phase, kind and quantile: below 1, it is faster."""
    ours = found.get("infermesh")
    if ours is None:
        return []
    return [
        {"peer": fleet["name"], "phase": phase, "kind": kind, "quantile": which, "ratio": fleet[phase][kind][f"{which}_ms"] / own}
        for name, fleet in found.items()
        if name != "infermesh"
        for phase, _ in PHASES
        for kind in KINDS
        for which in ("p50", "p99")
        if kind in fleet[phase] and (own := ours[phase].get(kind, {}).get(f"{which}_ms"))
    ]


def ratio_table(rows: list[Json]) -> Table:
    table = Table("DHT", title="How many times as long as ours (below 1: faster than ours)")
    columns = [(phase, kind, which) for phase, _ in PHASES for kind in KINDS for which in ("p50", "p99")]
    for phase, kind, which in columns:
        table.add_column(f"{kind} {which}, {phase}", justify="right")
    for peer in dict.fromkeys(row["peer"] for row in rows):
        cells = {(row["phase"], row["kind"], row["quantile"]): row["ratio"] for row in rows if row["peer"] == peer}
        table.add_row(peer, *(f"{cells[column]:.2f}" if column in cells else "-" for column in columns))
    return table


def verdicts(found: Json, rows: list[Json]) -> list[Json]:
    """The loopback row of the targets: faster than stock kademlia with all alive, ten times with many dead, each at p50 and p99."""
    stock = found.get("kademlia")
    if stock is None:
        return []
    made = []
    for row in rows:
        if row["peer"] == stock["name"]:
            least = 1.0 if row["phase"] == "healthy" else 10.0
            name = f"loopback, {row['phase']}: {row['kind']} {row['quantile']}, stock kademlia's over ours"
            text = f"{row['ratio']:.2f} times"
            made.append({"row": name, "measured": text, "target": f"> {least:.0f} times", "met": row["ratio"] > least})
    return made


def target_table(rows: Iterable[Json], title: str) -> Table:
    table = Table("row", "measured", "target", "met", title=title)
    words = {True: "yes", False: "NO", None: "not measured"}
    for row in rows:
        table.add_row(row["row"], row["measured"], row["target"], words[row["met"]])
    return table
