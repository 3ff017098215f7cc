"""One proxy process: identity, directory, links, HTTP. What is started here is stopped here, in reverse."""

from __future__ import annotations

import asyncio
import random

import structlog

from mesh import __version__
from mesh.address import Address, parse_address
from mesh.books import Books
from mesh.bulletin import watch_documents
from mesh.clock import SystemClock
from mesh.cordon import Cordon
from mesh.directory import Directory
from mesh.enrol import keep_keyset, keep_renewed, known_bootstraps, open_identity
from mesh.freshness import Watch, follow_revocations
from mesh.identity import IdentityStore
from mesh.ledger import LEDGER_FILE, Ledger, signer
from mesh.node import About, MeshNode
from mesh.records import Capability, Record, State
from mesh.revocations import RevocationList
from mesh.runtime import announce
from mesh.trust import Role
from proxy.app import App
from proxy.config import ProxyConfig
from proxy.documents import DocumentRoutes
from proxy.endpoints import EndpointRoutes, Endpoints
from proxy.explain import Explainer
from proxy.fleet import Fleet
from proxy.gate import Gate
from proxy.gate_metrics import GateCollector
from proxy.inference import NEW_S, Inference
from proxy.limits.counters import Counters
from proxy.limits.limiter import Limiter
from proxy.limits.metrics import LimitsCollector
from proxy.metering import LedgerCollector, Meter, look_at
from proxy.metrics import Metrics
from proxy.orders import Orders
from proxy.peers import ByRole, Proxies
from proxy.processes import run_processes
from proxy.prompts.keeper import FILE as PROMPTS_FILE
from proxy.prompts.keeper import Prompts, PromptsCollector
from proxy.prompts.routes import PromptRoutes
from proxy.server import HttpServer
from proxy.usage import UsageRoutes, held_prices
from proxy.views import Views

log = structlog.get_logger(__name__)

WATCH_S = 5.0
RECORD_TTL_S = 20.0
POLITE_S = 3.0
"""How long idle clients have to send one more request, whose answer tells them to close; then the connection is closed."""
LEAVE_S = 0.3
"""Between failing /readyz and closing the listener: for what was already on its way."""


async def run(config: ProxyConfig, stop: asyncio.Event) -> int:
    """Run a proxy until ``stop``; drain, then return 0."""
    if config.processes > 1:
        return await run_processes(config, stop)
    clock, rng = SystemClock(), random.Random()
    identity = await open_identity(config, Role.PROXY, clock)
    bootstraps, store = known_bootstraps(config), IdentityStore(config.state_dir)
    directory = Directory(identity, bootstraps=bootstraps, state_dir=config.state_dir, clock=clock, rng=rng)
    fleet, proxies = Fleet(on_record=directory.observe), Proxies(on_record=directory.observe)
    state = State.JOINING
    api = ""

    def about() -> About:
        drained = state == State.READY and bool(cordon.why)
        return About(
            state=State.DRAINING if drained else state,
            api=api,
            capability=Capability(region=config.region),
            reason=cordon.why if drained else "",
        )

    def on_cordon() -> None:
        inference.draining = bool(cordon.why) or state == State.DRAINING
        node.changed()

    cordon = Cordon(identity, config.state_dir, clock=clock, on_change=on_cordon)

    node = MeshNode(
        identity,
        directory,
        ByRole({Role.WORKER: fleet, Role.PROXY: proxies}),
        links_with=(Role.WORKER, Role.PROXY),
        about=about,
        state_dir=config.state_dir,
        record_ttl_s=RECORD_TTL_S,
        version=__version__,
        clock=clock,
        rng=rng,
        linked_workers=config.linked_workers,
    )
    views = Views(fleet, proxies, directory, own=node.record, mesh=identity.trust.keyset.name, clock=clock)
    metrics = Metrics(fleet, directory=directory.stats, lookups=directory.node.counts.lookups, record_ages=views.record_ages)
    revoked = RevocationList()
    watch = Watch(directory, revoked, own=identity.node_id, stale_s=config.revocations_stale_s, folder=config.state_dir, clock=clock)
    node.bulletin.on_agreed = lambda link: watch.agreed(link.node_id)
    gate = Gate(identity.trust, clock=clock, region=config.region, revoked=revoked, freshness=watch.freshness)
    limits = Limiter(identity.node_id, node.boot, send=proxies.send, clock=clock, counters=Counters(config.state_dir / "limits.db"))
    proxies.limits = limits
    explainer = Explainer(fleet, directory, views, identity=identity, clock=clock, wants=node.neighbours.wants, sharing=limits.sharing)
    metrics.registry.register(LimitsCollector(limits))
    metrics.registry.register(GateCollector(gate))
    documents = DocumentRoutes(directory, identity.trust, gate, clock=clock)
    ledger = Ledger(config.state_dir / LEDGER_FILE, sign=signer(identity, clock), clock=clock, keep_s=config.keep_receipts_s)
    metrics.registry.register(LedgerCollector(ledger))
    explainer.more = lambda: look_at(ledger)
    orders = Orders(fleet, proxies, cordon, identity.trust, clock=clock)
    books = Books(ledger, link_of=fleet.link_of)
    usage = UsageRoutes(
        books,
        gate,
        own=identity.node_id,
        workers=lambda: {node_id: worker.link for node_id, worker in fleet.workers.items()},
        proxies=lambda: {node_id: proxy.link for node_id, proxy in proxies.linked.items()},
        known=lambda: directory.known(Role.WORKER),
        prices=lambda: held_prices(directory),
        clock=clock,
    )
    endpoints = Endpoints()
    endpoints.on_change = limits.renew
    prompts = Prompts(config.state_dir / PROMPTS_FILE, clock=clock)
    proxies.questions = {asked.about: asked for asked in (books.questions, prompts.questions)}
    metrics.registry.register(PromptsCollector(prompts))
    listed = EndpointRoutes(endpoints, gate, keeper=directory, ready=views.ready_models)
    kept = PromptRoutes(prompts, gate, own=identity.node_id, proxies=lambda: {id: proxy.link for id, proxy in proxies.linked.items()})
    routes = {**documents.routes(), **orders.routes(), **usage.routes(), **listed.routes(), **kept.routes()}
    inference = Inference(
        config,
        gate=gate,
        fleet=fleet,
        views=views,
        metrics=metrics,
        limits=limits,
        rng=rng,
        meter=Meter(ledger),
        endpoints=endpoints,
        prompts=prompts,
    )
    app = App(inference, gate=gate, views=views, explainer=explainer, metrics=metrics, rng=rng, endpoints=endpoints, routes=routes)
    server = HttpServer(app, config)
    metrics.watch(server.connections)
    loop = asyncio.get_running_loop()
    ledger.start()
    await directory.start(config.host, config.dht_port)
    try:
        follow_revocations(directory, revoked, watch.settle)
        await watch.look_first()
        limits.follow(directory)
        endpoints.follow(directory, identity.trust)
        _, link_port = await node.listen(config.host, config.link_port)
        node.addresses = config.addresses(link_port)
        port = await server.start()
        api = _base_url(config, port)
        state = State.READY
        inference.draining = bool(cordon.why)
        inference.new_until = loop.time() + NEW_S
        node.start()
        directory.watch(Role.BOOTSTRAP, _nothing, interval_s=WATCH_S)
        announce(config, node_id=identity.node_id, addresses=node.addresses, api=api)
        log.info("proxy.listening", api=api, links=node.addresses[0], id=identity.node_id.hex()[:12])
        async with asyncio.TaskGroup() as tasks:
            background = (
                tasks.create_task(keep_renewed(identity, store, bootstraps, clock, rng)),
                tasks.create_task(inference.sweep()),
                tasks.create_task(cordon.watch_certificate()),
                tasks.create_task(keep_keyset(identity, store)),
                tasks.create_task(watch_documents(directory, clock, rng)),
                tasks.create_task(watch.run(rng)),
                tasks.create_task(limits.run()),
                tasks.create_task(limits.keep()),
                tasks.create_task(limits.look(directory)),
                tasks.create_task(prompts.run()),
            )
            await stop.wait()
            leave_by = loop.time() + config.drain_s
            state = State.DRAINING
            inference.draining = True
            node.changed()
            limits.leave()
            await asyncio.sleep(LEAVE_S)
            await server.close_listener()
            await server.leave(min(POLITE_S, config.drain_s / 2))
            await inference.finish(leave_by - loop.time())
            limits.finish()
            for task in background:
                task.cancel()
    finally:
        await server.stop()
        await node.stop()
        await directory.stop()
        await books.stop()
        await prompts.stop()
        await ledger.stop()
    return 0


def _base_url(config: ProxyConfig, port: int) -> str:
    scheme = "https" if config.tls_cert else "http"
    host = parse_address(config.addresses(port)[0]).host
    return f"{scheme}://{Address(host, port)}/v1"


def _nothing(record: Record) -> None:
    """Watched for the view alone."""
