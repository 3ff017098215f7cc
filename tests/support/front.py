"""A proxy's HTTP front over real sockets, with workers in the test's hands: links in memory, scripts or a real gateway behind them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from mesh.apikey import ApiKey, mint
from mesh.authority import KEYS_KID
from mesh.books import Books
from mesh.clock import SystemClock
from mesh.cordon import Cordon
from mesh.directory import Directory
from mesh.documents import ENDPOINT_KIND, next_version, seal_document
from mesh.endpoints import Endpoint, encode_endpoint
from mesh.identity import Identity, Peer
from mesh.ledger import LEDGER_FILE, Ledger, signer
from mesh.link.frames import Frame
from mesh.link.link import IncomingStream, Link
from mesh.records import Capability, ModelEntry, Record, State
from mesh.trust import Role
from proxy.access import Routes
from proxy.app import App
from proxy.config import ProxyConfig
from proxy.documents import DocumentRoutes
from proxy.endpoints import EndpointRoutes, Endpoints
from proxy.explain import Explainer
from proxy.fleet import Fleet
from proxy.gate import Gate
from proxy.inference import Inference
from proxy.limits.limiter import Limiter
from proxy.metering import Meter
from proxy.metrics import Metrics
from proxy.orders import Orders
from proxy.peers import Proxies
from proxy.prompts.keeper import Prompts
from proxy.prompts.routes import PromptRoutes
from proxy.server import HttpServer
from proxy.usage import UsageRoutes
from proxy.views import Views
from tests.support.answers import Answer, read_answer
from tests.support.authority import TestMesh
from tests.support.fake_engine import CONTEXT_TOKENS, FakeEngine
from tests.support.pipe import Owner, PipeTransport, connect, settle
from tests.support.shelf import Shelf
from worker.admission import Admission
from worker.engine import ModelSpec, Task, TokenIds
from worker.engine.client import EngineClient
from worker.gateway import Gateway
from worker.metering import Meter as WorkerMeter

DEADLINE_S = 20.0
MODEL = ModelEntry(name="m")
Serve = Callable[[IncomingStream, dict[str, Any]], Awaitable[None]]


class ProxyOwner(Owner):
    """The proxy's end of a link: tells the fleet what `mesh.link.peers` would."""

    def __init__(self, fleet: Fleet, record: Record) -> None:
        super().__init__(Peer(node_id=record.node_id, role=Role.WORKER))
        self._fleet, self._record = fleet, record

    def on_hello(self, link: Link, fields: dict[str, Any]) -> None:
        self._fleet.on_up(link, self._record)

    def on_open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        self._fleet.on_open(stream, head)

    def on_control(self, link: Link, kind: Frame, fields: dict[str, Any]) -> None:
        if kind == Frame.LOAD:
            self._fleet.on_load(link, fields)
        elif kind == Frame.DRAIN:
            link.draining = True
            self._fleet.on_drain(link)

    def on_lost(self, link: Link, reason: str) -> None:
        self._fleet.on_down(link, reason)


class Worker:
    """A worker linked to the front. ``serve`` does what its test says; ``heads`` are the OPEN frames it got."""

    def __init__(self, front: Front, name: str, serve: Serve, record: Record) -> None:
        self.record = record
        self.serve = serve
        self.heads: list[dict[str, Any]] = []
        self.cancelled = 0
        self.changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        owner = Owner(Peer(node_id=b"p" * 32, role=Role.PROXY))
        owner.on_stream = self._take
        clock = SystemClock()
        self.proxy_link = Link(ProxyOwner(front.fleet, record), clock=clock, dialled=True)
        self.link = Link(owner, clock=clock, dialled=False)
        self.ends: tuple[PipeTransport, PipeTransport] = connect(self.proxy_link, self.link)

    def _take(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        self.heads.append(head)
        task = asyncio.create_task(self._run(stream, head))
        stream.on_cancel = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.changed.set()

    async def _run(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        try:
            await self.serve(stream, head)
        except asyncio.CancelledError:
            self.cancelled += 1
            self.changed.set()
            raise

    def lose(self) -> None:
        """Its machine is gone."""
        self.ends[0].lose()

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not true():
                self.changed.clear()
                await self.changed.wait()


@dataclass
class StandInEngine:
    """Implements `worker.gateway.EngineView` for a running stand-in engine."""

    base_url: str | None
    models: tuple[ModelSpec, ...]
    suspected: int = 0

    def suspect(self) -> None:
        self.suspected += 1


@dataclass
class KnownRecords:
    """What `Views` asks of the directory."""

    records: list[Record] = field(default_factory=list)

    def known(self, role: Role) -> list[Record]:
        return [record for record in self.records if record.role == role]

    def stats(self) -> dict[str, int | float]:
        return {"table_size": 3}


class Front:
    """App and HTTP server on port 0 of loopback. ``settings`` are `ProxyConfig`'s; ``ledger`` gets the proxy's receipts."""

    def __init__(self, mesh: TestMesh, folder: Path, *, ledger: Ledger | None = None, **settings: Any) -> None:
        self.mesh = mesh
        self.clock = SystemClock()
        self.directory = KnownRecords()
        self.fleet = Fleet(on_record=lambda record: None)
        own = Record(
            node_id=b"p" * 32, role=Role.PROXY, boot=1, seq=1, issued=self.clock.wall(), expires=self.clock.wall() + 3600, state=State.READY
        )
        directory = cast(Directory, self.directory)
        self.metrics = Metrics(self.fleet, directory=directory.stats)
        self.config = ProxyConfig(home=folder, host="127.0.0.1", port=0, **settings)
        views = Views(self.fleet, Proxies(on_record=lambda record: None), directory, own=lambda: own, mesh="test", clock=self.clock)
        identity = mesh.identity(Role.PROXY, now=self.clock.wall())
        self.shelf = Shelf(mesh.trust(), self.clock)
        self.limits = Limiter(own.node_id, own.boot, send=lambda peer, kind, fields: None, clock=self.clock)
        self.limits.shares.looked = True
        self.endpoints = Endpoints()
        self.endpoints.on_change = self.limits.renew
        self.endpoints.follow(self.shelf, self.shelf.trust)
        self.prompts = Prompts(folder / "prompts.db", clock=self.clock)
        self._ready = views.ready_models
        gate = Gate(mesh.trust(), clock=self.clock)
        rng = random.Random(1)
        self.inference = Inference(
            self.config,
            gate=gate,
            fleet=self.fleet,
            views=views,
            metrics=self.metrics,
            limits=self.limits,
            rng=rng,
            meter=Meter(ledger),
            endpoints=self.endpoints,
            prompts=self.prompts,
        )
        self.app = App(
            self.inference,
            gate=gate,
            views=views,
            explainer=Explainer(self.fleet, directory, views, identity=identity, clock=self.clock),
            metrics=self.metrics,
            rng=rng,
            endpoints=self.endpoints,
            routes=self._routes(folder, identity, directory, ledger),
        )
        self.server = HttpServer(self.app, self.config)
        self.port = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._workers = 0

    def _routes(self, folder: Path, identity: Identity, directory: Directory, ledger: Ledger | None) -> Routes:
        """All that `proxy.node` gives a proxy beside the application's own."""
        trust, proxies = self.shelf.trust, Proxies(on_record=lambda record: None)
        cordon = Cordon(identity, folder, clock=self.clock, on_change=lambda: None)
        usage = UsageRoutes(
            Books(ledger or Ledger(folder / LEDGER_FILE, sign=signer(identity, self.clock), clock=self.clock, keep_s=3600.0)),
            Gate(self.mesh.trust(), clock=self.clock),
            own=identity.node_id,
            workers=dict,
            proxies=dict,
            known=lambda: directory.known(Role.WORKER),
            prices=lambda: None,
            clock=self.clock,
        )
        orders = Orders(self.fleet, proxies, cordon, trust, clock=self.clock)
        documents = DocumentRoutes(self.shelf, trust, Gate(self.mesh.trust(), clock=self.clock), clock=self.clock)
        listed = EndpointRoutes(self.endpoints, Gate(self.mesh.trust(), clock=self.clock), keeper=self.shelf, ready=self._ready)
        kept = PromptRoutes(self.prompts, Gate(self.mesh.trust(), clock=self.clock), own=identity.node_id, proxies=dict)
        return {**documents.routes(), **orders.routes(), **usage.routes(), **listed.routes(), **kept.routes()}

    async def __aenter__(self) -> Front:
        self.port = await self.server.start()
        self.limits.beat(self.clock.monotonic())
        self._tasks = [asyncio.create_task(self.inference.sweep()), asyncio.create_task(self.limits.run())]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
        for worker in list(self.fleet.workers.values()):
            worker.link.abort("the test is over")
        await self.server.stop()
        await self.prompts.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def key(self, **claims: Any) -> str:
        now = self.clock.wall()
        base = ApiKey(id=b"12345678", project="p", roles=frozenset({"invoker"}), not_before=now - 60, expires=now + 3600)
        return mint(replace(base, **claims), self.mesh.keys_issuer, KEYS_KID)

    def endpoint(self, name: str, *, project: str = "p", **said: Any) -> None:
        """Sign an endpoint, or what it says from now on; without anything said it is gone."""
        endpoint = Endpoint(project=project, name=name, **said) if said else None
        former = self.shelf.held_document(ENDPOINT_KIND, name, project=project)
        body, now = encode_endpoint(endpoint), self.clock.wall()
        version = next_version(former, kind=ENDPOINT_KIND, name=name, project=project, body=body, now=now)
        assert self.shelf.accept_document(seal_document(version, self.mesh.keys_issuer, KEYS_KID).signed)

    async def worker(
        self, serve: Serve, *, name: str = "", models: tuple[ModelEntry, ...] = (ModelEntry(name="m"),), **fields: Any
    ) -> Worker:
        """Link a worker that serves by a script."""
        self._workers += 1
        now = self.clock.wall()
        record = Record(
            node_id=(name or f"w{self._workers}").encode().ljust(32, b"."),
            role=Role.WORKER,
            boot=1,
            seq=1,
            issued=now,
            expires=now + 3600,
            state=State.READY,
            models=models,
            capability=Capability(max_concurrency=10),
        )
        worker = Worker(self, name, serve, replace(record, **fields))
        await settle(*worker.ends)
        return worker

    @asynccontextmanager
    async def gateway(
        self,
        engine: FakeEngine,
        *,
        limit: int = 100,
        queue_limit: int = 100,
        ledger: Ledger | None = None,
        token_ids: bool = False,
        digest: str = "",
    ) -> AsyncIterator[tuple[Worker, Gateway]]:
        """Link a worker whose real gateway serves from a stand-in engine; with ``token_ids``, so that its streams can move."""
        way = TokenIds.VLLM if token_ids else None
        spec = ModelSpec(name="m", engine_name=engine.model, tasks=frozenset(Task), token_ids=way, context_tokens=CONTEXT_TOKENS)
        view = StandInEngine(engine.url, (spec,))
        entry = ModelEntry(name="m", tasks=tuple(map(str, Task)), digest=digest)
        admission = Admission(limit=limit, queue_limit=queue_limit)
        async with EngineClient(idle_s=1.0) as client:
            meter = WorkerMeter(ledger, clock=self.clock)
            gateway = Gateway(view, client, headers={}, admission=admission, on_load=lambda: None, clock=self.clock, meter=meter)
            worker = await self.worker(_never, models=(entry,))
            owner = cast(Owner, worker.link._owner)
            owner.on_stream = gateway.open
            try:
                yield worker, gateway
            finally:
                await gateway.stop()

    async def connect(self) -> Wire:
        return Wire(*await asyncio.open_connection("127.0.0.1", self.port))


async def _never(stream: IncomingStream, head: dict[str, Any]) -> None:
    raise AssertionError


class Wire:
    """A client that writes bytes and reads answers with the strict reader."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.got = bytearray()
        self.ended = False
        self.was_reset = False

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def more(self) -> None:
        """Read once."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                data = await self.reader.read(65536)
            except ConnectionError:
                data, self.was_reset = b"", True
        self.got += data
        self.ended = self.ended or not data

    async def answer(self, *, skip_100: bool = True) -> Answer:
        """The next answer: until it is complete, or the connection ends."""
        while True:
            answer = read_answer(bytes(self.got), ended=self.ended and not self.was_reset)
            if answer is not None and answer.complete:
                self.got = bytearray(answer.rest)
                if answer.status == 100 and skip_100:
                    continue
                return answer
            if self.ended:
                assert answer is not None, f"the connection ended with {bytes(self.got)!r}"
                return answer
            await self.more()

    async def until(self, text: bytes) -> None:
        while text not in self.got:
            assert not self.ended, bytes(self.got)
            await self.more()

    async def end(self) -> bytes:
        """Everything until the connection ends."""
        while not self.ended:
            await self.more()
        return bytes(self.got)

    def close(self) -> None:
        self.writer.transport.abort()


def post(path: str, body: bytes, key: str | None = None, *, version: str = "1.1", **headers: str) -> bytes:
    """The bytes of a POST request."""
    lines = [f"POST {path} HTTP/{version}", "Host: x"]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    fields = {"content-length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines += [f"{name}: {value}" for name, value in fields.items() if value]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
