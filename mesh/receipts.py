"""Receipts: what one node says about one attempt of one request, or about a stretch of time in which it kept a model warm. Pure.

Worker and proxy each write one, from what each saw itself; `mesh.usage` lays the two side by side. A receipt names neither prompt nor
answer. It is a msgpack map with short names; what is empty or zero is left out.

Receipts are signed in batches: an envelope in the domain ``infermesh/receipts`` by the node's own key holds the Merkle root over a
batch, the digest of the batch before, and the node's membership, so that each single receipt can be shown to be a member's, and that
none was taken out afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from itertools import pairwise
from operator import attrgetter
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.claims import CLOCK_SKEW_S, read_bool, read_bytes, read_int, read_str
from mesh.envelope import open_envelope, parse_payload, seal
from mesh.errors import BadSignature, MalformedEnvelope, NotYetValid, UnknownSigner
from mesh.membership import MAX_MEMBERSHIP_BYTES, parse_membership
from mesh.merkle import HASH_BYTES, leaf_hash, verify_path
from mesh.trust import Role, Trust, raw_public_key, read_public_key

RECEIPTS_DOMAIN = "infermesh/receipts"
MAX_RECEIPT_BYTES = 1200
MAX_BATCH_BYTES = 700
MAX_BATCH_RECEIPTS = 1 << 20
MAX_PROOF_BYTES = MAX_RECEIPT_BYTES + MAX_BATCH_BYTES + 20 * HASH_BYTES + 64
MAX_TOKENS = 10**9
MAX_MS = 10**13
"""Of a moment or a stretch: the year 2286."""

Row = tuple[int, bytes]
"""``at`` of a receipt, and its bytes."""

_DIGEST = "sha256:"
_pack = msgspec.msgpack.Encoder().encode
"""The same bytes as msgpack's own packer, in a third of the time."""


class Kind(StrEnum):
    """What a receipt is about."""

    CALL = "call"
    UPTIME = "uptime"


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """One attempt. Times are wall-clock milliseconds, stretches milliseconds, tokens and bytes counts.

    ``at`` is when the request came, by its proxy's clock: the same in every receipt of a request, so that all copies fall on the same
    day. ``side`` is the writer's role and ``peer`` the other node. Of a worker the tokens are its engine's own count (or, with
    ``own_count``, the worker's); of a proxy they are what the worker claimed, or what went through by its own count. ``resumed`` is how
    much of ``prompt`` was the answer of earlier attempts, given to this one to go on from.
    """

    id: str
    attempt: int
    at: int
    side: Role
    kind: Kind = Kind.CALL
    peer: bytes = b""
    project: str = ""
    key: bytes = b""
    endpoint: str = ""
    model: str = ""
    digest: str = ""
    adapter: str = ""
    task: str = ""
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    resumed: int = 0
    events: int = 0
    size_bytes: int = 0
    queue_ms: int = 0
    engine_ms: int = 0
    first_ms: int = 0
    took_ms: int = 0
    done: int = 0
    gpus: int = 0
    status: str = "ok"
    own_count: bool = False
    final: bool = False

    def row(self) -> Row:
        """As a ledger keeps it."""
        return (self.at, encode_receipt(self))

    @property
    def order(self) -> tuple[int, str, int]:
        """Where it stands among all receipts of all nodes: the attempts of a request follow one another."""
        return (self.at, self.id, self.attempt)

    @property
    def complete(self) -> bool:
        return self.status == "ok"

    @property
    def delivered(self) -> bool:
        """Whether any of an answer was passed on: what was not is not charged for."""
        return self.size_bytes > 0

    @property
    def partial(self) -> bool:
        """Cut off half-way, and charged for what had been delivered."""
        return not self.complete and self.delivered


_TEXTS = (
    ("p", "project", 64),
    ("ep", "endpoint", 128),
    ("m", "model", 256),
    ("a", "adapter", 256),
    ("t", "task", 32),
)
_COUNTS = (
    ("in", "prompt", MAX_TOKENS),
    ("cached", "cached", MAX_TOKENS),
    ("out", "completion", MAX_TOKENS),
    ("think", "reasoning", MAX_TOKENS),
    ("base", "resumed", MAX_TOKENS),
    ("ev", "events", MAX_TOKENS),
    ("b", "size_bytes", 1 << 50),
    ("q", "queue_ms", MAX_MS),
    ("e", "engine_ms", MAX_MS),
    ("first", "first_ms", MAX_MS),
    ("ms", "took_ms", MAX_MS),
    ("done", "done", MAX_MS),
    ("gpu", "gpus", 1024),
)
_FLAGS = (("own", "own_count"), ("fin", "final"))


_SHORT = ("id", "n", "at", "peer", "key", *(short for short, *_ in (*_TEXTS, *_COUNTS, *_FLAGS)))
_values_of = attrgetter("id", "attempt", "at", "peer", "key", *(name for _, name, *_ in (*_TEXTS, *_COUNTS, *_FLAGS)))


def encode_receipt(receipt: Receipt) -> bytes:
    """The bytes that are kept, hashed and sent. Numbers must be within the bounds that `parse_receipt` holds them to."""
    fields = {short: value for short, value in zip(_SHORT, _values_of(receipt), strict=True) if value}
    fields["n"], fields["at"] = receipt.attempt, receipt.at
    if receipt.side == Role.PROXY:
        fields["px"] = True
    if receipt.kind == Kind.UPTIME:
        fields["up"] = True
    if receipt.status != "ok":
        fields["st"] = receipt.status
    if receipt.digest:
        fields["d"] = bytes.fromhex(receipt.digest.removeprefix(_DIGEST)) if receipt.digest.startswith(_DIGEST) else receipt.digest
    return pack_receipt(fields)


def pack_receipt(fields: Mapping[str, Any] | Slip) -> bytes:
    """For who writes the fields by their short names: see PROTOCOL.md."""
    return _pack(fields)


class Slip(msgspec.Struct, omit_defaults=True, gc=False, rename={"prompt": "in"}):
    """A call's receipt by its short names, as a proxy fills it in with every request: half the time of a dictionary."""

    id: str
    n: int
    at: int
    px: bool
    p: str
    key: bytes
    t: str
    ms: int
    done: int
    m: str
    ep: str = ""
    st: str = ""
    fin: bool = False
    own: bool = False
    peer: bytes = b""
    ev: int = 0
    b: int = 0
    first: int = 0
    prompt: int = 0
    cached: int = 0
    out: int = 0
    think: int = 0
    base: int = 0


def parse_receipt(data: bytes) -> Receipt:
    """A receipt from anywhere. Raises `MalformedEnvelope` and nothing else, whatever the bytes."""
    if len(data) > MAX_RECEIPT_BYTES:
        raise MalformedEnvelope(f"a receipt has at most {MAX_RECEIPT_BYTES} bytes, this one {len(data)}")
    fields = parse_payload(data)
    digest = fields.get("d", "")
    if isinstance(digest, bytes):
        digest = _DIGEST + read_bytes(fields, "d", size=32).hex()
    elif digest:
        digest = read_str(fields, "d", max_len=80)
    return Receipt(
        id=read_str(fields, "id", max_len=64),
        attempt=read_int(fields, "n", high=1000),
        at=read_int(fields, "at", high=MAX_MS),
        side=Role.PROXY if read_bool(fields, "px", default=False) else Role.WORKER,
        kind=Kind.UPTIME if read_bool(fields, "up", default=False) else Kind.CALL,
        peer=read_bytes(fields, "peer", size=32) if "peer" in fields else b"",
        key=read_bytes(fields, "key", size=8) if "key" in fields else b"",
        status=read_str(fields, "st", default="ok", max_len=64),
        digest=digest,
        **{name: read_str(fields, short, default="", max_len=most) for short, name, most in _TEXTS},  # type: ignore[arg-type]
        **{name: read_int(fields, short, default=0, high=most) for short, name, most in _COUNTS},  # type: ignore[arg-type]
        **{name: read_bool(fields, short, default=False) for short, name in _FLAGS},  # type: ignore[arg-type]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A signed batch: ``count`` receipts under ``root``, the ``number``-th batch of its node. ``at`` in wall-clock milliseconds."""

    node_id: bytes
    role: Role
    number: int
    count: int
    root: bytes
    previous: bytes
    at: int
    signed: bytes

    @property
    def digest(self) -> bytes:
        """What the next batch names as its predecessor."""
        return batch_digest(self.signed)


def batch_digest(signed: bytes) -> bytes:
    return sha256(signed).digest()


def seal_batch(key: Ed25519PrivateKey, membership: bytes, *, number: int, count: int, root: bytes, previous: bytes, at: int) -> bytes:
    """Sign a batch with the node's own key. ``previous`` is the digest of the batch before, empty for the first."""
    payload = {"mem": membership, "no": number, "n": count, "root": root, "prev": previous, "at": at}
    return seal(RECEIPTS_DOMAIN, raw_public_key(key.public_key()), key, payload)


def parse_batch(data: bytes, trust: Trust, *, now: float) -> Batch:
    """Verify a batch from anywhere. Raises a `TrustError`.

    The membership must have held when the batch was signed, not now: receipts outlive certificates. So a node can date a batch back
    to when it was a member; what it says there of a request, the other side's receipt of the request must bear out.
    """

    def resolve(signer: bytes) -> bytes:
        if len(signer) != 32:
            raise UnknownSigner("receipts are signed by a node's own key")
        return read_public_key(signer)

    opened = open_envelope(RECEIPTS_DOMAIN, data, resolve, max_bytes=MAX_BATCH_BYTES)
    payload = opened.payload
    at = read_int(payload, "at", high=MAX_MS)
    if at / 1000 > now + CLOCK_SKEW_S:
        raise NotYetValid("the receipts are from the future; check this machine's clock")
    membership = parse_membership(read_bytes(payload, "mem", max_len=MAX_MEMBERSHIP_BYTES), trust, now=at / 1000)
    if membership.public_key != opened.signer:
        raise BadSignature("the receipts were not signed by the member they name")
    batch = Batch(
        node_id=membership.node_id,
        role=membership.role,
        number=read_int(payload, "no", low=1),
        count=read_int(payload, "n", low=1, high=MAX_BATCH_RECEIPTS),
        root=read_bytes(payload, "root", size=HASH_BYTES),
        previous=read_bytes(payload, "prev", max_len=HASH_BYTES),
        at=at,
        signed=data,
    )
    if len(batch.previous) != (HASH_BYTES if batch.number > 1 else 0):
        raise MalformedEnvelope("a node's first batch has no predecessor, every other names its own")
    return batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A receipt and what shows whose it is: its place in a signed batch."""

    receipt: bytes
    index: int
    path: tuple[bytes, ...]
    batch: bytes


def pack_proof(proof: Proof) -> bytes:
    """For the way from the node that has it."""
    return pack_receipt({"r": proof.receipt, "i": proof.index, "path": b"".join(proof.path), "b": proof.batch})


def parse_proof(data: bytes) -> Proof:
    """Raises `MalformedEnvelope`; proves nothing yet."""
    if len(data) > MAX_PROOF_BYTES:
        raise MalformedEnvelope(f"a proof has at most {MAX_PROOF_BYTES} bytes")
    fields = parse_payload(data)
    path = read_bytes(fields, "path")
    return Proof(
        receipt=read_bytes(fields, "r", max_len=MAX_RECEIPT_BYTES),
        index=read_int(fields, "i", high=MAX_BATCH_RECEIPTS),
        path=tuple(path[at : at + HASH_BYTES] for at in range(0, len(path), HASH_BYTES)),
        batch=read_bytes(fields, "b", max_len=MAX_BATCH_BYTES),
    )


def verify_proof(proof: Proof, trust: Trust, *, now: float) -> tuple[Receipt, Batch]:
    """What was signed, and by whom. Raises a `TrustError`."""
    batch = parse_batch(proof.batch, trust, now=now)
    if not verify_path(leaf_hash(proof.receipt), proof.index, batch.count, proof.path, batch.root):
        raise BadSignature("the receipt is not in the batch")
    receipt = parse_receipt(proof.receipt)
    if receipt.side != batch.role:
        raise BadSignature("the receipt's writer is of another role than the batch's signer")
    return receipt, batch


def check_chain(batches: Sequence[Batch]) -> None:
    """Batches of one node in order: each names the one before. Raises `BadSignature` where one is missing or was changed."""
    for former, later in pairwise(batches):
        if later.node_id != former.node_id or later.number != former.number + 1 or later.previous != former.digest:
            raise BadSignature(f"batch {later.number} does not follow batch {former.number}")
