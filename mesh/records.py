"""Records: what a node says about itself in the directory. Pure.

A record is an envelope signed by the node's own key and carries the node's membership, so whoever holds it can check everything
offline: the key belongs to a node of this mesh, in this role, and this node said this,
at this time. It lives for seconds, and the highest ``(boot, seq)`` wins; there is no voting. At most 1,000 bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.claims import (
    CLOCK_SKEW_S,
    check_time,
    read_bytes,
    read_int,
    read_maps,
    read_number,
    read_str,
    read_strs,
)
from mesh.envelope import open_envelope, read_unverified, seal
from mesh.errors import MalformedEnvelope, UnknownSigner
from mesh.membership import MAX_MEMBERSHIP_BYTES, Membership, MembershipCache
from mesh.pulse import PULSE_BYTES, anchor_of
from mesh.trust import Role, raw_public_key, read_public_key

RECORD_DOMAIN = "infermesh/record"
MAX_RECORD_BYTES = 1000
FIRST_HAND_SKEW_S = 2 * CLOCK_SKEW_S
MAX_LIFETIME_S = 60.0
"""A record may not promise to live longer than this, whatever its owner says."""


class State(StrEnum):
    """Where a node is in its life. Only ``ready`` workers get requests."""

    JOINING = "joining"
    STARTING = "starting"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One model a worker serves. ``digest`` names the exact version; ``tasks`` are chat, completions, embeddings, responses."""

    name: str
    digest: str = ""
    tasks: tuple[str, ...] = ("chat", "completions")
    adapters: tuple[str, ...] = ()
    context_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """What the machine is. Memory in bytes over all GPUs; 0 GPUs means it computes on its CPU."""

    gpu: str = ""
    gpu_count: int = 0
    memory_bytes: int = 0
    region: str = ""
    tier: str = ""
    engine: str = ""
    max_concurrency: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Coarse load at signing time; the exact load travels over links. ``kv_use`` is 0 to 1."""

    running: int = 0
    waiting: int = 0
    kv_use: float = 0.0


_NO_CAPABILITY, _NO_LOAD = Capability(), Load()
_CAPABILITY_FIELDS = ("gpu", "gpus", "mb", "reg", "tier", "eng", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A verified record, or one about to be signed. Times are wall-clock seconds; ``boot`` is the node's start in ms.

    ``addresses`` are ``host:port`` of the link listener, empty for a node that only dials out. ``api`` is a proxy's base URL.
    """

    node_id: bytes
    role: Role
    boot: int
    seq: int
    issued: float
    expires: float
    state: State
    addresses: tuple[str, ...] = ()
    models: tuple[ModelEntry, ...] = ()
    capability: Capability = field(default_factory=Capability)
    load: Load = field(default_factory=Load)
    reason: str = ""
    api: str = ""
    version: str = ""
    signed: bytes = b""
    anchor: bytes = b""
    """What its pulses are checked against, empty if it cannot have any; see `mesh.pulse`."""
    pulse: int = 0
    """Its owner has said so many seconds after ``issued`` that it still holds; ``expires`` has it in."""

    @property
    def order(self) -> tuple[int, int]:
        """Which of two records of one node is the newer."""
        return self.boot, self.seq

    @property
    def outbound_only(self) -> bool:
        return not self.addresses

    @property
    def freshness(self) -> tuple[int, int, float]:
        """Which of two copies is worth more: the newer, and of the same record the one that lives longer."""
        return self.boot, self.seq, self.expires

    @property
    def confirmed(self) -> float:
        """When its owner last said so: as it signed it, or with its latest pulse."""
        return self.issued + self.pulse

    def alive(self, now: float) -> bool:
        return now < self.expires

    def serves(self, model: str) -> bool:
        return any(entry.name == model for entry in self.models)


def seal_record(record: Record, key: Ed25519PrivateKey, membership: bytes) -> Record:
    """Sign ``record`` with its node's key; returns it with ``signed`` filled in."""
    capability, load = record.capability, record.load
    anchor = anchor_of(key, record.boot, record.seq)
    payload: dict[str, Any] = {
        "mem": membership,
        "boot": record.boot,
        "seq": record.seq,
        "iat": int(record.issued * 1000),
        "exp": int(record.expires * 1000),
        "st": str(record.state),
        "hb": anchor,
    }
    optional: dict[str, Any] = {
        "addr": list(record.addresses),
        "mod": [_model_payload(entry) for entry in record.models],
        "why": record.reason[:120],
        "api": record.api,
        "ver": record.version,
        "load": [load.running, load.waiting, round(load.kv_use * 1000)] if load != Load() else None,
        "gpu": capability.gpu,
        "gpus": capability.gpu_count,
        "mb": capability.memory_bytes >> 20,
        "reg": capability.region,
        "tier": capability.tier,
        "eng": capability.engine,
        "max": capability.max_concurrency,
    }
    payload.update({name: value for name, value in optional.items() if value})
    signed = seal(RECORD_DOMAIN, raw_public_key(key.public_key()), key, payload)
    if len(signed) > MAX_RECORD_BYTES:
        raise MalformedEnvelope(
            f"this node's record is {len(signed)} bytes, more than {MAX_RECORD_BYTES}: name fewer models, adapters or addresses"
        )
    return replace(record, signed=signed, anchor=anchor)


def parse_record(data: bytes, members: MembershipCache, *, now: float, first_hand: bool = False) -> Record:
    """Verify a record from anywhere. Raises a `TrustError`; the lifetime is clamped to `MAX_LIFETIME_S`.

    ``first_hand``: it came from its owner just now, over a connection that proves it. Then it is as old as its arrival, whatever the
    owner's clock says, within `FIRST_HAND_SKEW_S`: two honest clocks must not cut a link that works.
    """
    opened = open_envelope(RECORD_DOMAIN, data, read_public_key, max_bytes=MAX_RECORD_BYTES)
    payload = opened.payload
    member = members.parse(read_bytes(payload, "mem", max_len=MAX_MEMBERSHIP_BYTES), now=now)
    if member.public_key != opened.signer:
        raise UnknownSigner("the record carries another node's membership")
    issued, expires = read_int(payload, "iat") / 1000, read_int(payload, "exp") / 1000
    skew_s = FIRST_HAND_SKEW_S if first_hand else CLOCK_SKEW_S
    if first_hand and abs(now - issued) <= FIRST_HAND_SKEW_S:
        issued, expires = now, now + expires - issued
    return _record_from(payload, member, data, now, issued=issued, expires=expires, skew_s=skew_s)


def _record_from(
    payload: dict[str, Any], member: Membership, data: bytes, now: float, *, issued: float, expires: float, skew_s: float
) -> Record:
    expires = min(expires, issued + MAX_LIFETIME_S, now + MAX_LIFETIME_S, member.expires)
    check_time("the record", not_before=issued, expires=expires, now=now)
    try:
        state = State(read_str(payload, "st", max_len=16))
    except ValueError:
        raise MalformedEnvelope("unknown state") from None
    return Record(
        node_id=member.node_id,
        role=member.role,
        boot=read_int(payload, "boot", high=int((now + skew_s) * 1000)),
        seq=read_int(payload, "seq"),
        issued=issued,
        expires=expires,
        state=state,
        addresses=read_strs(payload, "addr", default=(), max_items=8),
        models=tuple(_model_from(item) for item in read_maps(payload, "mod")),
        capability=_capability_from(payload),
        load=_load_from(payload),
        reason=read_str(payload, "why", default="", max_len=120),
        api=read_str(payload, "api", default=""),
        version=read_str(payload, "ver", default="", max_len=32),
        signed=data,
        anchor=read_bytes(payload, "hb", default=b"", size=PULSE_BYTES),
    )


def member_until(record: Record) -> float:
    """Until when its node is a member, wall clock. ``record`` came out of `parse_record`, which has verified all of it."""
    membership = read_bytes(read_unverified(record.signed).payload, "mem", max_len=MAX_MEMBERSHIP_BYTES)
    return read_number(read_unverified(membership).payload, "exp")


def _model_payload(entry: ModelEntry) -> dict[str, Any]:
    payload: dict[str, Any] = {"n": entry.name}
    optional = {
        "d": entry.digest,
        "t": list(entry.tasks) if entry.tasks != ModelEntry(name="").tasks else None,
        "a": list(entry.adapters),
        "c": entry.context_tokens,
    }
    payload.update({name: value for name, value in optional.items() if value})
    return payload


def _model_from(payload: dict[str, Any]) -> ModelEntry:
    name = read_str(payload, "n")
    if len(payload) == 1:
        return ModelEntry(name=name)
    return ModelEntry(
        name=name,
        digest=read_str(payload, "d", default="", max_len=80),
        tasks=read_strs(payload, "t", default=ModelEntry(name="").tasks, max_items=16, max_len=32),
        adapters=read_strs(payload, "a", default=(), max_items=64),
        context_tokens=read_int(payload, "c", default=0, high=2**31),
    )


def _capability_from(payload: dict[str, Any]) -> Capability:
    if payload.keys().isdisjoint(_CAPABILITY_FIELDS):
        return _NO_CAPABILITY
    return Capability(
        gpu=read_str(payload, "gpu", default="", max_len=64),
        gpu_count=read_int(payload, "gpus", default=0, high=1024),
        memory_bytes=read_int(payload, "mb", default=0, high=2**32) << 20,
        region=read_str(payload, "reg", default="", max_len=64),
        tier=read_str(payload, "tier", default="", max_len=64),
        engine=read_str(payload, "eng", default="", max_len=32),
        max_concurrency=read_int(payload, "max", default=0, high=10**6),
    )


def _load_from(payload: dict[str, Any]) -> Load:
    values = payload.get("load")
    if values is None and "load" not in payload:
        return _NO_LOAD
    if not isinstance(values, list) or len(values) != 3:
        raise MalformedEnvelope("'load' must be three integers")
    fields = dict(zip(("running", "waiting", "kv"), values, strict=True))
    return Load(
        running=read_int(fields, "running", high=10**6),
        waiting=read_int(fields, "waiting", high=10**6),
        kv_use=read_int(fields, "kv", high=1000) / 1000,
    )


def directory_key(kind: str, name: str = "", shard: int = 0) -> bytes:
    """Where in the directory's 256-bit space something is found: SHA-256 over kind, name and shard."""
    return hashlib.sha256(b"\x00".join((b"infermesh/key", kind.encode(), name.encode(), shard.to_bytes(2)))).digest()


def role_key(role: Role, shard: int = 0) -> bytes:
    """Where all nodes of a role are found."""
    return directory_key("role", str(role), shard)


def model_key(model: str, shard: int = 0) -> bytes:
    """Where the ready workers of a model are found."""
    return directory_key("model", model, shard)


def record_keys(record: Record) -> Iterator[bytes]:
    """Under which keys a record is published: its role always, its models once it is ready."""
    yield role_key(record.role)
    if record.state == State.READY:
        for entry in record.models:
            yield model_key(entry.name)


def newest(records: Iterable[Record], *, now: float) -> dict[bytes, Record]:
    """By node id, the newest live record of each. Merging views is this and nothing else."""
    best: dict[bytes, Record] = {}
    for record in records:
        known = best.get(record.node_id)
        if record.alive(now) and (known is None or record.freshness > known.freshness):
            best[record.node_id] = record
    return best
