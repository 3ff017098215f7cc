"""What tokens and GPU time cost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from mesh import prices as price_lists
from mesh.authority import open_mesh
from mesh.client import Client
from mesh.commands.asking import Day, ask_options, asking, settings_of
from mesh.commands.documents import change_document, operator_settings
from mesh.commands.shared import MeshCommand, home_option, json_option, note, print_json, print_table, run
from mesh.documents import Document
from mesh.errors import UsageError
from mesh.exports import moment
from mesh.prices import PriceList, parse_amount, parse_prices, show_micro


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
        async with asking(settings_of(home, url, api_key, whole_mesh)) as mesh:
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
