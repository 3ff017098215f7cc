"""`scripts/bench/run limits`: what limits hold, what they leave unused, what they cost. See README.md in the folder above."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from bench.limits import cost, hotpath, real, simulated  # noqa: E402

Json = dict[str, Any]


def table(title: str, rows: list[Json]) -> Table:
    shown = Table(title=title, title_justify="left")
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "ok"]
    for column in columns:
        shown.add_column(column.replace("_", " "))
    shown.add_column("")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        shown.add_row(*(f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in cells), "ok" if row["ok"] else "[bold red]missed")
    return shown


@click.command()
@click.option("--only", multiple=True, help=f"Only this part (again for more): {', '.join((*simulated.ROWS, 'cost', 'hotpath', 'real'))}.")
@click.option("--real", "with_real", is_flag=True, help="Real processes as well: some minutes.")
@click.option("--proxies", default="2,4", show_default=True, help="real: how many.")
@click.option("--rps", default=10.0, show_default=True, help="real: the limit; clients ask for three times as much.")
@click.option("--seconds", default=75.0, show_default=True, help="real: how long.")
@click.option("--seed", default=1, show_default=True)
@click.option("--quick", is_flag=True, help="Fewer proxies and less time: a look at whether it all works, not figures to quote.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures there.")
def main(
    only: tuple[str, ...], with_real: bool, proxies: str, rps: float, seconds: float, seed: int, quick: bool, path: Path | None
) -> None:
    """Limits over many proxies: on virtual time, and with --real in real processes; and what they cost a request."""
    console = Console(width=180)
    size = simulated.Size(seed=seed, proxies=(2, 4), seconds=60.0, seeds=2) if quick else simulated.Size(seed=seed)
    found: dict[str, list[Json]] = {}
    for name, measure in simulated.ROWS.items():
        if not only or name in only:
            found[name] = list(measure(size))
            console.print(table(f"{name}, on virtual time, seed {seed}", found[name]))
    if not only or "cost" in only:
        found["cost"] = cost.measure()
        console.print(table("cost of a request's limits, headers included", found["cost"]))
    if not only or "hotpath" in only:
        found["hotpath"] = hotpath.measure() + hotpath.real()
        console.print(table("cost of limits, receipts and revocation together: CPU of the whole process", found["hotpath"]))
    if with_real or "real" in only:
        counts = [int(part) for part in proxies.split(",")]
        found["real"] = [real.measure(proxies=count, rps=rps, seconds=seconds) for count in counts]
        found["real"] += [real.measure(proxies=counts[-1], rps=rps, seconds=seconds, fault=fault) for fault in real.FAULTS]
        console.print(table("real processes", found["real"]))
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(not all(row["ok"] for rows in found.values() for row in rows))


main()
