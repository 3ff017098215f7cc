"""The signing side of a mesh: its root, its issuers, and what they make.

On the operator's machine::

    HOME/mesh/
        mesh.json            name, mesh id, bootstrap addresses         (not secret)
        root/root.key        the root key: signs keysets and nothing else; may be moved offline
        root.crt  keyset     the root certificate; the signed keyset    (not secret)
        issuers/KID.key .crt what signs day by day: keys-1 (API keys and invitations), nodes-1 (memberships)
        network.secret       from which the directory's epoch keys are derived

A bootstrap node holds only what it needs to admit nodes: ``nodes-1`` and the network secret.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from mesh.apikey import ApiKey, mint_with
from mesh.delegation import Signer, open_chain
from mesh.documents import Document, seal_document
from mesh.errors import ConfigError, MalformedEnvelope, UsageError
from mesh.identity import (
    CERTIFICATE_LIFETIME_S,
    Credentials,
    NetworkKey,
    load_private_key,
    make_issuer_certificate,
    make_node_certificate,
    make_root_certificate,
    private_key_pem,
    write_private,
)
from mesh.invite import Invite, seal_invite
from mesh.membership import seal_membership
from mesh.orders import ORDER_LIFE_S, Action, Order, seal_order
from mesh.scope import UNBOUNDED
from mesh.trust import Issuer, Keyset, Purpose, Role, Trust, key_id, parse_keyset, raw_public_key, seal_keyset

ROOT_LIFETIME_S = 10 * 365 * 86400.0
ISSUER_LIFETIME_S = 2 * 365 * 86400.0
EPOCH_S = 86400.0
"""How long one directory key lasts. Keys of the epoch before and the one after are accepted too."""

KEYS_KID = "keys-1"
NODES_KID = "nodes-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What admits nodes: held by bootstrap nodes. ``secret`` is 32 bytes."""

    kid: str
    key: Ed25519PrivateKey
    certificate: bytes
    root_certificate: bytes
    keyset: Keyset
    secret: bytes

    def admit(self, public_key: Ed25519PublicKey, role: Role, *, now: float) -> Credentials:
        """Credentials for a node's key, good for `CERTIFICATE_LIFETIME_S`."""
        mesh_id = self.keyset.mesh_id
        leaf = make_node_certificate(self.key, self.certificate, public_key, mesh_id=mesh_id, role=role, now=now)
        membership = seal_membership(
            self.key,
            self.kid,
            public_key=raw_public_key(public_key),
            role=role,
            issued=now,
            expires=now + CERTIFICATE_LIFETIME_S,
        )
        return Credentials(
            certificate_chain=leaf + self.certificate,
            root_certificate=self.root_certificate,
            membership=membership,
            keyset=self.keyset.signed,
            network_keys=network_keys(self.secret, mesh_id, now=now),
        )

    def save(self, directory: Path) -> None:
        """Keep it in a bootstrap node's state folder (0600)."""
        write_private(directory / "admission.json", json.dumps(encode_admission(self), indent=1).encode())


def encode_admission(admission: Admission) -> dict[str, str]:
    """As JSON-ready values. Secret: whoever holds them can admit nodes."""
    return {
        "kid": admission.kid,
        "key": private_key_pem(admission.key).decode(),
        "certificate": admission.certificate.decode(),
        "root_certificate": admission.root_certificate.decode(),
        "keyset": admission.keyset.signed.hex(),
        "mesh_id": admission.keyset.mesh_id.hex(),
        "secret": admission.secret.hex(),
    }


def parse_admission(data: object) -> Admission:
    """From JSON values. Raises a `TrustError`: `MalformedEnvelope`, or whatever is wrong with the keyset."""
    try:
        if not isinstance(data, dict):
            raise TypeError
        key = load_pem_private_key(data["key"].encode(), password=None)
        secret = bytes.fromhex(data["secret"])
        if not isinstance(key, Ed25519PrivateKey) or len(secret) != 32:
            raise ValueError
        return Admission(
            kid=str(data["kid"]),
            key=key,
            certificate=data["certificate"].encode(),
            root_certificate=data["root_certificate"].encode(),
            keyset=parse_keyset(bytes.fromhex(data["keyset"]), mesh_id=bytes.fromhex(data["mesh_id"])),
            secret=secret,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MalformedEnvelope("not what a bootstrap node needs to admit others") from None


def load_admission(directory: Path) -> Admission:
    """Read what `Admission.save` wrote. Raises `ConfigError`, or a `TrustError` if its keyset does not hold."""
    path = directory / "admission.json"
    try:
        return parse_admission(json.loads(path.read_bytes()))
    except (OSError, ValueError, MalformedEnvelope) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """An operator's mesh, opened from its folder. The root key itself is never loaded here."""

    directory: Path
    name: str
    keyset: Keyset
    bootstraps: tuple[str, ...]

    @property
    def mesh_id(self) -> bytes:
        return self.keyset.mesh_id

    @property
    def trust(self) -> Trust:
        return Trust(self.keyset)

    def mint_key(self, claims: ApiKey, *, kid: str | None = None) -> str:
        """Make a key with the issuer ``kid``, else with the best one here. Raises `ConfigError`, `UsageError` or a `TrustError`."""
        return mint_with(claims, self.signer(kid, now=claims.not_before))

    def sign_document(self, document: Document) -> Document:
        """Sign a version of a document; returns it with ``signed`` filled in."""
        kid = self.issuer_here(Purpose.DOCUMENT)
        return seal_document(document, self._issuer_key(kid), kid)

    def invite(self, role: Role, *, ttl_s: float, uses: int, bootstraps: tuple[str, ...], now: float) -> str:
        """A join token's text."""
        kid = self.issuer_here(Purpose.INVITE)
        claims = Invite(id=os.urandom(16), role=role, uses=uses, issued=now, expires=now + ttl_s)
        return seal_invite(self._issuer_key(kid), kid, claims, mesh_id=self.mesh_id, bootstraps=bootstraps)

    def order(self, node_id: bytes, action: Action, *, reason: str, now: float) -> Order:
        """Tell a node something; to be carried to it within `ORDER_LIFE_S`."""
        order = Order(node_id=node_id, action=action, issued=now, expires=now + ORDER_LIFE_S, reason=reason)
        kid = self.issuer_here(Purpose.DOCUMENT)
        return seal_order(order, self._issuer_key(kid), kid)

    def admission(self) -> Admission:
        """What a bootstrap node needs. Raises `ConfigError` where this folder no longer holds it."""
        kid = self.issuer_here(Purpose.NODE)
        return Admission(
            kid=kid,
            key=self._issuer_key(kid),
            certificate=self._read(f"issuers/{kid}.crt"),
            root_certificate=self._read("root.crt"),
            keyset=self.keyset,
            secret=self._read("network.secret"),
        )

    def signer(self, kid: str | None = None, *, now: float) -> Signer:
        """Who makes API keys here: an issuer of the keyset, or a delegation handed over. Raises `ConfigError` or a `TrustError`."""
        if kid is None:
            delegated = sorted(path.stem for path in (self.directory / "issuers").glob("*.chain"))
            issuers = self._issuers_here(Purpose.KEY)
            kid = issuers[-1].kid if issuers else delegated[-1] if delegated else self.issuer_here(Purpose.KEY)
        chain = self._chain(kid)
        if chain:
            delegation = open_chain(chain, self.trust, now=now)[1][-1]
            return Signer(kid=kid, key=self._issuer_key(kid), scope=delegation.scope, expires=delegation.expires, chain=chain)
        issuer = self.trust.issuer(kid, Purpose.KEY, now=now)
        return Signer(kid=kid, key=self._issuer_key(kid), scope=issuer.scope, expires=issuer.expires)

    def issuer_here(self, purpose: Purpose) -> str:
        """The newest issuer that may sign for ``purpose`` and whose key is here. Raises `ConfigError`."""
        issuers = self._issuers_here(purpose)
        if issuers:
            return issuers[-1].kid
        named = next((issuer.kid for issuer in self.keyset.issuers if purpose in issuer.may), None)
        where = f": {self.directory / 'issuers' / named}.key does not exist" if named else ""
        raise ConfigError(f"nothing here may sign for '{purpose}'{where}")

    def _issuers_here(self, purpose: Purpose) -> list[Issuer]:
        """Those whose bounds are the widest last, and of those the newest."""
        folder = self.directory / "issuers"
        here = [issuer for issuer in self.keyset.issuers if purpose in issuer.may and (folder / f"{issuer.kid}.key").exists()]
        return sorted(here, key=lambda issuer: (issuer.scope == UNBOUNDED, issuer.not_before))

    def _chain(self, kid: str) -> tuple[bytes, ...]:
        path = self.directory / "issuers" / f"{kid}.chain"
        try:
            return tuple(bytes.fromhex(text) for text in json.loads(path.read_bytes()))
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None

    def _issuer_key(self, kid: str) -> Ed25519PrivateKey:
        return load_private_key(self.directory / "issuers" / f"{kid}.key")

    def _read(self, name: str) -> bytes:
        try:
            return (self.directory / name).read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.directory / name} cannot be read: {error}") from None


def create_mesh(directory: Path, *, name: str, now: float, bootstraps: tuple[str, ...] = ()) -> Authority:
    """Make a mesh: root, issuers, keyset, network secret. Refuses to touch a folder that holds one."""
    if (directory / "mesh.json").exists() or (directory / "root").exists():
        raise UsageError(f"{directory} already holds a mesh; choose another --home, or keep using it")
    for folder in (directory, directory / "root", directory / "issuers"):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    root = Ed25519PrivateKey.generate()
    root_public = raw_public_key(root.public_key())
    write_private(directory / "root" / "root.key", private_key_pem(root))
    root_certificate = make_root_certificate(root, name=name, now=now, lifetime_s=ROOT_LIFETIME_S)
    write_private(directory / "root.crt", root_certificate)
    issuers = []
    for kid, purposes in ((KEYS_KID, (Purpose.KEY, Purpose.INVITE, Purpose.DOCUMENT)), (NODES_KID, (Purpose.NODE,))):
        key = Ed25519PrivateKey.generate()
        write_private(directory / "issuers" / f"{kid}.key", private_key_pem(key))
        issuers.append(
            Issuer(
                kid=kid,
                public_key=raw_public_key(key.public_key()),
                may=frozenset(purposes),
                not_before=now,
                expires=now + ISSUER_LIFETIME_S,
            )
        )
        if Purpose.NODE in purposes:
            certificate = make_issuer_certificate(root, root_certificate, key.public_key(), kid=kid, now=now, lifetime_s=ISSUER_LIFETIME_S)
            write_private(directory / "issuers" / f"{kid}.crt", certificate)
    write_private(directory / "keyset", seal_keyset(root, name=name, seq=1, issued=now, issuers=issuers))
    write_private(directory / "network.secret", os.urandom(32))
    about = {"name": name, "mesh_id": key_id(root_public).hex(), "bootstraps": list(bootstraps)}
    write_private(directory / "mesh.json", json.dumps(about, indent=1).encode())
    return open_mesh(directory)


def open_mesh(directory: Path) -> Authority:
    """Open an operator's mesh folder. Raises `ConfigError`, or a `TrustError` if its keyset does not hold."""
    try:
        about = json.loads((directory / "mesh.json").read_bytes())
        mesh_id = bytes.fromhex(about["mesh_id"])
        keyset = (directory / "keyset").read_bytes()
        bootstraps = tuple(str(item) for item in about.get("bootstraps", ()))
    except FileNotFoundError:
        raise ConfigError(f"there is no mesh in {directory}; make one with `mesh create`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{directory / 'mesh.json'} cannot be read: {error}") from None
    return Authority(
        directory=directory,
        name=str(about.get("name", "")),
        keyset=parse_keyset(keyset, mesh_id=mesh_id),
        bootstraps=bootstraps,
    )


def network_keys(secret: bytes, mesh_id: bytes, *, now: float) -> tuple[NetworkKey, ...]:
    """The directory keys a node needs for the life of its certificate: the epoch before, this one, and two to come."""
    current = int(now // EPOCH_S)
    return tuple(NetworkKey(epoch=epoch, key=_derive(secret, mesh_id, epoch)) for epoch in range(current - 1, current + 3))


def _derive(secret: bytes, mesh_id: bytes, epoch: int) -> bytes:
    """A pseudo-random function of the epoch: HMAC-SHA-256 under a 256-bit secret."""
    return hmac.new(secret, b"infermesh/network\x00" + mesh_id + epoch.to_bytes(8), hashlib.sha256).digest()
