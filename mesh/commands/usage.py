"""What was used, what it costs, and who called what: asked of all nodes through one proxy, and added up here."""

from __future__ import annotations

import asyncio
import base64
import calendar
import json
import math
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from mesh import prices as price_lists
from mesh.apikey import KeyRole, read_key
from mesh.authority import open_mesh
from mesh.client import Client, ClientSettings, resolve
from mesh.commands.documents import change_document, operator_settings
from mesh.commands.shared import Duration, F, MeshCommand, home_option, json_option, note, print_json, print_table, run
from mesh.commands.user import get
from mesh.documents import Document
from mesh.errors import ApiError, TrustError, UsageError
from mesh.exports import Priced, moment, write_cloud_events, write_csv, write_parquet
from mesh.filters import Test, parse_filter
from mesh.ledger import START, Page, Query
from mesh.options import plain_errors
from mesh.prices import PriceList, due, parse_amount, parse_prices, show_cost, show_micro
from mesh.receipts import parse_proof, parse_receipt, verify_proof
from mesh.trust import Role
from mesh.usage import DIMENSIONS, Copy, Fetch, Summary, Survey, Totals

RECEIPTS_PATH = "/mesh/v1/receipts"
FOLLOW_S = 1.0
MOST_SHOWN = 20
_FAR = 1 << 62
_MINOR_DIGITS = dict.fromkeys(("BIF", "CLP", "ISK", "JPY", "KRW", "PYG", "UGX", "VND", "XAF", "XOF"), 0) | dict.fromkeys(
    ("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3
)
"""Digits after the point, where they are not two (ISO 4217)."""

LOG_NUMBERS = {
    "latency": "latency_ms",
    "first": "first_byte_ms",
    "attempts": "attempts",
    "input": "prompt_tokens",
    "cached": "cached_tokens",
    "output": "completion_tokens",
    "bytes": "bytes",
}
LOG_TEXTS = {name: name for name in ("status", "model", "project", "key", "endpoint", "task", "worker", "proxy", "request")}


def ask_options(command: F) -> F:
    for decorate in (
        home_option,
        click.option("--api-key", metavar="KEY", help="The API key.  (MESH_API_KEY, else what `mesh init` stored)"),
        click.option("--url", metavar="URL", help="The proxy's base URL.  (MESH_URL, else what `mesh init` stored)"),
        click.option("--all", "whole_mesh", is_flag=True, help="Every project's, as the operator: needs the mesh's folder in --home."),
    ):
        command = decorate(command)
    return command


class Day(click.ParamType[float]):
    """A date, or how long ago: ``2026-11-01``, ``2026-11-01T12:00``, ``7d`` → wall-clock seconds, by UTC."""

    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        for shape in ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%SZ"):
            with suppress(ValueError):
                return float(calendar.timegm(time.strptime(str(value), shape)))
        if re.fullmatch(r"[\d.]+[a-z]+", str(value)):
            return time.time() - Duration().convert(value, param, ctx)
        self.fail("write a date as 2026-11-01 or 2026-11-01T12:00 (UTC), or how long ago: 7d, 12h", param, ctx)


def span_options(command: F) -> F:
    for decorate in (
        click.option("--until", type=Day(), metavar="WHEN", help="Before this moment. [now]"),
        click.option("--since", type=Day(), metavar="WHEN", help="From this moment: a date, or how long ago (7d). [this month]"),
        click.option("--project", metavar="P", help="Only this project's."),
    ):
        command = decorate(command)
    return command


# -- mesh usage


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
            _usage(by, since, until, project, _settings(home, url, api_key, whole_mesh), as_json)


def _usage(by: str, since: float | None, until: float | None, project: str | None, settings: ClientSettings, as_json: bool) -> None:
    names = [name.strip() for name in by.split(",") if name.strip()]
    Summary(names)  # so that a wrong name is told before anybody is asked
    begin, end = _span(since, until)
    if not _may_look(settings):
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
        lost, currency = _lost(survey), prices.currency if prices is not None else None
    if as_json:
        told = {"since": begin, "until": end, "by": names, "data": rows, "total": total}
        print_json({**told, "currency": currency, "complete": complete, "lost": lost})
        return
    columns = [*names, "requests", "input", "cached", "output", "failed", "partial", "replica hours", "GPU hours", "cost"]
    shown = [[*(row[name] for name in names), *_cells(row, currency)] for row in rows] if names else []
    print_table(columns, [*shown, [*(["total", *[""] * (len(names) - 1)] if names else []), *_cells(total, currency)]])
    _warn(total, complete, lost)


def _cells(row: dict[str, Any], currency: str | None) -> list[Any]:
    hours = [f"{row[name] / 3_600_000:.2f}" if row[name] else "" for name in ("replica_ms", "gpu_ms")]
    cost = f"{show_cost(row['cost'])} {currency}" if currency and row["cost"] else ""
    counts = [row[name] for name in ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "failed", "partial")]
    return [*counts, *hours, cost]


def _warn(total: dict[str, Any], complete: bool, lost: list[dict[str, str]]) -> None:
    for each in lost:
        note(f"node {each['node'][:12]} could not be asked: {each['reason']}")
    if not complete:
        note("more than one node is missing: requests between two of them are not in this")
    if total.get("flagged"):
        note(f"{total['flagged']} charges do not fit together: see the flags in `mesh usage export`")
    if total.get("unpriced"):
        note(f"{total['unpriced']} charges have no price: `mesh prices get` shows what has")


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
    settings, (begin, end) = _settings(home, url, api_key, whole_mesh), _span(since, until)

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
        print_json({"charges": count, "file": str(output), "complete": survey.complete, "lost": _lost(survey)})
        return
    note(f"{count} charges from {moment(int(begin * 1000))} to {moment(int(end * 1000))}")
    _warn({}, survey.complete, _lost(survey))


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
        async with asking(_settings(home, url, api_key, whole_mesh)) as mesh:
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


# -- mesh bill


@click.command(cls=MeshCommand, epilog="Example: mesh bill --month 2026-11 --project search")
@click.option("--month", metavar="YYYY-MM", help="Which month, by UTC. [this one]")
@click.option("--project", metavar="P", help="Only this project's statement.")
@ask_options
@json_option
def bill(month: str | None, project: str | None, url: str | None, api_key: str | None, whole_mesh: bool, home: Path, as_json: bool) -> None:
    """A statement per project for a month: daily records with begin and end, in exact amounts, rounded once at the end.

    Needs prices (`mesh prices set`). Time in which replicas were kept ready is on the mesh's own statement.
    """
    begin, end = _month(month)
    settings = _settings(home, url, api_key, whole_mesh or _operates(home, api_key))

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
        print_json({**period, "currency": prices.currency, "statements": told, "complete": survey.complete, "lost": _lost(survey)})
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
    _warn(summary.total.describe(), survey.complete, _lost(survey))


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


# -- mesh prices


@click.group()
def prices() -> None:
    """What tokens and GPU time cost: a signed document that every proxy has."""


@prices.command(
    "set", cls=MeshCommand, epilog="Example: mesh prices set --currency EUR --model qwen3-8b --input 0.20 --cached 0.05 --output 0.60"
)
@click.option("--model", default=price_lists.ANY, show_default=True, metavar="M", help="For which model; * for those without a price.")
@click.option("--input", "input_price", metavar="PRICE", help="Per million input tokens that were not cached.")
@click.option("--cached", "cached_price", metavar="PRICE", help="Per million cached input tokens. [as --input]")
@click.option("--output", "output_price", metavar="PRICE", help="Per million output tokens.")
@click.option("--gpu-hour", metavar="PRICE", help="Per hour and GPU of a replica that is kept ready.")
@click.option("--currency", metavar="CUR", help="Three letters: EUR, USD, BDT. Needed the first time.")
@click.option("--from", "since", type=Day(), metavar="WHEN", help="From when on; what came before keeps its price. [now]")
@click.option("--url", metavar="URL", help="The proxy's base URL.  (MESH_URL, else what `mesh init` stored)")
@home_option
@json_option
def set_prices(
    model: str,
    input_price: str | None,
    cached_price: str | None,
    output_price: str | None,
    gpu_hour: str | None,
    currency: str | None,
    since: float | None,
    url: str | None,
    home: Path,
    as_json: bool,
) -> None:
    """Set a model's prices from some moment on; the other models' stay as they are. Operators only."""
    if input_price is None and output_price is None and gpu_hour is None:
        raise UsageError("which price? --input and --output per million tokens, or --gpu-hour")
    if (input_price is None) != (output_price is None):
        raise UsageError("--input and --output are set together")
    tokens = None
    if input_price is not None and output_price is not None:
        paid = parse_amount(input_price)
        cached = paid if cached_price is None else parse_amount(cached_price)
        tokens = price_lists.TokenPrice(input=paid, cached=cached, output=parse_amount(output_price))
    hourly = parse_amount(gpu_hour) if gpu_hour is not None else None
    start = int(since if since is not None else time.time())
    authority = open_mesh(home / "mesh")

    def change(former: Document | None) -> bytes:
        known = parse_prices(former.body) if former is not None else None
        if known is None and currency is None:
            raise UsageError("in which currency? --currency EUR")
        if known is not None and currency is not None and currency.upper() != known.currency:
            raise UsageError(f"prices are in {known.currency}; a mesh has one currency")
        base = known or PriceList(currency=str(currency).upper())
        body = price_lists.encode_prices(price_lists.with_price(base, start, model, tokens=tokens, gpu_hour=hourly))
        parse_prices(body)  # what cannot be read back is not signed
        return body

    async def put() -> Document:
        async with Client(operator_settings(authority, home, url=url)) as client:
            document, _ = await change_document(client, authority, price_lists.KIND, price_lists.NAME, change)
            return document

    document = run(put)
    if as_json:
        print_json({"seq": document.seq, "model": model, "from": start})
    else:
        click.echo(f"prices of {model} from {moment(start * 1000)} on (version {document.seq})")


@prices.command("get", cls=MeshCommand, epilog="Example: mesh prices get --json")
@ask_options
@json_option
def get_prices(url: str | None, api_key: str | None, whole_mesh: bool, home: Path, as_json: bool) -> None:
    """Show the prices, period by period."""

    async def read() -> PriceList | None:
        async with asking(_settings(home, url, api_key, whole_mesh)) as mesh:
            return await mesh.prices()

    found = run(read)
    if as_json:
        periods = [] if found is None else [_describe(period) for period in found.periods]
        print_json({"currency": found.currency if found is not None else None, "periods": periods})
        return
    if found is None:
        note("there are no prices yet: mesh prices set --help")
        return
    rows = []
    for period in found.periods:
        for name in sorted({*period.models, *period.gpu_hour}):
            price, hourly = period.models.get(name), period.gpu_hour.get(name)
            amounts = [show_micro(price.input), show_micro(price.cached), show_micro(price.output)] if price else ["", "", ""]
            rows.append((moment(period.since * 1000)[:16], name, *amounts, show_micro(hourly) if hourly is not None else ""))
    print_table(("from", "model", "input", "cached", "output", "GPU hour"), rows, title=f"{found.currency} per million tokens")


def _describe(period: price_lists.Period) -> dict[str, Any]:
    models = {
        name: {"input": show_micro(price.input), "cached": show_micro(price.cached), "output": show_micro(price.output)}
        for name, price in period.models.items()
    }
    return {
        "from": moment(period.since * 1000),
        "models": models,
        "gpu_hour": {name: show_micro(it) for name, it in period.gpu_hour.items()},
    }


# -- mesh logs


@click.command(cls=MeshCommand, epilog='Example: mesh logs --model qwen3-8b --filter "latency>1000ms and status!=ok" --since 1h --follow')
@click.option("--endpoint", metavar="E", help="Only calls of this endpoint.")
@click.option("--model", metavar="M", help="Only calls of this model.")
@click.option("--project", metavar="P", help="Only this project's.")
@click.option("--filter", "wanted", metavar="TEXT", help=f"Fields: {', '.join([*LOG_NUMBERS, *LOG_TEXTS])}; = != > < ~, and, or, not, ( ).")
@click.option("--since", type=Day(), default="1h", show_default=True, metavar="WHEN", help="From this moment: a date, or how long ago.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the last so many. [all]")
@click.option("--follow", is_flag=True, help="Go on with what comes in, until Ctrl-C.")
@ask_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def logs(
    endpoint: str | None,
    model: str | None,
    project: str | None,
    wanted: str | None,
    since: float,
    limit: int | None,
    follow: bool,
    url: str | None,
    api_key: str | None,
    whole_mesh: bool,
    home: Path,
    as_json: bool,
) -> None:
    """Who called what, when, how long it took and how it ended, over all proxies. Never what was asked or answered."""
    test = _test(endpoint, model, wanted)
    settings = _settings(home, url, api_key, whole_mesh)

    async def show() -> None:
        async with asking(settings) as mesh:
            proxies = [node for node, role in (await mesh.nodes()).items() if role == Role.PROXY]
            written = {node: (await mesh.page(node, Query(since=_FAR, project=project))).last for node in proxies} if follow else {}
            survey = await mesh.survey(since, time.time() + 60, project, only=set(proxies))
            found = [
                (copy.receipt.order, record)
                async for request in survey.requests()
                for copy in request
                if (record := log_record(copy)) is not None and test(record)
            ]
            kept = found[-limit:] if limit else found
            for _, record in kept:
                _show_log(record, as_json)
            _warn({}, complete=not survey.lost, lost=_lost(survey))
            if follow:
                await _follow(mesh, written, project, test, {order for order, _ in found}, as_json)

    run(show)


async def _follow(
    mesh: Asked, written: dict[bytes, int], project: str | None, test: Test, shown: set[tuple[int, str, int]], as_json: bool
) -> None:
    while True:
        for node in await mesh.nodes():
            if node not in written and (await mesh.nodes())[node] != Role.PROXY:
                continue
            with suppress(ApiError):
                page = await mesh.page(node, Query(written=written.get(node, 0), project=project))
                written[node] = page.last
                for body in page.receipts:
                    receipt = parse_receipt(body)
                    record = log_record(Copy(receipt=receipt, node_id=node))
                    if record is not None and receipt.order not in shown and test(record):
                        _show_log(record, as_json)
        await asyncio.sleep(FOLLOW_S)


def log_record(copy: Copy) -> dict[str, Any] | None:
    """A call as its proxy saw it; None for what is not the end of one."""
    receipt = copy.receipt
    if receipt.side != Role.PROXY or not receipt.final:
        return None
    return {
        "time": moment(receipt.at),
        "request": receipt.id,
        "project": receipt.project,
        "key": receipt.key.hex(),
        "endpoint": receipt.endpoint,
        "model": receipt.model,
        "task": receipt.task,
        "status": receipt.status,
        "latency_ms": receipt.took_ms,
        "first_byte_ms": receipt.first_ms,
        "attempts": receipt.attempt,
        "prompt_tokens": receipt.prompt,
        "cached_tokens": receipt.cached,
        "completion_tokens": receipt.completion,
        "bytes": receipt.size_bytes,
        "worker": receipt.peer.hex()[:12],
        "proxy": copy.node_id.hex()[:12],
    }


def _test(endpoint: str | None, model: str | None, wanted: str | None) -> Test:
    asked = parse_filter(wanted, numbers=LOG_NUMBERS, texts=LOG_TEXTS) if wanted else None

    def test(record: Any) -> bool:
        if (endpoint is not None and record["endpoint"] != endpoint) or (model is not None and record["model"] != model):
            return False
        return asked is None or asked(record)

    return test


def _show_log(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(record, ensure_ascii=False))
        return
    tokens = f"{record['prompt_tokens']}+{record['completion_tokens']}"
    parts = (record["time"], record["request"], record["project"], record["model"] or "-", record["status"], f"{record['latency_ms']}ms")
    click.echo("  ".join([*parts, f"first={record['first_byte_ms']}ms", f"tokens={tokens}", f"worker={record['worker'] or '-'}"]))


# -- asking


class Asked:
    """All nodes' receipts, through one proxy."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def nodes(self, project: str | None = None) -> dict[bytes, str]:
        """Node ids and roles. Raises `ApiError`, also where the key may not look at the project."""
        query = f"?{urlencode({'project': project})}" if project is not None else ""
        answer = await self._client.get(RECEIPTS_PATH + query)
        try:
            return {bytes.fromhex(entry["id"]): str(entry["role"]) for entry in answer["nodes"]}
        except (KeyError, TypeError, ValueError):
            raise ApiError("the answer names no nodes: is this the URL of a mesh's proxy?") from None

    async def page(self, node: bytes, query: Query) -> Page:
        asked: dict[str, Any] = {"node": node.hex(), "since": query.since, "until": query.until}
        if query.after != START:
            asked |= dict(zip(("after_at", "after_id", "after_n"), query.after, strict=True))
        asked |= {name: value for name in ("project", "written") if (value := getattr(query, name)) is not None}
        if query.prove:
            asked["prove"] = query.prove
        answer = await self._client.get(f"{RECEIPTS_PATH}?{urlencode(asked)}")
        try:
            receipts = tuple(base64.b64decode(text, validate=True) for text in answer["receipts"])
            return Page(receipts=receipts, more=bool(answer["more"]), last=int(answer["last"]))
        except (KeyError, TypeError, ValueError):
            raise ApiError("the answer holds no receipts: is this the URL of a mesh's proxy?") from None

    async def survey(self, begin: float, end: float, project: str | None, *, only: set[bytes] | None = None) -> Survey:
        sources: dict[bytes, Fetch] = {node: partial(self.page, node) for node in await self.nodes(project) if only is None or node in only}
        return Survey(sources, Query(since=int(begin * 1000), until=int(end * 1000), project=project))

    async def prices(self) -> PriceList | None:
        """What the mesh's proxies hold; it was signed, and checked by them."""
        try:
            answer = await self._client.get(f"/mesh/v1/documents/{price_lists.KIND}/{price_lists.NAME}")
            return parse_prices(base64.b64decode(answer["body"], validate=True))
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        except (KeyError, TypeError, ValueError):
            raise ApiError("the answer holds no document: is this the URL of a mesh's proxy?") from None


@asynccontextmanager
async def asking(settings: ClientSettings) -> AsyncIterator[Asked]:
    async with Client(settings) as client:
        yield Asked(client)


def _settings(home: Path, url: str | None, api_key: str | None, whole_mesh: bool) -> ClientSettings:
    if whole_mesh:
        return operator_settings(open_mesh(home / "mesh"), home, url=url, api_key=api_key)
    return resolve(home, url=url, api_key=api_key, environ=os.environ)


def _operates(home: Path, api_key: str | None) -> bool:
    """Whether this is the operator's machine, and no key says otherwise."""
    return not api_key and not os.environ.get("MESH_API_KEY") and (home / "mesh" / "mesh.json").exists()


def _may_look(settings: ClientSettings) -> bool:
    with suppress(TrustError):
        return bool(read_key(settings.api_key).roles & {KeyRole.VIEWER, KeyRole.ADMIN})
    return False


def _span(since: float | None, until: float | None) -> tuple[float, float]:
    end = until if until is not None else time.time()
    begin = since if since is not None else _month(None)[0]
    if begin >= end:
        raise UsageError("--since must be before --until")
    return begin, end


def _month(text: str | None) -> tuple[float, float]:
    """First moment of a month and of the next, by UTC."""
    text = text or time.strftime("%Y-%m", time.gmtime())
    if not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", text):
        raise UsageError("--month: write it as 2026-11")
    year, month = int(text[:4]), int(text[5:])
    following = (year + month // 12, month % 12 + 1)
    return float(calendar.timegm((year, month, 1, 0, 0, 0))), float(calendar.timegm((*following, 1, 0, 0, 0)))


def _lost(survey: Survey) -> list[dict[str, str]]:
    """Raises `ApiError` if there was nobody to ask: nothing found is then no answer."""
    if survey.lost and not survey.answered:
        raise ApiError(f"no node could be asked: {next(iter(survey.lost.values()))}")
    return [{"node": node.hex(), "reason": reason} for node, reason in sorted(survey.lost.items())]
