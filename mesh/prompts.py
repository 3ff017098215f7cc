"""Prompts and answers that an endpoint has kept: how they are sealed, and how a proxy asks another for its own.

Whoever signs the endpoint names an X25519 public key, and each record is sealed to it as it is written (HPKE, RFC 9180, base mode:
DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305). A proxy cannot read afterwards what it keeps, nor can the proxies that
pass it on. The context binds a record to its project, endpoint and request, so that none can be shown as another's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from mesh.claims import read_bool, read_bytes, read_int, read_str
from mesh.documents import MAX_PROJECT_CHARS
from mesh.errors import BadSignature, MalformedEnvelope, ProtocolError
from mesh.link import questions
from mesh.link.link import Link

TASK = "prompts"
MAX_SEALED_BYTES = 100 * 1024
PAGE_BYTES = 128 * 1024
"""What one answer holds at most; a link's stream takes it without waiting for credit."""
_DOMAIN = b"infermesh/prompt"
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_FAR = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One record. ``at`` is when its request came, in wall-clock ms."""

    id: str
    at: int
    sealed: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptQuery:
    """Which records: of an endpoint, of requests that came from ``since`` until before ``until`` (ms), written after place ``after``."""

    project: str
    endpoint: str
    since: int = 0
    until: int = _FAR
    after: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPage:
    """Records in the order of writing. ``more``: there are further ones after place ``last``."""

    kept: tuple[Kept, ...]
    more: bool
    last: int


def seal_record(record: bytes, public_key: bytes, *, project: str, endpoint: str, request_id: str) -> bytes:
    """Raises `ValueError` for a public key that is none."""
    return _SUITE.encrypt(record, X25519PublicKey.from_public_bytes(public_key), _context(project, endpoint, request_id))


def open_record(sealed: bytes, key: X25519PrivateKey, *, project: str, endpoint: str, request_id: str) -> bytes:
    """Raises `BadSignature` if it was not sealed to this key, or not as this request's."""
    try:
        return _SUITE.decrypt(sealed, key, _context(project, endpoint, request_id))
    except (InvalidTag, ValueError):
        raise BadSignature("sealed to another key, or altered") from None


def _context(project: str, endpoint: str, request_id: str) -> bytes:
    return b"\x00".join((_DOMAIN, project.encode(), endpoint.encode(), request_id.encode()))


def encode_query(query: PromptQuery) -> dict[str, Any]:
    """The fields of an OPEN."""
    fields: dict[str, Any] = {"id": TASK, "task": TASK, "size": 0, "only": query.project, "ep": query.endpoint}
    return fields | {"since": query.since, "until": query.until, "after": query.after}


def parse_query(fields: Mapping[str, Any]) -> PromptQuery:
    """Raises `ProtocolError`."""
    try:
        return PromptQuery(
            project=read_str(fields, "only", max_len=MAX_PROJECT_CHARS),
            endpoint=read_str(fields, "ep", max_len=128),
            since=read_int(fields, "since", default=0),
            until=read_int(fields, "until", default=_FAR),
            after=read_int(fields, "after", default=0),
        )
    except MalformedEnvelope as error:
        raise ProtocolError(f"bad question for prompts: {error.message}") from None


def encode_page(kept: Iterable[Kept]) -> bytes:
    """Records one after the other, each a msgpack map."""
    packer = msgpack.Packer(use_bin_type=True)
    return b"".join(packer.pack({"id": record.id, "at": record.at, "s": record.sealed}) for record in kept)


def parse_page(data: bytes, trailer: Mapping[str, Any]) -> PromptPage:
    """Raises `ProtocolError`."""
    if len(data) > PAGE_BYTES:
        raise ProtocolError("a page of prompts that is too large")
    limits = {"max_bin_len": MAX_SEALED_BYTES, "max_str_len": 64, "max_array_len": 0, "max_map_len": 8, "max_ext_len": 0}
    unpacker = msgpack.Unpacker(None, max_buffer_size=len(data) or 1, strict_map_key=True, **limits)
    try:
        unpacker.feed(data)
        entries = list(unpacker)
        if unpacker.tell() != len(data) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError
        kept = tuple(
            Kept(
                id=read_str(entry, "id", max_len=64),
                at=read_int(entry, "at"),
                sealed=read_bytes(entry, "s", max_len=MAX_SEALED_BYTES),
            )
            for entry in entries
        )
        return PromptPage(kept=kept, more=read_bool(trailer, "more"), last=read_int(trailer, "last", default=0))
    except MalformedEnvelope as error:
        raise ProtocolError(f"a page that is none: {error.message}") from None
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError(f"a page that is none ({type(error).__name__})") from None


async def ask(link: Link, query: PromptQuery) -> PromptPage:
    """A page of a linked proxy's records. Raises a `MeshError`."""
    return parse_page(*await questions.ask(link, encode_query(query), about=TASK))
