"""Delegations: an issuer's word that another key may make API keys, within bounds, and so on downward.

A delegation is an envelope, domain ``infermesh/delegation``, signed by an issuer that may sign API keys or by the key of the delegation
above. It travels inside the API keys that are made with it, so no node has to be told of it, and the root key stays where it is. A chain
is at most `MAX_CHAIN` long, and each link keeps within the one above: what is delegated only ever gets less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.claims import check_time, read_bytes, read_number
from mesh.envelope import Opened, Resolver, open_envelope, seal
from mesh.errors import MalformedEnvelope, OutOfScope, UnknownSigner
from mesh.scope import Scope, read_scope
from mesh.trust import Issuer, Purpose, Trust, raw_public_key, read_public_key

DELEGATION_DOMAIN = "infermesh/delegation"
MAX_DELEGATION_BYTES = 2_048
MAX_CHAIN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegation:
    """``id`` is 8 random bytes, by which it can be revoked with all below it. Times are wall-clock seconds."""

    id: bytes
    public_key: bytes
    scope: Scope
    not_before: float
    expires: float
    signed: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """Who makes keys: an issuer of the keyset, or who holds the key of the last delegation of ``chain``; then ``kid`` is for people."""

    kid: str
    key: Ed25519PrivateKey
    scope: Scope
    expires: float
    chain: tuple[bytes, ...] = ()

    @property
    def name(self) -> bytes:
        """As it stands in the envelopes that it signs."""
        return raw_public_key(self.key.public_key()) if self.chain else self.kid.encode("ascii")


def seal_delegation(delegation: Delegation, signer: Signer) -> Delegation:
    """Sign; returns it with ``signed`` filled in. Raises `OutOfScope` where it goes beyond its signer's own bounds."""
    beyond = delegation.scope.beyond(signer.scope)
    if beyond is not None:
        raise OutOfScope(f"'{signer.kid}' may not pass on what it does not have: {beyond}")
    if len(signer.chain) >= MAX_CHAIN:
        raise OutOfScope(f"a chain has at most {MAX_CHAIN} delegations")
    payload = {
        "id": delegation.id,
        "pub": delegation.public_key,
        "nbf": int(delegation.not_before),
        "exp": int(delegation.expires),
    } | delegation.scope.payload()
    signed = seal(DELEGATION_DOMAIN, signer.name, signer.key, payload)
    if len(signed) > MAX_DELEGATION_BYTES:
        raise MalformedEnvelope(
            f"this delegation has {len(signed)} bytes, more than {MAX_DELEGATION_BYTES}: name fewer models or endpoints"
        )
    return replace(delegation, signed=signed)


def open_chain(chain: Sequence[bytes], trust: Trust, *, now: float) -> tuple[Issuer, tuple[Delegation, ...]]:
    """Verify a chain, the issuer's own delegation first. Raises a `TrustError`."""
    if not 1 <= len(chain) <= MAX_CHAIN:
        raise MalformedEnvelope(f"a chain has 1 to {MAX_CHAIN} delegations")
    issuer, opened = trust.open(DELEGATION_DOMAIN, chain[0], Purpose.KEY, now=now, max_bytes=MAX_DELEGATION_BYTES)
    found = [_within(_parse(opened, chain[0]), issuer.scope, now=now)]
    for signed in chain[1:]:
        opened = open_envelope(DELEGATION_DOMAIN, signed, signed_by(found[-1]), max_bytes=MAX_DELEGATION_BYTES)
        found.append(_within(_parse(opened, signed), found[-1].scope, now=now))
    return issuer, tuple(found)


def signed_by(delegation: Delegation) -> Resolver:
    """Resolves to the key of a delegation, and to no other."""

    def resolve(signer: bytes) -> bytes:
        if signer != delegation.public_key:
            raise UnknownSigner("the signer is not who was delegated to")
        return read_public_key(signer)

    return resolve


def _parse(opened: Opened, signed: bytes) -> Delegation:
    payload = opened.payload
    return Delegation(
        id=read_bytes(payload, "id", size=8),
        public_key=read_bytes(payload, "pub", size=32),
        scope=read_scope(payload),
        not_before=read_number(payload, "nbf"),
        expires=read_number(payload, "exp"),
        signed=signed,
    )


def _within(delegation: Delegation, outer: Scope, *, now: float) -> Delegation:
    beyond = delegation.scope.beyond(outer)
    if beyond is not None:
        raise OutOfScope(f"a delegation goes beyond the one above it: {beyond}")
    check_time("the delegation", not_before=delegation.not_before, expires=delegation.expires, now=now)
    return delegation
