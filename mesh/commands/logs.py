"""Who called what, and how it ended."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from mesh.commands.asking import Asked, Day, ask_options, asking, lost_nodes, settings_of, tell_gaps
from mesh.commands.prompts import load_prompt_key, project_of, show_prompts
from mesh.commands.shared import MeshCommand, run
from mesh.errors import ApiError, UsageError
from mesh.exports import moment
from mesh.filters import Test, parse_filter
from mesh.ledger import Query
from mesh.receipts import parse_receipt
from mesh.trust import Role
from mesh.usage import Copy

FOLLOW_S = 1.0
_FAR = 1 << 62

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


@click.command(cls=MeshCommand, epilog='Example: mesh logs --model qwen3-8b --filter "latency>1000ms and status!=ok" --since 1h --follow')
@click.option("--endpoint", metavar="E", help="Only calls of this endpoint.")
@click.option("--model", metavar="M", help="Only calls of this model.")
@click.option("--project", metavar="P", help="Only this project's.")
@click.option("--filter", "wanted", metavar="TEXT", help=f"Fields: {', '.join([*LOG_NUMBERS, *LOG_TEXTS])}; = != > < ~, and, or, not, ( ).")
@click.option("--since", type=Day(), default="1h", show_default=True, metavar="WHEN", help="From this moment: a date, or how long ago.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the last so many. [all]")
@click.option("--prompts", is_flag=True, help="What was asked and answered, where --endpoint keeps it; takes the role deployer and --key.")
@click.option("--key", "key_file", type=click.Path(path_type=Path), metavar="FILE", help="Opens what --prompts finds.")
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
    prompts: bool,
    key_file: Path | None,
    follow: bool,
    url: str | None,
    api_key: str | None,
    whole_mesh: bool,
    home: Path,
    as_json: bool,
) -> None:
    """Who called what, when, how long it took and how it ended, over all proxies. Never what was asked or answered.

    But for endpoints that keep just that (`mesh endpoint set --prompts`): --prompts shows it to whoever has the key it is sealed to.
    """
    test = _test(endpoint, model, wanted)
    settings = settings_of(home, url, api_key, whole_mesh)
    if prompts or key_file is not None:
        if not prompts or endpoint is None or key_file is None or wanted or follow or model:
            raise UsageError("--prompts goes with --endpoint E and --key FILE, and takes --project, --since and --limit beside them")
        key, owner = load_prompt_key(key_file), project_of(settings, project)
        run(lambda: show_prompts(settings, owner, endpoint, key, since=since, limit=limit, as_json=as_json))
        return

    async def show() -> None:
        async with asking(settings) as mesh:
            began = time.time()
            proxies = await _proxies(mesh)
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
            tell_gaps({}, complete=not survey.lost, lost=lost_nodes(survey))
            if follow:
                await _follow(mesh, written, int(began * 1000), project, test, {order for order, _ in found}, as_json)

    run(show)


async def _proxies(mesh: Asked) -> list[bytes]:
    return [node for node, role in (await mesh.nodes()).items() if role == Role.PROXY]


async def _follow(
    mesh: Asked,
    written: dict[bytes, int],
    began_ms: int,
    project: str | None,
    test: Test,
    shown: set[tuple[int, str, int]],
    as_json: bool,
) -> None:
    """Show what proxies write from the places ``written`` on; of one that comes later, calls that came later too. One that is away, the
    one that is asked among them, is asked again."""
    while True:
        with suppress(ApiError):
            for node in await _proxies(mesh):
                query = Query(written=written.get(node, 0), since=0 if node in written else began_ms, project=project)
                with suppress(ApiError):
                    page = await mesh.page(node, query)
                    written[node] = page.last
                    for receipt in map(parse_receipt, page.receipts):
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
    called = f"{record['endpoint']}={record['model']}" if record["endpoint"] else record["model"] or "-"
    parts = (record["time"], record["request"], record["project"], called, record["status"], f"{record['latency_ms']}ms")
    click.echo("  ".join([*parts, f"first={record['first_byte_ms']}ms", f"tokens={tokens}", f"worker={record['worker'] or '-'}"]))
