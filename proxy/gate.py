"""Who may pass: the key, its scope. The first thing done with a request."""

from __future__ import annotations

from mesh.apikey import ApiKey, KeyRole, KeyVerifier
from mesh.clock import Clock
from mesh.errors import BadSignature, Expired, InvalidKey, KeyNotAllowed, MalformedEnvelope, NotYetValid, TrustError
from mesh.trust import Trust


class Gate:
    """Verifies keys offline. ``region`` is this proxy's own; a key bound to another region is refused here."""

    def __init__(self, trust: Trust, *, clock: Clock, region: str = "") -> None:
        self._keys = KeyVerifier(trust)
        self._clock = clock
        self._region = region

    def authenticate(self, authorization: str | None) -> ApiKey:
        """From the Authorization header to verified claims. Raises `InvalidKey`, which never repeats the key."""
        if not authorization:
            raise InvalidKey("No API key was given. Send it as: Authorization: Bearer im_…")
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise InvalidKey("The Authorization header must be: Bearer im_…")
        try:
            key = self._keys.verify(text.strip(), now=self._clock.wall())
        except (Expired, NotYetValid, MalformedEnvelope) as error:
            raise InvalidKey(f"Incorrect API key: {error.message}") from None
        except BadSignature:
            raise InvalidKey("Incorrect API key: its signature does not hold") from None
        except TrustError:
            raise InvalidKey("Incorrect API key: it was not issued for this mesh") from None
        if key.region is not None and key.region != self._region:
            raise InvalidKey("Incorrect API key: it is for another region")
        return key

    def authorize(self, key: ApiKey, model: str) -> None:
        """Whether the key may call the model. Raises `KeyNotAllowed`."""
        if not key.has_role(KeyRole.INVOKER):
            raise KeyNotAllowed("This API key may not call models: it lacks the role 'invoker'")
        if not key.may_use(model):
            raise KeyNotAllowed(f"This API key may not use the model '{model[:128]}'", param="model")

    def require(self, key: ApiKey, role: KeyRole) -> None:
        """Raises `KeyNotAllowed` unless the key holds the role or is an admin's."""
        if not key.has_role(role) and not key.has_role(KeyRole.ADMIN):
            raise KeyNotAllowed(f"This API key lacks the role '{role}'")
