"""Reading fields out of a verified but still untrusted payload.

A valid signature says who wrote a map, not that they wrote it well. Every field passes through here, so a wrong type or size is
one clear `MalformedEnvelope` and never a ``TypeError`` three calls later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mesh.errors import Expired, MalformedEnvelope, NotYetValid

CLOCK_SKEW_S = 30.0
"""Clocks of honest machines may differ by this much."""

_MISSING = object()
_LISTS = (list, tuple)


def read_str(payload: Mapping[str, Any], name: str, *, default: Any = _MISSING, max_len: int = 256) -> str:
    value = _get(payload, name, default)
    if not isinstance(value, str) or len(value) > max_len or not value.isprintable():
        raise MalformedEnvelope(f"'{name}' must be a printable string of at most {max_len} characters")
    return value


def read_bytes(payload: Mapping[str, Any], name: str, *, default: Any = _MISSING, size: int | None = None, max_len: int = 4096) -> bytes:
    value = _get(payload, name, default)
    if value is default:
        return bytes(value)
    if not isinstance(value, bytes) or len(value) > max_len or (size is not None and len(value) != size):
        raise MalformedEnvelope(f"'{name}' must be {size if size is not None else f'at most {max_len}'} bytes")
    return value


def read_int(payload: Mapping[str, Any], name: str, *, default: Any = _MISSING, low: int = 0, high: int = 2**63 - 1) -> int:
    value = _get(payload, name, default)
    if type(value) is not int or not low <= value <= high:
        raise MalformedEnvelope(f"'{name}' must be an integer from {low} to {high}")
    return value


def read_number(payload: Mapping[str, Any], name: str, *, default: Any = _MISSING, low: float = 0.0, high: float = 1e18) -> float:
    value = _get(payload, name, default)
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise MalformedEnvelope(f"'{name}' must be a number from {low:g} to {high:g}")
    return float(value)


def read_bool(payload: Mapping[str, Any], name: str, *, default: Any = _MISSING) -> bool:
    value = _get(payload, name, default)
    if type(value) is not bool:
        raise MalformedEnvelope(f"'{name}' must be true or false")
    return value


def read_strs(
    payload: Mapping[str, Any], name: str, *, default: Any = _MISSING, max_items: int = 64, max_len: int = 256
) -> tuple[str, ...]:
    value = _get(payload, name, default)
    if not isinstance(value, _LISTS) or len(value) > max_items:
        raise MalformedEnvelope(f"'{name}' must be a list of at most {max_items} strings")
    for item in value:
        if not isinstance(item, str) or len(item) > max_len or not item.isprintable():
            raise MalformedEnvelope(f"'{name}' must hold printable strings of at most {max_len} characters")
    return tuple(value)


def read_maps(payload: Mapping[str, Any], name: str, *, max_items: int = 64) -> tuple[dict[str, Any], ...]:
    value = _get(payload, name, [])
    if not isinstance(value, _LISTS) or len(value) > max_items:
        raise MalformedEnvelope(f"'{name}' must be a list of at most {max_items} maps")
    if not all(isinstance(item, dict) and all(isinstance(key, str) for key in item) for item in value):
        raise MalformedEnvelope(f"'{name}' must hold maps with string keys")
    return tuple(value)


def check_time(what: str, *, not_before: float, expires: float, now: float) -> None:
    """Raise `NotYetValid` or `Expired`. ``now`` is wall time in seconds; starting early is forgiven by the clock skew."""
    if now < not_before - CLOCK_SKEW_S:
        raise NotYetValid(f"{what} is not valid yet; check this machine's clock")
    if now >= expires:
        raise Expired(f"{what} has expired")


def _get(payload: Mapping[str, Any], name: str, default: Any) -> Any:
    value = payload.get(name, default)
    if value is _MISSING:
        raise MalformedEnvelope(f"'{name}' is missing")
    return value
