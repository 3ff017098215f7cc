"""Makes the committed test vectors from fixed keys, so that a change of any format on the wire shows as a changed file.

`python -m tests.support.vectors` writes them again; a reviewer then sees what changed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from mesh.apikey import ApiKey, KeyRole, mint, parse_key
from mesh.documents import Document, seal_document
from mesh.envelope import seal
from mesh.invite import Invite, parse_token, seal_invite
from mesh.membership import seal_membership
from mesh.merkle import audit_path, leaf_hash, root_hash
from mesh.orders import Action, Order, seal_order
from mesh.receipts import Kind, Receipt, encode_receipt, seal_batch
from mesh.records import Capability, Load, ModelEntry, Record, State, seal_record
from mesh.trust import Issuer, Purpose, Role, key_id, raw_public_key, seal_keyset

FOLDER = Path(__file__).parent.parent / "unit" / "vectors"
NOW = 1_800_000_000.0
DAY_S = 86_400.0


def fixed_key(name: str) -> Ed25519PrivateKey:
    """A key anybody can make again: its seed is SHA-256 of ``infermesh test vector: NAME``."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"infermesh test vector: {name}".encode()).digest())


def build() -> dict[str, dict[str, Any]]:
    """File name → its contents."""
    root, keys, nodes, worker = (fixed_key(name) for name in ("root", "keys-1", "nodes-1", "worker"))
    mesh_id = key_id(raw_public_key(root.public_key()))
    seeds = {name: _seed(key) for name, key in (("root", root), ("keys-1", keys), ("nodes-1", nodes), ("worker", worker))}
    keyset = seal_keyset(
        root,
        name="vectors",
        seq=7,
        issued=NOW,
        issuers=[
            _issuer("keys-1", keys, Purpose.KEY, Purpose.INVITE),
            _issuer("nodes-1", nodes, Purpose.NODE),
        ],
    )
    payload = {"text": "grüezi", "number": 7, "bytes": b"\x00\x01", "list": [1, 2.5, None, True], "map": {"a": b""}}
    envelope = seal("infermesh/test", b"keys-1", keys, payload)
    membership = seal_membership(
        nodes,
        "nodes-1",
        public_key=raw_public_key(worker.public_key()),
        role=Role.WORKER,
        issued=NOW,
        expires=NOW + DAY_S,
    )
    common = {"now": NOW, "seeds": seeds, "mesh_id": mesh_id.hex(), "keyset": keyset.hex()}
    return {
        "envelope.json": {
            "domain": "infermesh/test",
            "signer": "keys-1",
            "seeds": seeds,
            "payload": {"text": "grüezi", "number": 7, "bytes": {"hex": "0001"}, "list": [1, 2.5, None, True], "map": {"a": {"hex": ""}}},
            "envelope": envelope.hex(),
        },
        "apikey.json": common | _apikey(keys),
        "invite.json": common | _invite(keys, mesh_id),
        "document.json": _document(root, keys, seeds, mesh_id),
        "order.json": _order(root, keys, seeds, mesh_id),
        "record.json": common | {"membership": membership.hex()} | _record(worker, membership),
        "receipts.json": common | {"membership": membership.hex()} | _receipts(worker, membership),
    }


def write() -> None:
    for name, content in build().items():
        (FOLDER / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return content


def _apikey(issuer: Ed25519PrivateKey) -> dict[str, Any]:
    claims = ApiKey(
        id=bytes(range(8)),
        project="search",
        roles=frozenset({KeyRole.INVOKER, KeyRole.VIEWER}),
        not_before=NOW,
        expires=NOW + 30 * DAY_S,
        kid="keys-1",
        models=frozenset({"qwen3-8b", "minilm"}),
        region="eu-1",
        rps=100.0,
        tps=10_000.0,
        concurrency=500.0,
    )
    text = mint(claims, issuer, "keys-1")
    return {"claims": claims.describe(), "key": text, "envelope": parse_key(text).hex()}


def _invite(issuer: Ed25519PrivateKey, mesh_id: bytes) -> dict[str, Any]:
    claims = Invite(id=bytes(range(16)), role=Role.WORKER, uses=3, issued=NOW, expires=NOW + 3600.0)
    bootstraps = ("mesh.example.org:7600", "192.0.2.7:7600")
    text = seal_invite(issuer, "keys-1", claims, mesh_id=mesh_id, bootstraps=bootstraps)
    return {
        "claims": {"id": claims.id.hex(), "role": "worker", "uses": 3, "issued": NOW, "expires": NOW + 3600.0},
        "bootstraps": list(bootstraps),
        "token": text,
        "envelope": parse_token(text).signed.hex(),
    }


def _document(root: Ed25519PrivateKey, issuer: Ed25519PrivateKey, seeds: dict[str, str], mesh_id: bytes) -> dict[str, Any]:
    keyset = seal_keyset(root, name="vectors", seq=8, issued=NOW, issuers=[_issuer("keys-1", issuer, Purpose.DOCUMENT)])
    version = Document(
        kind="endpoint",
        name="chat",
        project="search",
        seq=3,
        previous=hashlib.sha256(b"the version before").digest(),
        issued=NOW,
        expires=NOW + 365 * DAY_S,
        body=b'{"model":"qwen3-8b"}',
    )
    document = seal_document(version, issuer, "keys-1")
    return {
        "now": NOW,
        "seeds": {name: seeds[name] for name in ("root", "keys-1")},
        "mesh_id": mesh_id.hex(),
        "keyset": keyset.hex(),
        "key": document.key.hex(),
        "digest": document.digest.hex(),
        "body": document.body.hex(),
        "document": document.signed.hex(),
    }


def _order(root: Ed25519PrivateKey, issuer: Ed25519PrivateKey, seeds: dict[str, str], mesh_id: bytes) -> dict[str, Any]:
    keyset = seal_keyset(root, name="vectors", seq=8, issued=NOW, issuers=[_issuer("keys-1", issuer, Purpose.DOCUMENT)])
    order = Order(node_id=bytes(range(32)), action=Action.DRAIN, issued=NOW + 0.25, expires=NOW + 300.0, reason="new driver")
    return {
        "now": NOW,
        "seeds": {name: seeds[name] for name in ("root", "keys-1")},
        "mesh_id": mesh_id.hex(),
        "keyset": keyset.hex(),
        "node": order.node_id.hex(),
        "action": str(order.action),
        "issued": order.issued,
        "expires": order.expires,
        "reason": order.reason,
        "order": seal_order(order, issuer, "keys-1").signed.hex(),
    }


def _record(node: Ed25519PrivateKey, membership: bytes) -> dict[str, Any]:
    record = Record(
        node_id=key_id(raw_public_key(node.public_key())),
        role=Role.WORKER,
        boot=int(NOW * 1000) - 5000,
        seq=42,
        issued=NOW,
        expires=NOW + 20.0,
        state=State.READY,
        addresses=("192.0.2.9:7700", "[2001:db8::9]:7700"),
        models=(
            ModelEntry(name="qwen3-8b", digest="sha256:" + "ab" * 32, adapters=("legal",), context_tokens=8192),
            ModelEntry(name="minilm", tasks=("embeddings",)),
        ),
        capability=Capability(
            gpu="NVIDIA L4", gpu_count=1, memory_bytes=24 << 30, region="eu-1", tier="spot", engine="vllm", max_concurrency=500
        ),
        load=Load(running=3, waiting=1, kv_use=0.25),
        version="0.1.0",
    )
    return {"node_id": record.node_id.hex(), "record": seal_record(record, node, membership).signed.hex()}


def _receipts(node: Ed25519PrivateKey, membership: bytes) -> dict[str, Any]:
    """Three receipts, the batch they are signed in, and the path of the second."""
    at = int(NOW * 1000)
    plain = Receipt(id="req_1", attempt=1, at=at, side=Role.WORKER, peer=bytes(32), project="search", key=bytes(range(8)), model="qwen3-8b")
    receipts = (
        replace(plain, digest="sha256:" + "ab" * 32, task="chat", prompt=100, cached=64, completion=20, events=21, size_bytes=4200),
        replace(plain, id="req_2", attempt=2, resumed=7, prompt=107, completion=5, size_bytes=900, status="cancelled", own_count=True),
        replace(plain, id="up_1", kind=Kind.UPTIME, peer=b"", project="", key=b"", gpus=2, took_ms=60_000),
    )
    bodies = [encode_receipt(receipt) for receipt in receipts]
    leaves = [leaf_hash(body) for body in bodies]
    batch = seal_batch(node, membership, number=1, count=len(bodies), root=root_hash(leaves), previous=b"", at=at + 1000)
    return {
        "receipts": [body.hex() for body in bodies],
        "root": root_hash(leaves).hex(),
        "path_of_the_second": [step.hex() for step in audit_path(leaves, 1)],
        "batch": batch.hex(),
    }


def _issuer(kid: str, key: Ed25519PrivateKey, *may: Purpose) -> Issuer:
    return Issuer(
        kid=kid,
        public_key=raw_public_key(key.public_key()),
        may=frozenset(may),
        not_before=NOW - DAY_S,
        expires=NOW + 365 * DAY_S,
    )


def _seed(key: Ed25519PrivateKey) -> str:
    return key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()).hex()


if __name__ == "__main__":
    write()
