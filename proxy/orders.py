"""Orders of operators over HTTP: this proxy obeys its own, and carries others to the node they are for.

As with documents, what authorizes an order is its own signature, which the node verifies again. A proxy that is not linked with the
node hands it to the other proxies, once; they pass it on or drop it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from aiohttp import web

from mesh.claims import read_bytes
from mesh.clock import Clock
from mesh.cordon import Cordon
from mesh.errors import BodyTooLarge, InvalidRequest, NoWorker, OrderRefused, SlowRequest, TrustError
from mesh.link.frames import Frame
from mesh.link.link import Link
from mesh.orders import MAX_ORDER_BYTES, Order, parse_order
from mesh.trust import Trust
from proxy.access import Routes
from proxy.fleet import Fleet
from proxy.peers import Proxies

log = structlog.get_logger(__name__)

PATH = "/mesh/v1/orders"
BODY_S = 10.0


class Orders:
    """``cordon`` is this proxy's own."""

    def __init__(self, fleet: Fleet, proxies: Proxies, cordon: Cordon, trust: Trust, *, clock: Clock) -> None:
        self._fleet = fleet
        self._proxies = proxies
        self._cordon = cordon
        self._trust = trust
        self._clock = clock
        proxies.on_order = self.on_frame

    def routes(self) -> Routes:
        return {PATH: {"POST": self.post}}

    async def post(self, request: web.BaseRequest, request_id: str) -> web.Response:
        """Take a signed order: 200 with the node, the action, and to how many links it went (0: it was for this proxy)."""
        signed = await _read(request)
        try:
            order = parse_order(signed, self._trust, now=self._clock.wall())
        except TrustError as error:
            raise OrderRefused(f"The order is refused: {error.message}") from None
        links = self._way_to(order)
        if links is None:
            self._cordon.obey(signed)
        elif not links:
            links = [proxy.link for proxy in self._proxies.linked.values()]
            if not links:
                raise NoWorker("This proxy is linked neither with that node nor with another proxy; ask another", retry_after_s=2.0)
        for link in links or ():
            link.send_control(Frame.ORDER, {"order": signed})
        log.info("order.carried", request_id=request_id, node=order.node_id.hex()[:12], action=str(order.action), links=len(links or ()))
        answer = {"node": order.node_id.hex(), "action": str(order.action), "links": len(links or ())}
        return web.json_response(answer, headers={"x-request-id": request_id})

    def on_frame(self, link: Link, fields: dict[str, Any]) -> None:
        """An order that another proxy could not deliver. One that does not hold ends here."""
        try:
            signed = read_bytes(fields, "order", max_len=MAX_ORDER_BYTES)
            order = parse_order(signed, self._trust, now=self._clock.wall())
        except TrustError as error:
            log.warning("order.refused", proxy=link.node_id.hex()[:12], reason=error.message)
            return
        links = self._way_to(order)
        if links is None:
            self._cordon.obey_frame(fields)
        for onward in links or ():
            if onward is not link:
                onward.send_control(Frame.ORDER, {"order": signed})

    def _way_to(self, order: Order) -> list[Link] | None:
        """The link to the node it is for; none if there is no such link, None if it is this very node."""
        if self._cordon.is_for(order):
            return None
        worker, proxy = self._fleet.workers.get(order.node_id), self._proxies.linked.get(order.node_id)
        return [node.link for node in (worker, proxy) if node is not None]


async def _read(request: web.BaseRequest) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            while piece := await request.content.readany():
                body += piece
                if len(body) > MAX_ORDER_BYTES:
                    raise BodyTooLarge(f"A signed order has at most {MAX_ORDER_BYTES} bytes")
    except TimeoutError:
        raise SlowRequest("The order did not arrive in time") from None
    except web.RequestPayloadError:
        raise InvalidRequest("The request body is not valid HTTP") from None
    return bytes(body)
