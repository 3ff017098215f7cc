"""The HTTP application: the routes, who may take them, and what a proxy tells about itself. Calls of models are `proxy.inference`'s.

Built on aiohttp's low-level server: its C parser in front, one dictionary of routes, and no layers in between.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import structlog
from aiohttp import web

from mesh.apikey import ApiKey
from mesh.errors import MeshError, MethodNotAllowed, ModelNotFound, RouteNotFound
from proxy import openapi
from proxy.access import ROLES, Access, Handler, Routes, access_of
from proxy.endpoints import Endpoints
from proxy.explain import Explainer
from proxy.gate import Gate
from proxy.inference import Inference
from proxy.metrics import Metrics
from proxy.openai import TASKS, model_list, model_object
from proxy.respond import error_response
from proxy.views import Views

log = structlog.get_logger(__name__)


class App:
    """Answers HTTP requests. Made once per process by `proxy.node`."""

    def __init__(
        self,
        inference: Inference,
        *,
        gate: Gate,
        views: Views,
        explainer: Explainer,
        metrics: Metrics,
        rng: random.Random,
        endpoints: Endpoints,
        routes: Routes | None = None,
    ) -> None:
        self._inference = inference
        self._gate = gate
        self._views = views
        self._explainer = explainer
        self._metrics = metrics
        self._rng = rng
        self._endpoints = endpoints
        self._created = int(time.time())
        self._description = b""
        own: dict[str, dict[str, Handler]] = {
            "/health": {"GET": self._health},
            "/readyz": {"GET": self._ready},
            openapi.PATH: {"GET": self._describe},
            "/metrics": {"GET": self._render_metrics},
            "/v1/models": {"GET": self._models},
            "/v1/models/": {"GET": self._model},
            "/mesh/v1/status": {"GET": self._status},
            "/mesh/v1/workers": {"GET": self._workers},
            "/mesh/v1/peers": {"GET": self._peers},
            "/mesh/v1/lookup": {"GET": self._lookup},
            "/mesh/v1/doctor": {"GET": self._doctor},
            **{path: {"POST": inference.infer} for path in TASKS},
        }
        self._routes = {
            path: {method: self._guarded(handler, access_of(method, path)) for method, handler in methods.items()}
            for path, methods in (*own.items(), *(routes or {}).items())
        }
        self._below = tuple(path for path in self._routes if path.endswith("/"))

    def routes(self) -> Iterator[tuple[str, str]]:
        """Method and path of every route."""
        return ((method, path) for path, methods in self._routes.items() for method in methods)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The one entry: find the route, run it, turn what went wrong into an answer."""
        request_id = "req_%024x" % self._rng.getrandbits(96)  # noqa: UP031 - faster
        try:
            response = await self._route(request)(request, request_id)
        except MeshError as error:
            response = error_response(error, request_id=request_id)
        except ConnectionError:
            raise
        except Exception:
            log.exception("request.crashed", request_id=request_id, path=request.path[:128])
            response = error_response(MeshError("The proxy failed to handle this request"), request_id=request_id)
        if self._inference.draining:
            response.force_close()
        return response

    def _route(self, request: web.BaseRequest) -> Handler:
        path = request.raw_path
        methods = self._routes.get(path)
        if methods is None:
            path = request.path  # without the query, percent-decoded
            methods = self._routes.get(path)
        if methods is None or path.endswith("/"):
            methods = next((self._routes[below] for below in self._below if path.startswith(below) and path != below), None)
        if methods is None:
            raise RouteNotFound(f"There is no {request.method} {path[:128]} here")
        handler = methods.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            allow = [*methods, "HEAD"] if "GET" in methods else methods
            raise MethodNotAllowed(f"{path[:128]} takes {' or '.join(allow)}, not {request.method[:16]}", allow=allow)
        return handler

    def _guarded(self, handler: Handler, access: Access) -> Handler:
        """A handler behind the check of its route. Inference checks for itself, where it is counted."""
        if access in (Access.PUBLIC, Access.SIGNED, Access.INVOKER):
            return handler

        async def guarded(request: web.BaseRequest, request_id: str) -> web.StreamResponse:
            if access is not Access.LOCAL_VIEWER or not _from_this_machine(request):
                key = self._authenticate(request)
                if (role := ROLES.get(access)) is not None:
                    self._gate.require(key, role)
            return await handler(request, request_id)

        return guarded

    # -- looking

    async def _health(self, request: web.BaseRequest, request_id: str) -> web.Response:
        return web.json_response({"status": "ok"}, headers={"x-request-id": request_id})

    async def _ready(self, request: web.BaseRequest, request_id: str) -> web.Response:
        models = self._inference.models()
        waits = (
            (self._inference.draining, "draining"),
            (not self._gate.fresh, "its list of revoked keys is not confirmed"),
            (self._inference.meter.full, "its disk: receipts cannot be written"),
            (not models, "no worker is ready"),
        )
        status = next((why for waiting, why in waits if waiting), "ready")
        ready = status == "ready"
        return web.json_response(
            {"status": status, "models": len(models)}, status=200 if ready else 503, headers={"x-request-id": request_id}
        )

    async def _describe(self, request: web.BaseRequest, request_id: str) -> web.Response:
        self._description = self._description or openapi.encode_api(self.routes())
        return web.Response(body=self._description, content_type="application/json", headers={"x-request-id": request_id})

    async def _render_metrics(self, request: web.BaseRequest, request_id: str) -> web.Response:
        body = self._metrics.render()
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8", "x-request-id": request_id})

    async def _models(self, request: web.BaseRequest, request_id: str) -> web.Response:
        names = self._visible_models(self._authenticate(request))
        return web.json_response(model_list(names, created=self._created), headers={"x-request-id": request_id})

    async def _model(self, request: web.BaseRequest, request_id: str) -> web.Response:
        name = request.path.removeprefix("/v1/models/")
        if name not in self._visible_models(self._authenticate(request)):
            raise ModelNotFound(f"The model '{name[:128]}' does not exist or this key may not use it", param="model")
        return web.json_response(model_object(name, created=self._created), headers={"x-request-id": request_id})

    def _visible_models(self, key: ApiKey) -> set[str]:
        return self._endpoints.names(key, self._views.ready_models())

    async def _status(self, request: web.BaseRequest, request_id: str) -> web.Response:
        status = self._views.status(**self._inference.counts())
        return web.json_response(status | {"revocations": self._gate.about()}, headers={"x-request-id": request_id})

    async def _workers(self, request: web.BaseRequest, request_id: str) -> web.Response:
        return web.json_response({"workers": self._views.workers()}, headers={"x-request-id": request_id})

    async def _peers(self, request: web.BaseRequest, request_id: str) -> web.Response:
        return web.json_response(self._explainer.peers(), headers={"x-request-id": request_id})

    async def _lookup(self, request: web.BaseRequest, request_id: str) -> web.Response:
        asked = request.query
        answer = await self._explainer.lookup(model=asked.get("model"), role=asked.get("role"))
        return web.json_response(answer, headers={"x-request-id": request_id})

    async def _doctor(self, request: web.BaseRequest, request_id: str) -> web.Response:
        return web.json_response(await self._explainer.doctor(), headers={"x-request-id": request_id})

    def _authenticate(self, request: web.BaseRequest) -> ApiKey:
        return self._gate.authenticate(request.headers.get("Authorization"))


def _from_this_machine(request: web.BaseRequest) -> bool:
    """Whether the request came straight from this machine, not through a reverse proxy on it."""
    return request.remote in ("127.0.0.1", "::1") and not any(name in request.headers for name in ("X-Forwarded-For", "Forwarded", "Via"))
