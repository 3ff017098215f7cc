# mypy: ignore-errors
"""Draws the figures of a run: `plot.py RESULTS.json OUT.png`. It runs where matplotlib is, and imports nothing of ours."""

import json
import math
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

OURS, OTHERS = "#1668dc", "#9aa4b2"


def bars(axes, title, pairs, unit, log=False):
    pairs = [(name, value) for name, value in pairs if value]
    if not pairs:
        axes.set_axis_off()
        return
    pairs.sort(key=lambda pair: pair[1])
    names = [name for name, _ in pairs]
    values = [value for _, value in pairs]
    axes.barh(names, values, color=[OURS if name == "infermesh" else OTHERS for name in names])
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(left=10 ** math.floor(math.log10(min(values)) - 0.3))
        axes.xaxis.set_minor_formatter(NullFormatter())
    for at, value in enumerate(values):
        axes.text(
            value, at, f" {value:,.2f}" if value < 2 else f" {value:,.1f}" if value < 100 else f" {value:,.0f}", va="center", fontsize=7
        )
    axes.margins(x=0.18)


def main(results_file, out_file):
    with open(results_file) as handle:
        results = json.load(handle)
    fronts = {name: front for name, front in results["fronts"].items() if name != "direct"}
    direct = results["fronts"].get("direct")
    figure, grid = plt.subplots(2, 3, figsize=(14, 7))
    bars(
        grid[0][0],
        "CPU per plain request",
        [(n, f["plain"]["us_each"].get("proxy")) for n, f in fronts.items()],
        "µs",
        log=True,
    )
    for axes, count in zip((grid[0][1], grid[0][2]), [str(c) for c in results["streams"][:2]], strict=False):
        pairs = [(n, f["streams"].get(count, {}).get("us_each", {}).get("proxy")) for n, f in fronts.items()]
        bars(axes, f"CPU per streamed token, {count} streams", pairs, "µs", log=True)
    base = direct["single"]["latency"]["p50_us"] if direct else 0
    pairs = [(n, (f["single"]["latency"]["p50_us"] - base) / 1e3) for n, f in fronts.items()]
    bars(grid[1][0], "Added latency at concurrency 1, p50", pairs, "ms", log=True)
    pairs = [(n, f.get("most_streams", {}).get("held")) for n, f in fronts.items()]
    bars(grid[1][1], "Streams of 50 tokens/s held, gap p99 < 30 ms", pairs, "streams")
    bars(
        grid[1][2],
        "Resident memory after the run",
        [(n, f["rss_after_bytes"] / 2**20) for n, f in fronts.items()],
        "MiB",
        log=True,
    )
    where = results["machine"]
    figure.suptitle(f"One core for the front, one for the rest: {where['cpu']}, Linux {where['kernel']}, {where['at']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(out_file, dpi=120)


main(*sys.argv[1:3])
