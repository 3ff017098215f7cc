"""What was used: asked of all nodes through one proxy, and added up here."""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from mesh.authority import open_mesh
from mesh.client import ClientSettings
from mesh.commands.asking import Day, ask_options, asking, lost_nodes, may_look, settings_of, span, span_options, tell_gaps
from mesh.commands.shared import MeshCommand, json_option, note, print_json, print_table, run
from mesh.commands.user import get
from mesh.errors import ApiError, TrustError, UsageError
from mesh.exports import Priced, moment, write_cloud_events, write_csv, write_parquet
from mesh.ledger import Query
from mesh.options import plain_errors
from mesh.prices import PriceList, show_cost
from mesh.receipts import parse_proof, parse_receipt, verify_proof
from mesh.usage import DIMENSIONS, Summary, Survey


@click.group(
    invoke_without_command=True,
    epilog="Examples: mesh usage --by model,day --since 7d   ·   mesh usage export --format csv --output usage.csv",
)
@click.option("--by", default="", metavar="NAMES", help=f"Sum by these, separated by commas: {', '.join(DIMENSIONS)}.")
@span_options
@ask_options
@json_option
@click.pass_context
def usage(
    ctx: click.Context,
    by: str,
    since: float | None,
    until: float | None,
    project: str | None,
    url: str | None,
    api_key: str | None,
    whole_mesh: bool,
    home: Path,
    as_json: bool,
) -> None:
    """What was used: tokens, requests, warm replicas. Asks all nodes, and is right with any one of them lost.

    With a key of the role viewer its project's usage, with any other the key's own.
    """
    if ctx.invoked_subcommand is None:
        with plain_errors():
            _usage(by, since, until, project, settings_of(home, url, api_key, whole_mesh), as_json)


def _usage(by: str, since: float | None, until: float | None, project: str | None, settings: ClientSettings, as_json: bool) -> None:
    names = [name.strip() for name in by.split(",") if name.strip()]
    Summary(names)  # so that a wrong name is told before anybody is asked
    begin, end = span(since, until)
    if not may_look(settings):
        if project is not None:
            raise UsageError("--project takes a key with the role viewer; this key sees its own usage")
        query = urlencode({"since": int(begin), "until": math.ceil(end), "by": ",".join(names)})
        answer = get(settings, f"/v1/usage?{query}")
        rows, total = answer.get("data", []), answer.get("total", {})
        complete, lost, currency = bool(answer.get("complete")), answer.get("lost", []), answer.get("currency")
    else:

        async def add_up() -> tuple[Summary, Survey, PriceList | None]:
            async with asking(settings) as mesh:
                prices = await mesh.prices()
                summary = Summary(names, price=prices.cost if prices is not None else lambda charge: 0)
                survey = await mesh.survey(begin, end, project)
                async for charge in survey.charges(now=int(time.time() * 1000)):
                    summary.add(charge)
                return summary, survey, prices

        summary, survey, prices = run(add_up)
        rows, total, complete = summary.describe(), summary.total.describe(), survey.complete
        lost, currency = lost_nodes(survey), prices.currency if prices is not None else None
    if as_json:
        told = {"since": begin, "until": end, "by": names, "data": rows, "total": total}
        print_json({**told, "currency": currency, "complete": complete, "lost": lost})
        return
    columns = [*names, "requests", "input", "cached", "output", "failed", "partial", "replica hours", "GPU hours", "cost"]
    shown = [[*(row[name] for name in names), *_cells(row, currency)] for row in rows] if names else []
    print_table(columns, [*shown, [*(["total", *[""] * (len(names) - 1)] if names else []), *_cells(total, currency)]])
    tell_gaps(total, complete, lost)


def _cells(row: dict[str, Any], currency: str | None) -> list[Any]:
    hours = [f"{row[name] / 3_600_000:.2f}" if row[name] else "" for name in ("replica_ms", "gpu_ms")]
    cost = f"{show_cost(row['cost'])} {currency}" if currency and row["cost"] else ""
    counts = [row[name] for name in ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "failed", "partial")]
    return [*counts, *hours, cost]


@usage.command("export", cls=MeshCommand, epilog="Example: mesh usage export --format cloudevents --since 1h | post-to-billing")
@click.option("--format", "shape", type=click.Choice(["cloudevents", "csv", "parquet"]), default="cloudevents", show_default=True)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Where to write. [standard output]")
@span_options
@ask_options
@json_option
def export(
    shape: str,
    output: Path | None,
    since: float | None,
    until: float | None,
    project: str | None,
    url: str | None,
    api_key: str | None,
    whole_mesh: bool,
    home: Path,
    as_json: bool,
) -> None:
    """Every charge, for other programs. Each has an id that is the same in every export, so that nothing is counted twice."""
    if output is None and (shape == "parquet" or as_json):
        raise UsageError(f"{'--json' if as_json else 'Parquet'} takes a file to write to: --output FILE")
    settings, (begin, end) = settings_of(home, url, api_key, whole_mesh), span(since, until)

    async def gather() -> tuple[list[Priced], Survey]:
        async with asking(settings) as mesh:
            prices = await mesh.prices()
            survey = await mesh.survey(begin, end, project)
            found = [
                (charge, prices.cost(charge) if prices is not None else None)
                async for charge in survey.charges(now=int(time.time() * 1000))
            ]
            return found, survey

    charges, survey = run(gather)
    if shape == "parquet":
        assert output is not None
        count = write_parquet(charges, output)
    else:
        write = write_csv if shape == "csv" else partial(write_cloud_events, source=settings.url)
        if output is None:
            count = write(charges, sys.stdout)
        else:
            with output.open("w", encoding="utf-8", newline="") as out:
                count = write(charges, out)
    if as_json:
        print_json({"charges": count, "file": str(output), "complete": survey.complete, "lost": lost_nodes(survey)})
        return
    note(f"{count} charges from {moment(int(begin * 1000))} to {moment(int(end * 1000))}")
    tell_gaps({}, survey.complete, lost_nodes(survey))


@usage.command("prove", cls=MeshCommand, epilog="Example: mesh usage prove req_0123456789abcdef01234567")
@click.argument("request_id", metavar="REQUEST")
@click.option("--since", type=Day(), metavar="WHEN", help="Look no further back. [92d]")
@ask_options
@json_option
def prove(
    request_id: str,
    since: float | None,
    url: str | None,
    api_key: str | None,
    whole_mesh: bool,
    home: Path,
    as_json: bool,
) -> None:
    """The signed receipts of one request, from every node that has one, checked against the mesh in --home."""
    authority = open_mesh(home / "mesh") if (home / "mesh" / "mesh.json").exists() else None
    begin = since if since is not None else time.time() - 92 * 86400

    async def gather() -> list[tuple[bytes, bytes]]:
        async with asking(settings_of(home, url, api_key, whole_mesh)) as mesh:
            found = []
            for node in await mesh.nodes():
                with suppress(ApiError):
                    page = await mesh.page(node, Query(since=int(begin * 1000), prove=request_id))
                    found += [(node, packed) for packed in page.receipts]
            return found

    listed = []
    for node, packed in run(gather):
        proof = parse_proof(packed)
        receipt, verdict = parse_receipt(proof.receipt), "not checked: no mesh in this --home"
        if authority is not None:
            try:
                receipt, batch = verify_proof(proof, authority.trust, now=time.time())
                verdict = f"signed {moment(batch.at)}" if batch.node_id == node else "signed by another node"
            except TrustError as error:
                verdict = f"does not hold: {error.message}"
        tokens = {"prompt_tokens": receipt.prompt, "completion_tokens": receipt.completion, "bytes": receipt.size_bytes}
        told = {"node": node.hex(), "side": str(receipt.side), "attempt": receipt.attempt, "at": moment(receipt.at)}
        listed.append({**told, **tokens, "status": receipt.status, "verdict": verdict, "proof": packed.hex()})
    if not listed:
        raise ApiError(f"no node has a signed receipt of '{request_id[:64]}': it is signed about a second after the request's end")
    if as_json:
        print_json({"receipts": listed})
        return
    columns = ("node", "side", "attempt", "status", "prompt_tokens", "completion_tokens", "bytes", "verdict")
    print_table(columns, [[str(row[name])[:80] if name != "node" else str(row[name])[:12] for name in columns] for row in listed])
