"""How commands ask all nodes for their receipts through one proxy, and the options that say whom and since when."""

from __future__ import annotations

import base64
import calendar
import os
import re
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
from mesh.commands.documents import operator_settings
from mesh.commands.shared import Duration, F, note
from mesh.commands.user import access_options
from mesh.errors import ApiError, TrustError, UsageError
from mesh.ledger import START, Page, Query
from mesh.prices import PriceList, parse_prices
from mesh.usage import Fetch, Survey

RECEIPTS_PATH = "/mesh/v1/receipts"


def ask_options(command: F) -> F:
    whole = click.option("--all", "whole_mesh", is_flag=True, help="Every project's, as the operator: needs the mesh's folder in --home.")
    return whole(access_options(command))


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


def settings_of(home: Path, url: str | None, api_key: str | None, whole_mesh: bool) -> ClientSettings:
    if whole_mesh:
        return operator_settings(open_mesh(home / "mesh"), home, url=url, api_key=api_key)
    return resolve(home, url=url, api_key=api_key, environ=os.environ)


def operates(home: Path, api_key: str | None) -> bool:
    """Whether this is the operator's machine, and no key says otherwise."""
    return not api_key and not os.environ.get("MESH_API_KEY") and (home / "mesh" / "mesh.json").exists()


def may_look(settings: ClientSettings) -> bool:
    with suppress(TrustError):
        return bool(read_key(settings.api_key).roles & {KeyRole.VIEWER, KeyRole.ADMIN})
    return False


def span(since: float | None, until: float | None) -> tuple[float, float]:
    end = until if until is not None else time.time()
    begin = since if since is not None else month_of(None)[0]
    if begin >= end:
        raise UsageError("--since must be before --until")
    return begin, end


def month_of(text: str | None) -> tuple[float, float]:
    """First moment of a month and of the next, by UTC."""
    text = text or time.strftime("%Y-%m", time.gmtime())
    if not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", text):
        raise UsageError("--month: write it as 2026-11")
    year, month = int(text[:4]), int(text[5:])
    following = (year + month // 12, month % 12 + 1)
    return float(calendar.timegm((year, month, 1, 0, 0, 0))), float(calendar.timegm((*following, 1, 0, 0, 0)))


def lost_nodes(survey: Survey) -> list[dict[str, str]]:
    """Raises `ApiError` if there was nobody to ask: nothing found is then no answer."""
    if survey.lost and not survey.answered:
        raise ApiError(f"no node could be asked: {next(iter(survey.lost.values()))}")
    return [{"node": node.hex(), "reason": reason} for node, reason in sorted(survey.lost.items())]


def tell_gaps(total: dict[str, Any], complete: bool, lost: list[dict[str, str]]) -> None:
    for each in lost:
        note(f"node {each['node'][:12]} could not be asked: {each['reason']}")
    if not complete:
        note("more than one node is missing: requests between two of them are not in this")
    if total.get("flagged"):
        note(f"{total['flagged']} charges do not fit together: see the flags in `mesh usage export`")
    if total.get("unpriced"):
        note(f"{total['unpriced']} charges have no price: `mesh prices get` shows what has")
