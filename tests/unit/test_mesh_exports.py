"""Exports: every charge once, under an id that stays; amounts without loss; nothing that a spreadsheet would run."""

from __future__ import annotations

import builtins
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import UsageError
from mesh.exports import COLUMNS, Priced, write_cloud_events, write_csv, write_parquet
from mesh.receipts import Kind
from mesh.usage import Charge, Copy, settle
from tests.support.ledgers import make_receipt


def charge(**fields: Any) -> Charge:
    return settle([Copy(receipt=make_receipt(**fields), node_id=b"w" * 32)])[0]


CHARGES: list[Priced] = [
    (charge(), 10**30 + 1),
    (charge(number=2, status="cancelled", own_count=True), None),
    (charge(number=3, kind=Kind.UPTIME, project="", gpus=2), 7),
]


def test_cloud_events_have_what_the_standard_asks_for() -> None:
    out = io.StringIO()
    assert write_cloud_events(CHARGES, out, source="https://mesh") == 3
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["id"] for event in events] == [f"{it.id}/{it.attempt}" for it, _ in CHARGES]
    for event in events:
        assert {"specversion", "id", "source", "type", "subject", "time", "datacontenttype", "data"} == set(event)
        assert event["specversion"] == "1.0"
        assert event["time"].endswith("Z")
        assert event["subject"]
    assert events[0]["data"]["prompt"] == 100
    assert events[0]["data"]["cost"] == 10**30 + 1
    assert (events[1]["data"]["partial"], events[1]["data"]["cost"]) == (True, None)
    assert events[2]["subject"] == "mesh"


def test_csv_has_a_head_and_a_row_each() -> None:
    out = io.StringIO()
    assert write_csv(CHARGES, out) == 3
    rows = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert tuple(rows[0]) == COLUMNS
    assert [row["cost"] for row in rows] == [str(10**30 + 1), "", "7"]
    assert rows[1]["status"] == "cancelled"


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)"])
def test_csv_holds_no_formula(name: str) -> None:
    out = io.StringIO()
    write_csv([(charge(model=name), None)], out)
    assert next(csv.DictReader(io.StringIO(out.getvalue())))["model"] == f"'{name}"


def test_parquet_comes_back_as_it_was(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert write_parquet(CHARGES, tmp_path / "usage.parquet") == 3
    rows = parquet.read_table(tmp_path / "usage.parquet").to_pylist()
    assert tuple(rows[0]) == COLUMNS
    assert [row["id"] for row in rows] == [it.id for it, _ in CHARGES]
    assert [row["cost"] if row["cost"] is None else int(row["cost"]) for row in rows] == [10**30 + 1, None, 7]


def test_without_its_library_parquet_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'infermesh\[parquet\]'"):
        write_parquet(CHARGES, tmp_path / "usage.parquet")
