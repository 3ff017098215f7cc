"""What nodes have in common: a record that is kept fresh in the directory and, for proxies and workers, links to others.

A node's record is signed again every quarter of its life and whenever something changes; the new one goes over every link at once, which
is how a worker becomes routable within milliseconds, and into the directory, which is how strangers find it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import structlog

from mesh.bulletin import Bulletin
from mesh.clock import Clock
from mesh.directory import Directory
from mesh.errors import MalformedEnvelope
from mesh.identity import Identity, TlsContexts
from mesh.link.frames import Frame
from mesh.link.peers import LinkConfig, Peers, PeersOwner
from mesh.membership import MembershipCache
from mesh.neighbours import LINKED_WORKERS, Neighbours
from mesh.records import Capability, Load, ModelEntry, Record, State, seal_record
from mesh.trust import Role

log = structlog.get_logger(__name__)

PUBLISH_DEADLINE_S = 5.0
WATCH_S = 2.0
"""How often the directory is read again for nodes to link with; holders push what changes in between."""
SHARE_S = 5.0
MOST_LET_GO = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a room says about its node right now; the rest of the record is made here."""

    state: State
    models: tuple[ModelEntry, ...] = ()
    capability: Capability = field(default_factory=Capability)
    load: Load = field(default_factory=Load)
    reason: str = ""
    api: str = ""


class Announcer:
    """Keeps one node's record fresh. ``about`` is asked at each signing; ``on_sign`` hears of each new record before it is published."""

    def __init__(
        self,
        identity: Identity,
        directory: Directory,
        *,
        about: Callable[[], About],
        record_ttl_s: float,
        version: str,
        clock: Clock,
        rng: random.Random,
        on_sign: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.addresses: tuple[str, ...] = ()
        self._identity = identity
        self._directory = directory
        self._about = about
        self._ttl_s = record_ttl_s
        self._version = version
        self._clock = clock
        self._rng = rng
        self._on_sign = on_sign
        self.boot = int(clock.wall() * 1000)
        self._seq = 0
        self._changed = asyncio.Event()
        self._record: Record | None = None
        self._publishing: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._publishing = asyncio.create_task(self._publish_forever())

    async def stop(self) -> None:
        """Say good-bye: a last record that is gone in a second."""
        if self._publishing is not None:
            self._publishing.cancel()
            await asyncio.gather(self._publishing, return_exceptions=True)
            await self._publish(self._sign(life_s=1.0))

    def record(self) -> Record:
        """This node's newest record; signed again if the last one is getting old."""
        now = self._clock.wall()
        if self._record is None or self._record.issued + self._ttl_s / 2 < now:
            return self._sign()
        return self._record

    def changed(self) -> None:
        """Something in `About` changed: sign and publish without waiting for the next refresh."""
        self._changed.set()

    def _sign(self, *, life_s: float | None = None) -> Record:
        about, now = self._about(), self._clock.wall()
        self._seq += 1
        record = Record(
            node_id=self._identity.node_id,
            role=self._identity.role,
            boot=self.boot,
            seq=self._seq,
            issued=now,
            expires=now + (self._ttl_s if life_s is None else life_s),
            state=about.state,
            addresses=self.addresses,
            models=about.models,
            capability=about.capability,
            load=about.load,
            reason=about.reason,
            api=about.api,
            version=self._version,
        )
        try:
            self._record = self._seal(record)
        except MalformedEnvelope as error:  # said where people look, instead of a node that silently never appears
            log.error("record.refused", reason=error.message)
            self._record = self._seal(replace(record, state=State.FAILED, models=(), reason=error.message[:120]))
        return self._record

    def _seal(self, record: Record) -> Record:
        return seal_record(record, self._identity.key, self._identity.membership.signed)

    async def _publish_forever(self) -> None:
        """Refresh on time and on change. A change that comes while publishing starts the next round at once."""
        while True:
            self._changed.clear()
            publishing = asyncio.create_task(self._publish(self._sign()))
            try:
                async with asyncio.timeout(self._ttl_s / 4 * self._rng.uniform(0.8, 1.0)):
                    await self._changed.wait()
            except TimeoutError:
                pass
            finally:
                publishing.cancel()
                await asyncio.gather(publishing, return_exceptions=True)

    async def _publish(self, record: Record) -> None:
        self._on_sign(record)
        try:
            async with asyncio.timeout(PUBLISH_DEADLINE_S):
                holders = await self._directory.publish(record)
        except TimeoutError:
            holders = 0
        log.debug("record.published", state=str(record.state), seq=record.seq, holders=holders)


class MeshNode:
    """A proxy's or worker's place in the mesh: its record and its links. ``links_with`` says which roles it finds and links with."""

    def __init__(
        self,
        identity: Identity,
        directory: Directory,
        owner: PeersOwner,
        *,
        links_with: Iterable[Role],
        about: Callable[[], About],
        state_dir: Path,
        record_ttl_s: float,
        version: str,
        clock: Clock,
        rng: random.Random,
        links: LinkConfig | None = None,
        linked_workers: int = LINKED_WORKERS,
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._sharing: asyncio.Task[None] | None = None
        self._links_with = frozenset(links_with)
        self._announcer = Announcer(
            identity,
            directory,
            about=about,
            record_ttl_s=record_ttl_s,
            version=version,
            clock=clock,
            rng=rng,
            on_sign=lambda record: self.peers.broadcast(Frame.RECORD, {"rec": record.signed}),
        )
        self.neighbours = Neighbours(
            identity.node_id,
            identity.role,
            directory,
            size=linked_workers,
            outbound_only=lambda: not self.addresses,
            clock=clock,
        )
        self.peers = Peers(
            identity,
            TlsContexts(identity, state_dir),
            owner,
            accept=self._links_with,
            record=self._announcer.record,
            members=MembershipCache(identity.trust),
            clock=clock,
            rng=rng,
            config=links,
            wants=self.neighbours.wants,
        )

        self.bulletin = Bulletin(
            directory,
            role=identity.role,
            links=lambda: self.peers.links.values(),
            start=lambda work: directory.node.tasks.start(work, name="document"),
            clock=clock,
            rng=rng,
        )
        self.peers.board = self.bulletin

    @property
    def addresses(self) -> tuple[str, ...]:
        """What others are told to dial; empty for a node that only dials out."""
        return self._announcer.addresses

    @addresses.setter
    def addresses(self, addresses: tuple[str, ...]) -> None:
        self._announcer.addresses = addresses

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Take links on ``host:port``. Call before `start`, and set ``addresses`` to what others should dial."""
        return await self.peers.listen(host, port)

    def start(self) -> None:
        """Begin to publish, to find those it links with and to keep links with them. The directory has been started by the caller."""
        self.peers.start()
        self._announcer.start()
        self._directory.node.tasks.start(self.bulletin.keep(), name="documents")
        for role in sorted(self._links_with):
            self._directory.watch(role, self.peers.want, interval_s=WATCH_S)
        if Role.WORKER in self._links_with:
            self._sharing = asyncio.create_task(self._share())

    async def _share(self) -> None:
        """Let go of workers that are other proxies' share now, a few at a time and none that is at work."""
        while True:
            await self._clock.sleep(SHARE_S)
            if not self.neighbours.shares():
                continue
            known = (record for record in self._directory.known(Role.WORKER) if record.node_id in self.peers.links)
            for record in islice((record for record in known if not self.neighbours.keeps(record)), MOST_LET_GO):
                self.peers.let_go(record.node_id)

    async def stop(self) -> None:
        """Say good-bye, over the links and in the directory, then close the links."""
        if self._sharing is not None:
            self._sharing.cancel()
            await asyncio.gather(self._sharing, return_exceptions=True)
        await self._announcer.stop()
        await self.peers.stop()

    def record(self) -> Record:
        """This node's newest record."""
        return self._announcer.record()

    @property
    def boot(self) -> int:
        """When this node started, as its records say."""
        return self._announcer.boot

    def changed(self) -> None:
        """Something in `About` changed: tell the links and the directory now."""
        self._announcer.changed()

    def drain(self) -> None:
        """Tell every link that no new request should come, then the directory."""
        self.peers.broadcast(Frame.DRAIN, {})
        self.changed()
