"""One worker process: the engine and its supervisor, the gateway, the record, the links."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import structlog

from mesh import __version__, books
from mesh.books import Books
from mesh.clock import SystemClock
from mesh.cordon import Cordon
from mesh.directory import Directory
from mesh.enrol import keep_keyset, keep_renewed, known_bootstraps, open_identity
from mesh.errors import ProtocolError
from mesh.identity import IdentityStore
from mesh.ledger import LEDGER_FILE, Ledger, signer
from mesh.link.frames import Frame
from mesh.link.link import IncomingStream, Link
from mesh.node import About, MeshNode
from mesh.records import Record
from mesh.runtime import announce
from mesh.trust import Role
from worker.admission import Admission
from worker.announce import LoadPusher, about
from worker.config import WorkerConfig
from worker.engine import EngineKind, EngineSpec, Readiness, Supervisor, Timing, make_engine
from worker.engine.client import EngineClient
from worker.engine.llamacpp import DEFAULT_CONTEXT_TOKENS
from worker.gateway import Gateway
from worker.hardware import detect
from worker.metering import Meter, Uptime
from worker.prefill import Prefill
from worker.prefixes import UNKNOWN_CAPACITY_TOKENS, HeldPrefixes
from worker.progress import DownloadProgress
from worker.pulse import Pulse
from worker.vitals import Vitals, stall_s

log = structlog.get_logger(__name__)

LEAVE_S = 0.25
"""Between telling the proxies and believing that they have heard."""
ENGINE_IDLE_S = 3.0
"""An idle connection to the engine is closed after this. Less than the 5 s of uvicorn, which vLLM runs on: whoever waits less is never
sent a request into the closing."""


async def run(config: WorkerConfig, stop: asyncio.Event) -> int:
    """Run a worker until ``stop``; withdraw, finish what runs, return 0."""
    clock, rng = SystemClock(), random.Random()
    engine = make_engine(engine_spec(config))
    identity = await open_identity(config, Role.WORKER, clock)
    bootstraps = known_bootstraps(config)
    directory = Directory(identity, bootstraps=bootstraps, state_dir=config.state_dir, clock=clock, rng=rng, serve=not config.outbound)
    admission = Admission(limit=config.max_concurrency, queue_limit=config.queue_limit)
    capability = await detect(region=config.region, engine=config.engine, max_concurrency=config.max_concurrency)
    started = False

    def report(done_bytes: int = 0, total_bytes: int | None = None) -> None:
        """Tell this machine (node.json) how far the engine is."""
        if started:
            entries = [{"stage": str(entry.stage), "at": entry.at_s, "reason": entry.reason} for entry in supervisor.readiness.history]
            progress = {"done_bytes": done_bytes, "total_bytes": total_bytes}
            announce(config, node_id=identity.node_id, addresses=node.addresses, stages=entries, progress=progress)

    def on_change(readiness: Readiness) -> None:
        report()
        uptime.ready(supervisor.models if readiness.is_ready else ())
        if not readiness.is_ready:
            prefill.held.clear()  # whatever the engine had cached, its next life begins without
            pusher.changed()
        if started:
            node.changed()

    def describe() -> About:
        told = about(config, supervisor, admission, capability, cordon.why)
        return replace(told, reason=f"receipts: {ledger.trouble}"[:120]) if ledger.trouble else told

    def on_cordon() -> None:
        node.changed()
        gateway.close_in(LEAVE_S) if cordon.why else gateway.reopen()

    cordon = Cordon(identity, config.state_dir, clock=clock, on_change=on_cordon)

    ledger = Ledger(config.state_dir / LEDGER_FILE, sign=signer(identity, clock), clock=clock, keep_s=config.keep_receipts_s)
    receipts = Books(ledger)
    uptime = Uptime(ledger, gpus=capability.gpu_count, clock=clock, rng=rng)
    progress = DownloadProgress(config.model[0] if config.model else config.engine, report)
    supervisor = Supervisor(
        engine,
        state_dir=config.state_dir,
        clock=clock,
        rng=rng,
        timing=Timing(load_deadline_s=config.load_timeout_s),
        on_change=on_change,
        on_progress=progress,
    )
    prefill = Prefill(clock, held=HeldPrefixes(capacity_tokens=kv_cache_tokens(config)))
    pulse = Pulse()
    pusher = LoadPusher(admission, supervisor, prefill, pulse)
    async with EngineClient(idle_s=ENGINE_IDLE_S if engine.keeps_connections else 0.0) as client:
        gateway = Gateway(
            supervisor,
            client,
            headers=engine.headers,
            admission=admission,
            on_load=pusher.changed,
            clock=clock,
            prefill=prefill,
            pulse=pulse,
            max_bodies_bytes=config.max_bodies_bytes,
            meter=Meter(ledger, clock=clock),
        )
        vitals = Vitals(
            supervisor,
            pulse,
            admission,
            stall_s=stall_s(config.stall_timeout_s, config.engine),
            on_change=pusher.changed,
            give_up=gateway.give_up,
            clock=clock,
        )
        node = MeshNode(
            identity,
            directory,
            _Links(gateway, receipts, pusher, cordon),
            links_with=(Role.PROXY,),
            about=describe,
            state_dir=config.state_dir,
            record_ttl_s=config.record_ttl_s,
            version=__version__,
            clock=clock,
            rng=rng,
        )
        pusher.peers = node.peers
        ledger.start()
        await directory.start(config.host, config.dht_port)
        try:
            if not config.outbound:
                _, port = await node.listen(config.host, config.port)
                node.addresses = config.addresses(port)
            started = True
            if cordon.why:
                gateway.close_in(0.0)
            node.start()
            report()
            log.info("worker.started", id=identity.node_id.hex()[:12], links=node.addresses or "outbound only", engine=config.engine)
            async with asyncio.TaskGroup() as tasks:
                store = IdentityStore(config.state_dir)
                background = (
                    tasks.create_task(keep_renewed(identity, store, bootstraps, clock, rng)),
                    tasks.create_task(keep_keyset(identity, store)),
                    tasks.create_task(vitals.run()),
                    tasks.create_task(uptime.run()),
                )
                tasks.create_task(supervisor.run())
                await stop.wait()
                log.info("worker.draining", running=admission.running, waiting=admission.waiting)
                supervisor.drain()
                node.drain()
                await asyncio.sleep(LEAVE_S)
                await admission.idle()  # `mesh.runtime` bounds it with the drain deadline
                for task in background:
                    task.cancel()
                await supervisor.stop()
        finally:
            progress.close()
            await gateway.stop()
            await node.stop()
            await directory.stop()
            await receipts.stop()
            await ledger.stop()
    return 0


def engine_spec(config: WorkerConfig) -> EngineSpec:
    """What the settings say about the engine."""
    return EngineSpec(
        kind=EngineKind(config.engine),
        source=config.model[0] if config.model else None,
        served_name=config.served_name[0] if config.served_name else None,
        args=config.engine_args,
        context_tokens=config.context_tokens or None,
        vllm_command=config.vllm_command,
        threads=config.threads or None,
        url=config.engine_url or None,
        api_key_env=config.engine_key_env or None,
        parallel=config.parallel or EngineSpec.parallel,
        token_ids=config.token_ids,
    )


def kv_cache_tokens(config: WorkerConfig) -> int:
    """How many tokens the engine's KV cache holds, until the engine itself says so."""
    if config.kv_cache_tokens:
        return config.kv_cache_tokens
    if config.engine == EngineKind.LLAMACPP:
        return (config.context_tokens or DEFAULT_CONTEXT_TOKENS) * (config.parallel or EngineSpec.parallel)
    return UNKNOWN_CAPACITY_TOKENS


class _Links:
    """Implements `mesh.link.peers.PeersOwner` for a worker: proxies open streams, and that is all they may do."""

    def __init__(self, gateway: Gateway, receipts: Books, pusher: LoadPusher, cordon: Cordon) -> None:
        self._gateway = gateway
        self._cordon = cordon
        self._books = receipts
        self._pusher = pusher

    def on_up(self, link: Link, record: Record) -> None:
        self._pusher.changed()

    def on_down(self, link: Link, reason: str) -> None:
        self._pusher.changed()

    def on_record(self, link: Link, record: Record) -> None:
        pass

    def on_load(self, link: Link, fields: dict[str, Any]) -> None:
        raise ProtocolError("a proxy has no load")

    def on_prefix(self, link: Link, fields: dict[str, Any]) -> None:
        raise ProtocolError("a proxy holds no prefixes")

    def on_drain(self, link: Link) -> None:
        pass

    def on_frame(self, link: Link, kind: Frame, fields: dict[str, Any]) -> None:
        if kind == Frame.ORDER:
            self._cordon.obey_frame(fields)

    def on_open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        if head.get("task") == books.TASK:
            self._books.open(stream, head)
        else:
            self._gateway.open(stream, head)
