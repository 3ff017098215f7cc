"""Join tokens: what an operator hands to a machine so that it may enrol, once, in one role.

A token carries the mesh id, so the newcomer knows whom to trust before it speaks; where the bootstrap nodes are; and an
envelope signed by an issuer, so that any bootstrap node can check it with nothing shared between them but the keyset.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.apikey import decode_base62, encode_base62
from mesh.claims import check_time, read_bytes, read_int, read_number, read_str, read_strs
from mesh.envelope import read_unverified, seal
from mesh.errors import MalformedEnvelope, UsageError
from mesh.trust import Purpose, Role, Trust

INVITE_DOMAIN = "infermesh/invite"
PREFIX = "imjoin_"
MAX_TOKEN_CHARS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    """Verified claims. ``id`` is 16 random bytes: the one-time secret's name on the list of spent ones."""

    id: bytes
    role: Role
    uses: int
    issued: float
    expires: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinToken:
    """What a newcomer reads out of its token before it can verify anything: whom to trust, where to go, what to show."""

    mesh_id: bytes
    bootstraps: tuple[str, ...]
    signed: bytes
    role: Role


def seal_invite(issuer: Ed25519PrivateKey, kid: str, invite: Invite, *, mesh_id: bytes, bootstraps: tuple[str, ...]) -> str:
    """The token's text."""
    if not bootstraps:
        raise UsageError("a join token must name at least one bootstrap node: --bootstrap HOST:PORT")
    payload = {
        "id": invite.id,
        "mesh": mesh_id,
        "at": list(bootstraps),
        "role": str(invite.role),
        "uses": invite.uses,
        "iat": int(invite.issued),
        "exp": int(invite.expires),
    }
    signed = seal(INVITE_DOMAIN, kid.encode("ascii"), issuer, payload)
    return PREFIX + encode_base62(signed + zlib.crc32(signed).to_bytes(4))


def parse_token(text: str) -> JoinToken:
    """Read a token's text. Raises `MalformedEnvelope`; nothing is verified yet but its checksum."""
    text = text.strip()
    if not text.startswith(PREFIX) or len(text) > MAX_TOKEN_CHARS:
        raise MalformedEnvelope(f"a join token starts with {PREFIX}; make one with `mesh invite`")
    data = decode_base62(text[len(PREFIX) :])
    signed, checksum = data[:-4], data[-4:]
    if zlib.crc32(signed).to_bytes(4) != checksum:
        raise MalformedEnvelope("the join token's checksum does not match: it was mistyped or cut off")
    payload = read_unverified(signed).payload
    bootstraps = read_strs(payload, "at", max_items=16)
    if not bootstraps:
        raise MalformedEnvelope("the join token names no bootstrap node")
    return JoinToken(mesh_id=read_bytes(payload, "mesh", size=32), bootstraps=bootstraps, signed=signed, role=_role(payload))


def verify_invite(signed: bytes, trust: Trust, *, now: float) -> Invite:
    """What a bootstrap node does with the envelope it is shown. Raises a `TrustError`."""
    _, opened = trust.open(INVITE_DOMAIN, signed, Purpose.INVITE, now=now)
    payload = opened.payload
    if read_bytes(payload, "mesh", size=32) != trust.mesh_id:
        raise MalformedEnvelope("the join token is for another mesh")
    invite = Invite(
        id=read_bytes(payload, "id", size=16),
        role=_role(payload),
        uses=read_int(payload, "uses", low=1, high=100_000),
        issued=read_number(payload, "iat"),
        expires=read_number(payload, "exp"),
    )
    check_time("the join token", not_before=invite.issued, expires=invite.expires, now=now)
    return invite


def _role(payload: dict[str, object]) -> Role:
    try:
        return Role(read_str(payload, "role", max_len=16))
    except ValueError:
        raise MalformedEnvelope("unknown node role") from None
