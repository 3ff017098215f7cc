"""Enrolment over HTTPS: four routes, each connection good for one request and a few seconds.

Strangers may connect (a newcomer has no certificate yet), so the handshake asks for a client certificate but does not insist.
One that is shown and was not issued by this mesh ends the handshake: no handler is ever entered for it.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from bootstrap.enrol import AttemptLimit, Desk
from mesh.clock import Clock
from mesh.enrol import ENROL_PATH, MESH_PATH, RENEW_PATH, SPENT_PATH
from mesh.errors import (
    BodyTooLarge,
    CapacityError,
    EnrolError,
    InvalidKey,
    InvalidRequest,
    MeshError,
    MethodNotAllowed,
    RateLimited,
    RouteNotFound,
    TrustError,
    UnknownSigner,
    UpstreamTimeout,
)
from mesh.identity import Identity, Peer, issuer_of, peer_of, private_key_pem, require_role, write_private
from mesh.trust import Purpose, Role

log = structlog.get_logger(__name__)

MAX_BODY_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What one stranger may cost. ``connection_s`` runs from the end of the handshake to the last byte of the answer."""

    connections: int = 1024
    handshake_s: float = 10.0
    connection_s: float = 20.0
    body_s: float = 10.0


_STATUS: tuple[tuple[type[MeshError], int], ...] = (
    (BodyTooLarge, 413),
    (RouteNotFound, 404),
    (MethodNotAllowed, 405),
    (InvalidKey, 401),
    (InvalidRequest, 400),
    (RateLimited, 429),
    (CapacityError, 503),
    (UpstreamTimeout, 408),
    (TrustError, 403),
    (EnrolError, 403),
)

Handler = Callable[[web.BaseRequest], Awaitable[dict[str, Any]]]


class EnrolServer:
    """The HTTPS side of a bootstrap node."""

    def __init__(
        self,
        desk: Desk,
        identity: Identity,
        directory: Path,
        clock: Clock,
        *,
        limits: ServerLimits = ServerLimits(),
        attempts: AttemptLimit | None = None,
    ) -> None:
        self._desk, self._identity, self._directory, self._clock = desk, identity, directory, clock
        self._limits, self._attempts = limits, attempts or AttemptLimit()
        self._routes: dict[str, tuple[str, Handler]] = {
            "/health": ("GET", self._health),
            MESH_PATH: ("GET", self._about),
            ENROL_PATH: ("POST", self._enrol),
            RENEW_PATH: ("POST", self._renew),
            SPENT_PATH: ("POST", self._spent),
        }
        self._context = self._make_context()
        self._front: _Front | None = None
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises `OSError`."""
        self._front = _Front(self._answer, self._limits)
        self._server = await asyncio.get_running_loop().create_server(
            self._front, host, port, ssl=self._context, ssl_handshake_timeout=self._limits.handshake_s, backlog=256
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._server is not None and self._front is not None:
            self._server.close()
            await self._front.shutdown(2.0)
        self._server = None

    def _make_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=self._identity.credentials.root_certificate.decode())
        context.set_alpn_protocols(["http/1.1"])
        context.num_tickets = 0

        def load() -> None:
            path = self._directory / "enrol.pem"
            write_private(path, private_key_pem(self._identity.key) + self._identity.credentials.certificate_chain)
            context.load_cert_chain(path)

        load()
        self._identity.on_renewal(load)
        return require_role(context, self._identity.mesh_id, set(Role))

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        headers: dict[str, str] = {}
        try:
            status, body = 200, await self._route(request)
        except MeshError as error:
            status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
            body = {"error": {"code": error.code, "message": error.message}}
            if error.retry_after_s is not None:
                headers["retry-after"] = str(int(error.retry_after_s) + 1)
            log.info("enrol.refused", path=request.path[:80], remote=request.remote, status=status, reason=error.message)
        except Exception:
            log.exception("enrol.failed", path=request.path[:80], remote=request.remote)
            status, body = 500, {"error": {"code": "internal_error", "message": "the bootstrap node failed; see its log"}}
        response = web.json_response(body, status=status, headers=headers)
        response.force_close()
        return response

    async def _route(self, request: web.BaseRequest) -> dict[str, Any]:
        method, handler = self._routes.get(request.path, ("", None))
        if handler is None:
            raise RouteNotFound(f"there is no {request.path[:80]} here")
        if request.method != method:
            raise MethodNotAllowed(f"{request.path} takes {method}")
        return await handler(request)

    async def _health(self, _request: web.BaseRequest) -> dict[str, Any]:
        return {"status": "ok", "role": str(Role.BOOTSTRAP), "id": self._identity.node_id.hex()}

    async def _about(self, _request: web.BaseRequest) -> dict[str, Any]:
        return self._desk.about()

    async def _enrol(self, request: web.BaseRequest) -> dict[str, Any]:
        self._attempts.take(request.remote or "", now=self._clock.monotonic())
        return await self._desk.enrol(await self._read_json(request))

    async def _renew(self, request: web.BaseRequest) -> dict[str, Any]:
        peer = self._peer(request)
        return self._desk.renew(peer, await self._read_json(request))

    async def _spent(self, request: web.BaseRequest) -> dict[str, Any]:
        if (role := self._peer(request).role) != Role.BOOTSTRAP:
            raise UnknownSigner(f"only bootstrap nodes tell each other of spent tokens, and this is a {role}")
        return await self._desk.spent(await self._read_json(request))

    def _peer(self, request: web.BaseRequest) -> Peer:
        tls = request.transport.get_extra_info("ssl_object") if request.transport is not None else None
        certificate = tls.getpeercert(binary_form=True) if tls is not None else None
        if not certificate:
            raise InvalidKey("this needs the node's present certificate (mutual TLS)")
        self._desk.trust.issuer(issuer_of(certificate), Purpose.NODE, now=self._clock.wall())  # TLS knows of no issuer that was retired
        return peer_of(certificate, self._identity.mesh_id)

    async def _read_json(self, request: web.BaseRequest) -> dict[str, Any]:
        data = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_s):
                async for chunk in request.content.iter_any():
                    data += chunk
                    if len(data) > MAX_BODY_BYTES:
                        raise BodyTooLarge(f"the body may be at most {MAX_BODY_BYTES} bytes")
        except TimeoutError:
            raise UpstreamTimeout("the body did not arrive in time") from None
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            raise InvalidRequest("the body is not JSON") from None
        if not isinstance(body, dict):
            raise InvalidRequest("the body must be a JSON object")
        return body


class _Front(web.Server):
    """aiohttp has no deadline for headers: here the whole connection has one, and there is a cap on how many there are."""

    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], limits: ServerLimits) -> None:
        super().__init__(handler, access_log=None, lingering_time=0.0, keepalive_timeout=1.0)
        self._limits = limits

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self.connections) > self._limits.connections:
            transport.abort()
        else:
            asyncio.get_running_loop().call_later(self._limits.connection_s, transport.abort)
