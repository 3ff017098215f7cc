"""Who may pass: the key, its scope. The first thing done with a request."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mesh.apikey import ApiKey, KeyRole, KeyVerifier
from mesh.clock import Clock
from mesh.errors import (
    BadSignature,
    Expired,
    InvalidKey,
    KeyNotAllowed,
    MalformedEnvelope,
    NotYetValid,
    OutOfScope,
    RevocationsStale,
    Revoked,
    TrustError,
)
from mesh.freshness import NEVER_STALE, Freshness
from mesh.revocations import RevocationList
from mesh.trust import Trust
from mesh.usage import MESH_PROJECT

_INVOKER = KeyRole.INVOKER


class Gate:
    """Verifies keys offline. ``region`` is this proxy's own; a key bound to another region is refused here."""

    def __init__(
        self,
        trust: Trust,
        *,
        clock: Clock,
        region: str = "",
        revoked: RevocationList | None = None,
        freshness: Freshness | None = None,
    ) -> None:
        self._revoked = revoked or RevocationList()
        self._keys = KeyVerifier(trust, revoked=self._revoked)
        self._freshness = freshness or Freshness(stale_s=0.0, fresh_until=NEVER_STALE)
        self._clock = clock
        self._region = region
        self.refused: Counter[str] = Counter()
        """Keys that did not hold, by the code of what was wrong with them."""

    def authenticate(self, authorization: str | None) -> ApiKey:
        """From the Authorization header to verified claims. Raises `InvalidKey`, which never repeats the key."""
        if not authorization:
            raise InvalidKey("No API key was given. Send it as: Authorization: Bearer im_…")
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise InvalidKey("The Authorization header must be: Bearer im_…")
        now = self._clock.wall()
        try:
            key = self._keys.verify(text.strip(), now=now)
        except TrustError as error:
            self.refused[error.code] += 1
            if isinstance(error, Expired | NotYetValid | MalformedEnvelope | OutOfScope | Revoked):
                raise InvalidKey(f"Incorrect API key: {error.message}") from None
            if isinstance(error, BadSignature):
                raise InvalidKey("Incorrect API key: its signature does not hold") from None
            raise InvalidKey("Incorrect API key: it was not issued for this mesh") from None
        if key.region is not None and key.region != self._region:
            self.refused["region"] += 1
            raise InvalidKey("Incorrect API key: it is for another region")
        if now >= self._freshness.fresh_until:
            self.refused[RevocationsStale.code] += 1
            raise self._stale()
        return key

    @property
    def fresh(self) -> bool:
        """Whether keys can be accepted at all: see `mesh.freshness`."""
        return self._clock.wall() < self._freshness.fresh_until

    @property
    def confirmed_ago_s(self) -> float:
        """How long ago the list was last confirmed to be the newest; 0 where there is none to be behind with."""
        return max(0.0, self._clock.wall() - self._freshness.confirmed) if self._revoked.newest.seq else 0.0

    def about(self) -> dict[str, Any]:
        """The revocation list as this proxy has it, for people."""
        newest, confirmed = self._revoked.newest, self._freshness.confirmed
        return {
            "seq": newest.seq,
            "issued": newest.issued or None,
            "keys": len(newest.keys),
            "projects": len(newest.projects),
            "issuers": len(newest.issuers),
            "confirmed": confirmed or None,
            "fresh": self.fresh,
        }

    def _stale(self) -> RevocationsStale:
        if not self._freshness.looked:
            return RevocationsStale("This proxy has just started and is asking which keys have been revoked", retry_after_s=1.0)
        return RevocationsStale(
            "This proxy has not been able to confirm its list of revoked keys for too long and accepts none until it has; try another",
            retry_after_s=10.0,
        )

    def authorize(self, key: ApiKey, model: str, endpoint: str = "") -> None:
        """Whether the key may call the model, through an endpoint or directly. Raises `KeyNotAllowed`."""
        if _INVOKER not in key.roles:
            raise KeyNotAllowed("This API key may not call models: it lacks the role 'invoker'")
        if not key.may_use(model, endpoint):
            what = f"the endpoint '{endpoint}'" if endpoint else f"the model '{model[:128]}'"
            raise KeyNotAllowed(f"This API key may not use {what}", param="model")

    def require(self, key: ApiKey, role: KeyRole) -> None:
        """Raises `KeyNotAllowed` unless the key holds the role or is an admin's."""
        if not key.has_role(role) and not key.has_role(KeyRole.ADMIN):
            raise KeyNotAllowed(f"This API key lacks the role '{role}'")

    def project(self, key: ApiKey) -> str | None:
        """The one project whose matters the key may look at; None for those of all, which an admin of the mesh itself may."""
        return None if key.project == MESH_PROJECT and key.has_role(KeyRole.ADMIN) else key.project
