"""Limits as operators write them: documents of the kind ``limits``. Pure.

A document says what one project may use, what every project without a document of its own may, or what a model may serve in all. Those are
the operator's, signed by who may sign for the whole mesh. A project may set itself tighter limits in a document of its own: of two that
say something of the same, both hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import msgpack

from mesh.claims import read_maps, read_number, read_str
from mesh.documents import Document
from mesh.envelope import parse_payload
from mesh.errors import MalformedEnvelope, UsageError

KIND = "limits"
DEFAULT_NAME = "default"
MODELS_NAME = "models"
PROJECT_PREFIX = "project:"
OWN_NAME = "own"
MAX_MODELS = 512
REQUEST_BURST_S = 1.0
TOKEN_BURST_S = 10.0
"""How many seconds' worth of a rate may be used at once, unless ``burst_s`` says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What may be used; None is no limit. ``burst_s`` is how many seconds' worth of a rate may be used at once."""

    rps: float | None = None
    tps: float | None = None
    concurrency: float | None = None
    tokens_per_day: float | None = None
    money_per_month: float | None = None
    burst_s: float | None = None

    def describe(self) -> dict[str, float]:
        """What is limited, JSON-ready."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A document's body: limits for everything, and for single models."""

    whole: Limit = field(default_factory=Limit)
    models: Mapping[str, Limit] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        return self.whole.describe() | ({"models": {name: limit.describe() for name, limit in self.models.items()}} if self.models else {})


NO_LIMITS = Limits()
_SHORT = {"rps": "rps", "tps": "tps", "concurrency": "con", "tokens_per_day": "tpd", "money_per_month": "mpm", "burst_s": "burst"}


def encode_limits(limits: Limits) -> bytes:
    """A document's body. Raises `UsageError` on what no proxy would take."""
    if len(limits.models) > MAX_MODELS:
        raise UsageError(f"a project has limits for at most {MAX_MODELS} models")
    models = [{"m": name} | encode_limit(limit) for name, limit in sorted(limits.models.items())]
    body: bytes = msgpack.packb(encode_limit(limits.whole) | ({"models": models} if models else {}), use_bin_type=True)
    return body


def parse_limits(body: bytes) -> Limits:
    """Raises `MalformedEnvelope`."""
    payload = parse_payload(body)
    entries = read_maps(payload, "models", max_items=MAX_MODELS)
    return Limits(whole=parse_limit(payload), models={read_str(entry, "m"): parse_limit(entry) for entry in entries})


class Rules:
    """All limits in force. ``take`` a document; `of_project` and `of_model` look limits up."""

    def __init__(self, documents: Iterable[Document] = ()) -> None:
        self.default = NO_LIMITS
        self.models = NO_LIMITS
        self.projects: dict[str, Limits] = {}
        self.own: dict[str, Limits] = {}
        for document in documents:
            self.take(document)

    def take(self, document: Document) -> bool:
        """Whether the document says something of limits. Raises `MalformedEnvelope`; what was in force then stays so."""
        if document.kind != KIND:
            return False
        limits = parse_limits(document.body)
        if document.project:
            if document.name != OWN_NAME:
                return False
            self.own[document.project] = limits
        elif document.name == DEFAULT_NAME:
            self.default = limits
        elif document.name == MODELS_NAME:
            self.models = limits
        elif document.name.startswith(PROJECT_PREFIX):
            self.projects[document.name.removeprefix(PROJECT_PREFIX)] = limits
        else:
            return False
        return True

    def of_project(self, project: str) -> tuple[Limits, Limits]:
        """The operator's limits of a project, and its own."""
        return self.projects.get(project, self.default), self.own.get(project, NO_LIMITS)


def project_name(project: str) -> str:
    """The name of the operator's document about a project."""
    return PROJECT_PREFIX + project


def encode_limit(limit: Limit) -> dict[str, float]:
    """The fields that say what is limited, for a body of which they are a part."""
    return {_SHORT[name]: value for name, value in limit.describe().items()}


def parse_limit(entry: Mapping[str, Any]) -> Limit:
    """Raises `MalformedEnvelope`."""

    def number(name: str, low: float = 0.0) -> float | None:
        return read_number(entry, _SHORT[name], low=low, high=1e15) if _SHORT[name] in entry else None

    limit = Limit(**{name: number(name) for name in _SHORT})
    if limit.burst_s is not None and limit.burst_s < 0.1:
        raise MalformedEnvelope("a burst is at least 0.1 s worth")
    return limit
