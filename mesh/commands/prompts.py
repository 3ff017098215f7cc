"""For a project's deployers: what an endpoint has kept of prompts and answers, from all proxies, opened with the key it is sealed to."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from mesh.apikey import read_key
from mesh.client import Client, ClientSettings
from mesh.commands.documents import OWN_PROJECT
from mesh.commands.shared import note
from mesh.commands.user import printable
from mesh.errors import ApiError, BadSignature, ConfigError, MalformedEnvelope, UsageError
from mesh.exports import moment
from mesh.prompts import Kept, open_record

PATH = "/mesh/v1/prompts"


def load_prompt_key(path: Path) -> X25519PrivateKey:
    """Raises `ConfigError`."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read as a key: {error}") from None
    if not isinstance(key, X25519PrivateKey):
        raise ConfigError(f"{path} is a key of another kind: `mesh endpoint set NAME --prompts redacted --key FILE` makes the right one")
    return key


def project_of(settings: ClientSettings, project: str | None) -> str:
    """Whose endpoint: what was said, else the project of the API key. Raises `UsageError`."""
    try:
        project = project or read_key(settings.api_key).project
    except MalformedEnvelope:
        project = OWN_PROJECT
    if project == OWN_PROJECT:
        raise UsageError("whose endpoint? --project P")
    return project


async def show_prompts(
    settings: ClientSettings, project: str, endpoint: str, key: X25519PrivateKey, *, since: float, limit: int | None, as_json: bool
) -> None:
    """Print what there is, the oldest first. What cannot be opened is counted and told."""
    found: dict[str, Kept] = {}
    async with Client(settings) as client:
        asked = {"project": project, "endpoint": endpoint, "since": int(since * 1000), "until": int((time.time() + 60) * 1000)}
        nodes = (await client.get(f"{PATH}?{urlencode({'project': project})}")).get("nodes")
        for node in nodes if isinstance(nodes, list) else []:
            try:
                found |= {record.id: record for record in await _gather(client, {**asked, "node": str(node)})}
            except ApiError as error:
                note(f"proxy {str(node)[:12]} could not be asked: {error.message}")
    kept = sorted(found.values(), key=lambda record: (record.at, record.id))
    closed = 0
    for record in kept[-limit:] if limit else kept:
        try:
            opened = open_record(record.sealed, key, project=project, endpoint=endpoint, request_id=record.id)
        except BadSignature:
            closed += 1
            continue
        _show(json.loads(opened), as_json)
    if closed:
        note(f"{closed} records are sealed to another key")


async def _gather(client: Client, asked: dict[str, Any]) -> list[Kept]:
    kept, after = [], 0
    while True:
        answer = await client.get(f"{PATH}?{urlencode({**asked, 'after': after})}")
        try:
            kept += [
                Kept(id=str(entry["id"]), at=int(entry["at"]), sealed=base64.b64decode(entry["sealed"], validate=True))
                for entry in answer["kept"]
            ]
            more, last = bool(answer["more"]), int(answer["last"])
        except (KeyError, TypeError, ValueError):
            raise ApiError("the answer holds no prompts: is this the URL of a mesh's proxy?") from None
        if not more or last <= after:
            return kept
        after = last


def _show(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(record | {"time": moment(record["at"])}, ensure_ascii=False))
        return
    click.echo("  ".join(str(part) for part in (moment(record["at"]), record["request"], record["model"], record["status"])))
    prompt, answer = record["prompt"], record["answer"]
    if isinstance(prompt, dict):
        prompt = prompt.get("messages") or prompt.get("prompt") or prompt.get("input") or prompt
    for name, value in (("prompt", prompt), ("answer", answer)):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        click.echo(f"  {name}: {printable(text)}")
