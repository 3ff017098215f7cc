"""Introductions: a node's word, signed with its key, on how to speak with it until it stops. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.claims import read_bool, read_bytes, read_int
from mesh.envelope import open_envelope, seal
from mesh.errors import UnknownSigner
from mesh.membership import MAX_MEMBERSHIP_BYTES, Membership, MembershipCache
from mesh.trust import raw_public_key, read_public_key

INTRODUCTION_DOMAIN = "infermesh/introduction"
MAX_INTRODUCTION_BYTES = 500


def seal_introduction(key: Ed25519PrivateKey, membership: bytes, *, exchange_key: bytes, sid: int, boot: int, serve: bool) -> bytes:
    payload: Mapping[str, object] = {"m": membership, "x": exchange_key, "s": sid, "b": boot, "v": serve}
    return seal(INTRODUCTION_DOMAIN, raw_public_key(key.public_key()), key, payload)


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """Verified. ``boot`` is the node's start in ms; ``serve`` is False for a node that only asks."""

    member: Membership
    exchange_key: bytes
    sid: int
    boot: int
    serve: bool
    signed: bytes


def parse_introduction(data: bytes, members: MembershipCache, *, now: float) -> Introduction:
    """Verify an introduction. Raises a `TrustError`."""
    opened = open_envelope(INTRODUCTION_DOMAIN, data, read_public_key, max_bytes=MAX_INTRODUCTION_BYTES)
    payload = opened.payload
    member = members.parse(read_bytes(payload, "m", max_len=MAX_MEMBERSHIP_BYTES), now=now)
    if member.public_key != opened.signer:
        raise UnknownSigner("the introduction carries another node's membership")
    return Introduction(
        member=member,
        exchange_key=read_bytes(payload, "x", size=32),
        sid=read_int(payload, "s", high=2**64 - 1),
        boot=read_int(payload, "b"),
        serve=read_bool(payload, "v"),
        signed=data,
    )
