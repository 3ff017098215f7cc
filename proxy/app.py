"""The HTTP application: routes, and the way of a request through the proxy.

    key → body → scope → choose → attempt → (retry elsewhere) → bytes to the client

Built on aiohttp's low-level server: its C parser in front, one dictionary of routes, and no layers in between.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import structlog
from aiohttp import web

from mesh.apikey import ApiKey, KeyRole
from mesh.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MeshError,
    MethodNotAllowed,
    ModelNotFound,
    NoWorker,
    Overloaded,
    Rerouted,
    RouteNotFound,
)
from proxy import openapi
from proxy.access import ROLES, Access, access_of
from proxy.body import Bodies
from proxy.config import ProxyConfig
from proxy.downstream import Downstream
from proxy.explain import Explainer
from proxy.fleet import Fleet, Worker
from proxy.forward import Attempt, cached_of, usage_of
from proxy.gate import Gate
from proxy.limits.limiter import Limiter
from proxy.limits.stash import Hold
from proxy.metering import Meter, Noted
from proxy.metrics import Metrics
from proxy.moves import Moves
from proxy.openai import TASKS, Call, model_list, model_object, parse_call, timeout_of
from proxy.respond import error_response
from proxy.retry import RetryBudget, RetryPolicy, counts_against_worker, spends
from proxy.route import Plan, Router
from proxy.views import Views

log = structlog.get_logger(__name__)

Handler = Callable[[web.BaseRequest, str], Awaitable[web.StreamResponse]]
Routes = Mapping[str, Mapping[str, Handler]]
"""Handlers by path and method; a path that ends with a slash takes all below it."""
SWEEP_S = 0.5
LOOK_AGAIN_S = 0.05


class App:
    """Answers HTTP requests. Made once per process by `proxy.node`."""

    def __init__(
        self,
        config: ProxyConfig,
        *,
        gate: Gate,
        fleet: Fleet,
        views: Views,
        explainer: Explainer,
        metrics: Metrics,
        limits: Limiter,
        rng: random.Random,
        routes: Routes | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._config = config
        self._gate = gate
        self._fleet = fleet
        self._views = views
        self._explainer = explainer
        self._metrics = metrics
        self._limits = limits
        self._rng = rng
        self._meter = meter or Meter(None)
        self._router = Router(config.routing, fleet=fleet, metrics=metrics, rng=rng, clock=time.monotonic)
        self._retry = RetryPolicy(failures=config.retry_limit + 1)
        self._budget = metrics.budget = RetryBudget(config.retry_share)
        self._moves = Moves(fleet, enabled=config.move_streams, policy=self._retry)
        metrics.follow(self._moves)
        self.bodies = Bodies(most_bytes=config.max_body_bytes, room_bytes=config.max_bodies_bytes, patience_s=config.body_timeout_s)
        self._attempts: set[Attempt] = set()
        self._created = int(time.time())
        self._description = b""
        self._loop = asyncio.get_running_loop()  # asking for it costs a system call each time
        self.draining = False
        self.new_until = 0.0
        """Until then, on the loop's clock, a request that finds nobody waits for the proxy to find somebody."""
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
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
            **{path: {"POST": self._infer} for path in TASKS},
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
        request_id = f"req_{self._rng.getrandbits(96):024x}"
        try:
            response = await self._route(request)(request, request_id)
        except MeshError as error:
            response = error_response(error, request_id=request_id)
        except ConnectionError:
            raise
        except Exception:
            log.exception("request.crashed", request_id=request_id, path=request.path[:128])
            response = error_response(MeshError("The proxy failed to handle this request"), request_id=request_id)
        if self.draining:
            response.force_close()
        return response

    async def drained(self) -> None:
        """Return once no inference request is in flight."""
        await self._idle.wait()

    def _enter(self) -> None:
        self.in_flight += 1
        self._idle.clear()

    def _leave(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

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
        models = sorted(self._fleet.models())
        waits = (
            (self.draining, "draining"),
            (not self._gate.fresh, "its list of revoked keys is not confirmed"),
            (self._meter.full, "its disk: receipts cannot be written"),
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
        return {name for name in self._views.ready_models() if key.may_use(name)}

    async def _status(self, request: web.BaseRequest, request_id: str) -> web.Response:
        counts = {"moves": self._moves.counts(), "retries": self._budget.counts()}
        status = self._views.status(in_flight=self.in_flight, draining=self.draining, **counts)
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

    # -- inference

    async def _infer(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        started = time.monotonic()
        path = request.raw_path if request.raw_path in TASKS else request.path
        task, model = TASKS[path], ""
        code = "cancelled"
        body: bytes | bytearray = b""
        noted = self._meter.open(request_id, task, started)
        hold: Hold | None = None
        self._enter()
        try:
            key = noted.key = self._authenticate(request)
            self._meter.check()
            body = await self.bodies.read(request)
            call = parse_call(path, body)
            noted.model = call.model
            self._gate.authorize(key, call.model)
            if not self._fleet.candidates(call.model, call.task) and not await self._found(call):
                raise self._nobody(call)
            model = call.model
            entered = self._limits.enter(key, call)
            hold = await self._limits.wait(key, call) if isinstance(entered, str) else entered
            response = await self._serve(request, request_id, key, call, noted, hold)
            code = "ok"
            return response
        except _BrokenOff as broken:
            code = broken.error.code
            log.warning("request.broken_off", request_id=request_id, code=code, reason=broken.error.message)
            broken.downstream.break_off(broken.error)
            return broken.downstream.response()
        except MeshError as error:
            code = error.code
            raise
        except ConnectionError:
            raise
        except Exception:
            code = MeshError.code
            raise
        finally:
            self._leave()
            if hold is not None:
                hold.end()
            self.bodies.release(body)
            self._metrics.requests(model, task, code).inc()
            ended = time.monotonic()
            self._meter.close(noted, code, ended)
            if model:
                self._metrics.duration(model).observe(ended - started)

    async def _serve(
        self, request: web.BaseRequest, request_id: str, key: ApiKey, call: Call, noted: Noted, hold: Hold | None
    ) -> web.StreamResponse:
        """Attempt after attempt until one succeeds or none is left; once the client has a byte, to go on with the same answer."""
        transport = request.transport
        if transport is None:
            raise ConnectionResetError
        downstream = Downstream(request, transport, keep_alive=request.keep_alive and not self.draining)
        plan = self._router.plan(call, key.project, request.headers.get)
        plan.hold = hold
        now = self._loop.time()
        self._budget.request(now)
        if timeout_s := timeout_of(request.headers.get("x-request-timeout"), self._config.deadline_s):
            plan.deadline = now + timeout_s
        passage = plan.passage = self._moves.passage(call, request_id)
        refused = 0
        last: MeshError | None = None
        while True:
            choice = self._router.choose(plan, request_id)
            if choice is None:
                error = last or self._nobody(call)
                self._fleet.blame(plan.failures, answered=False)
                raise _BrokenOff(error, downstream) if downstream.started else error
            worker = choice.worker
            try:
                await self._attempt(plan, worker, downstream, request_id, key, noted)
            except MeshError as error:
                if isinstance(error, Rerouted) and not downstream.started and self._router.rerouted(plan):
                    continue
                plan.avoid |= {worker.node_id}
                if counts_against_worker(error):
                    worker.failed += 1
                    plan.failures.append((worker, error.code))
                if downstream.started:
                    avoid = await self._moves.lost(passage if downstream.is_stream else None, call, worker, error)
                    if isinstance(avoid, MeshError):
                        self._fleet.blame(plan.failures, answered=False)
                        raise _BrokenOff(avoid, downstream) from error
                    self._router.elsewhere(plan, avoid)
                    last = error
                    continue
                refused += isinstance(error, Overloaded)
                if not self._may_retry(error, failed=len(plan.failures), refused=refused):
                    self._fleet.blame(plan.failures, answered=False)
                    raise
                log.info("request.retried", request_id=request_id, worker=worker.node_id.hex()[:12], code=error.code, reason=error.message)
                self._metrics.retries(error.code).inc()
                downstream.forget_head()
                if passage is not None:
                    passage.trail.clear()
                last = error
            else:
                self._fleet.succeeded(worker)
                if plan.failures:
                    self._fleet.blame(plan.failures, answered=True)
                return downstream.response()

    async def _found(self, call: Call) -> bool:
        """Whether somebody for a call turns up while this proxy is new, and has yet to meet the workers."""
        while self._loop.time() < self.new_until:
            await asyncio.sleep(LOOK_AGAIN_S)
            if self._fleet.candidates(call.model, call.task):
                return True
        return False

    def _may_retry(self, error: MeshError, *, failed: int, refused: int) -> bool:
        if not self._retry.again(error, failed=failed, refused=refused, started=False):
            return False
        if spends(error) and not self._budget.take(self._loop.time()):
            return False
        self._budget.retried += 1
        return True

    async def _attempt(self, plan: Plan, worker: Worker, downstream: Downstream, request_id: str, key: ApiKey, noted: Noted) -> None:
        now = self._loop.time()
        call = plan.call
        headers = {"x-request-id": request_id}
        if key.has_role(KeyRole.VIEWER) or key.has_role(KeyRole.ADMIN):
            headers["x-mesh-worker"] = worker.node_id.hex()[:12]
            headers["x-mesh-reason"] = plan.explain(now)
        if plan.hold is not None:
            headers |= plan.hold.headers()
        attempt = Attempt(worker, downstream, headers, loop=self._loop, now=now, tokens=plan.tokens - plan.expected, passage=plan.passage)
        head: dict[str, Any] = {
            "id": request_id,
            "task": call.task,
            "model": call.model,
            "stream": call.stream,
            "size": len(call.body),
            "project": key.project,
            "key": key.id,
            "at": noted.at,
            "try": (note := noted.begin(worker.node_id, downstream)).number,
        }
        if plan.chain or plan.priority:
            head |= plan.head()
        timer = None
        if plan.deadline:
            head["dl"] = max(1, round((plan.deadline - now) * 1000))
            timer = self._loop.call_at(plan.deadline, attempt.fail, DeadlineExceeded())
        attempt.may_move = not plan.failures and plan.choice is not None and plan.choice.of > 1
        if plan.passage is not None:
            head["trail"] = len(plan.passage.trail)
        worker.in_flight += 1
        self._attempts.add(attempt)
        on_trial = self._fleet.begin(worker)
        try:
            trailer = note.trailer = await attempt.run(head, call.body)
            note.status = "ok"
        except MeshError as error:
            note.status = error.code
            raise
        finally:
            note.end(attempt.first_byte_at)
            worker.in_flight -= 1
            self._attempts.discard(attempt)
            if timer is not None:
                timer.cancel()
            if plan.hold is not None:
                plan.hold.seen(accepted=attempt.accepted_at is not None, sent_bytes=downstream.bytes_sent)
            if on_trial:
                self._fleet.end_trial(worker)
        worker.served += 1
        prompt, completion = usage_of(trailer)
        if plan.hold is not None:
            plan.hold.settle(prompt, completion, cached_of(trailer))
        self._metrics.tokens(call.model, "prompt").inc(prompt)
        self._metrics.tokens(call.model, "completion").inc(completion)
        if plan.chain:
            self._router.served(plan, prompt_tokens=prompt, cached_tokens=cached_of(trailer))
        if attempt.first_byte_at is not None:
            self._metrics.first_byte(call.model).observe(attempt.first_byte_at - now)
            attempt.measure(self._loop.time(), completion)

    async def sweep(self) -> None:
        """A task for the life of the process: look at how workers are, and end attempts whose worker gives no sign."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self._loop.time()
            for attempt in list(self._attempts):
                attempt.measure(now)
                attempt.check_time(now, patience_s=self._config.first_byte_timeout_s, most_s=self._config.request_timeout_s)
            self._fleet.tick()

    # -- steps of a request

    def _authenticate(self, request: web.BaseRequest) -> ApiKey:
        return self._gate.authenticate(request.headers.get("Authorization"))

    def _nobody(self, call: Call) -> MeshError:
        """Why no linked worker can take a call: 404 for a model nobody serves, 400 for one that cannot do what is asked, else 503."""
        tasks = self._fleet.tasks(call.model)
        if tasks and call.task not in tasks:
            told = f"The model '{call.model}' does not serve {call.path}; it serves {', '.join(sorted(tasks))}"
            return InvalidRequest(told, param="model")
        if not tasks and not self._views.knows(call.model):
            return ModelNotFound(f"The model '{call.model[:128]}' does not exist; GET /v1/models lists those that do", param="model")
        return NoWorker(f"No worker is ready to serve '{call.model}' right now; try again shortly", retry_after_s=2.0)


class _BrokenOff(Exception):
    """An answer that ends in the middle: its client is told in-band, and the connection is not ended cleanly."""

    def __init__(self, error: MeshError, downstream: Downstream) -> None:
        super().__init__(error.message)
        self.error = error
        self.downstream = downstream


def _from_this_machine(request: web.BaseRequest) -> bool:
    """Whether the request came straight from this machine, not through a reverse proxy on it."""
    return request.remote in ("127.0.0.1", "::1") and not any(name in request.headers for name in ("X-Forwarded-For", "Forwarded", "Via"))
