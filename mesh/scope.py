"""What may be signed: the bounds of an issuer or a delegation, which the keys it makes must keep within. Pure.

``None`` is no bound. A bound on a list is the list of what is allowed; a bound on a number is the most that a single key may name. A key
that leaves open what its issuer bounds is wider than its issuer, and does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mesh.claims import read_number, read_strs

LISTS = (("projects", "projects"), ("models", "models"), ("endpoints", "endpoints"), ("regions", "regions"), ("key_roles", "roles"))
NUMBERS = (("rps", "rps"), ("tps", "tps"), ("con", "concurrency"), ("tpd", "tokens_per_day"), ("bud", "budget"), ("ttl", "ttl_s"))
"""Names in a payload and here."""
MAX_LISTED = 256
MAX_LIFETIME_S = 90 * 24 * 3600.0
"""No API key lives longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """``roles`` are those of API keys. Per key: ``rps`` requests and ``tps`` tokens a second, ``concurrency`` requests at once,
    ``tokens_per_day``, ``budget`` money a month, ``ttl_s`` seconds of life."""

    projects: frozenset[str] | None = None
    models: frozenset[str] | None = None
    endpoints: frozenset[str] | None = None
    regions: frozenset[str] | None = None
    roles: frozenset[str] | None = None
    rps: float | None = None
    tps: float | None = None
    concurrency: float | None = None
    tokens_per_day: float | None = None
    budget: float | None = None
    ttl_s: float | None = None

    def beyond(self, outer: Scope) -> str | None:
        """The first thing in which this is wider than ``outer``; None if it keeps within it."""
        for _, name in LISTS:
            allowed, asked = getattr(outer, name), getattr(self, name)
            if allowed is not None and (asked is None or not asked <= allowed):
                return name
        for _, name in NUMBERS:
            most, amount = getattr(outer, name), getattr(self, name)
            if most is not None and (amount is None or not amount <= most):
                return "lifetime" if name == "ttl_s" else name
        return None

    def payload(self) -> dict[str, Any]:
        fields: dict[str, Any] = {short: sorted(value) for short, name in LISTS if (value := getattr(self, name)) is not None}
        return fields | {short: value for short, name in NUMBERS if (value := getattr(self, name)) is not None}

    def describe(self) -> dict[str, Any]:
        """JSON-ready, for people: only what is bounded."""
        fields: dict[str, Any] = {name: sorted(value) for _, name in LISTS if (value := getattr(self, name)) is not None}
        return fields | {name: value for _, name in NUMBERS if (value := getattr(self, name)) is not None}


UNBOUNDED = Scope()


def read_scope(payload: Mapping[str, Any]) -> Scope:
    """Raises `MalformedEnvelope`."""
    bounds: dict[str, Any] = {
        name: frozenset(read_strs(payload, short, max_items=MAX_LISTED)) for short, name in LISTS if payload.get(short) is not None
    }
    bounds |= {name: read_number(payload, short) for short, name in NUMBERS if payload.get(short) is not None}
    return Scope(**bounds)
