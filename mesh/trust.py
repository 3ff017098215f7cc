"""What a verifier knows: which mesh this is, and whom its root key vouches for.

The root key signs a *keyset*: a list of issuers, each with a ``kid``, a public key, what it may sign and until when. A
mesh is named by ``mesh id = SHA-256(SPKI of the root key)``, so those 32 bytes are enough to check everything else
offline. Rotation is two entries that overlap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from mesh.claims import check_time, read_bytes, read_int, read_maps, read_number, read_str, read_strs
from mesh.envelope import Opened, open_envelope, seal
from mesh.errors import MalformedEnvelope, UnknownSigner, WrongMesh
from mesh.scope import UNBOUNDED, Scope, read_scope

KEYSET_DOMAIN = "infermesh/keyset"
KEYSET_KIND = "keyset"
"""The kind and the name of the document in which a keyset travels."""
_ED25519_SPKI_PREFIX = bytes.fromhex("302a300506032b6570032100")  # RFC 8410, section 4


class Purpose(StrEnum):
    """What an issuer may sign."""

    KEY = "key"
    NODE = "node"
    INVITE = "invite"
    DOCUMENT = "document"


class Role(StrEnum):
    """What a node may be."""

    BOOTSTRAP = "bootstrap"
    PROXY = "proxy"
    WORKER = "worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """One entry of the keyset. ``scope`` bounds the API keys it makes; without ``node_roles`` it may admit any node. Wall-clock seconds."""

    kid: str
    public_key: bytes
    may: frozenset[str]
    not_before: float
    expires: float
    node_roles: frozenset[str] | None = None
    scope: Scope = UNBOUNDED

    @property
    def projects(self) -> frozenset[str] | None:
        return self.scope.projects

    @property
    def models(self) -> frozenset[str] | None:
        return self.scope.models

    def to_payload(self) -> dict[str, Any]:
        payload: dict[str, Any] = {
            "kid": self.kid,
            "pub": self.public_key,
            "may": sorted(self.may),
            "nbf": int(self.not_before),
            "exp": int(self.expires),
        }
        if self.node_roles is not None:
            payload["roles"] = sorted(self.node_roles)
        return payload | self.scope.payload()

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Issuer:
        return cls(
            kid=read_str(payload, "kid", max_len=32),
            public_key=read_bytes(payload, "pub", size=32),
            may=frozenset(read_strs(payload, "may")),
            not_before=read_number(payload, "nbf"),
            expires=read_number(payload, "exp"),
            node_roles=frozenset(read_strs(payload, "roles")) if payload.get("roles") is not None else None,
            scope=read_scope(payload),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyset:
    """The root's signed list of issuers. ``seq`` only ever grows; a lower one is a rollback."""

    mesh_id: bytes
    name: str
    seq: int
    issuers: tuple[Issuer, ...]
    signed: bytes

    def issuer(self, kid: str) -> Issuer | None:
        return next((issuer for issuer in self.issuers if issuer.kid == kid), None)


def seal_keyset(root: Ed25519PrivateKey, *, name: str, seq: int, issued: float, issuers: Iterable[Issuer]) -> bytes:
    """Sign a keyset with the root key."""
    payload = {"name": name, "seq": seq, "iat": int(issued), "issuers": [issuer.to_payload() for issuer in issuers]}
    return seal(KEYSET_DOMAIN, raw_public_key(root.public_key()), root, payload)


def parse_keyset(data: bytes, *, mesh_id: bytes) -> Keyset:
    """Verify that ``data`` is a keyset of this very mesh. Raises a `TrustError`."""

    def resolve(signer: bytes) -> bytes:
        if len(signer) != 32 or key_id(signer) != mesh_id:
            raise WrongMesh("this keyset was signed by another mesh's root key")
        return read_public_key(signer)

    payload = open_envelope(KEYSET_DOMAIN, data, resolve).payload
    return Keyset(
        mesh_id=mesh_id,
        name=read_str(payload, "name", max_len=64),
        seq=read_int(payload, "seq"),
        issuers=tuple(Issuer.from_payload(item) for item in read_maps(payload, "issuers", max_items=256)),
        signed=data,
    )


class Trust:
    """Verifies on behalf of one mesh. Holds the newest keyset seen; a rollback is refused."""

    def __init__(self, keyset: Keyset) -> None:
        self._keyset = keyset
        self._on_change: list[Callable[[], None]] = []

    @property
    def mesh_id(self) -> bytes:
        return self._keyset.mesh_id

    @property
    def keyset(self) -> Keyset:
        return self._keyset

    def update(self, keyset: Keyset) -> bool:
        """Take a newer keyset of the same mesh; True if it was newer."""
        if keyset.mesh_id != self.mesh_id:
            raise WrongMesh("this keyset belongs to another mesh")
        if keyset.seq <= self._keyset.seq:
            return False
        self._keyset = keyset
        for callback in self._on_change:
            callback()
        return True

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` after each keyset change: whoever caches a verdict drops it then."""
        self._on_change.append(callback)

    def issuer(self, kid: bytes | str, purpose: Purpose, *, now: float) -> Issuer:
        """The issuer named ``kid`` if it may sign for ``purpose`` now. Raises `UnknownSigner`, `Expired`, `NotYetValid`."""
        try:
            name = kid.decode("ascii") if isinstance(kid, bytes) else kid
        except UnicodeDecodeError:
            raise UnknownSigner("the signer is not an issuer of this mesh") from None
        issuer = self._keyset.issuer(name)
        if issuer is None:
            raise UnknownSigner("the signer is not an issuer of this mesh")
        if purpose not in issuer.may:
            raise UnknownSigner(f"issuer '{name}' may not sign this kind of thing")
        check_time(f"issuer '{name}'", not_before=issuer.not_before, expires=issuer.expires, now=now)
        return issuer

    def open(self, domain: str, data: bytes, purpose: Purpose, *, now: float, max_bytes: int = 4096) -> tuple[Issuer, Opened]:
        """Open an envelope that an issuer of this mesh must have signed for ``purpose``."""
        issuers: list[Issuer] = []

        def resolve(signer: bytes) -> bytes:
            issuers.append(self.issuer(signer, purpose, now=now))
            return read_public_key(issuers[0].public_key)

        opened = open_envelope(domain, data, resolve, max_bytes=max_bytes)
        return issuers[0], opened


def raw_public_key(key: Ed25519PublicKey) -> bytes:
    """The 32 raw bytes."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def read_public_key(raw: bytes) -> bytes:
    """The same 32 raw bytes. Raises `MalformedEnvelope` if they cannot be a key."""
    if len(raw) != 32:
        raise MalformedEnvelope("not an Ed25519 public key")
    return raw


def key_id(raw: bytes) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo of an Ed25519 key: a mesh's id (root key) or a node's id (node key)."""
    return hashlib.sha256(_ED25519_SPKI_PREFIX + raw).digest()
