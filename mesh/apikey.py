"""API keys: signed claims that any proxy can check offline.

::

    im_ ‖ base62(envelope) ‖ crc
          envelope: mesh.envelope, domain "infermesh/apikey", signer = kid of an issuer that may sign keys
          crc:      CRC-32 of everything before it, 6 base62 digits

The checksum lets a typo fail in a microsecond, before any cryptography, and lets secret scanners recognise a leaked key.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.claims import check_time, read_bytes, read_number, read_str, read_strs
from mesh.envelope import read_unverified, seal
from mesh.errors import MalformedEnvelope, UnknownSigner, UsageError
from mesh.trust import Issuer, Purpose, Trust

PREFIX = "im_"
APIKEY_DOMAIN = "infermesh/apikey"
MAX_LIFETIME_S = 90 * 24 * 3600.0
MAX_KEY_CHARS = 4096
_CRC_CHARS = 6
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_VALUE = {digit: value for value, digit in enumerate(_DIGITS)}
_SHAPE = re.compile(r"im_[1-9A-Za-z][0-9A-Za-z]+")


class KeyRole(StrEnum):
    """What the holder may do: look, call, deploy, administer. Roles do not imply one another."""

    VIEWER = "viewer"
    INVOKER = "invoker"
    DEPLOYER = "deployer"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """The verified claims of a key. ``None`` means no restriction by this key.

    ``id`` is 8 random bytes; times are wall-clock seconds; ``rps`` requests and ``tps`` tokens per second;
    ``concurrency`` requests at once; ``budget`` a money amount in the mesh's currency.
    """

    id: bytes
    project: str
    roles: frozenset[str]
    not_before: float
    expires: float
    kid: str = ""
    models: frozenset[str] | None = None
    endpoints: frozenset[str] | None = None
    region: str | None = None
    rps: float | None = None
    tps: float | None = None
    concurrency: float | None = None
    budget: float | None = None

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models

    def has_role(self, role: KeyRole) -> bool:
        return role in self.roles

    def describe(self) -> dict[str, Any]:
        """JSON-ready claims, for people. Holds nothing secret."""

        def listed(value: frozenset[str] | None) -> list[str] | None:
            return None if value is None else sorted(value)

        return {
            "id": self.id.hex(),
            "kid": self.kid,
            "project": self.project,
            "roles": sorted(self.roles),
            "models": listed(self.models),
            "endpoints": listed(self.endpoints),
            "region": self.region,
            "rps": self.rps,
            "tps": self.tps,
            "concurrency": self.concurrency,
            "budget": self.budget,
            "not_before": self.not_before,
            "expires": self.expires,
        }


_LISTS = (("m", "models"), ("e", "endpoints"))
_NUMBERS = (("rps", "rps"), ("tps", "tps"), ("con", "concurrency"), ("bud", "budget"))


def mint(claims: ApiKey, issuer: Ed25519PrivateKey, kid: str) -> str:
    """Sign a key. Raises `UsageError` if it would live more than 90 days or holds an unknown role."""
    if not 0 < claims.expires - claims.not_before <= MAX_LIFETIME_S:
        raise UsageError("an API key lives at most 90 days; create another before it ends")
    unknown = claims.roles - set(KeyRole)
    if unknown or not claims.roles:
        raise UsageError(f"roles are {', '.join(KeyRole)}" + (f", not {', '.join(sorted(unknown))}" if unknown else ""))
    payload: dict[str, Any] = {
        "id": claims.id,
        "p": claims.project,
        "r": sorted(claims.roles),
        "nbf": int(claims.not_before),
        "exp": int(claims.expires),
    }
    for short, name in _LISTS:
        if (listed := getattr(claims, name)) is not None:
            payload[short] = sorted(listed)
    for short, name in (*_NUMBERS, ("reg", "region")):
        if (value := getattr(claims, name)) is not None:
            payload[short] = value
    text = PREFIX + encode_base62(seal(APIKEY_DOMAIN, kid.encode("ascii"), issuer, payload))
    key = text + _checksum(text)
    if len(key) > MAX_KEY_CHARS:
        raise UsageError(f"this key would be {len(key)} characters long; name fewer models or endpoints")
    return key


def parse_key(text: str) -> bytes:
    """The envelope inside a key's text; shape and checksum only. Raises `MalformedEnvelope`."""
    if len(text) > MAX_KEY_CHARS or not text.isascii() or _SHAPE.fullmatch(text) is None:
        raise MalformedEnvelope("an API key looks like im_ followed by letters and digits")
    if _checksum(text[:-_CRC_CHARS]) != text[-_CRC_CHARS:]:
        raise MalformedEnvelope("the API key's checksum does not match: it was mistyped or cut off")
    return decode_base62(text[len(PREFIX) : -_CRC_CHARS])


def verify_key(text: str, trust: Trust, *, now: float) -> ApiKey:
    """Verify a key's text against the mesh. Raises a `TrustError` that says which check failed, never what was in the key."""
    issuer, opened = trust.open(APIKEY_DOMAIN, parse_key(text), Purpose.KEY, now=now, max_bytes=MAX_KEY_CHARS)
    claims = _claims_from(opened.payload, issuer.kid)
    _check_scope(claims, issuer)
    check_time("the API key", not_before=claims.not_before, expires=claims.expires, now=now)
    return claims


def read_key(text: str) -> ApiKey:
    """What a key claims, with nothing verified but its checksum: for showing to people. Raises `MalformedEnvelope`."""
    opened = read_unverified(parse_key(text))
    return _claims_from(opened.payload, opened.signer.decode("ascii", "replace"))


class KeyVerifier:
    """Verifies keys, remembering good ones by hash: 100 µs the first time, a microsecond after.

    A remembered verdict ends with the key's own expiry, its issuer's, or any change of the keyset.
    """

    def __init__(self, trust: Trust, *, size: int = 10_000) -> None:
        self._trust = trust
        self._size = size
        self._known: OrderedDict[bytes, tuple[float, ApiKey]] = OrderedDict()
        trust.on_change(self._known.clear)

    def verify(self, text: str, *, now: float) -> ApiKey:
        """As `verify_key`."""
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        known = self._known.get(digest)
        if known is not None and now < known[0]:
            return known[1]
        claims = verify_key(text, self._trust, now=now)
        issuer = self._trust.issuer(claims.kid, Purpose.KEY, now=now)
        if claims.not_before <= now:
            self._known[digest] = (min(claims.expires, issuer.expires), claims)
            if len(self._known) > self._size:
                self._known.popitem(last=False)
        return claims


def encode_base62(data: bytes) -> str:
    """Big-endian base 62. ``data`` must not begin with a zero byte (an envelope begins with its version)."""
    number, digits = int.from_bytes(data), []
    while number:
        number, rest = divmod(number, 62)
        digits.append(_DIGITS[rest])
    return "".join(reversed(digits))


def decode_base62(text: str) -> bytes:
    """The inverse of `encode_base62`. Raises `MalformedEnvelope`."""
    number = 0
    try:
        for digit in text:
            number = number * 62 + _VALUE[digit]
    except KeyError:
        raise MalformedEnvelope("not base 62") from None
    return number.to_bytes((number.bit_length() + 7) // 8)


def _checksum(text: str) -> str:
    return encode_base62(zlib.crc32(text.encode("ascii")).to_bytes(4)).rjust(_CRC_CHARS, "0")


def _claims_from(payload: dict[str, Any], kid: str) -> ApiKey:
    def optional_list(name: str) -> frozenset[str] | None:
        return frozenset(read_strs(payload, name, max_items=256)) if name in payload else None

    def optional_number(name: str) -> float | None:
        return read_number(payload, name) if name in payload else None

    roles = frozenset(read_strs(payload, "r", max_items=8, max_len=16))
    if not roles <= set(KeyRole):
        raise MalformedEnvelope("the API key holds a role this proxy does not know")
    not_before, expires = read_number(payload, "nbf"), read_number(payload, "exp")
    if expires - not_before > MAX_LIFETIME_S:
        raise MalformedEnvelope("the API key claims to live longer than 90 days")
    return ApiKey(
        id=read_bytes(payload, "id", size=8),
        project=read_str(payload, "p", max_len=64),
        roles=roles,
        not_before=not_before,
        expires=expires,
        kid=kid,
        region=read_str(payload, "reg", max_len=64) if "reg" in payload else None,
        models=optional_list("m"),
        endpoints=optional_list("e"),
        rps=optional_number("rps"),
        tps=optional_number("tps"),
        concurrency=optional_number("con"),
        budget=optional_number("bud"),
    )


def _check_scope(claims: ApiKey, issuer: Issuer) -> None:
    """An issuer can never sign more than the root allowed it."""
    if issuer.projects is not None and claims.project not in issuer.projects:
        raise UnknownSigner("the API key's issuer may not sign for its project")
    if issuer.models is not None and not _within(claims.models, issuer.models):
        raise UnknownSigner("the API key's issuer may not sign for its models")


def _within(inner: Iterable[str] | None, outer: frozenset[str]) -> bool:
    return inner is not None and outer.issuperset(inner)
