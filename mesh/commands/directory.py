"""For whoever wants to know why: a proxy's peers in the directory, a look-up in full, and what is wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from mesh.client import resolve
from mesh.commands.shared import MeshCommand, json_option, note, print_json, print_table
from mesh.commands.user import access_options, cell, get, objects
from mesh.errors import UsageError

__all__ = ["doctor", "lookup", "peers"]

_MARKS = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}


@click.command(cls=MeshCommand, epilog="Example: mesh peers")
@access_options
@json_option
def peers(url: str | None, api_key: str | None, home: Path, as_json: bool) -> None:
    """List a proxy's peers in the directory. Needs a key with the role viewer."""
    answer = get(resolve(home, url=url, api_key=api_key, environ=os.environ), "/mesh/v1/peers")
    if as_json:
        print_json(answer)
        return
    listed = objects(answer, "peers")
    rows = [
        (
            _name(item),
            item.get("role"),
            item.get("address"),
            _seconds(item.get("seen_s"), "ago"),
            _milliseconds(item.get("rtt_s")),
            "failing" if item.get("failing") is True else "",
        )
        for item in listed
    ]
    if not rows:
        note("this proxy has no peer; `mesh doctor` says why")
        return
    print_table(("peer", "role", "address", "seen", "round trip", ""), rows)
    note(f"{len(rows)} peers; about {cell(answer.get('nodes_estimated'))} nodes in the mesh")


@click.command(cls=MeshCommand, epilog="Example: mesh lookup qwen3-8b")
@click.argument("model", required=False)
@click.option("--role", metavar="ROLE", help="Look up all nodes of a role in place of a model: worker, proxy or bootstrap.")
@access_options
@json_option
def lookup(model: str | None, role: str | None, url: str | None, api_key: str | None, home: Path, as_json: bool) -> None:
    """Look up the workers of MODEL in the directory now: the path taken, the holders, and what each record is worth.

    Needs a key with the role viewer.
    """
    if (model is None) == (role is None):
        raise UsageError("what should be looked up? give a MODEL, or --role worker, proxy or bootstrap")
    query = urlencode({"model": model} if model is not None else {"role": role})
    answer = get(resolve(home, url=url, api_key=api_key, environ=os.environ), f"/mesh/v1/lookup?{query}")
    if as_json:
        print_json(answer)
        return
    _show_lookup(answer)


@click.command(cls=MeshCommand, epilog="Example: mesh doctor || mesh doctor --json")
@access_options
@json_option
def doctor(url: str | None, api_key: str | None, home: Path, as_json: bool) -> None:
    """Check the directory as a proxy sees it: clocks, peers, bootstrap nodes, records, links, keys. Exit code 1 if anything fails.

    Needs a key with the role viewer.
    """
    answer = get(resolve(home, url=url, api_key=api_key, environ=os.environ), "/mesh/v1/doctor")
    if as_json:
        print_json(answer)
    else:
        _show_findings(objects(answer, "findings"))
    if answer.get("worst") not in ("ok", "warn"):
        sys.exit(1)


def _show_lookup(answer: dict[str, Any]) -> None:
    path, holders, records = (objects(answer, name) for name in ("path", "holders", "records"))
    sharded = any(item.get("shard") for item in path)
    print_table(
        ("asked at", "path", "node", "role", "address", "took", "outcome", "records", *(("shard",) if sharded else ())),
        (
            (
                _milliseconds(item.get("asked_s")),
                item.get("path"),
                _name(item),
                item.get("role"),
                item.get("address"),
                _milliseconds(item.get("took_s")),
                item.get("outcome"),
                item.get("records"),
                *((item.get("shard"),) if sharded else ()),
            )
            for item in sorted(path, key=lambda item: _number(item.get("asked_s")))
        ),
        title="path",
    )
    print_table(
        ("holder", "role", "address", "records", "took", ""),
        (
            (
                _name(item),
                item.get("role"),
                "this proxy" if item.get("own") is True else item.get("address"),
                item.get("records"),
                _milliseconds(item.get("took_s")),
                "" if item.get("complete") is True else "did not say all",
            )
            for item in holders
        ),
        title="\nholders",
    )
    print_table(
        ("record of", "verdict", "state", "age", "ends in", "boot.seq", "linked", "held by", ""),
        (
            (
                _name(item),
                item.get("verdict"),
                item.get("state"),
                _seconds(item.get("age_s")),
                _seconds(item.get("expires_in_s")),
                _order(item.get("order")),
                "yes" if item.get("linked") is True else "no",
                cell(item.get("holders")),
                item.get("reason"),
            )
            for item in records
        ),
        title="\nrecords",
    )
    late = "" if answer.get("complete") is True else "; not complete: the deadline came first, or there is too much of it"
    note(f"\n{cell(answer.get('nodes'))} nodes found in {_milliseconds(answer.get('lookup_s'))}{late}")


def _show_findings(findings: list[dict[str, Any]]) -> None:
    """What needs somebody first, each with what to do; then a line for each thing that is well."""
    rows: list[tuple[str, str]] = []
    for item in findings:
        severity = str(item.get("severity"))
        rows.append((_MARKS.get(severity, severity), cell(item.get("what"))))
        if item.get("detail"):
            rows.append(("", cell(item.get("detail"))))
        if item.get("advice") and severity != "ok":
            rows.append(("", f"→ {cell(item.get('advice'))}"))
    print_table(("", ""), rows)


def _name(item: dict[str, Any]) -> object:
    return item.get("name") or str(item.get("id", ""))[:12]


def _order(value: object) -> str:
    return f"{value.get('boot')}.{value.get('seq')}" if isinstance(value, dict) else ""


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _milliseconds(value: object) -> str:
    return f"{value * 1000:.1f} ms" if isinstance(value, int | float) else ""


def _seconds(value: object, after: str = "") -> str:
    return f"{value:.1f} s {after}".rstrip() if isinstance(value, int | float) else ""
