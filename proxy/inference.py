"""The way of a request through the proxy.

key → body → scope → limits → choose → attempt → (retry elsewhere) → bytes to the client
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Coroutine
from functools import partial
from typing import Any

import structlog
from aiohttp import web

from mesh.apikey import ApiKey, KeyRole
from mesh.errors import (
    CapacityError,
    DeadlineExceeded,
    InvalidRequest,
    MeshError,
    ModelNotFound,
    NoWorker,
    Overloaded,
    Rerouted,
    WorkerLost,
)
from proxy.body import Bodies
from proxy.config import ProxyConfig
from proxy.downstream import Downstream
from proxy.endpoints import Endpoints
from proxy.fleet import Fleet, Worker
from proxy.forward import Attempt, cached_of, usage_of
from proxy.gate import Gate
from proxy.hedge import HEDGED, Hedge, may_hedge
from proxy.limits.limiter import Limiter
from proxy.limits.stash import Hold
from proxy.metering import Meter, Noted
from proxy.metrics import Metrics
from proxy.moves import Moves
from proxy.openai import TASKS, Call, parse_call, timeout_of
from proxy.prompts.keeper import Prompts
from proxy.prompts.watched import Watched
from proxy.retry import RetryBudget, RetryPolicy, counts_against_worker, spends
from proxy.route import Plan, Router
from proxy.views import Views

log = structlog.get_logger(__name__)

SWEEP_S = 0.5
NEW_S = 5.0
"""So long after its start, or after it stood still, a proxy lets requests wait for workers it may not have met yet: clients that come by
DNS do not ask /readyz."""
STILL_S = 2.0
"""A process that ran nothing for so long may have lost its links to all workers at once."""
_OPERATORS = frozenset({KeyRole.VIEWER, KeyRole.ADMIN})
"""Whom the answer tells which worker it came from, and why."""
LOOK_AGAIN_S = 0.05


class Inference:
    """Serves calls of models, each by the worker that suits it best, or by several after one another."""

    def __init__(
        self,
        config: ProxyConfig,
        *,
        gate: Gate,
        fleet: Fleet,
        views: Views,
        metrics: Metrics,
        limits: Limiter,
        rng: random.Random,
        meter: Meter,
        endpoints: Endpoints,
        prompts: Prompts,
    ) -> None:
        self._config = config
        self._gate = gate
        self._fleet = fleet
        self._views = views
        self._metrics = metrics
        self._limits = limits
        self.meter = meter
        self._endpoints = endpoints
        self._prompts = prompts
        self._router = Router(config.routing, fleet=fleet, metrics=metrics, rng=rng, clock=time.monotonic)
        self._retry = RetryPolicy(failures=config.retry_limit + 1)
        self._hedge_s = config.hedge_after_s
        self._budget = metrics.budget = RetryBudget(config.retry_share)
        self._moves = Moves(fleet, enabled=config.move_streams, policy=self._retry)
        metrics.follow(self._moves)
        self.bodies = Bodies(most_bytes=config.max_body_bytes, room_bytes=config.max_bodies_bytes, patience_s=config.body_timeout_s)
        self.attempts: set[Attempt] = set()
        self._loop = asyncio.get_running_loop()  # asking for it costs a system call each time
        self.draining = False
        self.new_until = 0.0
        """Until then, on the loop's clock, a request that finds nobody waits for the proxy to find somebody."""
        self._looked_at = math.inf
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def models(self) -> set[str]:
        """Those that a linked worker serves right now."""
        return self._fleet.models()

    def counts(self) -> dict[str, Any]:
        """For `Views.status`: what is in flight, what was moved and what was tried again."""
        return {
            "in_flight": self.in_flight,
            "draining": self.draining,
            "moves": self._moves.counts(),
            "retries": self._budget.counts(),
        }

    async def drained(self) -> None:
        """Return once no inference request is in flight."""
        await self._idle.wait()

    async def finish(self, within_s: float) -> None:
        """As `drained`; what is not over by then is ended, and its clients are told so."""
        try:
            async with asyncio.timeout(max(0.0, within_s)):
                await self.drained()
        except TimeoutError:
            log.warning("proxy.drain_deadline", ended=len(self.attempts))
            for attempt in list(self.attempts):
                attempt.fail(CapacityError("This proxy is leaving and has waited for as long as it may; ask again", retry_after_s=1.0))
            await self.drained()

    async def infer(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        started = time.monotonic()
        path = request.raw_path if request.raw_path in TASKS else request.path
        task, model = TASKS[path], ""
        code = "cancelled"
        body: bytes | bytearray = b""
        noted = self.meter.open(request_id, task, started)
        hold: Hold | None = None
        self._enter()
        try:
            key = noted.key = self._gate.authenticate(request.headers.get("Authorization"))
            self.meter.check()
            body = await self.bodies.read(request)
            call = self._endpoints.find(key, parse_call(path, body))
            anybody = self._fleet.candidates(call.model, call.task)
            if not anybody and call.endpoint is None:
                call = await self._endpoints.look(key, call)
                anybody = self._fleet.candidates(call.model, call.task)
            noted.model = call.model
            if call.endpoint is not None:
                noted.endpoint = call.endpoint.name
            self._gate.authorize(key, call.model, noted.endpoint)
            if not anybody and not await self._found(call):
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
            if noted.watched is not None:
                self._prompts.keep(request_id, noted.at, noted.watched, code)
                noted.watched = None
            self._metrics.requests(model, task, code).inc()
            ended = time.monotonic()
            self.meter.close(noted, code, ended)
            if model:
                self._metrics.duration(model).observe(ended - started)

    async def _serve(
        self, request: web.BaseRequest, request_id: str, key: ApiKey, call: Call, noted: Noted, hold: Hold | None
    ) -> web.StreamResponse:
        """Attempt after attempt until one succeeds or none is left; once the client has a byte, to go on with the same answer."""
        transport = request.transport
        if transport is None:
            raise ConnectionResetError
        keep_alive = request.keep_alive and not self.draining
        if call.endpoint is None or call.endpoint.recording is None:
            downstream = Downstream(request, transport, keep_alive=keep_alive)
        else:
            downstream = noted.watched = Watched(request, transport, keep_alive=keep_alive, call=call)
        plan = self._router.plan(call, key.project, request.headers.get)
        plan.hold = hold
        now = self._loop.time()
        self._budget.request(now)
        usual_s = self._config.deadline_s if call.endpoint is None else call.endpoint.timeout_s or self._config.deadline_s
        if timeout_s := timeout_of(request.headers.get("x-request-timeout"), usual_s):
            plan.deadline = now + timeout_s
        passage = plan.passage = self._moves.passage(call, request_id)
        refused = 0
        last: MeshError | None = None
        while True:
            choice = self._router.choose(plan, request_id)
            if choice is None and isinstance(last, WorkerLost) and not downstream.started and await self._found(call):
                plan.avoid = frozenset()  # who is linked now has come back
                choice = self._router.choose(plan, request_id)
            if choice is None:
                error = last or self._nobody(call)
                self._fleet.blame(plan.failures, answered=False)
                raise _BrokenOff(error, downstream) if downstream.started else error
            worker = choice.worker
            try:
                attempt = self._hedged if self._hedge_s and not downstream.started else self._attempt
                await attempt(plan, worker, downstream, request_id, key, noted)
            except MeshError as error:
                worker, passage = (plan.choice or choice).worker, plan.passage  # the other's, if a second one was asked and went on
                if isinstance(error, Rerouted) and not downstream.started and self._router.rerouted(plan):
                    continue
                plan.avoid |= {worker.node_id}
                if counts_against_worker(error):
                    worker.failed += 1
                    plan.failures.append((worker, error.code))
                if downstream.started:
                    note = partial(self.meter.lost, noted)
                    avoid = await self._moves.lost(passage if downstream.is_stream else None, call, worker, error, note=note)
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
                self._fleet.succeeded((plan.choice or choice).worker)
                if plan.failures:
                    self._fleet.blame(plan.failures, answered=True)
                return downstream.response()

    async def _found(self, call: Call) -> bool:
        """Whether somebody for a call turns up while this proxy is new, or stood still a moment ago, and has yet to meet the workers."""
        self._look_whether_still()
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

    async def _hedged(self, plan: Plan, worker: Worker, downstream: Downstream, request_id: str, key: ApiKey, noted: Noted) -> None:
        """As `_attempt`, and a second worker is asked where the first lets its client wait."""

        def attempt(plan: Plan, worker: Worker, lane: Downstream) -> Coroutine[Any, Any, None]:
            return self._attempt(plan, worker, lane, request_id, key, noted)

        def second() -> Plan | None:
            other = plan.beside(worker)
            other.passage = self._moves.passage(plan.call, request_id)
            if not may_hedge(plan.call) or self._router.choose(other, request_id) is None or not self._budget.take(self._loop.time()):
                return None
            log.info("request.hedged", request_id=request_id, worker=worker.node_id.hex()[:12])
            self._metrics.retries(HEDGED).inc()
            self._budget.retried += 1
            return other

        hedge = Hedge(self._hedge_s, attempt, second)
        try:
            await hedge.run(plan, worker, downstream, noted)
        finally:
            for failed, error in hedge.failed:
                plan.avoid |= {failed.node_id}
                if counts_against_worker(error):
                    failed.failed += 1
                    plan.failures.append((failed, error.code))

    async def _attempt(self, plan: Plan, worker: Worker, downstream: Downstream, request_id: str, key: ApiKey, noted: Noted) -> None:
        now = self._loop.time()
        call = plan.call
        headers = f"x-request-id: {request_id}\r\n"
        if not key.roles.isdisjoint(_OPERATORS):
            headers += f"x-mesh-worker: {worker.node_id.hex()[:12]}\r\nx-mesh-reason: {plan.explain(now)}\r\n"
        if plan.hold is not None:
            headers += plan.hold.headers()
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
        if call.endpoint is not None:
            head["ep"] = call.endpoint.name
        if plan.chain or plan.priority:
            head |= plan.head()
        timer = None
        if plan.deadline:
            head["dl"] = max(1, round((plan.deadline - now) * 1000))
            timer = self._loop.call_at(plan.deadline, attempt.fail, DeadlineExceeded())
        attempt.may_move = not plan.failures and plan.choice is not None and plan.choice.of > 1
        if plan.passage is not None:
            head["trail"] = note.follow(plan.passage)
        worker.in_flight += 1
        self.attempts.add(attempt)
        on_trial = self._fleet.begin(worker)
        try:
            trailer = note.trailer = await attempt.run(head, call.body)
            note.status = "ok"
        except MeshError as error:
            note.status = error.code
            raise
        finally:
            note.end(attempt.first_byte_at, plan.passage)
            worker.in_flight -= 1
            self.attempts.discard(attempt)
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

    def _look_whether_still(self) -> None:
        """A process that was stopped or starved finds its links gone before it finds that much time has passed."""
        now = self._loop.time()
        if now - self._looked_at > STILL_S:
            self.new_until = max(self.new_until, now + NEW_S)
            log.warning("proxy.stood_still", for_s=round(now - self._looked_at, 1))
        self._looked_at = now

    async def sweep(self) -> None:
        """A task for the life of the process: look at how workers are, and end attempts whose worker gives no sign."""
        self._looked_at = self._loop.time()
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self._loop.time()
            self._look_whether_still()
            for attempt in list(self.attempts):
                attempt.measure(now)
                attempt.check_time(now, patience_s=self._config.first_byte_timeout_s, most_s=self._config.request_timeout_s)
            self._fleet.tick()

    def _enter(self) -> None:
        if not self.in_flight:
            self._idle.clear()
        self.in_flight += 1

    def _leave(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    def _nobody(self, call: Call) -> MeshError:
        """Why no linked worker can take a call: 404 for a model nobody serves, 400 for one that cannot do what is asked, else 503."""
        tasks = self._fleet.tasks(call.model)
        if tasks and call.task not in tasks:
            told = f"The model '{call.model}' does not serve {call.path}; it serves {', '.join(sorted(tasks))}"
            return InvalidRequest(told, param="model")
        if not tasks and call.endpoint is None and not self._views.knows(call.model):
            return ModelNotFound(f"The model '{call.model[:128]}' does not exist; GET /v1/models lists those that do", param="model")
        if call.endpoint is not None:
            told = f"No worker is ready for the endpoint '{call.endpoint.name}' right now: its model is '{call.model}'; try again shortly"
            return NoWorker(told, retry_after_s=2.0)
        return NoWorker(f"No worker is ready to serve '{call.model}' right now; try again shortly", retry_after_s=2.0)


class _BrokenOff(Exception):
    """An answer that ends in the middle: its client is told in-band, and the connection is not ended cleanly."""

    def __init__(self, error: MeshError, downstream: Downstream) -> None:
        super().__init__(error.message)
        self.error = error
        self.downstream = downstream
