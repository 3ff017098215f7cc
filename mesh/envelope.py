"""The one signed envelope.

Everything signed in a mesh (keysets, API keys, memberships, invitations, records, documents) has this shape, so that there is
one parser to review and one to fuzz::

    version (1) ‖ signer length (1) ‖ signer ‖ payload (msgpack map) ‖ Ed25519 signature (64)

    signature = Ed25519(domain ‖ 0x00 ‖ every byte before the signature)

* The *domain* is never sent: the reader knows what it expects. A thing signed for one purpose verifies for no other.
* The *version* fixes the algorithm; there is nothing to negotiate.
* The *signer* is an issuer's ``kid`` or a raw 32-byte public key; the caller's resolver decides whether it may sign here.
* The received bytes are verified as they came, never a re-encoding, and only then is the payload parsed, within limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nacl.bindings import crypto_sign_open
from nacl.exceptions import CryptoError

from mesh.errors import BadSignature, MalformedEnvelope

VERSION = 1
SIGNATURE_BYTES = 64
MAX_SIGNER_BYTES = 32
MAX_ENVELOPE_BYTES = 68 * 1024
"""A 64 KiB document and its frame; smaller kinds pass a smaller bound of their own."""

Resolver = Callable[[bytes], bytes]
"""From the signer named in an envelope to its raw public key, or raises `UnknownSigner`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a verified envelope held: its signer as named, and its payload, parsed."""

    signer: bytes
    payload: dict[str, Any]


def seal(domain: str, signer: bytes, key: Ed25519PrivateKey, payload: Mapping[str, Any]) -> bytes:
    """Sign ``payload`` for ``domain``. ``signer`` is what the reader's resolver will be asked for (1 to 32 bytes)."""
    if not 1 <= len(signer) <= MAX_SIGNER_BYTES:
        raise ValueError("signer must be 1 to 32 bytes")
    packed: bytes = msgpack.packb(dict(payload), use_bin_type=True)
    body = bytes((VERSION, len(signer))) + signer + packed
    return body + key.sign(_signed(domain, body))


def open_envelope(domain: str, data: bytes, resolve: Resolver, *, max_bytes: int = MAX_ENVELOPE_BYTES) -> Opened:
    """Verify, then parse.

    Raises `MalformedEnvelope` (shape, version or size), whatever ``resolve`` raises, or `BadSignature`. Never another
    exception, whatever the bytes.
    """
    body, signer, payload_at = _split(data, max_bytes)
    key = resolve(signer)
    try:
        crypto_sign_open(data[-SIGNATURE_BYTES:] + _signed(domain, body), key)
    except CryptoError:  # of libsodium: twice as fast as OpenSSL's, and it refuses weak keys
        raise BadSignature from None
    return Opened(signer=signer, payload=parse_payload(body[payload_at:]))


def signer_of(data: bytes) -> bytes:
    """Who the envelope says signed it. Unverified: for choosing what to verify with, for nothing else."""
    return _split(data, MAX_ENVELOPE_BYTES)[1]


def read_unverified(data: bytes) -> Opened:
    """What an envelope claims, signature not looked at: for showing to people, and for a newcomer who cannot verify yet."""
    body, signer, payload_at = _split(data, MAX_ENVELOPE_BYTES)
    return Opened(signer=signer, payload=parse_payload(body[payload_at:]))


def parse_payload(data: bytes) -> dict[str, Any]:
    """Parse one msgpack map with string keys from outside, within limits. Raises `MalformedEnvelope`."""
    size = len(data)
    try:
        payload = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=size,
            max_bin_len=size,
            max_array_len=4096,
            max_map_len=1024,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise MalformedEnvelope(f"payload is not valid msgpack ({type(error).__name__})") from None
    if not isinstance(payload, dict):
        raise MalformedEnvelope("payload is not a map")
    for key in payload:
        if type(key) is not str:
            raise MalformedEnvelope("payload keys must be strings")
    return payload


def _split(data: bytes, max_bytes: int) -> tuple[bytes, bytes, int]:
    if len(data) > max_bytes:
        raise MalformedEnvelope(f"{len(data)} bytes, more than the {max_bytes} allowed")
    if len(data) < 2 + 1 + 1 + SIGNATURE_BYTES:
        raise MalformedEnvelope("too short")
    if data[0] != VERSION:
        raise MalformedEnvelope(f"unknown version {data[0]}")
    payload_at = 2 + data[1]
    if not 1 <= data[1] <= MAX_SIGNER_BYTES or payload_at >= len(data) - SIGNATURE_BYTES:
        raise MalformedEnvelope("bad signer length")
    return data[:-SIGNATURE_BYTES], data[2:payload_at], payload_at


def _signed(domain: str, body: bytes) -> bytes:
    return domain.encode("ascii") + b"\x00" + body
