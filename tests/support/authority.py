"""A mesh's signing side in memory, for tests that need real signatures and no files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.authority import ISSUER_LIFETIME_S, KEYS_KID, NODES_KID, ROOT_LIFETIME_S, Admission
from mesh.identity import Identity, make_issuer_certificate, make_root_certificate
from mesh.trust import Issuer, Keyset, Purpose, Role, Trust, key_id, parse_keyset, raw_public_key, seal_keyset


@dataclass(frozen=True, kw_only=True)
class TestMesh:
    """Root, issuers and a keyset. ``identity(role)`` enrols a node without a network."""

    __test__ = False

    root: Ed25519PrivateKey
    keys_issuer: Ed25519PrivateKey
    admission: Admission
    keyset: Keyset

    @property
    def mesh_id(self) -> bytes:
        return self.keyset.mesh_id

    def trust(self) -> Trust:
        return Trust(self.keyset)

    def identity(self, role: Role, *, now: float, key: Ed25519PrivateKey | None = None) -> Identity:
        key = key or Ed25519PrivateKey.generate()
        credentials = self.admission.admit(key.public_key(), role, now=now)
        return Identity(key, credentials, mesh_id=self.mesh_id, now=now)


def make_mesh(*, now: float, name: str = "test", entropy: Callable[[int], bytes] = os.urandom) -> TestMesh:
    """``entropy`` gives so many bytes: a seeded generator's ``randbytes`` makes the same mesh each time."""
    root, keys, nodes = (Ed25519PrivateKey.from_private_bytes(entropy(32)) for _ in range(3))
    root_certificate = make_root_certificate(root, name=name, now=now, lifetime_s=ROOT_LIFETIME_S)
    issuers = [
        Issuer(
            kid=kid,
            public_key=raw_public_key(key.public_key()),
            may=frozenset(may),
            not_before=now,
            expires=now + ISSUER_LIFETIME_S,
        )
        for kid, key, may in ((KEYS_KID, keys, (Purpose.KEY, Purpose.INVITE, Purpose.DOCUMENT)), (NODES_KID, nodes, (Purpose.NODE,)))
    ]
    signed = seal_keyset(root, name=name, seq=1, issued=now, issuers=issuers)
    keyset = parse_keyset(signed, mesh_id=key_id(raw_public_key(root.public_key())))
    certificate = make_issuer_certificate(root, root_certificate, nodes.public_key(), kid=NODES_KID, now=now, lifetime_s=ISSUER_LIFETIME_S)
    admission = Admission(
        kid=NODES_KID,
        key=nodes,
        certificate=certificate,
        root_certificate=root_certificate,
        keyset=keyset,
        secret=os.urandom(32),
    )
    return TestMesh(root=root, keys_issuer=keys, admission=admission, keyset=keyset)
