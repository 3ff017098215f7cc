"""Signed records for tests, and a verifier that knows their mesh."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.dht.verify import Verifier
from mesh.identity import Identity
from mesh.membership import MembershipCache
from mesh.records import ModelEntry, Record, State, seal_record
from mesh.trust import Role
from tests.support.authority import TestMesh, make_mesh

NOW = 1_800_000_000.0


class Scribe:
    """One mesh; ``node`` makes members of it, ``record`` signs in their name. Everything from one seed."""

    def __init__(self, seed: int = 1, *, now: float = NOW) -> None:
        self.rng = random.Random(seed)
        self.now = now
        self.mesh: TestMesh = make_mesh(now=now, entropy=self.rng.randbytes)

    def verifier(self) -> Verifier:
        return Verifier(MembershipCache(self.mesh.trust()))

    def node(self, role: Role = Role.WORKER) -> Identity:
        return self.mesh.identity(role, now=self.now, key=Ed25519PrivateKey.from_private_bytes(self.rng.randbytes(32)))

    def record(self, node: Identity, *, seq: int = 1, **about: Any) -> Record:
        """A ready worker's record, living 20 s from `now`, unless ``about`` says otherwise."""
        record = Record(
            node_id=node.node_id,
            role=node.role,
            boot=int(self.now * 1000),
            seq=seq,
            issued=self.now,
            expires=self.now + 20.0,
            state=State.READY,
            addresses=("203.0.113.7:7401",),
            models=(ModelEntry(name="smollm"),),
        )
        return seal_record(replace(record, **about), node.key, node.credentials.membership)
