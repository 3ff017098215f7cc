"""A node's membership: an issuer's word that a public key belongs to a node of this mesh, in a role, until a time.

It says what the node's X.509 certificate says, in a quarter of the bytes, so that it fits into every record and every
introduction datagram.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.claims import check_time, read_bytes, read_number, read_str
from mesh.envelope import seal
from mesh.errors import MalformedEnvelope, UnknownSigner
from mesh.trust import Issuer, Purpose, Role, Trust, key_id

MEMBERSHIP_DOMAIN = "infermesh/membership"
MAX_MEMBERSHIP_BYTES = 320


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Verified claims. ``node_id`` is SHA-256 of the public key's SPKI; times are wall-clock seconds."""

    node_id: bytes
    public_key: bytes
    role: Role
    issued: float
    expires: float
    signed: bytes


def seal_membership(issuer: Ed25519PrivateKey, kid: str, *, public_key: bytes, role: Role, issued: float, expires: float) -> bytes:
    payload = {"pub": public_key, "role": str(role), "iat": int(issued), "exp": int(expires)}
    return seal(MEMBERSHIP_DOMAIN, kid.encode("ascii"), issuer, payload)


def parse_membership(data: bytes, trust: Trust, *, now: float) -> Membership:
    """Verify a membership. Raises a `TrustError`."""
    issuer, opened = trust.open(MEMBERSHIP_DOMAIN, data, Purpose.NODE, now=now, max_bytes=MAX_MEMBERSHIP_BYTES)
    payload = opened.payload
    try:
        role = Role(read_str(payload, "role", max_len=16))
    except ValueError:
        raise MalformedEnvelope("unknown node role") from None
    _check_role(issuer, role)
    public_key = read_bytes(payload, "pub", size=32)
    membership = Membership(
        node_id=key_id(public_key),
        public_key=public_key,
        role=role,
        issued=read_number(payload, "iat"),
        expires=read_number(payload, "exp"),
        signed=data,
    )
    check_time("the node's membership", not_before=membership.issued, expires=membership.expires, now=now)
    return membership


class MembershipCache:
    """Remembers verdicts: a signature costs 100 µs and the same membership comes with every record of its node."""

    def __init__(self, trust: Trust, *, size: int = 20_000) -> None:
        self._trust = trust
        self._size = size
        self._known: OrderedDict[bytes, Membership] = OrderedDict()
        trust.on_change(self._known.clear)

    def parse(self, data: bytes, *, now: float) -> Membership:
        """As `parse_membership`."""
        known = self._known.get(data)
        if known is not None and now < known.expires:
            return known
        membership = parse_membership(data, self._trust, now=now)
        self._known[data] = membership
        if len(self._known) > self._size:
            self._known.popitem(last=False)
        return membership


def _check_role(issuer: Issuer, role: Role) -> None:
    if issuer.node_roles is not None and role not in issuer.node_roles:
        raise UnknownSigner(f"issuer '{issuer.kid}' may not admit a {role}")
