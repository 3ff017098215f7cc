"""The directory as the other rooms see it: publish a record, find records, keep a view.

Slow truth: who is there and what they serve. Nobody waits for it on a request's path; `known` answers from memory, and what it answers is
verified, live and the newest of each node.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from mesh.clock import Clock
from mesh.dht.config import DirectoryConfig
from mesh.dht.documents import Answer
from mesh.dht.exchange import Version
from mesh.dht.keys import MAX_LEVEL, level_of, sub_shards
from mesh.dht.node import DhtNode
from mesh.dht.routing import Contact
from mesh.dht.verify import Verifier
from mesh.documents import Document, document_key
from mesh.errors import TrustError
from mesh.identity import Identity
from mesh.pulse import Pulse
from mesh.records import Record, directory_key, newest
from mesh.trust import Role

__all__ = ["Directory", "DirectoryConfig", "PeerInfo"]

log = structlog.get_logger(__name__)

_SWEEP_SHARE = 0.3
"""A large view is read so often in a record's life: with a refresh at half of it, a fifth remains for the reading itself."""
_SWEEP_PATIENCE = 3
_LEVELS = 3
"""An index that has overflowed may take so many look-ups one after the other."""

OnChange = Callable[[Record], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """One entry of the routing table. ``seen_s`` is how long ago it last proved itself, ``rtt_s`` its usual round trip."""

    node_id: bytes
    address: str
    seen_s: float
    rtt_s: float
    failing: bool


@dataclass(slots=True, eq=False)
class _View:
    """What is known of one role, and who wants to hear of it."""

    records: dict[bytes, Record] = field(default_factory=dict)
    listeners: list[OnChange] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """One key read: every good record that came, unmerged, whether the key has overflowed, and who stands nearest to it."""

    key: bytes
    records: list[Record]
    full: bool
    nearest: list[Contact]


@dataclass(slots=True, eq=False)
class _Sweep:
    """The regular reading of a role, and by key whose records were read there, and when last (monotonic)."""

    role: Role
    interval_s: float
    listed: dict[bytes, dict[bytes, float]] = field(default_factory=dict)


class Directory:
    """One node's access to the directory.

    ``serve=False`` for a node that others cannot reach: it asks and stores, and holds nothing. Several nodes in one process may share
    a ``verifier``, so that each signature is checked once.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        bootstraps: Sequence[str],
        state_dir: Path | None,
        clock: Clock,
        rng: random.Random,
        serve: bool = True,
        config: DirectoryConfig = DirectoryConfig(),  # noqa: B008 - frozen
        verifier: Verifier | None = None,
    ) -> None:
        self._clock = clock
        self._rng = rng
        self._config = config
        self._views: dict[Role, _View] = {}
        self._shards: dict[tuple[str, str], dict[int, None]] = {}
        self.node = DhtNode(
            identity, bootstraps=bootstraps, state_dir=state_dir, clock=clock, rng=rng, serve=serve, config=config, verifier=verifier
        )
        self.node.hear(self.observe)
        self._sweep_now = asyncio.Event()
        self.node.on_reunion(self._sweep_now.set)

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Bind UDP at ``host:port`` (0: any free port), load remembered peers, begin to join. Returns the bound address.

        Raises `OSError` if the address cannot be had.
        """
        return await self.node.start(host, port)

    async def stop(self) -> None:
        """Save the known peers and leave."""
        await self.node.stop()

    async def joined(self, *, timeout_s: float) -> bool:
        """Wait until at least one peer has proven itself. True at once for a bootstrap node that knows of no other."""
        return await self.node.joined(timeout_s)

    async def publish(self, record: Record) -> int:
        """Store a signed record under each of its keys; returns how many holders accepted. Never raises for network trouble.

        Call it again with a fresh record every `DirectoryConfig.refresh_s`: what is not refreshed disappears.
        """
        try:
            return await self.node.publisher.publish(record)
        except OSError as error:
            log.warning("directory.publish_failed", error=str(error))
            return 0

    async def find(self, key: bytes, *, timeout_s: float = 1.0) -> list[Record]:
        """The live records under one key: verified, the newest of each node; ours and what others hold."""
        return self._merge((await self._read(key, timeout_s)).records)

    async def find_role(self, role: Role) -> list[Record]:
        """All live nodes of a role."""
        records = await self._find_index("role", str(role))
        return [record for record in records if record.role == role]

    async def find_model(self, model: str, *, on_record: OnChange | None = None) -> list[Record]:
        """All live workers that are ready to serve ``model``: the newest record of each.

        ``on_record`` is called with each verified record as it comes, so that the first can be used at once; an older one of the same
        worker may come before a newer.
        """
        records = await self._find_index("model", model, on_record=on_record)
        return [record for record in records if record.serves(model)]

    def known(self, role: Role) -> list[Record]:
        """The live view of a role, kept by `watch`; asks nobody."""
        view = self._views.get(role)
        if view is None:
            return []
        now = self._clock.wall()
        for node_id in [node_id for node_id, record in view.records.items() if not record.alive(now)]:
            del view.records[node_id]
        return list(view.records.values())

    def watch(self, role: Role, on_change: OnChange, *, interval_s: float) -> None:
        """Keep a view of ``role``, and call ``on_change`` with each record that is new or newer than the last of its node.

        Holders tell at once of what changes; every ``interval_s`` or so everything is read again.
        """
        first = role not in self._views
        view = self._views.setdefault(role, _View())
        view.listeners.append(on_change)
        for record in self.known(role):
            on_change(record)
        if first:
            sweep = _Sweep(role, interval_s)
            self.node.tasks.repeat(lambda: self._sweep(sweep), self._clock, name=f"directory sweep {role}")

    def observe(self, record: Record) -> None:
        """A verified record from elsewhere (a link, a push) enters the view."""
        view = self._views.get(record.role)
        if view is None or not record.alive(self._clock.wall()):
            return
        known = view.records.get(record.node_id)
        if known is not None and known.order >= record.order:
            if known.order == record.order and record.expires > known.expires:
                view.records[record.node_id] = record
            return
        view.records[record.node_id] = record
        for listener in view.listeners:
            try:
                listener(record)
            except Exception:
                log.exception("directory.listener_failed", role=str(record.role))

    async def put_document(self, document: Document) -> int:
        """Store a signed version of a document; returns how many of the nodes nearest to its key have it.

        Raises `TrustError` if it does not hold, `DirectoryError` if it does not follow the newest version there is (compare-and-swap on
        seq), or too few can be reached.
        """
        return await self.node.exchange.put(document)

    async def get_document(self, kind: str, name: str, *, project: str = "", seq: int = 0) -> Document | None:
        """The newest version of a document, or version ``seq``, verified; None if there is none. Never older than one seen here before.

        One that has expired is still given, so that nothing older takes its place: see `Document.alive`.
        """
        return await self.node.exchange.get(document_key(kind, name, project), seq=seq)

    async def document_history(self, kind: str, name: str, *, project: str = "") -> list[Version]:
        """The last versions that holders list, the newest first. What they list is verified when it is fetched."""
        return await self.node.exchange.history(document_key(kind, name, project))

    def held_documents(self, kind: str = "") -> list[Document]:
        """The newest version of each document (of a kind) that this node itself holds; asks nobody. After `start`, those on disk too."""
        return [document for document in self.node.documents if kind in ("", document.kind)]

    def held_document(self, kind: str, name: str, *, project: str = "") -> Document | None:
        """The newest version of a document that this node itself holds."""
        return self.node.documents.newest(document_key(kind, name, project))

    async def confirm_document(self, document: Document) -> bool:
        """Offer a version to every bootstrap node that is known; True if one of them has it, and so none newer."""
        contacts = [contact for record in self.known(Role.BOOTSTRAP) if (contact := self.node.contact_of(record)) is not None]
        answers = await self.node.exchange.offer(document, contacts)
        return any(answer in (Answer.HAVE, Answer.ACCEPTED) for answer in answers.values())

    def accept_document(self, signed: bytes) -> bool:
        """Take in a document that came over a link; True if it holds and is newer than what is here. It is then kept like any other.

        Never raises: what does not hold is counted and not kept.
        """
        return self.node.exchange.accept(signed, "a link")

    def on_document(self, callback: Callable[[Document], None]) -> None:
        """Call ``callback`` with every version that becomes the newest held here: offered, found, handed in or written here.

        Not with what `start` reads from disk: see `held_documents`.
        """
        self.node.exchange.hear(callback)

    def watch_document(self, kind: str, name: str, on_change: Callable[[Document], None], *, interval_s: float, project: str = "") -> None:
        """Call ``on_change`` with the document and with each newer version: looked for every ``interval_s``, told at once if it comes."""
        key = document_key(kind, name, project)
        seen = b""

        def tell(document: Document | None) -> None:
            nonlocal seen
            if document is not None and document.key == key and document.digest != seen:
                seen = document.digest
                on_change(document)

        async def look() -> float:
            tell(await self.node.exchange.get(key))
            return interval_s * self._rng.uniform(0.75, 1.0)

        self.on_document(tell)
        self.node.tasks.repeat(look, self._clock, name=f"directory document {kind}")

    def peers(self) -> list[PeerInfo]:
        """The routing table."""
        now, memory = self._clock.monotonic(), self.node.memory
        return [
            PeerInfo(
                node_id=contact.id,
                address=str(contact.address),
                seen_s=now - contact.seen,
                rtt_s=memory.rtt_s(contact.id),
                failing=memory.failing(contact.id),
            )
            for contact in self.node.table
        ]

    def stats(self) -> dict[str, int | float]:
        """Counters since the start, and sizes now."""
        return dict(self.node.counts.values) | {
            "table_size": len(self.node.table),
            "records_held": len(self.node.store),
            "documents_held": len(self.node.documents),
            "sessions": len(self.node.sessions),
            "nodes_estimated": self.node.table.estimate_nodes(),
            "clock_offset_s": self.node.time.offset_s,
            "records_verified": self.node.verifier.verified,
        }

    # reading

    async def _find_index(self, kind: str, name: str, *, on_record: OnChange | None = None) -> list[Record]:
        reads = await self._read_index(kind, name, on_record=on_record)
        return self._merge(record for read in reads for record in read.records)

    async def _read_index(
        self,
        kind: str,
        name: str,
        *,
        known: dict[bytes, list[Record]] | None = None,
        patience: float = 1.0,
        on_record: OnChange | None = None,
    ) -> list[_Read]:
        """``known`` has, by key, records of an earlier reading; what is not newer is not fetched again.

        Read a key and, where it has overflowed, its sub-keys: those known from the last time at once, new ones as they show."""
        index = (kind, name)
        look_up_s = patience * self._config.lookup_timeout_s
        deadline = self._clock.monotonic() + _LEVELS * look_up_s
        reads: dict[int, _Read] = {}
        wave = [0, *self._shards.get(index, {})]
        while wave and (left_s := deadline - self._clock.monotonic()) > 0:
            timeout_s = min(left_s, look_up_s)
            keys = [directory_key(kind, name, shard) for shard in wave]
            reading = [self._read(key, timeout_s, (known or {}).get(key, []), on_record) for key in keys]
            done = await asyncio.gather(*reading) if len(reading) > 1 else [await reading[0]]
            reads |= zip(wave, done, strict=True)
            wave = [shard for shard in _under(reads) if shard not in reads]
        self._shards[index] = dict.fromkeys(_under(reads))
        return list(reads.values())

    async def _read(self, key: bytes, timeout_s: float, known: Sequence[Record] = (), on_record: OnChange | None = None) -> _Read:
        """What we ourselves and the network hold under a key; ``on_record`` hears of each record as soon as it is verified."""
        found: dict[bytes, Record] = {}
        if on_record is not None:
            for held in self.node.store.live(key, self._clock.monotonic()):
                on_record(self.node.local(held))

        def accept(data: bytes, remaining_s: float, pulse: Pulse, source: bytes) -> Record | None:
            try:
                record = self.node.check(data, remaining_s, pulse)
            except TrustError as error:
                self.node.counts.refuse(f"found_{error.code}", source.hex()[:12], now=self._clock.monotonic())
                return None
            known = found.get(data)
            if known is None or record.expires > known.expires:
                found[data] = record
                if on_record is not None:
                    on_record(record)
            return record

        outcome = await self.node.crawl(key, accept=accept, timeout_s=timeout_s, known=known)
        self.node.counts.lookups.observe(outcome.elapsed_s)
        now = self._clock.monotonic()
        own = [self.node.local(held) for held in self.node.store.live(key, now)]
        full = outcome.full or self.node.store.is_full(key, now)
        return _Read(key=key, records=[*found.values(), *own], full=full, nearest=outcome.nearest)

    def _merge(self, records: Iterable[Record]) -> list[Record]:
        return list(newest(records, now=self._clock.wall()).values())

    async def _sweep(self, sweep: _Sweep) -> float:
        """Keep the view of a role: read all of it, renew the watch, wait. A large view is read a few times in a record's life."""
        known = self._still_known(sweep)
        reads = await self._read_index("role", str(sweep.role), known=known, patience=_SWEEP_PATIENCE, on_record=self.observe)
        self._note_read(sweep, reads)
        await self.node.watch({read.key: read.nearest for read in reads})
        view = self._views[sweep.role].records
        pause_s = sweep.interval_s if view else min(sweep.interval_s, 0.5)
        if len(view) >= self._config.large_mesh:
            pause_s = max(pause_s, _SWEEP_SHARE * self._config.record_ttl_s)
        self._sweep_now.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s * self._rng.uniform(0.75, 1.0)):
                await self._sweep_now.wait()
        return 0.0

    def _note_read(self, sweep: _Sweep, reads: list[_Read]) -> None:
        """A record is sent again with each new pulse. One that was not for a whole life stands under this key no more: its owner went to a
        sub-key, and to ask this key's holders about it would be in vain."""
        now, live = self._clock.monotonic(), {record.node_id for record in self.known(sweep.role)}
        oldest = now - self._config.record_ttl_s
        sweep.listed = {
            read.key: {
                node_id: at
                for node_id, at in (sweep.listed.get(read.key, {}) | {record.node_id: now for record in read.records}).items()
                if node_id in live and at >= oldest
            }
            for read in reads
        }

    def _still_known(self, sweep: _Sweep) -> dict[bytes, list[Record]]:
        """By key, the records that were read there lately, as the view has them."""
        live = {record.node_id: record for record in self.known(sweep.role)}
        return {key: [live[node_id] for node_id in ids if node_id in live] for key, ids in sweep.listed.items()}


def _under(reads: dict[int, _Read]) -> list[int]:
    """The sub-shards of whatever has overflowed."""
    full = [shard for shard, read in reads.items() if read.full and level_of(shard) < MAX_LEVEL]
    return [shard for parent in full for shard in sub_shards(parent)]
