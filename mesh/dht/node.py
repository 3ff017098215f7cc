"""One node of the directory's network: joining it, staying in it, looking things up, storing our own."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgpack
import structlog

from mesh.clock import Clock
from mesh.dht.address import Address, is_dialable, normalise, split_host_port
from mesh.dht.collect import Accept
from mesh.dht.config import DirectoryConfig
from mesh.dht.counts import Counts
from mesh.dht.crawl import Crawl, Outcome
from mesh.dht.documents import DocumentStore
from mesh.dht.exchange import Exchange
from mesh.dht.hearsay import Hearsay
from mesh.dht.keys import depth_of, indexes
from mesh.dht.mesh_time import MeshTime
from mesh.dht.peers import PeerMemory
from mesh.dht.protocol import EMPTY, MeshProtocol, Op
from mesh.dht.publish import Publisher
from mesh.dht.routing import FEW, ID_BITS, ID_BYTES, Contact, Table, parse_contacts
from mesh.dht.rpc import Reply
from mesh.dht.session import Sessions
from mesh.dht.state import KnownPeer, load_peers, save_peers
from mesh.dht.storage import Held, RecordStore, Verdict
from mesh.dht.tasks import Tasks
from mesh.dht.verify import Verifier, lifetime_s, peek
from mesh.errors import ConfigError, TrustError
from mesh.identity import Identity
from mesh.membership import MembershipCache
from mesh.pulse import NO_PULSE, Pulse, make_pulse
from mesh.records import Record, directory_key
from mesh.trust import Role

log = structlog.get_logger(__name__)

_RESOLVE_S = 3.0
_JOIN_AT_ONCE = 16
_SEEDS = 24
_LARGE_PROBES = 2
"""In a large mesh there is more talk to learn from; probes are so many times rarer."""
_NEAR_ENOUGH, _LARGE_NEAR_ENOUGH = 3.0, 1.5
"""In a large mesh tables know a smaller part of it: of what stands farther than so many times the usual distance, none may be a holder."""
_BUCKETS_AT_ONCE = 16
_BUCKET_CHECKS = 0.025
"""So often, in `DirectoryConfig.refresh_bucket_s`, buckets are checked: one that was split off with hardly anybody in it cannot wait."""
_LONG_LOST_S = 20.0
_REUNITE_EVERY_S = 5.0
_KEYS_REMEMBERED = 1_024
_OWN_ADDRESS_CHECKS = 3
_EXPIRE_EVERY_S = 1.0
_SAVE_NEWS_S = 2.0

T = TypeVar("T")
Hearer = Callable[[Record], None]


class DhtNode:
    """Everything `mesh.directory.Directory` stands on. ``serve`` False: asks and stores, but never enters a table."""

    def __init__(
        self,
        identity: Identity,
        *,
        bootstraps: Sequence[str],
        state_dir: Path | None,
        clock: Clock,
        rng: random.Random,
        serve: bool,
        config: DirectoryConfig,
        verifier: Verifier | None = None,
    ) -> None:
        self.identity = identity
        self.config = config
        self.clock = clock
        self.counts = Counts()
        self.time = MeshTime(clock)
        self.memory = PeerMemory(config, rng)
        self.table = Table(identity.node_id, config)
        self.hearsay = Hearsay(self.table, self.memory)
        self.is_large = False
        """Whether the mesh is so large that traffic matters more than a few seconds, judged once a second."""
        self.verifier = verifier if verifier is not None else Verifier(MembershipCache(identity.trust))
        self.store = RecordStore(self.verifier, config)
        boot = int(clock.wall() * 1000)
        self.sessions = Sessions(identity, self.verifier, boot=boot, serve=serve, size=config.max_sessions)
        self.protocol = MeshProtocol(
            clock=clock,
            config=config,
            sessions=self.sessions,
            memory=self.memory,
            time=self.time,
            counts=self.counts,
            own_id=identity.node_id,
            table=self.table,
            store=self.store,
            serve=serve,
            welcomes=identity.role == Role.BOOTSTRAP,
        )
        self.tasks = Tasks()
        self.publisher = Publisher(
            self.protocol, self.memory, config, clock, rng, self.tasks, self.walk, self.guess, self._make_pulse, self._hold
        )
        remembers = identity.role in (Role.BOOTSTRAP, Role.PROXY)
        self.documents = DocumentStore(identity.trust, state_dir if remembers else None)
        self.exchange = Exchange(
            identity,
            self.protocol,
            self.documents,
            config,
            clock,
            rng,
            self.tasks,
            self.walk,
            serve=serve,
        )
        self._serve = serve
        self._rng = rng
        self._state_dir = state_dir
        self._bootstraps = [split_host_port(text) for text in bootstraps]
        self._own_addresses: dict[Address, float] = {}
        self._resolved: dict[Address, None] = {}
        self._remembered: dict[bytes, Contact] = {}
        self._news = False
        self._knock_pause_s = config.bootstrap_retry_s
        self._done_at: dict[str, float] = {}
        self._lost: OrderedDict[bytes, float] = OrderedDict()
        self._reunited = float("-inf")
        self._on_reunion: list[Callable[[], None]] = []
        self._nearest: OrderedDict[bytes, list[Contact]] = OrderedDict()
        self._lacks: OrderedDict[bytes, dict[bytes, int]] = OrderedDict()
        """By key and node: see `Collector`."""
        self._joined = asyncio.Event()
        self._hearers: list[Hearer] = []
        self.store.on_change = self._on_change
        self.protocol.on_notice = self._on_notice
        self.protocol.on_own_address = self._on_own_address
        self.table.on_added = self._on_added
        self.table.on_removed = self._on_removed
        self._renewed()
        identity.on_renewal(self._renewed)
        identity.trust.on_change(self.verifier.forget)
        identity.trust.on_change(self.exchange.recheck)

    # life

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Bind the UDP socket and begin to join. Raises `OSError` if the address cannot be had."""
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: self.protocol, local_addr=(host, port))
        bound = transport.get_extra_info("sockname")
        if self._state_dir is not None:
            for peer in load_peers(self._state_dir, limit=self.config.remembered_peers):
                self._remembered[peer.node_id] = Contact(peer.node_id, peer.address)
        self.documents.load(now=self.clock.wall())
        self.tasks.repeat(self._keep_documents, self.clock, name="directory documents")
        self.tasks.repeat(self._stay_joined, self.clock, name="directory join")
        self.tasks.repeat(self._maintain, self.clock, name="directory upkeep")
        log.info("directory.started", host=bound[0], port=bound[1], remembered=len(self._remembered))
        return bound[0], bound[1]

    async def stop(self) -> None:
        """Save what is known and leave. Idempotent."""
        await self.tasks.stop()
        self.protocol.close()
        await self._save()
        await self.exchange.save()

    def forget_state_dir(self) -> None:
        """Save nothing from now on: as if the power had gone."""
        self._state_dir = None
        self.documents.unsaved()

    async def joined(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._joined.wait()
        except TimeoutError:
            return False
        return True

    def _renewed(self) -> None:
        self.protocol.sealer.set_keys(self.identity.credentials.network_keys)
        self.sessions.renew()

    # what a person may want to know

    @property
    def bootstraps(self) -> list[tuple[str, int]]:
        """The bootstrap nodes we were told of: name or address, and port."""
        return list(self._bootstraps)

    def is_own(self, address: Address) -> bool:
        """Whether a datagram to ``address`` has come back to us."""
        return self._own_addresses.get(address, 0.0) > self.clock.monotonic()

    def lost(self) -> list[tuple[Contact, float]]:
        """Peers that fell out of the table and have not come back, and how many seconds ago."""
        now = self.clock.monotonic()
        return [(self._remembered[node_id], now - at) for node_id, at in self._lost.items() if node_id in self._remembered]

    def contact_of(self, record: Record) -> Contact | None:
        """Where a node answers datagrams: as it last did, else as its record says; None for one that is known by a DNS name alone."""
        known = self.table.get(record.node_id) or self._remembered.get(record.node_id)
        if known is not None or not record.addresses:
            return known
        try:
            host, port = split_host_port(record.addresses[0])
            return Contact(record.node_id, normalise(str(ipaddress.ip_address(host)), port))
        except (ConfigError, ValueError):  # a name, or whatever its owner chose to write there
            return None

    # looking up and storing

    def seeds(self, key: bytes, count: int = _SEEDS) -> list[Contact]:
        """Where a look-up begins, nearest first: who stood nearest the last time, and the ``count`` nearest contacts, but not those that
        lately kept silent."""
        now = self.clock.monotonic()
        found = self.table.nearest(key, count, accept=lambda contact: not self.memory.shunned(contact.id, now))
        if (last := self._nearest.get(key)) is not None:
            goal = int.from_bytes(key)
            found = sorted({contact.id: contact for contact in (*last, *found)}.values(), key=lambda contact: contact.long_id ^ goal)
        return found or self.table.nearest(key, count)

    def guess(self, key: bytes, count: int) -> list[Contact]:
        """The ``count`` nodes of our table nearest to ``key``, if they stand about as near as the nearest of the whole network do."""
        found = self.table.nearest(key, count, accept=lambda contact: not self.memory.failing(contact.id))
        if len(found) < count:
            return []
        usual = (count << ID_BITS) / self.table.estimate_nodes()
        most = usual * (_LARGE_NEAR_ENOUGH if self.is_large else _NEAR_ENOUGH)
        return found if found[-1].long_id ^ int.from_bytes(key) <= most else []

    async def walk(self, key: bytes) -> list[Contact]:
        """The live nodes nearest to ``key``, nearest first."""
        return (await self.crawl(key, accept=None, timeout_s=2 * self.config.lookup_timeout_s)).nearest

    async def crawl(
        self, key: bytes, *, accept: Accept | None, timeout_s: float, width: int | None = None, known: Sequence[Record] = ()
    ) -> Outcome:
        """One look-up; ``known`` are records under the key that need not be fetched again."""
        lacks = self._lacks.get(key, {}) if known else {}
        crawl = Crawl(
            self.protocol,
            self.memory,
            self.config,
            self.clock,
            key=key,
            accept=accept,
            width=width,
            known=known,
            lacks=lacks,
            sparing=self.is_large,
        )
        outcome = await crawl.run(self.seeds(key, 1), partial(self.seeds, key), timeout_s=timeout_s)
        self.table.touch(key, self.clock.monotonic())
        if width is None:
            _remember(self._nearest, key, outcome.nearest[: self.config.k])
        if known:
            _remember(self._lacks, key, {contact.id: lacks[contact.id] for contact in outcome.nearest if contact.id in lacks})
        self.counts.add("lookups")
        if not outcome.complete:
            self.counts.add("lookups_cut_short")
        if not self.is_large:
            self.hearsay.hear(outcome.heard)
        return outcome

    def _hold(self, record: Record, pulse: Pulse) -> None:
        """Hold our own record too, so that we find ourselves. Whoever asks us should hear what it hears from the other holders."""
        remaining_s = record.expires - self.clock.wall()
        now, wall = self.clock.monotonic(), self.time.now()
        own = self.identity.node_id
        if pulse.n and self.store.keep(own, pulse, now=now, wall=wall) is Verdict.ACCEPTED:
            return
        keys = [directory_key(kind, name) for kind, name in indexes(record)]
        self.store.offer(record.signed, keys, remaining_s=remaining_s, source=own, now=now, wall=wall)

    def check(self, data: bytes, remaining_s: float, pulse: Pulse = NO_PULSE) -> Record:
        """Verify a record from a peer; returns it with ``expires`` on our own wall clock. Raises a `TrustError`."""
        now = self.time.now()
        claim = peek(data)
        record = self.verifier.record(data, claim, now=now, pulse=pulse)
        left_s = lifetime_s(claim, remaining_s, now=now, pulse_s=pulse.n)
        return replace(record, expires=self.clock.wall() + left_s, pulse=pulse.n)

    def local(self, held: Held) -> Record:
        """A held record with ``expires`` on our own wall clock."""
        return replace(held.record, expires=self.clock.wall() + held.ends - self.clock.monotonic(), pulse=held.pulse.n)

    def _make_pulse(self, record: Record, n: int) -> Pulse:
        return make_pulse(self.identity.key, record.boot, record.seq, n)

    def hear(self, hearer: Hearer) -> None:
        """Call ``hearer`` with every verified record that reaches this node unasked: stored here, or pushed by a holder."""
        self._hearers.append(hearer)

    def _on_change(self, held: Held, former: Held | None, material: bool) -> None:
        if material and self._serve:
            self.protocol.push(held, held.keys if former is None else held.keys | former.keys)
        self._tell(self.local(held))

    def _on_notice(self, data: bytes, remaining_s: float, source: bytes) -> None:
        try:
            record = self.check(data, remaining_s)
        except TrustError as error:
            self.counts.refuse(f"notice_{error.code}", source.hex()[:12], now=self.clock.monotonic())
            return
        self._tell(record)

    def _tell(self, record: Record) -> None:
        for hearer in self._hearers:
            hearer(record)

    async def watch(self, nearest: dict[bytes, list[Contact]]) -> None:
        """Ask the holders of each key to push what changes under it; the lease must be renewed."""
        keys_at: dict[Contact, list[bytes]] = {}
        for key, contacts in nearest.items():
            for contact in contacts[: self.config.holders]:
                keys_at.setdefault(contact, []).append(key)
        lease_ms = int(self.config.watch_lease_s * 1000)
        requests = [
            self.protocol.request(contact.address, Op.WATCH, msgpack.packb([keys[at : at + 16], lease_ms]), node_id=contact.id)
            for contact, keys in keys_at.items()
            for at in range(0, len(keys), 16)
        ]
        await asyncio.gather(*requests)

    # joining

    def _on_added(self, contact: Contact) -> None:
        self._news = self._news or contact.id not in self._remembered
        self._remembered.pop(contact.id, None)
        self._remembered[contact.id] = contact
        if self.memory.failing(contact.id):
            self.protocol.probe(contact)  # it speaks again: once it answers too, look-ups ask it and we tell others of it
        lost_at = self._lost.pop(contact.id, None)
        if lost_at is not None and self.clock.monotonic() - lost_at > _LONG_LOST_S:
            self._reunite()
        while len(self._remembered) > self.config.remembered_peers:
            self._remembered.pop(next(iter(self._remembered)))
        self.publisher.contact_added(contact)
        self._joined.set()

    def _on_removed(self, contact: Contact) -> None:
        self._lost[contact.id] = self.clock.monotonic()
        self._lost.move_to_end(contact.id)
        if len(self._lost) > self.config.remembered_peers:
            self._lost.popitem(last=False)

    def _reunite(self) -> None:
        """A peer long lost is back: perhaps half the network is. Look around at once instead of when it falls due."""
        now = self.clock.monotonic()
        if now - self._reunited < _REUNITE_EVERY_S:
            return
        self._reunited = now
        self.counts.add("reunions")
        self.tasks.start(self._look_around(), name="directory reunion")

    async def _look_around(self) -> None:
        await self._pause(1.0)
        await self.crawl(self.identity.node_id, accept=None, timeout_s=self.config.lookup_timeout_s, width=self.config.k)
        await self.publisher.walk_again()
        await self.exchange.keep_alive()
        for listener in self._on_reunion:
            listener()

    def on_reunion(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` when much of the network may have come back."""
        self._on_reunion.append(listener)

    def _on_own_address(self, address: Address) -> None:
        """Believed for a while only: whoever overhears what we send can send it back to us in another's name."""
        self._own_addresses[address] = self.clock.monotonic() + _OWN_ADDRESS_CHECKS * self.config.bootstrap_recheck_s

    def _alone_by_right(self) -> bool:
        """No other bootstrap node is named: whoever comes will come to us."""
        return all(self.is_own(address) for address in self._resolved) and (bool(self._resolved) or not self._bootstraps)

    async def _stay_joined(self) -> float:
        """While alone, knock at every known door with growing pauses; later, look at the bootstrap nodes now and then."""
        alone = not len(self.table)
        await self._knock()
        if len(self.table):
            self._knock_pause_s = self.config.bootstrap_retry_s
            if alone:
                await self._settle()
            return self.config.bootstrap_recheck_s * self._rng.uniform(0.5, 1.0)
        if self._alone_by_right():
            self._joined.set()
        pause_s = self._knock_pause_s * self._rng.uniform(0.5, 1.0)
        self._knock_pause_s = min(self.config.bootstrap_retry_max_s, 2 * self._knock_pause_s)
        return pause_s

    async def _pause(self, pause_s: float) -> None:
        await self.clock.sleep(pause_s * self._rng.uniform(0.5, 1.0))

    async def _knock(self) -> None:
        """Ping bootstrap nodes, and remembered peers that are not in the table."""
        await self._resolve()
        addresses: dict[Address, bytes | None] = {address: None for address in self._resolved if not self.is_own(address)}
        known = {contact.address: None for contact in self.table}
        for contact in list(self._remembered.values())[-_JOIN_AT_ONCE * 4 :]:
            if self.table.get(contact.id) is None:
                addresses.setdefault(contact.address, contact.id)
        fresh = [(address, node_id) for address, node_id in addresses.items() if address not in known]
        for at in range(0, len(fresh), _JOIN_AT_ONCE):
            some = fresh[at : at + _JOIN_AT_ONCE]
            await asyncio.gather(*(self._greet(address, node_id) for address, node_id in some))
            if len(self.table) >= self.config.k:
                break

    async def _greet(self, address: Address, node_id: bytes | None) -> None:
        """Introduce ourselves to a remembered peer, or to whichever bootstrap node is at ``address``."""
        await self.protocol.request(address, Op.PING, EMPTY, node_id=node_id)

    async def _settle(self) -> None:
        """Learn our neighbourhood and make it learn us, then look beyond: who knows nobody in some range of ids finds nothing that is kept
        there, and cannot tell others."""
        await self.crawl(self.identity.node_id, accept=None, timeout_s=2 * self.config.lookup_timeout_s, width=self.config.k)
        await self._refresh_buckets(older_than_s=0.0)
        log.info("directory.joined", peers=len(self.table))

    async def _keep_documents(self) -> float:
        """Soon after the start, and then now and then."""
        if not len(self.table):
            return _EXPIRE_EVERY_S
        return await self.exchange.keep_alive()

    async def _refresh_buckets(self, *, older_than_s: float) -> None:
        """Meet a few in each range of ids where we looked nothing up for long."""
        for low, high in self.table.stale_ranges(self.clock.monotonic(), older_than_s)[:_BUCKETS_AT_ONCE]:
            target = self._rng.randint(low, high).to_bytes(ID_BITS // 8)
            await self.crawl(target, accept=None, timeout_s=self.config.lookup_timeout_s, width=FEW)

    async def _resolve(self) -> None:
        """Names anew each time: a bootstrap node may have moved. What cannot be resolved keeps its last addresses."""
        loop = asyncio.get_running_loop()
        for host, port in self._bootstraps:
            try:
                async with asyncio.timeout(_RESOLVE_S):
                    found = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
            except (OSError, TimeoutError) as error:
                log.warning("directory.unresolved", host=host, error=str(error) or "timed out")
                continue
            for *_, address in found:
                canonical = normalise(str(address[0]), int(address[1]))
                if is_dialable(*canonical):
                    self._resolved[canonical] = None
        while len(self._resolved) > 64:
            self._resolved.pop(next(iter(self._resolved)))

    # upkeep

    async def _maintain(self) -> float:
        """Every second: what has expired goes. Now and then: probe the silent, refresh buckets, save."""
        now = self.clock.monotonic()
        self.store.expire(now)
        nodes = self.table.estimate_nodes() if len(self.table) > 2 * self.config.k else 0
        self.is_large = nodes >= self.config.large_mesh
        self.publisher.unhurried = self.is_large
        self.publisher.depth = depth_of(nodes, self.config.shard_size) if self.is_large else 0
        if not self.is_large and (unmet := self.hearsay.take(now)) is not None:
            self._inquire(unmet)
        if self._due("probe", now, self.config.probe_interval_s * (_LARGE_PROBES if self.is_large else 1)):
            self._probe_silent(now)
        if self._due("buckets", now, self.config.refresh_bucket_s * _BUCKET_CHECKS):
            self.tasks.start(self._refresh_buckets(older_than_s=self.config.refresh_bucket_s), name="directory buckets")
        if self._due("save", now, _SAVE_NEWS_S if self._news else self.config.save_interval_s):
            await self._save()
        return _EXPIRE_EVERY_S * self._rng.uniform(0.8, 1.2)

    def _due(self, what: str, now: float, every_s: float) -> bool:
        """True once in ``every_s``; not at once."""
        if now - self._done_at.setdefault(what, now) < every_s:
            return False
        self._done_at[what] = now
        return True

    def _probe_silent(self, now: float) -> None:
        contact = self.table.longest_silent()
        if contact is not None and now - contact.seen > 2 * self.config.probe_interval_s:
            if self.is_large:
                self.protocol.probe(contact)
            else:
                self._inquire(contact)
        lost = [self._remembered[node_id] for node_id in self._lost if node_id in self._remembered]
        if lost:
            self.protocol.probe(self._rng.choice(lost))

    def _inquire(self, contact: Contact) -> None:
        """A probe that also asks who stands around some place: for few once there is nobody left to be met."""
        body = msgpack.packb([self._rng.randbytes(ID_BYTES), self.config.k if len(self.hearsay) else FEW])
        self.protocol.ask(contact.address, Op.FIND_NODE, body, self._hear_of, node_id=contact.id)

    def _hear_of(self, reply: Reply | None) -> None:
        if reply is None or not reply.bodies or not reply.bodies[0]:
            return
        try:
            self.hearsay.hear(parse_contacts(reply.bodies[0][0], limit=self.config.k))
        except TrustError as error:
            self.counts.refuse(f"reply_{error.code}", reply.address, now=self.clock.monotonic())

    async def _save(self) -> None:
        if self._state_dir is None or not self._remembered:
            return
        self._news = False
        wall, now = self.clock.wall(), self.clock.monotonic()
        peers = [
            KnownPeer(node_id=contact.id, address=contact.address, seen=wall - max(0.0, now - contact.seen) if contact.seen else 0)
            for contact in self._remembered.values()
        ]
        try:
            await asyncio.get_running_loop().run_in_executor(None, save_peers, self._state_dir, peers)
        except OSError as error:
            log.warning("directory.state_unsaved", error=str(error))


def _remember(memory: OrderedDict[bytes, T], key: bytes, value: T) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > _KEYS_REMEMBERED:
        memory.popitem(last=False)
