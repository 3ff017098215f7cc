"""A bootstrap node from start to stop: its own admission, enrolment for others, a seat in the directory."""

from __future__ import annotations

import asyncio
import random

import structlog

from bootstrap.config import BootstrapConfig
from bootstrap.enrol import Desk
from bootstrap.ledger import Ledger
from bootstrap.others import Others
from bootstrap.server import EnrolServer
from mesh import __version__, runtime
from mesh.authority import Admission, load_admission, open_mesh
from mesh.bulletin import watch_documents
from mesh.clock import Clock, SystemClock
from mesh.directory import Directory
from mesh.enrol import keep_keyset, known_bootstraps, open_identity, until_half_life
from mesh.errors import ConfigError
from mesh.freshness import follow_revocations
from mesh.identity import Identity, IdentityStore
from mesh.node import About, Announcer
from mesh.records import Capability, State
from mesh.revocations import RevocationList
from mesh.trust import Role

log = structlog.get_logger(__name__)

RECORD_TTL_S = 20.0
WATCH_S = 10.0
"""How often the other bootstrap nodes are looked up: newcomers are told of them."""
MAX_BOOTSTRAPS = 16
PORT_ATTEMPTS = 20
"""With port 0: how often to look for a number that is free for both TCP and UDP."""


async def run(config: BootstrapConfig, stop: asyncio.Event) -> int:
    """Run until ``stop``. Raises `ConfigError`, `EnrolError` or a `TrustError` where it cannot start."""
    clock, rng = SystemClock(), random.Random()
    admission = await open_admission(config, clock, rng)
    store = IdentityStore(config.state_dir)
    identity = await admit_itself(admission, store, clock)
    ledger = Ledger(config.state_dir / "tokens.db")
    directory = Directory(identity, bootstraps=known_bootstraps(config), state_dir=config.state_dir, clock=clock, rng=rng)
    announcer = Announcer(
        identity,
        directory,
        about=lambda: About(state=State.READY, capability=Capability(region=config.region)),
        record_ttl_s=RECORD_TTL_S,
        version=__version__,
        clock=clock,
        rng=rng,
    )

    def bootstraps() -> tuple[str, ...]:
        """This node first, then those that are up now, then those that were known; a newcomer remembers them all."""
        up = (address for record in directory.known(Role.BOOTSTRAP) for address in record.addresses[:2])
        return tuple(dict.fromkeys((*announcer.addresses, *up, *known_bootstraps(config))))[:MAX_BOOTSTRAPS]

    def others() -> tuple[str, ...]:
        """One address of each other bootstrap node that is up."""
        up = directory.known(Role.BOOTSTRAP)
        return tuple(record.addresses[0] for record in up if record.addresses and record.node_id != identity.node_id)

    revoked = RevocationList()
    desk = Desk(
        admission=admission,
        trust=identity.trust,
        ledger=ledger,
        clock=clock,
        known_bootstraps=bootstraps,
        tell_others=Others(identity, config.state_dir, others).tell,
        revoked=revoked,
    )
    server = EnrolServer(desk, identity, config.state_dir, clock)
    try:
        port = await listen(config, server, directory)
        follow_revocations(directory, revoked)
        announcer.addresses = config.addresses(port)
        announcer.start()
        directory.watch(Role.BOOTSTRAP, lambda _record: None, interval_s=WATCH_S)
        async with asyncio.TaskGroup() as tasks:
            background = (
                tasks.create_task(keep_admitted(identity, admission, store, clock, rng)),
                tasks.create_task(keep_keyset(identity, store)),
                tasks.create_task(watch_documents(directory, clock, rng)),
            )
            runtime.announce(config, node_id=identity.node_id, addresses=announcer.addresses)
            log.info("bootstrap.ready", addresses=announcer.addresses, id=identity.node_id.hex()[:12], version=__version__)
            await stop.wait()
            for task in background:
                task.cancel()
    finally:
        await server.stop()
        await announcer.stop()
        await directory.stop()
        ledger.close()
    return 0


async def open_admission(config: BootstrapConfig, clock: Clock, rng: random.Random) -> Admission:
    """What lets this node admit others: from the operator's mesh in HOME, from an earlier start, or from another bootstrap node.

    The first bootstrap node of a mesh runs where `mesh create` ran; every other is handed the same by the one it joins.
    """
    operator = config.home / "mesh"
    if not config.join and (operator / "mesh.json").exists():
        return await asyncio.to_thread(lambda: open_mesh(operator).admission())
    stored = config.state_dir / "admission.json"
    if config.join and not stored.exists():
        await open_identity(config, Role.BOOTSTRAP, clock, rng)
    if not stored.exists():
        raise ConfigError(
            f"this bootstrap node has no mesh: run it with --home where `mesh create` was run (looked in {operator}), "
            "or with --join TOKEN from `mesh invite bootstrap`"
        )
    return await asyncio.to_thread(load_admission, config.state_dir)


async def admit_itself(admission: Admission, store: IdentityStore, clock: Clock) -> Identity:
    """A bootstrap node needs nobody's leave: it holds an issuer's key."""
    key = await asyncio.to_thread(store.key)
    credentials = admission.admit(key.public_key(), Role.BOOTSTRAP, now=clock.wall())
    identity = Identity(key, credentials, mesh_id=admission.keyset.mesh_id, now=clock.wall())
    await asyncio.to_thread(store.save, credentials, identity.mesh_id)
    return identity


async def keep_admitted(identity: Identity, admission: Admission, store: IdentityStore, clock: Clock, rng: random.Random) -> None:
    """Renew its own certificate at half life, for as long as it runs."""
    while True:
        await until_half_life(identity.membership, clock, rng)
        now = clock.wall()
        credentials = admission.admit(identity.key.public_key(), Role.BOOTSTRAP, now=now)
        identity.renew(credentials, now=now)
        await asyncio.to_thread(store.save, identity.credentials, identity.mesh_id)
        log.info("node.renewed", until=int(identity.membership.expires))


async def listen(config: BootstrapConfig, server: EnrolServer, directory: Directory) -> int:
    """Open one port number for both TCP and UDP; returns it. Raises `ConfigError` if it is taken."""
    for attempt in range(PORT_ATTEMPTS):
        try:
            port = await server.start(config.host, config.port)
            await directory.start(config.host, port)
            return port
        except OSError as error:
            await server.stop()
            if config.port or attempt == PORT_ATTEMPTS - 1:
                raise ConfigError(
                    f"--port: cannot listen on {config.host}:{config.port} for TCP and UDP ({error.strerror or error})"
                ) from None
    raise AssertionError("unreachable")
