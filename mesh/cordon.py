"""Why a node takes no new requests although it could: an operator's order, or a certificate that runs out.

A cordoned node finishes what it has, stays up and linked, and says why in its record. What an order says holds across restarts:
maintenance does not end because a machine was booted in the middle of it. So the newest order obeyed is kept in the node's folder, which
also keeps older ones from being played back to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import structlog

from mesh.claims import read_bytes
from mesh.clock import Clock
from mesh.errors import TrustError
from mesh.identity import Identity, write_private
from mesh.orders import MAX_ORDER_BYTES, Action, Order, parse_order

log = structlog.get_logger(__name__)

ORDER_FILE = "order.json"
CERTIFICATE_MARGIN_S = 60.0
CERTIFICATE_LOOK_S = 5.0


class Cordon:
    """``why`` is empty while nothing keeps requests away; ``on_change`` hears whenever that changes."""

    def __init__(self, identity: Identity, state_dir: Path, *, clock: Clock, on_change: Callable[[], None]) -> None:
        self._identity = identity
        self._file = state_dir / ORDER_FILE
        self._clock = clock
        self._on_change = on_change
        self._reasons: dict[str, str] = {}
        self._newest = 0.0
        self._load()

    @property
    def why(self) -> str:
        return next(iter(self._reasons.values()), "")

    def is_for(self, order: Order) -> bool:
        return order.node_id == self._identity.node_id

    def obey(self, signed: bytes) -> bool:
        """Take an order that came from anywhere. False if it is another node's, or no newer than the last. Raises a `TrustError`."""
        order = parse_order(signed, self._identity.trust, now=self._clock.wall())
        if not self.is_for(order) or order.issued <= self._newest:
            return False
        self._newest = order.issued
        kept = {"action": str(order.action), "issued": order.issued, "reason": order.reason}
        write_private(self._file, json.dumps(kept).encode())
        log.warning("node.ordered", action=str(order.action), reason=order.reason)
        self._set("order", _told(order.reason) if order.action is Action.DRAIN else "")
        return True

    def obey_frame(self, fields: dict[str, object]) -> None:
        """An ORDER frame. One that does not hold says nothing about the proxy that carried it, so it only is not obeyed."""
        try:
            self.obey(read_bytes(fields, "order", max_len=MAX_ORDER_BYTES))
        except TrustError as error:
            log.warning("node.order_refused", reason=error.message)

    async def watch_certificate(self) -> None:
        """A task for the life of the node: leave in good order before the certificate ends, come back once it was renewed."""
        while True:
            member = self._identity.membership
            left_s = member.expires - self._clock.wall()
            ends = left_s < min(CERTIFICATE_MARGIN_S, (member.expires - member.issued) / 10)
            self._set("certificate", "its certificate runs out and no bootstrap node renews it" if ends else "")
            await self._clock.sleep(CERTIFICATE_LOOK_S)

    def _set(self, source: str, why: str) -> None:
        before = self.why
        self._reasons.pop(source, None)
        if why:
            self._reasons[source] = why
        if self.why != before:
            self._on_change()

    def _load(self) -> None:
        try:
            kept = json.loads(self._file.read_bytes())
            self._newest = float(kept["issued"])
            if kept["action"] == Action.DRAIN:
                self._reasons["order"] = _told(str(kept["reason"]))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("node.order_unreadable", file=str(self._file), error=str(error))


def _told(reason: str) -> str:
    return f"drained by the operator: {reason}" if reason else "drained by the operator; mesh undrain ends it"
