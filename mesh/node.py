"""What proxies and workers have in common: a record that is kept fresh, a place in the directory, links to the other side.

A node's record is signed again every quarter of its life and whenever something changes; the new one goes over every link at once, which
is how a worker becomes routable within milliseconds, and into the directory, which is how strangers find it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from mesh.clock import Clock
from mesh.directory import Directory
from mesh.identity import Identity, TlsContexts
from mesh.link.frames import Frame
from mesh.link.link import Link
from mesh.link.peers import LinkConfig, Peers, PeersOwner
from mesh.membership import MembershipCache
from mesh.records import Capability, Load, ModelEntry, Record, State, seal_record
from mesh.trust import Role

log = structlog.get_logger(__name__)

PUBLISH_DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a room says about its node right now; the rest of the record is made here."""

    state: State
    models: tuple[ModelEntry, ...] = ()
    capability: Capability = field(default_factory=Capability)
    load: Load = field(default_factory=Load)
    reason: str = ""
    api: str = ""


class MeshNode:
    """Directory, links and record of one node. ``counterpart`` is the role it links with; ``about`` is asked at each signing."""

    def __init__(
        self,
        identity: Identity,
        directory: Directory,
        owner: PeersOwner,
        *,
        counterpart: Role,
        about: Callable[[], About],
        state_dir: Path,
        record_ttl_s: float,
        version: str,
        clock: Clock,
        rng: random.Random,
        links: LinkConfig | None = None,
    ) -> None:
        self.identity = identity
        self.directory = directory
        self.addresses: tuple[str, ...] = ()
        self._about = about
        self._counterpart = counterpart
        self._ttl_s = record_ttl_s
        self._version = version
        self._clock = clock
        self._rng = rng
        self._boot = int(clock.wall() * 1000)
        self._seq = 0
        self._changed = asyncio.Event()
        self._record: Record | None = None
        self._publishing: asyncio.Task[None] | None = None
        self.peers = Peers(
            identity,
            TlsContexts(identity, state_dir),
            owner,
            accept=frozenset({counterpart}),
            record=self.record,
            members=MembershipCache(identity.trust),
            clock=clock,
            rng=rng,
            config=links,
        )

    # -- lifetime

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Take links on ``host:port``. Call before `start`, and set ``addresses`` to what others should dial."""
        return await self.peers.listen(host, port)

    def start(self) -> None:
        """Begin to publish, to find the other side and to keep links with it. The directory has been started by the caller."""
        self.peers.start()
        self._publishing = asyncio.create_task(self._publish_forever())
        self.directory.watch(self._counterpart, self.peers.want, interval_s=2.0)

    async def stop(self) -> None:
        """Say good-bye in the directory, then close the links."""
        if self._publishing is not None:
            self._publishing.cancel()
            await asyncio.gather(self._publishing, return_exceptions=True)
        last = self._sign(life_s=1.0)
        self.peers.broadcast(Frame.RECORD, {"rec": last.signed})
        await self._publish(last)
        await self.peers.stop()

    # -- record

    def record(self) -> Record:
        """This node's newest record; signed again if the last one is getting old."""
        now = self._clock.wall()
        if self._record is None or self._record.issued + self._ttl_s / 2 < now:
            return self._sign()
        return self._record

    def changed(self) -> None:
        """Something in `About` changed: sign, send and publish without waiting for the next refresh."""
        self._changed.set()

    def drain(self) -> None:
        """Tell every link that no new request should come, then the directory."""
        for link in self.peers.links.values():
            link.send_control(Frame.DRAIN, {})
        self.changed()

    def links(self) -> list[Link]:
        return list(self.peers.links.values())

    def _sign(self, *, life_s: float | None = None) -> Record:
        about, now = self._about(), self._clock.wall()
        self._seq += 1
        record = Record(
            node_id=self.identity.node_id,
            role=self.identity.role,
            boot=self._boot,
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
        self._record = seal_record(record, self.identity.key, self.identity.membership.signed)
        return self._record

    async def _publish_forever(self) -> None:
        """Refresh on time and on change. A change that comes while publishing starts the next round at once."""
        while True:
            self._changed.clear()
            record = self._sign()
            self.peers.broadcast(Frame.RECORD, {"rec": record.signed})
            publishing = asyncio.create_task(self._publish(record))
            try:
                async with asyncio.timeout(self._ttl_s / 4 * self._rng.uniform(0.8, 1.0)):
                    await self._changed.wait()
            except TimeoutError:
                pass
            finally:
                if self._changed.is_set():
                    publishing.cancel()
                await asyncio.gather(publishing, return_exceptions=True)

    async def _publish(self, record: Record) -> None:
        try:
            async with asyncio.timeout(PUBLISH_DEADLINE_S):
                holders = await self.directory.publish(record)
        except TimeoutError:
            holders = 0
        log.debug("record.published", state=str(record.state), seq=record.seq, holders=holders)
