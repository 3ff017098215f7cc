"""A statement per project for a month."""

from __future__ import annotations

import calendar
import time
from pathlib import Path
from typing import Any

import click

from mesh.commands.asking import ask_options, asking, lost_nodes, month_of, operates, settings_of, tell_gaps
from mesh.commands.shared import MeshCommand, json_option, note, print_json, print_table, run
from mesh.errors import UsageError
from mesh.exports import moment
from mesh.prices import PriceList, due, show_cost
from mesh.usage import Summary, Survey, Totals

_MINOR_DIGITS = dict.fromkeys(("BIF", "CLP", "ISK", "JPY", "KRW", "PYG", "UGX", "VND", "XAF", "XOF"), 0) | dict.fromkeys(
    ("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3
)
"""Digits after the point, where they are not two (ISO 4217)."""


@click.command(cls=MeshCommand, epilog="Example: mesh bill --month 2026-11 --project search")
@click.option("--month", metavar="YYYY-MM", help="Which month, by UTC. [this one]")
@click.option("--project", metavar="P", help="Only this project's statement.")
@ask_options
@json_option
def bill(month: str | None, project: str | None, url: str | None, api_key: str | None, whole_mesh: bool, home: Path, as_json: bool) -> None:
    """A statement per project for a month: daily records with begin and end, in exact amounts, rounded once at the end.

    Needs prices (`mesh prices set`). Time in which replicas were kept ready is on the mesh's own statement.
    """
    begin, end = month_of(month)
    settings = settings_of(home, url, api_key, whole_mesh or operates(home, api_key))

    async def add_up() -> tuple[Summary, Survey, PriceList]:
        async with asking(settings) as mesh:
            prices = await mesh.prices()
            if prices is None:
                raise UsageError("there are no prices yet: mesh prices set --help")
            summary = Summary(("project", "day", "model"), price=prices.cost)
            survey = await mesh.survey(begin, end, project)
            async for charge in survey.charges(now=int(time.time() * 1000)):
                if charge.ends or charge.prompt or charge.completion or charge.gpus or charge.took_ms:
                    summary.add(charge)
            return summary, survey, prices

    summary, survey, prices = run(add_up)
    told = statements(summary, prices.currency)
    if as_json:
        period = {"from": moment(int(begin * 1000)), "to": moment(int(end * 1000))}
        print_json({**period, "currency": prices.currency, "statements": told, "complete": survey.complete, "lost": lost_nodes(survey)})
        return
    for statement in told:
        title = f"{statement['project'] or 'the mesh itself: replicas kept ready'}, {time.strftime('%Y-%m', time.gmtime(begin))}"
        columns = ("day", "model", "requests", "input", "cached", "output", "GPU hours", prices.currency)
        rows = [
            (
                row["day"],
                row["model"],
                row["requests"],
                row["prompt_tokens"],
                row["cached_tokens"],
                row["completion_tokens"],
                f"{row['gpu_ms'] / 3_600_000:.3f}" if row["gpu_ms"] else "",
                row["cost"],
            )
            for row in statement["days"]
        ]
        print_table(columns, [*rows, ("sum", "", "", "", "", "", "", statement["cost"])], title=title)
        click.echo(f"due: {statement['due']} {prices.currency}\n")
    if not told:
        note("nothing was used")
    tell_gaps(summary.total.describe(), survey.complete, lost_nodes(survey))


def statements(summary: Summary, currency: str) -> list[dict[str, Any]]:
    """From sums by project, day and model to a statement per project; amounts as exact decimals."""
    digits = _MINOR_DIGITS.get(currency, 2)
    by_project: dict[str, list[tuple[str, str, Totals]]] = {}
    for (project, day, model), totals in sorted(summary.rows.items()):
        by_project.setdefault(project, []).append((day, model, totals))
    told = []
    for project, rows in by_project.items():
        days = []
        for day, model, totals in rows:
            begin = calendar.timegm(time.strptime(day, "%Y-%m-%d")) * 1000
            record = totals.describe() | {"cost": show_cost(totals.cost)}
            days.append({"day": day, "begin": moment(begin), "end": moment(begin + 86_400_000), "model": model, **record})
        cost = sum(totals.cost for _, _, totals in rows)
        told.append({"project": project, "days": days, "cost": show_cost(cost), "due": due(cost, digits)})
    return told
