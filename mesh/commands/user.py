"""For whoever uses a mesh: store where it is, chat, look at models and workers."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from mesh.client import Client, ClientSettings, parse_url, resolve, store
from mesh.commands.shared import F, MeshCommand, home_option, json_option, note, print_json, print_table, run
from mesh.errors import ApiError, UsageError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def access_options(command: F) -> F:
    for decorate in (
        home_option,
        click.option("--api-key", metavar="KEY", help="The API key.  (MESH_API_KEY, else what `mesh init` stored)"),
        click.option("--url", metavar="URL", help="The proxy's base URL.  (MESH_URL, else what `mesh init` stored)"),
    ):
        command = decorate(command)
    return command


@click.command(cls=MeshCommand, epilog="Example: mesh init --url https://mesh.example.org --api-key im_…")
@click.option("--url", required=True, metavar="URL", help="The proxy's base URL, with or without /v1.")
@click.option("--api-key", "api_key", metavar="KEY", help="The API key; asked for when not given.  (MESH_API_KEY)")
@home_option
@json_option
def init(url: str, api_key: str | None, home: Path, as_json: bool) -> None:
    """Store where the mesh is and the key that opens it (readable by you only)."""
    address = parse_url(url)
    text = api_key or os.environ.get("MESH_API_KEY")
    if not text and sys.stdin.isatty():
        text = click.prompt("API key", hide_input=True, err=True)
    elif not text:
        text = sys.stdin.readline()
    settings = resolve(home, url=address, api_key=text.strip() or None, environ={})
    path = store(home, settings)
    if as_json:
        print_json({"url": settings.url, "file": str(path)})
    else:
        click.echo(f"stored in {path}; try: mesh models")


@click.command(cls=MeshCommand, epilog='Example: mesh chat --stream "Why is the sky blue?"')
@click.argument("prompt", nargs=-1)
@click.option("--stream/--no-stream", default=None, help="Print tokens as they come. [on a terminal]")
@click.option("--model", metavar="M", help="Which model. [the only one the key may use]")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), metavar="T", help="0 is the most predictable.")
@access_options
@json_option
def chat(
    prompt: tuple[str, ...],
    stream: bool | None,
    model: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    url: str | None,
    api_key: str | None,
    home: Path,
    as_json: bool,
) -> None:
    """Ask a model. PROMPT, else standard input; without either, on a terminal, a conversation."""
    settings = resolve(home, url=url, api_key=api_key, environ=os.environ)
    options = {"max_tokens": max_tokens, "temperature": temperature}
    body: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    streaming = sys.stdout.isatty() if stream is None else stream
    text = " ".join(prompt)
    talking = not text and sys.stdin.isatty()
    if not text and not talking:
        text = sys.stdin.read().strip()
        if not text:
            raise UsageError("nothing to ask: give a PROMPT, or write it to standard input")

    body["model"] = run(lambda: _choose_model(settings, model))

    def turn(question: str) -> str:
        messages.append({"role": "user", "content": question})
        return run(lambda: _turn(settings, body | {"messages": messages}, streaming, as_json))

    if not talking:
        turn(text)
        return
    note(f"{body['model']}; an empty line or Ctrl-D ends it")
    while line := _ask():
        messages.append({"role": "assistant", "content": turn(line)})


@click.command(cls=MeshCommand, epilog="Example: mesh models")
@access_options
@json_option
def models(url: str | None, api_key: str | None, home: Path, as_json: bool) -> None:
    """List the models this key may use."""
    answer = get(resolve(home, url=url, api_key=api_key, environ=os.environ), "/v1/models")
    if as_json:
        print_json(answer)
        return
    listed = objects(answer, "data")
    if not listed:
        note("no model is ready; `mesh workers` shows what the workers are doing")
    print_table(("model",), ((entry.get("id"),) for entry in listed))


@click.command(cls=MeshCommand, epilog="Example: mesh workers --json")
@access_options
@json_option
def workers(url: str | None, api_key: str | None, home: Path, as_json: bool) -> None:
    """List the workers a proxy knows: state, models, load. Needs a key with the role viewer."""
    answer = get(resolve(home, url=url, api_key=api_key, environ=os.environ), "/mesh/v1/workers")
    if as_json:
        print_json(answer)
    else:
        _show_workers(objects(answer, "workers"))


@click.command(cls=MeshCommand, epilog="Example: mesh status")
@access_options
@json_option
def status(url: str | None, api_key: str | None, home: Path, as_json: bool) -> None:
    """Show the mesh as one proxy sees it. Needs a key with the role viewer."""
    answer = get(resolve(home, url=url, api_key=api_key, environ=os.environ), "/mesh/v1/status")
    if as_json:
        print_json(answer)
        return
    for name in ("mesh", "proxy", "directory"):
        value = answer.get(name)
        if isinstance(value, dict):
            rows = [(key, cell(item)) for key, item in value.items() if item not in (None, "", [], {})]
            print_table((name, ""), rows)
        elif value:
            print_table((name, ""), [("name", value)])
    for kind, columns in (("proxies", ("name", "api", "state", "version")), ("bootstraps", ("name", "address", "state", "version"))):
        if listed := objects(answer, kind):
            print_table((kind, *columns[1:]), ([cell(item.get(name))[:64] for name in columns] for item in listed))
    _show_workers(objects(answer, "workers"))


async def _turn(settings: ClientSettings, body: dict[str, Any], streaming: bool, as_json: bool) -> str:
    """One question and its answer, printed; returns the answer."""
    async with Client(settings) as client:
        return await (_stream if streaming else _whole)(client, body, as_json)


async def _whole(client: Client, body: dict[str, Any], as_json: bool) -> str:
    answer = await client.post("/v1/chat/completions", body)
    if as_json:
        print_json(answer)
    else:
        click.echo(_text_of(answer, "message"))
    return _text_of(answer, "message")


async def _stream(client: Client, body: dict[str, Any], as_json: bool) -> str:
    pieces: list[str] = []
    usage = finish = None
    async for event in client.stream("/v1/chat/completions", body | {"stream_options": {"include_usage": True}}):
        usage = event.get("usage") or usage
        finish = _finish_of(event) or finish
        pieces.append(_text_of(event, "delta"))
        if not as_json:
            click.echo(pieces[-1], nl=False)
            sys.stdout.flush()
    if as_json:
        print_json({"model": body["model"], "content": "".join(pieces), "finish_reason": finish, "usage": usage})
    else:
        click.echo()
        if finish == "length":
            note("(cut at --max-tokens or the model's context)")
    return "".join(pieces)


def _text_of(event: dict[str, Any], part: str) -> str:
    choices = event.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    holder = first.get(part) if isinstance(first, dict) else None
    content = holder.get("content") if isinstance(holder, dict) else None
    return printable(content) if isinstance(content, str) else ""


def _finish_of(event: dict[str, Any]) -> str | None:
    choices = event.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first.get("finish_reason") if isinstance(first, dict) else None


def printable(text: str) -> str:
    """A model's words must not drive the terminal: control characters other than line ends and tabs are shown, not sent."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


async def _choose_model(settings: ClientSettings, model: str | None) -> str:
    if model:
        return model
    async with Client(settings) as client:
        names = [str(entry.get("id")) for entry in objects(await client.get("/v1/models"), "data")]
    if len(names) == 1:
        return names[0]
    if not names:
        raise ApiError("no model is ready; `mesh workers` shows what the workers are doing")
    raise UsageError(f"which model? --model {' | '.join(names[:20])}")


def _show_workers(listed: list[dict[str, Any]]) -> None:
    if not listed:
        note("no worker is known here; `mesh invite worker` lets one join")
        return
    columns = (
        "worker",
        "state",
        "models",
        "address",
        "engine",
        "region",
        "linked",
        "running",
        "waiting",
        "kv",
        "served",
        "standing",
        "reason",
    )
    rows = [
        (
            item.get("name") or str(item.get("id", ""))[:12],
            item.get("state"),
            cell(item.get("models")),
            item.get("address") or "outbound",
            item.get("engine"),
            item.get("region"),
            "yes" if item.get("linked") else "no",
            item.get("running"),
            item.get("waiting"),
            f"{item['kv_use']:.0%}" if isinstance(item.get("kv_use"), int | float) else "",
            item.get("served"),
            item.get("standing") if item.get("standing") != "trusted" else "",
            item.get("standing_reason") or item.get("reason"),
        )
        for item in listed
    ]
    used = [index for index in range(len(columns)) if index < 3 or any(row[index] not in (None, "") for row in rows)]
    print_table([columns[index] for index in used], [[row[index] for index in used] for row in rows])


def cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(cell(item) for item in value)
    if isinstance(value, dict):
        return str(value.get("name") or value.get("id") or " ".join(f"{key}={item}" for key, item in value.items()))
    return "" if value is None else str(value)


def objects(answer: dict[str, Any], name: str) -> list[dict[str, Any]]:
    value = answer.get(name)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def get(settings: ClientSettings, path: str) -> dict[str, Any]:
    async def call() -> dict[str, Any]:
        async with Client(settings) as client:
            return await client.get(path)

    return run(call)


def _ask() -> str:
    """A line from the person, with the editing and history their terminal offers; empty at the end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() uses it once it is there
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        note("")
        return ""
