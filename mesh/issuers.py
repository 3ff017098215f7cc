"""The operator's issuers: new ones, their rotation and retirement, delegations, and how they are handed over.

Whatever changes the keyset needs the root key; a delegation does not. What is made here stays in the operator's folder until it is sent to
the mesh as a document (`keyset_document`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from mesh.authority import ISSUER_LIFETIME_S, Authority, open_mesh
from mesh.delegation import Delegation, Signer, seal_delegation
from mesh.documents import Document
from mesh.errors import ConfigError, UsageError
from mesh.identity import load_private_key, make_issuer_certificate, private_key_pem, write_private
from mesh.scope import Scope
from mesh.trust import KEYSET_KIND, Issuer, Keyset, Purpose, key_id, parse_keyset, raw_public_key, seal_keyset

KID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}")
"""Names of issuers: they become file names."""


def load_root(authority: Authority, path: Path | None) -> Ed25519PrivateKey:
    """The root key, from the operator's folder or wherever it was moved (a folder or the file). Raises `ConfigError`."""
    place = path or authority.directory / "root"
    file = place / "root.key" if place.is_dir() else place
    if not file.exists():
        raise ConfigError(f"this needs the mesh's root key, and {file} does not exist: give --root with where you keep it")
    root = load_private_key(file)
    if key_id(raw_public_key(root.public_key())) != authority.mesh_id:
        raise ConfigError(f"{file} is another mesh's root key")
    return root


def change_keyset(authority: Authority, root: Ed25519PrivateKey, issuers: Iterable[Issuer], *, now: float) -> Authority:
    """Sign and store the next keyset. Returns the mesh as it is then."""
    keyset = authority.keyset
    signed = seal_keyset(root, name=keyset.name, seq=keyset.seq + 1, issued=now, issuers=issuers)
    write_private(authority.directory / "keyset", signed)
    return open_mesh(authority.directory)


def adopt_keyset(authority: Authority, keyset: Keyset) -> Authority:
    """Take a newer keyset of this mesh from elsewhere: another of its operators has changed it."""
    if keyset.seq <= authority.keyset.seq:
        return authority
    write_private(authority.directory / "keyset", keyset.signed)
    return open_mesh(authority.directory)


def keyset_document(authority: Authority, former: Document | None, *, now: float) -> Document:
    """The keyset as a document, still to be signed. ``former`` is the newest that the mesh has."""
    keyset = authority.keyset
    previous = former.digest if former is not None else bytes(32 if keyset.seq > 1 else 0)
    return Document(kind=KEYSET_KIND, name=KEYSET_KIND, seq=keyset.seq, previous=previous, issued=now, body=keyset.signed)


def create_issuer(
    authority: Authority,
    root: Ed25519PrivateKey,
    *,
    kid: str,
    may: frozenset[str],
    scope: Scope,
    now: float,
    lifetime_s: float = ISSUER_LIFETIME_S,
    node_roles: frozenset[str] | None = None,
) -> Authority:
    """Add an issuer to the keyset; its key is in the operator's folder. Raises `UsageError` if there is one of that name."""
    check_kid(authority, kid)
    key = Ed25519PrivateKey.generate()
    issuer = Issuer(
        kid=kid,
        public_key=raw_public_key(key.public_key()),
        may=may,
        not_before=now,
        expires=now + lifetime_s,
        node_roles=node_roles,
        scope=scope,
    )
    _store(authority.directory, kid, key)
    if Purpose.NODE in may:
        root_certificate = (authority.directory / "root.crt").read_bytes()
        certificate = make_issuer_certificate(root, root_certificate, key.public_key(), kid=kid, now=now, lifetime_s=lifetime_s)
        write_private(authority.directory / "issuers" / f"{kid}.crt", certificate)
    return change_keyset(authority, root, (*authority.keyset.issuers, issuer), now=now)


def rotate_issuer(authority: Authority, root: Ed25519PrivateKey, kid: str, *, overlap_s: float, now: float) -> tuple[Authority, str]:
    """A successor with the same rights; the old issuer ends after ``overlap_s``. Returns the mesh and the new issuer's name."""
    old = find_issuer(authority, kid)
    successor = _next_kid(authority, kid)
    lifetime_s = max(old.expires - old.not_before, 86_400.0)
    kept = tuple(
        replace(issuer, expires=min(issuer.expires, now + overlap_s)) if issuer.kid == kid else issuer
        for issuer in authority.keyset.issuers
    )
    shorter = replace(authority, keyset=replace(authority.keyset, issuers=kept))
    made = create_issuer(
        shorter, root, kid=successor, may=old.may, scope=old.scope, now=now, lifetime_s=lifetime_s, node_roles=old.node_roles
    )
    return made, successor


def retire_issuer(authority: Authority, root: Ed25519PrivateKey, kid: str, *, now: float) -> Authority:
    """Take an issuer out of the keyset: all that it ever signed stops to hold. Raises `UsageError` if nothing could be signed any more."""
    old = find_issuer(authority, kid)
    left = tuple(issuer for issuer in authority.keyset.issuers if issuer.kid != kid)
    for purpose in (Purpose.NODE, Purpose.DOCUMENT):
        if purpose in old.may and not any(purpose in issuer.may for issuer in left):
            raise UsageError(f"'{kid}' is the last issuer that may sign for '{purpose}': rotate it first")
    return change_keyset(authority, root, left, now=now)


def find_issuer(authority: Authority, kid: str) -> Issuer:
    issuer = authority.keyset.issuer(kid)
    if issuer is None:
        raise UsageError(f"the keyset has no issuer '{kid}'; `mesh issuer list` shows those there are")
    return issuer


def check_kid(authority: Authority, kid: str) -> None:
    if KID.fullmatch(kid) is None:
        raise UsageError("an issuer's name is 1 to 31 letters, digits, '.', '_' or '-'")
    if authority.keyset.issuer(kid) is not None or (authority.directory / "issuers" / f"{kid}.key").exists():
        raise UsageError(f"there is an issuer '{kid}' already")


def delegate(authority: Authority, *, name: str, signer: Signer, scope: Scope, lifetime_s: float, now: float) -> Handover:
    """Make a delegation of ``signer``. Raises `OutOfScope` where it would be wider than its signer."""
    if KID.fullmatch(name) is None:
        raise UsageError("a delegation's name is 1 to 31 letters, digits, '.', '_' or '-'")
    key = Ed25519PrivateKey.generate()
    delegation = seal_delegation(
        Delegation(
            id=os.urandom(8),
            public_key=raw_public_key(key.public_key()),
            scope=scope,
            not_before=now,
            expires=min(now + lifetime_s, signer.expires),
        ),
        signer,
    )
    return Handover(authority=authority, kid=name, key=key, chain=(*signer.chain, delegation.signed), made=delegation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """What whoever is to sign needs, and nothing more. Secret."""

    authority: Authority
    kid: str
    key: Ed25519PrivateKey
    chain: tuple[bytes, ...] = ()
    made: Delegation | None = None

    def write(self, path: Path) -> None:
        """As a file (0600). Raises `ConfigError` if that cannot be written."""
        data = {
            "infermesh_issuer": 1,
            "name": self.authority.name,
            "mesh_id": self.authority.mesh_id.hex(),
            "keyset": self.authority.keyset.signed.hex(),
            "bootstraps": list(self.authority.bootstraps),
            "kid": self.kid,
            "key": private_key_pem(self.key).decode(),
            "chain": [signed.hex() for signed in self.chain],
        }
        try:
            write_private(path, json.dumps(data, indent=1).encode())
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}") from None


def take_over(path: Path, directory: Path) -> tuple[Authority, str]:
    """Read what `Handover.write` wrote into a mesh folder, made if there is none. Returns the mesh and the issuer's name."""
    try:
        data = json.loads(path.read_bytes())
        mesh_id, kid = bytes.fromhex(data["mesh_id"]), str(data["kid"])
        key = load_pem_private_key(data["key"].encode(), password=None)
        chain = tuple(bytes.fromhex(text) for text in data["chain"])
        about = {"name": str(data["name"]), "mesh_id": mesh_id.hex(), "bootstraps": [str(item) for item in data["bootstraps"]]}
        keyset = parse_keyset(bytes.fromhex(data["keyset"]), mesh_id=mesh_id)
        if not isinstance(key, Ed25519PrivateKey) or KID.fullmatch(kid) is None:
            raise ValueError("bad key or name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read as an issuer's file: {error}") from None
    if not (directory / "mesh.json").exists():
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(directory / "keyset", keyset.signed)
        write_private(directory / "mesh.json", json.dumps(about, indent=1).encode())
    authority = open_mesh(directory)
    if authority.mesh_id != mesh_id:
        raise UsageError(f"{directory} belongs to another mesh; choose another --home")
    authority = adopt_keyset(authority, keyset)
    if (directory / "issuers" / f"{kid}.key").exists():
        raise UsageError(f"there is an issuer '{kid}' here already")
    _store(directory, kid, key, chain)
    return authority, kid


def _store(directory: Path, kid: str, key: Ed25519PrivateKey, chain: tuple[bytes, ...] = ()) -> None:
    folder = directory / "issuers"
    folder.mkdir(exist_ok=True, mode=0o700)
    if chain:
        write_private(folder / f"{kid}.chain", json.dumps([signed.hex() for signed in chain]).encode())
    write_private(folder / f"{kid}.key", private_key_pem(key))


def _next_kid(authority: Authority, kid: str) -> str:
    """``keys-1`` → ``keys-2``, or the first number that is free."""
    base, number = (match[1], int(match[2])) if (match := re.fullmatch(r"(.*?)-(\d{1,6})", kid)) else (kid[:24], 1)
    while True:
        number += 1
        successor = f"{base}-{number}"
        if authority.keyset.issuer(successor) is None and not (authority.directory / "issuers" / f"{successor}.key").exists():
            return successor
