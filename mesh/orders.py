"""Orders: what an operator tells one node to do. Pure.

An order is an envelope of its own domain, signed by an issuer that may sign documents of the whole mesh, and the node verifies it itself:
whoever carries it (any proxy) need not be trusted, and gains no authority by carrying it. It says which node it is for and lives for
minutes; a node obeys only one that is newer than the last it obeyed, so an old one cannot be played back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.claims import check_time, read_bytes, read_int, read_str
from mesh.envelope import seal
from mesh.errors import MalformedEnvelope, UnknownSigner
from mesh.trust import Purpose, Trust

ORDER_DOMAIN = "infermesh/order"
MAX_ORDER_BYTES = 512
MAX_REASON_CHARS = 80
ORDER_LIFE_S = 300.0
"""As the command makes them; a reader takes none that lives longer than twice this."""
NODE_ID_BYTES = 32


class Action(StrEnum):
    """What a node can be told."""

    DRAIN = "drain"
    UNDRAIN = "undrain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """``issued`` and ``expires`` are wall-clock seconds; ``issued`` to the millisecond, since it is what makes one newer."""

    node_id: bytes
    action: Action
    issued: float
    expires: float
    reason: str = ""
    signed: bytes = b""


def seal_order(order: Order, issuer: Ed25519PrivateKey, kid: str) -> Order:
    """Sign with an issuer's key; returns the order with ``signed`` filled in."""
    payload = {
        "node": order.node_id,
        "act": str(order.action),
        "iat": round(order.issued * 1000),
        "exp": round(order.expires * 1000),
    }
    if order.reason:
        payload["why"] = order.reason
    return replace(order, signed=seal(ORDER_DOMAIN, kid.encode("ascii"), issuer, payload))


def parse_order(data: bytes, trust: Trust, *, now: float) -> Order:
    """Verify an order from anywhere. Raises a `TrustError`."""
    issuer, opened = trust.open(ORDER_DOMAIN, data, Purpose.DOCUMENT, now=now, max_bytes=MAX_ORDER_BYTES)
    if any(getattr(issuer.scope, name) is not None for name in ("projects", "models", "endpoints", "regions")):
        raise UnknownSigner("the order's issuer is for a part of the mesh only, and a node serves all of it")
    payload = opened.payload
    try:
        action = Action(read_str(payload, "act", max_len=16))
    except ValueError:
        raise MalformedEnvelope("an order of a kind that is not known here") from None
    order = Order(
        node_id=read_bytes(payload, "node", size=NODE_ID_BYTES),
        action=action,
        issued=read_int(payload, "iat") / 1000,
        expires=read_int(payload, "exp") / 1000,
        reason=read_str(payload, "why", default="", max_len=MAX_REASON_CHARS),
        signed=data,
    )
    if order.expires - order.issued > 2 * ORDER_LIFE_S:
        raise MalformedEnvelope("an order lives for minutes")
    check_time("the order", not_before=order.issued, expires=order.expires, now=now)
    return order
