"""Endpoints: names under which a project's clients call a model, each with what goes with it. Documents of the kind ``endpoint``. Pure.

An endpoint is a matter of its project: `mesh.documents` says who may sign it. It only ever narrows. Its limits hold beside all others,
and a key reaches through it no model that it could not call anyway.

What an endpoint can say will grow. Readers skip what they do not know, so a new field needs no new version.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgpack

from mesh.claims import read_bool, read_bytes, read_int, read_str
from mesh.documents import ENDPOINT_KIND, NEVER, Document
from mesh.envelope import parse_payload
from mesh.errors import MalformedEnvelope, UsageError
from mesh.limits import Limit, encode_limit, parse_limit

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""No slash, so that ``project/name`` can come to mean something; no colon, which keeps the parts of buckets' names apart."""
MAX_MODEL_CHARS = 256
MAX_TIMEOUT_MS = 86_400_000
MIN_KEEP_S, MAX_KEEP_S = 60, 90 * 86_400
KEY_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Prompts and answers are kept: for ``keep_s`` seconds, sealed to an X25519 public key, redacted unless ``full``."""

    public_key: bytes
    keep_s: int
    full: bool = False

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"mode": "full" if self.full else "redacted", "keep_s": self.keep_s, "public_key": self.public_key.hex()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """``timeout_s`` is how long a whole answer may take where its request does not say; 0 leaves that to the proxy."""

    project: str
    name: str
    model: str
    timeout_s: float = 0.0
    limit: Limit = field(default_factory=Limit)
    recording: Recording | None = None

    def describe(self) -> dict[str, Any]:
        """JSON-ready, for people."""
        return {
            "name": self.name,
            "project": self.project,
            "model": self.model,
            "timeout_s": self.timeout_s or None,
            "limits": self.limit.describe(),
            "prompts": self.recording.describe() if self.recording is not None else None,
        }


def encode_endpoint(endpoint: Endpoint | None) -> bytes:
    """A document's body; None says that the endpoint is gone."""
    body: dict[str, Any] = {"gone": True}
    if endpoint is not None:
        body = {"m": endpoint.model}
        if endpoint.timeout_s:
            body["dl"] = max(1, round(endpoint.timeout_s * 1000))
        if endpoint.limit != Limit():
            body["lim"] = encode_limit(endpoint.limit)
        if (recording := endpoint.recording) is not None:
            body["rec"] = {"pub": recording.public_key, "keep": recording.keep_s} | ({"full": True} if recording.full else {})
    packed: bytes = msgpack.packb(body, use_bin_type=True)
    return packed


def parse_endpoint(document: Document) -> Endpoint | None:
    """What a document of this kind says; None for an endpoint that is gone. Raises `MalformedEnvelope`."""
    if not document.project or NAME.fullmatch(document.name) is None:
        raise MalformedEnvelope("an endpoint is a project's, and its name 1 to 63 letters, digits, '.', '_' or '-'")
    if document.expires != NEVER:
        raise MalformedEnvelope("an endpoint has no end: it is deleted")
    body = parse_payload(document.body)
    if read_bool(body, "gone", default=False):
        return None
    model = read_str(body, "m", max_len=MAX_MODEL_CHARS)
    if not model:
        raise MalformedEnvelope("an endpoint names a model")
    limit = _map(body, "lim")
    recording = _map(body, "rec")
    return Endpoint(
        project=document.project,
        name=document.name,
        model=model,
        timeout_s=read_int(body, "dl", low=1, high=MAX_TIMEOUT_MS) / 1000 if "dl" in body else 0.0,
        limit=parse_limit(limit) if limit is not None else Limit(),
        recording=_parse_recording(recording) if recording is not None else None,
    )


def changeable_endpoint(document: Document | None, project: str, name: str) -> Endpoint:
    """The endpoint that a new version is to be made of. Raises `UsageError` where there is none, or one that would lose something."""
    endpoint = parse_endpoint(document) if document is not None else None
    if document is None or endpoint is None:
        raise UsageError(f"the project '{project}' has no endpoint '{name}': `mesh endpoint create` makes one")
    if unknown_fields(document.body):
        raise UsageError("this endpoint says more than this version of mesh knows of: change it with a newer one")
    return endpoint


def unknown_fields(body: bytes) -> set[str]:
    """What a body says that only a newer version of this program knows: who wrote it anew would lose it. Raises `MalformedEnvelope`."""
    return set(parse_payload(body)) - {"m", "dl", "lim", "rec", "gone"}


class Catalogue:
    """The endpoints in force, by project and name."""

    def __init__(self) -> None:
        self.projects: dict[str, dict[str, Endpoint]] = {}

    def take(self, document: Document) -> bool:
        """Whether the document is about an endpoint. Raises `MalformedEnvelope`; what was in force then stays so."""
        if document.kind != ENDPOINT_KIND:
            return False
        endpoint = parse_endpoint(document)
        named = self.projects.setdefault(document.project, {})
        if endpoint is not None:
            named[document.name] = endpoint
        else:
            named.pop(document.name, None)
        if not named:
            del self.projects[document.project]
        return True

    def find(self, project: str, name: str) -> Endpoint | None:
        named = self.projects.get(project)
        return named.get(name) if named is not None else None

    def listed(self, project: str | None = None) -> Iterable[Endpoint]:
        """Those of a project, or all; sorted."""
        chosen = self.projects if project is None else {project: self.projects.get(project, {})}
        return (named[name] for _, named in sorted(chosen.items()) for name in sorted(named))


def _parse_recording(fields: dict[str, Any]) -> Recording:
    return Recording(
        public_key=read_bytes(fields, "pub", size=KEY_BYTES),
        keep_s=read_int(fields, "keep", low=MIN_KEEP_S, high=MAX_KEEP_S),
        full=read_bool(fields, "full", default=False),
    )


def _map(body: dict[str, Any], name: str) -> dict[str, Any] | None:
    value = body.get(name)
    if value is not None and not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
        raise MalformedEnvelope(f"'{name}' must be a map")
    return value
