"""What proxies say to each other about limits, on the wire: ASK and GRANT. Pure. SHARES is `proxy.limits.shares`'s own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mesh.claims import read_bytes, read_int, read_maps, read_number
from proxy.limits.buckets import Ask, Grant, Kind
from proxy.limits.counters import SOURCE_BYTES

BUCKET_BYTES = 16
MAX_ENTRIES = 400
"""Of one frame."""
MOST = 1e15


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """What one process has used of a budget, as somebody has heard. ``most``, where an owner says it of itself to its heir, is what it
    may have used by the time that it is heard of again."""

    bucket: bytes
    source: bytes
    used: float
    ends: float
    most: float = 0.0


def encode_asks(asks: Iterable[Ask], counts: Iterable[Count] = ()) -> dict[str, Any]:
    """An ASK frame's fields. What is nothing is left out."""
    fields: dict[str, Any] = {"ask": [_encode_ask(ask) for ask in asks]}
    if told := [_encode_count(count) for count in counts]:
        fields["count"] = told
    return fields


def _encode_count(count: Count) -> dict[str, Any]:
    fields: dict[str, Any] = {"b": count.bucket, "s": count.source, "u": count.used, "e": count.ends}
    return fields | {"m": count.most} if count.most else fields


def _encode_ask(ask: Ask) -> dict[str, Any]:
    fields: dict[str, Any] = {"b": ask.bucket, "k": int(ask.kind), "l": ask.limit}
    values = {"c": ask.burst, "w": ask.want, "n": ask.least, "d": ask.demand, "r": ask.back, "u": ask.used, "e": ask.ends}
    fields |= {name: value for name, value in values.items() if value}
    if ask.held is not None:
        fields["h"] = ask.held
    return fields


def parse_asks(fields: Mapping[str, Any]) -> tuple[list[Ask], list[Count]]:
    """Raises `MalformedEnvelope`."""

    def number(entry: Mapping[str, Any], name: str) -> float:
        return read_number(entry, name, default=0.0, high=MOST)

    asks = [
        Ask(
            bucket=read_bytes(entry, "b", size=BUCKET_BYTES),
            kind=Kind(read_int(entry, "k", high=max(Kind))),
            limit=read_number(entry, "l", high=MOST),
            burst=number(entry, "c"),
            want=number(entry, "w"),
            least=number(entry, "n"),
            demand=number(entry, "d"),
            back=number(entry, "r"),
            used=number(entry, "u"),
            held=number(entry, "h") if "h" in entry else None,
            ends=number(entry, "e"),
        )
        for entry in read_maps(fields, "ask", max_items=MAX_ENTRIES)
    ]
    counts = [
        Count(
            bucket=read_bytes(entry, "b", size=BUCKET_BYTES),
            source=read_bytes(entry, "s", size=SOURCE_BYTES),
            used=number(entry, "u"),
            ends=number(entry, "e"),
            most=number(entry, "m"),
        )
        for entry in read_maps(fields, "count", max_items=MAX_ENTRIES)
    ]
    return asks, counts


def encode_grants(grants: Iterable[Grant], kept: Iterable[Count] = ()) -> dict[str, Any]:
    """A GRANT frame's fields; ``kept`` are wills that have been heard."""
    fields: dict[str, Any] = {"give": [{"b": grant.bucket, "g": grant.given, "l": grant.left, "w": grant.wait_s} for grant in grants]}
    if told := [{"b": count.bucket, "m": count.most} for count in kept]:
        fields["kept"] = told
    return fields


def parse_grants(fields: Mapping[str, Any]) -> tuple[list[Grant], list[tuple[bytes, float]]]:
    """Grants, and of wills that were heard the bucket and how much. Raises `MalformedEnvelope`."""
    kept = [
        (read_bytes(entry, "b", size=BUCKET_BYTES), read_number(entry, "m", high=MOST))
        for entry in read_maps(fields, "kept", max_items=MAX_ENTRIES)
    ]
    grants = [
        Grant(
            bucket=read_bytes(entry, "b", size=BUCKET_BYTES),
            given=read_number(entry, "g", high=MOST),
            left=read_number(entry, "l", high=MOST),
            wait_s=read_number(entry, "w", high=MOST),
        )
        for entry in read_maps(fields, "give", max_items=MAX_ENTRIES)
    ]
    return grants, kept
