"""The figures as tables, and the targets they are held to."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from bench import peers
from bench.frontdoor import measure

Json = dict[str, Any]


def us(result: Json, who: str) -> str:
    """What one event cost somebody, in microseconds."""
    value = result.get("us_each", {}).get(who)
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def ms(value_us: float | None) -> str:
    return "-" if value_us is None else f"{value_us / 1e3:.2f}" if value_us < 10_000 else f"{value_us / 1e3:.1f}"


def mib(value_bytes: float) -> str:
    return f"{value_bytes / 2**20:.0f}" if value_bytes else "-"


def added(result: Json, base: Json | None, field: str, quantile: str) -> float | None:
    """A quantile less the same quantile without any front, microseconds."""
    value = result.get(field, {}).get(quantile)
    if value is None:
        return None
    under = base.get(field, {}).get(quantile) if base else None
    return float(max(0.0, value - (under or 0.0)))


def cost_table(results: Json) -> Table:
    counts = [str(count) for count in results["streams"]]
    table = Table(title="What a front costs (CPU of its processes), loopback, one core")
    table.add_column("front")
    table.add_column("µs / request", justify="right")
    table.add_column("requests/s", justify="right")
    for count in counts:
        table.add_column(f"µs / token, {count}", justify="right")
    for heading in ("most streams", "RSS idle MiB", f"RSS after {counts[-1]}", "TLS set-up µs"):
        table.add_column(heading, justify="right")
    for name, front in results["fronts"].items():
        row = [name, us(front["plain"], "proxy"), f"{front['plain']['requests_per_s']:.0f}"]
        for count in counts:
            result = front["streams"].get(count)
            mark = "" if result and (measure.clean(result) or name == "direct") else "*"
            row.append(us(result, "proxy") + mark if result else "saturated")
        most = front.get("most_streams")
        tls = front.get("tls", {})
        row += [str(most["held"]) if most else "-", mib(front["rss_idle_bytes"]), mib(front["rss_after_bytes"])]
        row.append(f"{tls['cpu_us']:.0f}" if "cpu_us" in tls else "-")
        table.add_row(*row)
    return table


def latency_table(results: Json) -> Table:
    direct = results["fronts"].get("direct")
    table = Table(title="What a front adds, ms (direct's own quantile taken off where direct ran)")
    for heading in ("front", "request at c=1 p50", "p99"):
        table.add_column(heading, justify="left" if heading == "front" else "right")
    middle = str(results["streams"][min(1, len(results["streams"]) - 1)])
    for heading in ("TTFT p50", "p99", "token p50", "p99", "gap p50", "gap p99"):
        table.add_column(f"{heading} @{middle}" if "50" in heading else heading, justify="right")
    for name, front in results["fronts"].items():
        base = direct if direct and name != "direct" else None
        single, stream, probed = front["single"], front["streams"].get(middle, {}), front.get("probed", {})
        base_stream = base["streams"].get(middle) if base else None
        base_probed = base.get("probed") if base else None
        row = [name]
        row += [ms(added(single, base["single"] if base else None, "latency", q)) for q in ("p50_us", "p99_us")]
        row += [ms(added(probed, base_probed, "probe_ttft_added", q)) for q in ("p50_us", "p99_us")]
        row += [ms(added(stream, base_stream, "token_delay", q)) for q in ("p50_us", "p99_us")]
        row += [ms(stream.get("gap", {}).get(q)) for q in ("p50_us", "p99_us")]
        table.add_row(*row)
    return table


def share_table(results: Json) -> Table:
    """How much of their core the others took: whoever reads a figure must know what was not the front's doing."""
    table = Table(title="CPU of the harness and of our worker (µs each; share of their core)")
    headings = (
        "front",
        "what",
        "events/s",
        "engine µs",
        "generator µs",
        "worker µs",
        "engine+generator share",
        "worker share",
        "foreign",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("front", "what") else "right")
    for name, front in results["fronts"].items():
        rows = {"plain": front["plain"], **{f"{count} streams": result for count, result in front["streams"].items()}}
        for what, result in rows.items():
            share = result["core_share"]
            per_s = result["tokens_per_s"] or result["requests_per_s"]
            worker = us(result, "worker") if share["worker"] else "-"
            table.add_row(
                name,
                what,
                f"{per_s:.0f}",
                us(result, "engine"),
                us(result, "generator"),
                worker,
                f"{share['engine'] + share['generator']:.2f}",
                f"{share['worker']:.2f}" if share["worker"] else "-",
                f"{result['foreign_share']:.2f}",
            )
    return table


def targets(results: Json) -> list[tuple[str, str, bool | None]]:
    """What the project holds itself to, as (target, figures, met); None where a figure is missing."""
    ours = results["fronts"].get("infermesh")
    if not ours:
        return []
    rust = [front for name, front in results["fronts"].items() if name in peers.PEERS and peers.PEERS[name].rust]
    lines: list[tuple[str, str, bool | None]] = []

    def hold(label: str, value: float | None, limit: float | None, *, at_least: bool = False) -> None:
        if not value or not limit:
            lines.append((label, "not measured", None))
            return
        met = value >= limit if at_least else value <= limit
        lines.append((label, f"{value:.2f} against {limit:.2f}", met))

    def least(values: list[float]) -> float | None:
        return min(values) if values else None

    def token_us(front: Json, count: str) -> float | None:
        result = front["streams"].get(count)
        return float(result["us_each"]["proxy"]) if result and result["us_each"] and measure.clean(result) else None

    def ours_us(count: str) -> float | None:
        return token_us(ours, count) or (token_us(alone, count) if alone else None)

    request_us = ours["plain"]["us_each"].get("proxy")
    cheapest = least([front["plain"]["us_each"]["proxy"] for front in rust if front["plain"]["us_each"]])
    hold("CPU per request ≤ 0.7 x cheapest Rust router, µs", request_us, cheapest and 0.7 * cheapest)
    alone = results["fronts"].get("infermesh-proxy")
    for count in map(str, results["streams"]):
        cheapest = least([value for front in rust if (value := token_us(front, count))])
        hold(
            f"CPU per token at {count} ≤ 0.6 x cheapest Rust router, µs",
            ours_us(count),
            cheapest and 0.6 * cheapest,
        )
        nginx = results["fronts"].get("nginx")
        hold(
            f"CPU per token at {count} ≤ 1.0 x nginx, µs",
            ours_us(count),
            token_us(nginx, count) if nginx else None,
        )
    if "most_streams" in ours:
        best = max((front["most_streams"]["held"] for front in rust if "most_streams" in front), default=0)
        held = max(front["most_streams"]["held"] for front in (ours, alone or ours) if "most_streams" in front)
        hold("streams held ≥ 1.3 x best Rust router", held, 1.3 * best, at_least=True)
    base = results["fronts"].get("direct")
    if base:
        for quantile, limit in (("p50_us", 0.5), ("p99_us", 2.0)):
            value = added(ours["single"], base["single"], "latency", quantile)
            hold(f"added at concurrency 1, {quantile[:3]}, ms", value and value / 1e3, limit)
    return lines


def show(results: Json) -> None:
    """Everything, on stdout."""
    console = Console(width=max(150, Console().width))
    for table in (cost_table(results), latency_table(results), share_table(results)):
        console.print(table)
    for name, reason in results["missing"].items():
        console.print(f"missing: {name}: {reason}", markup=False)
    for label, figures, met in targets(results):
        console.print(f"{'n/a ' if met is None else 'met ' if met else 'MISS'} {label}: {figures}", markup=False)
