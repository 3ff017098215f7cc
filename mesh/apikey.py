"""API keys: signed claims that any proxy can check offline.

::

    im_ ‖ base62(envelope) ‖ crc
          envelope: mesh.envelope, domain "infermesh/apikey", signer = kid of an issuer that may sign keys
          crc:      CRC-32 of everything before it, 6 base62 digits

A key may also be signed with a delegation (`mesh.delegation`): then its signer is the delegation's own public key, and it carries the
chain of delegations from an issuer down to that one. Whoever is above in the chain bounds whoever is below.

The checksum lets a typo fail in a microsecond, before any cryptography, and lets secret scanners recognise a leaked key.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.claims import check_time, read_bytes, read_number, read_str, read_strs
from mesh.delegation import MAX_CHAIN, Delegation, Signer, open_chain, signed_by
from mesh.envelope import open_envelope, read_unverified, seal, signer_of
from mesh.errors import MalformedEnvelope, OutOfScope, Revoked, UsageError
from mesh.revocations import RevocationList
from mesh.scope import MAX_LIFETIME_S, UNBOUNDED, Scope
from mesh.trust import Purpose, Trust

PREFIX = "im_"
APIKEY_DOMAIN = "infermesh/apikey"
MAX_KEY_CHARS = 4096
_CRC_CHARS = 6
_PUBLIC_KEY_BYTES = 32
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_VALUE = {digit: value for value, digit in enumerate(_DIGITS)}
_STEP = 10
"""So many digits of base 62 fit a machine word."""
_SHAPE = re.compile(r"im_[1-9A-Za-z][0-9A-Za-z]+")


class KeyRole(StrEnum):
    """What the holder may do: look, call, deploy, administer. Roles do not imply one another."""

    VIEWER = "viewer"
    INVOKER = "invoker"
    DEPLOYER = "deployer"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """The verified claims of a key. ``None`` means no restriction by this key. ``delegations`` are the ids of those it was made with.

    ``id`` is 8 random bytes; times are wall-clock seconds; ``rps`` requests and ``tps`` tokens per second;
    ``concurrency`` requests at once; ``tokens_per_day`` by UTC; ``budget`` an amount a month in the mesh's currency.
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
    tokens_per_day: float | None = None
    budget: float | None = None
    delegations: tuple[bytes, ...] = ()

    @property
    def scope(self) -> Scope:
        """What the key asks for, as the bounds that it must keep within are said."""
        return Scope(
            projects=frozenset({self.project}),
            models=self.models,
            endpoints=self.endpoints,
            regions=None if self.region is None else frozenset({self.region}),
            roles=self.roles,
            rps=self.rps,
            tps=self.tps,
            concurrency=self.concurrency,
            tokens_per_day=self.tokens_per_day,
            budget=self.budget,
            ttl_s=self.expires - self.not_before,
        )

    def may_use(self, model: str, endpoint: str = "") -> bool:
        """Whether it may have the model answer, called through an endpoint or, without one, directly.

        Each list narrows by itself: one of endpoints leaves these and nothing else, one of models leaves these however they are called.
        So a key that is made from another can never do what that one cannot.
        """
        return (self.models is None or model in self.models) and (self.endpoints is None or endpoint in self.endpoints)

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
            "tokens_per_day": self.tokens_per_day,
            "budget": self.budget,
            "not_before": self.not_before,
            "expires": self.expires,
            **({"delegations": [delegation.hex() for delegation in self.delegations]} if self.delegations else {}),
        }


_SINGULAR = {"projects": "project", "regions": "region"}
_LISTS = (("m", "models"), ("e", "endpoints"))
_NUMBERS = (("rps", "rps"), ("tps", "tps"), ("con", "concurrency"), ("tpd", "tokens_per_day"), ("bud", "budget"))


def mint(claims: ApiKey, issuer: Ed25519PrivateKey, kid: str) -> str:
    """Sign a key with an issuer's own key. Raises `UsageError` if it would live more than 90 days or holds an unknown role."""
    return mint_with(claims, Signer(kid=kid, key=issuer, scope=UNBOUNDED, expires=claims.expires))


def mint_with(claims: ApiKey, signer: Signer) -> str:
    """Sign a key. Raises `UsageError` as `mint`, and `OutOfScope` if the signer may not make it."""
    if not 0 < claims.expires - claims.not_before <= MAX_LIFETIME_S:
        raise UsageError("an API key lives at most 90 days; create another before it ends")
    unknown = claims.roles - set(KeyRole)
    if unknown or not claims.roles:
        raise UsageError(f"roles are {', '.join(KeyRole)}" + (f", not {', '.join(sorted(unknown))}" if unknown else ""))
    _check_scope(claims, signer.scope)
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
    if signer.chain:
        payload["d"] = list(signer.chain)
    text = PREFIX + encode_base62(seal(APIKEY_DOMAIN, signer.name, signer.key, payload))
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
    return _verify(text, trust, now=now)[0]


def _verify(text: str, trust: Trust, *, now: float) -> tuple[ApiKey, float]:
    """The claims, and until when this verdict holds: the earliest end of the key and of whoever stands above it."""
    envelope = parse_key(text)
    chain = _chain_of(envelope)
    delegations: tuple[Delegation, ...] = ()
    if chain:
        issuer, delegations = open_chain(chain, trust, now=now)
        opened = open_envelope(APIKEY_DOMAIN, envelope, signed_by(delegations[-1]), max_bytes=MAX_KEY_CHARS)
    else:
        issuer, opened = trust.open(APIKEY_DOMAIN, envelope, Purpose.KEY, now=now, max_bytes=MAX_KEY_CHARS)
    claims = _claims_from(opened.payload, issuer.kid, tuple(delegation.id for delegation in delegations))
    _check_scope(claims, delegations[-1].scope if delegations else issuer.scope)
    check_time("the API key", not_before=claims.not_before, expires=claims.expires, now=now)
    return claims, min(claims.expires, issuer.expires, *(delegation.expires for delegation in delegations))


def _chain_of(envelope: bytes) -> tuple[bytes, ...]:
    """The delegations that a key brings along. Each is verified before it counts; which there are decides what the key is verified with."""
    if len(signer_of(envelope)) != _PUBLIC_KEY_BYTES:
        return ()
    chain = read_unverified(envelope).payload.get("d", [])
    if not isinstance(chain, list) or len(chain) > MAX_CHAIN or not all(isinstance(item, bytes) for item in chain):
        raise MalformedEnvelope("the API key's delegations cannot be read")
    return tuple(chain)


def read_key(text: str) -> ApiKey:
    """What a key claims, with nothing verified but its checksum: for showing to people. Raises `MalformedEnvelope`."""
    opened = read_unverified(parse_key(text))
    signer = opened.signer
    return _claims_from(opened.payload, signer.hex() if len(signer) == _PUBLIC_KEY_BYTES else signer.decode("ascii", "replace"), ())


class KeyVerifier:
    """Verifies keys, remembering good ones by hash: 100 µs the first time, a microsecond after.

    A remembered verdict ends with the key's own expiry, with that of whoever made it, with a change of the keyset, or with a revocation.
    """

    def __init__(self, trust: Trust, *, revoked: RevocationList | None = None, size: int = 10_000) -> None:
        self._trust = trust
        self._revoked = revoked or RevocationList()
        self._size = size
        self._known: OrderedDict[bytes, tuple[float, ApiKey]] = OrderedDict()
        trust.on_change(self._known.clear)
        self._revoked.on_change(self._forget_revoked)

    def verify(self, text: str, *, now: float) -> ApiKey:
        """As `verify_key`; also raises `Revoked`."""
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        known = self._known.get(digest)
        if known is not None and now < known[0]:
            return known[1]
        claims, until = _verify(text, self._trust, now=now)
        newest = self._revoked.newest
        reason = newest.refuses(claims, now=now)
        if reason is not None:
            raise Revoked(reason)
        if claims.not_before <= now:
            self._known[digest] = (min(until, newest.holds_until(claims)), claims)
            if len(self._known) > self._size:
                self._known.popitem(last=False)
        return claims

    def _forget_revoked(self) -> None:
        """Once for each new list, so that a request asks nothing of it."""
        newest = self._revoked.newest
        for digest, (until, claims) in list(self._known.items()):
            if newest.refuses(claims, now=0.0) is not None:
                del self._known[digest]
            elif newest.later:
                self._known[digest] = (min(until, newest.holds_until(claims)), claims)


def encode_base62(data: bytes) -> str:
    """Big-endian base 62. ``data`` must not begin with a zero byte (an envelope begins with its version)."""
    number, digits = int.from_bytes(data), []
    while number:
        number, rest = divmod(number, 62)
        digits.append(_DIGITS[rest])
    return "".join(reversed(digits))


def decode_base62(text: str) -> bytes:
    """The inverse of `encode_base62`. Raises `MalformedEnvelope`."""
    text = "0" * (-len(text) % _STEP) + text
    words = []
    try:
        for at in range(0, len(text), _STEP):
            word = 0
            for digit in text[at : at + _STEP]:
                word = word * 62 + _VALUE[digit]
            words.append(word)
    except KeyError:
        raise MalformedEnvelope("not base 62") from None
    power = 62**_STEP
    while len(words) > 1:  # by halves: digit by digit, a key of the greatest length, which anybody may send, took 14 ms
        words = [0] * (len(words) % 2) + words
        words = [high * power + low for high, low in zip(words[::2], words[1::2], strict=True)]
        power *= power
    number = words[0] if words else 0
    return number.to_bytes((number.bit_length() + 7) // 8)


def _checksum(text: str) -> str:
    return encode_base62(zlib.crc32(text.encode("ascii")).to_bytes(4)).rjust(_CRC_CHARS, "0")


def _claims_from(payload: dict[str, Any], kid: str, delegations: tuple[bytes, ...]) -> ApiKey:
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
        tokens_per_day=optional_number("tpd"),
        budget=optional_number("bud"),
        delegations=delegations,
    )


def _check_scope(claims: ApiKey, bounds: Scope) -> None:
    """Nobody can sign more than whoever stands above allowed."""
    beyond = claims.scope.beyond(bounds)
    if beyond is not None:
        raise OutOfScope(f"the API key's issuer may not sign for its {_SINGULAR.get(beyond, beyond)}")
