"""Documents: what the mesh's operators say, for long: endpoints, model versions, limits, revocations. Pure.

A document is an envelope signed by an issuer that may sign documents. Its ``seq`` counts its versions from 1, and each version names the
digest of the one before, so a lost update or a rollback shows. At most 64 KiB of body.

A document of a project is a matter of that project alone. An issuer that is restricted to projects signs for those and for nothing that
concerns the whole mesh; one that is restricted to models signs none, because what a body says of models is not ours to read. Endpoints
are for those who may deploy: an issuer that is restricted to roles signs none unless deployer or admin is among them, and one that is
restricted to endpoints signs those.

The mesh's keyset travels as a document too. The root's signature inside is what counts: such a document is verified with the very keyset
that it brings, so a new issuer may sign it that nobody has heard of yet, and its ``seq`` is the keyset's own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.claims import check_time, read_bytes, read_int, read_number, read_str
from mesh.envelope import MAX_ENVELOPE_BYTES, read_unverified, seal
from mesh.errors import MalformedEnvelope, UnknownSigner
from mesh.records import directory_key
from mesh.trust import KEYSET_KIND, Issuer, Purpose, Trust, parse_keyset

DOCUMENT_DOMAIN = "infermesh/document"
MAX_BODY_BYTES = 64 * 1024
MAX_KIND_CHARS = 32
MAX_NAME_CHARS = 128
MAX_PROJECT_CHARS = 64
DIGEST_BYTES = 32
ENDPOINT_KIND = "endpoint"
DEPLOYING = frozenset({"deployer", "admin"})
"""The roles of API keys that an issuer must be able to give if it is to sign endpoints."""
NEVER = 0.0
"""An ``expires`` that does not come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One version. ``previous`` is the digest of the version before, empty for the first; ``project`` is empty for what concerns the whole
    mesh. Times are wall-clock seconds."""

    kind: str
    name: str
    seq: int
    previous: bytes
    issued: float
    body: bytes
    project: str = ""
    expires: float = NEVER
    signed: bytes = b""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the signed bytes."""
        return hashlib.sha256(self.signed).digest()

    @property
    def key(self) -> bytes:
        return document_key(self.kind, self.name, self.project)

    @property
    def title(self) -> str:
        """What people call it: ``KIND/NAME`` or ``KIND/PROJECT/NAME``."""
        return "/".join(part for part in (self.kind, self.project, self.name) if part)

    def alive(self, now: float) -> bool:
        return self.expires == NEVER or now < self.expires


def document_key(kind: str, name: str, project: str = "") -> bytes:
    """Where a document is found. The parts are kept apart by a byte that none of them can have."""
    return directory_key("document", "\x00".join((kind, project, name)))


def next_version(
    former: Document | None, *, kind: str, name: str, body: bytes, now: float, project: str = "", expires: float = NEVER
) -> Document:
    """The version that follows ``former``, still to be sealed: the compare of compare-and-swap is in ``previous``."""
    return Document(
        kind=kind,
        name=name,
        seq=1 if former is None else former.seq + 1,
        previous=b"" if former is None else former.digest,
        issued=now,
        body=body,
        project=project,
        expires=expires,
    )


def seal_document(document: Document, issuer: Ed25519PrivateKey, kid: str) -> Document:
    """Sign with an issuer's key; returns the document with ``signed`` filled in. Raises `MalformedEnvelope` if it is too large."""
    if len(document.body) > MAX_BODY_BYTES:
        raise MalformedEnvelope(f"a document has at most {MAX_BODY_BYTES} bytes, this one {len(document.body)}")
    document = replace(document, issued=float(int(document.issued)), expires=float(int(document.expires)))
    payload: dict[str, object] = {
        "kind": document.kind,
        "name": document.name,
        "seq": document.seq,
        "prev": document.previous,
        "iat": int(document.issued),
        "exp": int(document.expires),
        "body": document.body,
    }
    if document.project:
        payload["proj"] = document.project
    return replace(document, signed=seal(DOCUMENT_DOMAIN, kid.encode("ascii"), issuer, payload))


def parse_document(data: bytes, trust: Trust, *, now: float) -> Document:
    """Verify a document from anywhere. Raises a `TrustError`. One that has expired is still a document: see `Document.alive`."""
    issuer, opened = _vouching(data, trust).open(DOCUMENT_DOMAIN, data, Purpose.DOCUMENT, now=now, max_bytes=MAX_ENVELOPE_BYTES)
    payload = opened.payload
    document = Document(
        kind=read_str(payload, "kind", max_len=MAX_KIND_CHARS),
        name=read_str(payload, "name", max_len=MAX_NAME_CHARS),
        project=read_str(payload, "proj", default="", max_len=MAX_PROJECT_CHARS),
        seq=read_int(payload, "seq", low=1),
        previous=read_bytes(payload, "prev", max_len=DIGEST_BYTES),
        issued=read_number(payload, "iat"),
        body=read_bytes(payload, "body", max_len=MAX_BODY_BYTES),
        expires=read_number(payload, "exp"),
        signed=data,
    )
    if len(document.previous) != (DIGEST_BYTES if document.seq > 1 else 0):
        raise MalformedEnvelope("a document's first version has no predecessor, every other names its own")
    if not document.kind:
        raise MalformedEnvelope("a document has a kind")
    _check_scope(issuer, document)
    check_time("the document", not_before=document.issued, expires=float("inf"), now=now)
    return document


def _vouching(data: bytes, trust: Trust) -> Trust:
    """What a document is verified against: for one that brings a newer keyset, that keyset, since the root itself has signed it."""
    payload = read_unverified(data).payload
    if payload.get("kind") != KEYSET_KIND:
        return trust
    keyset = parse_keyset(read_bytes(payload, "body", max_len=MAX_BODY_BYTES), mesh_id=trust.mesh_id)
    if (payload.get("seq"), payload.get("name"), payload.get("proj", "")) != (keyset.seq, KEYSET_KIND, ""):
        raise MalformedEnvelope("a keyset travels under its own number and name, as a document of the whole mesh")
    return Trust(keyset) if keyset.seq > trust.keyset.seq else trust


def _check_scope(issuer: Issuer, document: Document) -> None:
    scope = issuer.scope
    if scope.models is not None or (scope.projects is not None and document.project not in scope.projects):
        raise UnknownSigner("the document's issuer may not sign it: it is outside the projects that the issuer is for")
    if document.kind != ENDPOINT_KIND:
        return
    if scope.roles is not None and not scope.roles & DEPLOYING:
        raise UnknownSigner("the document's issuer may not sign endpoints: that takes the role deployer or admin")
    if scope.endpoints is not None and document.name not in scope.endpoints:
        raise UnknownSigner("the document's issuer may not sign it: it is outside the endpoints that the issuer is for")
