"""Charges for other programs: CloudEvents, as usage-based billing takes them, CSV and Parquet."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from mesh.errors import UsageError
from mesh.usage import Charge

EVENT_TYPE = "infermesh.usage"
ROWS_AT_ONCE = 10_000
_NUMBERS = ("attempt", "prompt", "cached", "completion", "reasoning", "took_ms", "gpus")
_FLAGS = ("partial", "estimated", "confirmed", "ends")
_TEXTS = ("id", "kind", "project", "key", "endpoint", "model", "worker", "proxy", "status")
COLUMNS = ("time", *_TEXTS, *_NUMBERS, *_FLAGS, "flags", "cost")
"""``cost`` is in 10⁻¹² of the currency, empty without a price."""

Priced = tuple[Charge, int | None]


def record_of(charge: Charge, cost: int | None) -> dict[str, Any]:
    """One row: `COLUMNS`."""
    told = charge.describe()
    return {"time": moment(charge.at), **{name: told[name] for name in (*_TEXTS, *_NUMBERS, *_FLAGS, "flags")}, "cost": cost}


def cloud_event(charge: Charge, cost: int | None, *, source: str) -> dict[str, Any]:
    """CloudEvents 1.0, JSON format. The id is the same at every export, so that a receiver counts nothing twice."""
    record = record_of(charge, cost)
    return {
        "specversion": "1.0",
        "id": f"{charge.id}/{charge.attempt}",
        "source": source,
        "type": EVENT_TYPE,
        "subject": charge.project or "mesh",
        "time": record.pop("time"),
        "datacontenttype": "application/json",
        "data": record,
    }


def write_cloud_events(charges: Iterable[Priced], out: TextIO, *, source: str) -> int:
    """One event a line; returns how many."""
    count = 0
    for charge, cost in charges:
        count += 1
        out.write(json.dumps(cloud_event(charge, cost, source=source), ensure_ascii=False, separators=(",", ":")) + "\n")
    return count


def write_csv(charges: Iterable[Priced], out: TextIO) -> int:
    """With a head line; returns how many rows."""
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    count = 0
    for charge, cost in charges:
        count += 1
        record = record_of(charge, cost) | {"flags": " ".join(sorted(charge.flags))}
        writer.writerow([_inert(record[name]) for name in COLUMNS])
    return count


def write_parquet(charges: Iterable[Priced], path: Path) -> int:
    """Through pyarrow; returns how many rows. Raises `UsageError` where it is not installed."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UsageError("Parquet needs the library pyarrow: pip install 'infermesh[parquet]'; or take --format csv") from None
    kinds = {"time": arrow.string(), "flags": arrow.list_(arrow.string()), "cost": arrow.decimal128(38, 0)}
    kinds |= dict.fromkeys(_TEXTS, arrow.string()) | dict.fromkeys(_NUMBERS, arrow.int64()) | dict.fromkeys(_FLAGS, arrow.bool_())
    schema = arrow.schema([(name, kinds[name]) for name in COLUMNS])
    count, rows = 0, []
    with parquet.ParquetWriter(path, schema) as writer:
        for charge, cost in charges:
            rows.append(record_of(charge, cost))
            count += 1
            if len(rows) == ROWS_AT_ONCE:
                writer.write_table(_table(arrow, rows, schema))
                rows = []
        writer.write_table(_table(arrow, rows, schema))
    return count


def moment(at_ms: int) -> str:
    """RFC 3339, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at_ms // 1000)) + f".{at_ms % 1000:03}Z"


def _table(arrow: Any, rows: Sequence[dict[str, Any]], schema: Any) -> Any:
    return arrow.Table.from_pylist(list(rows), schema=schema)


def _inert(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula is shown as text: names of models and projects come from outside."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
