"""Where a node keeps its receipts: one SQLite file, written behind the requests' backs, durable before anybody is told.

`Ledger.add` encodes a receipt and appends it. What has gathered for `COMMIT_EVERY_S` is written in one transaction by a thread and synced
to disk; once a second what was written is signed (`mesh.receipts`). What a reader gets has always been synced: a receipt that was ever
told of survives kill -9 and power cuts, and is there once.

Writing happens with every request, reading now and then. So a row of the file is no receipt but a pack: the receipts of one commit that
share the `SLOT_MS` of their `at`, one after the other. Readers open the packs of the slots they want and sort there.

A disk that is full or too slow loses nothing silently. Receipts wait in memory, the node says so (`Ledger.trouble`, metrics, doctor), and
with `MAX_WAITING` of them it takes no further requests until they are on disk.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import msgpack
import structlog

from mesh.clock import Clock
from mesh.errors import ConfigError
from mesh.identity import Identity
from mesh.merkle import audit_path, leaf_hash, leaf_hashes, root_hash
from mesh.receipts import Proof, Row, batch_digest, pack_proof, parse_receipt, seal_batch

log = structlog.get_logger(__name__)

LEDGER_FILE = "receipts.db"
COMMIT_EVERY_S = 0.2
SIGN_EVERY_S = 1.0
RETRY_S = 1.0
MAX_WAITING = 50_000
"""Receipts that may wait for the disk: about 50 MB of memory, and minutes of a busy node."""
FORGET_EVERY_S = 600.0
FORGET_AT_ONCE = 200
"""Old packs dropped in one transaction, so that new receipts never wait long."""
PACKS_AT_ONCE = 100
"""Packs written by one statement."""
PAGE_BYTES = 128 * 1024
"""What one answer holds at most; a link's stream takes it without waiting for credit."""
PAGE_RECEIPTS = 2_000
MAX_PROOFS = 16

SLOT_MS = 100
"""Half as long as commits are apart: shorter ones make more packs of a commit, longer ones more work of a page."""
CACHE_KIB = 512
"""Of the file's pages, for each of two connections. What is written is not read again soon, and SQLite's own 2 MiB fill within the hour."""
FORMAT = 3
"""Of the file. No release has written another one."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS packs (last INTEGER PRIMARY KEY, slot INTEGER NOT NULL, receipts BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS packs_by_slot ON packs (slot);
CREATE TABLE IF NOT EXISTS batches (number INTEGER PRIMARY KEY, last INTEGER NOT NULL, signed BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS batches_by_last ON batches (last);
"""
"""Receipts are numbered in the order of writing. ``last`` is the number of the last one in a pack, or under a batch."""
Sign = Callable[[int, int, bytes, bytes], bytes]
"""From number, count, root and the digest of the batch before to a signed batch."""
Order = tuple[int, str, int]
START: Order = (-1, "", 0)


class Entry(Protocol):
    """What can be added: a receipt, or something that can write itself down as one."""

    def row(self) -> Row: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which receipts: from ``since`` until before ``until`` (wall-clock ms), after ``after``, of a project, of a key.

    With ``written``, in the order in which they were written, those after that place: for who follows what comes in.
    """

    since: int = 0
    until: int = 1 << 62
    after: Order = START
    project: str | None = None
    key: bytes | None = None
    written: int | None = None
    prove: str = ""
    """A request's id: its receipts with their proofs instead, packed as `pack_proof` does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Receipts in `Receipt.order`, as bytes. ``more``: there are further ones after these.

    ``last``: the place up to which this goes in the order of writing; without `Query.written`, that of the newest of all.
    """

    receipts: tuple[bytes, ...]
    more: bool
    last: int = 0


def signer(identity: Identity, clock: Clock) -> Sign:
    """Signs as this node, with the membership it has by then."""

    def sign(number: int, count: int, root: bytes, previous: bytes) -> bytes:
        return seal_batch(
            identity.key,
            identity.membership.signed,
            number=number,
            count=count,
            root=root,
            previous=previous,
            at=int(clock.wall() * 1000),
        )

    return sign


class Ledger:
    """One node's receipts. ``add`` from the event loop; ``await stop()`` writes what is left.

    ``keep_s``: older receipts are forgotten. Raises `ConfigError` if the file cannot be used.
    """

    def __init__(self, path: Path, *, sign: Sign, clock: Clock, keep_s: float) -> None:
        self.trouble = ""
        """Why receipts cannot be written right now; empty while they can."""
        self.written = 0
        """Receipts made durable since the start."""
        self.signed = 0
        """Batches signed since the start."""
        self._clock = clock
        self._waiting: list[Row] = []
        self._writing = 0
        self._due: asyncio.TimerHandle | None = None
        self._hurried = False
        self._store = _Store(path, sign=sign, clock=clock, keep_s=keep_s)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="ledger-read")
        self._job: asyncio.Future[tuple[int, bool]] | None = None
        self._changed = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Receipts that are not on disk yet."""
        return len(self._waiting) + self._writing

    @property
    def full(self) -> bool:
        """Whether no further request should be taken."""
        return len(self._waiting) + self._writing >= MAX_WAITING

    def add(self, entry: Entry) -> None:
        """Take a receipt; it is on disk about `COMMIT_EVERY_S` later.

        One that cannot be written down is a fault in the program: said, and no reason to lose the others.
        """
        try:
            self._waiting.append(entry.row())
        except Exception:
            log.exception("ledger.bad_receipt")
            return
        if not self._hurried:
            self._hurried = True
            if self._job is None:
                self._write_in(COMMIT_EVERY_S)

    def start(self) -> None:
        """Sign what an earlier life wrote and did not get to sign; begin to forget old receipts."""
        self._write_in(COMMIT_EVERY_S)

    async def settled(self) -> None:
        """Return once nothing waits for the disk."""
        while self.waiting:
            self._changed.clear()
            await self._changed.wait()

    async def stop(self) -> None:
        """Write and sign what is left, then close. What cannot be written is said in the log."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if self._job is not None:
            await asyncio.wait((self._job,))
        rows, self._waiting = self._waiting, []
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._writer, self._store.write, rows, True)
            self.written += len(rows)
        except sqlite3.Error as error:
            log.error("ledger.receipts_lost", receipts=len(rows), reason=str(error))
        self._writer.shutdown()
        self._reader.shutdown()
        self._store.close()

    async def page(self, query: Query) -> Page:
        """What is on disk, a page of it."""
        if query.prove:
            proofs = await self.prove(query.prove, since=query.since)
            visible = [proof for proof in proofs if query.project in (None, parse_receipt(proof.receipt).project)]
            return Page(receipts=tuple(map(pack_proof, visible)), more=False)
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._store.page, query)

    async def prove(self, request_id: str, *, since: int = 0) -> list[Proof]:
        """The signed receipts of a request that came after ``since`` (ms), with their proofs. The last second's may not be signed yet."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._store.prove, request_id, since)

    def _write_in(self, delay_s: float) -> None:
        if self._due is not None:
            self._due.cancel()
        self._due = asyncio.get_running_loop().call_later(delay_s, self._write)

    def _write(self) -> None:
        self._due = None
        self._hurried = False
        rows, self._waiting = self._waiting, []
        self._writing = len(rows)
        loop = asyncio.get_running_loop()
        self._job = loop.run_in_executor(self._writer, self._store.write, rows, False)
        self._job.add_done_callback(lambda job: self._written(rows, job))

    def _written(self, rows: list[Row], job: asyncio.Future[tuple[int, bool]]) -> None:
        self._job = None
        self._writing = 0
        again_s: float | None
        error = job.exception()
        if error is None:
            batches, unsigned = job.result()
            if self.trouble:
                log.warning("ledger.recovered", receipts=len(rows))
                self.trouble = ""
            self.written += len(rows)
            self.signed += batches
            again_s = COMMIT_EVERY_S if self._waiting else SIGN_EVERY_S if unsigned else None
        else:
            self._waiting[:0] = rows
            if not self.trouble:
                log.error("ledger.failing", reason=str(error), waiting=len(self._waiting))
            self.trouble = f"{type(error).__name__}: {error}"
            again_s, self._hurried = RETRY_S, True
        if again_s is not None:
            self._write_in(again_s)
        self._changed.set()


class _Store:
    """The file. ``write`` runs in one thread, ``page`` and ``prove`` in another; each has a connection of its own."""

    def __init__(self, path: Path, *, sign: Sign, clock: Clock, keep_s: float) -> None:
        self._sign = sign
        self._clock = clock
        self._keep_s = keep_s
        self._number = self._newest = 0
        self._previous = b""
        self._unsure = False
        self._leaves: list[bytes] = []
        try:
            path.touch(mode=0o600)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            if self._db.execute("PRAGMA user_version").fetchone()[0] not in (0, FORMAT) or _has_table(self._db, "receipts"):
                raise sqlite3.DatabaseError("another version of Infermesh wrote it")
            self._db.executescript(f"{_SCHEMA} PRAGMA user_version = {FORMAT};")
            self._read = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._read.execute("PRAGMA query_only = ON")
            self._read.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            self._load()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"{path} cannot be used to keep receipts: {error}; free or repair the disk, or move the file away to begin another"
            ) from None
        self._signed_at = self._forgot_at = clock.monotonic()

    def close(self) -> None:
        self._db.close()
        self._read.close()

    def write(self, rows: Sequence[Row], last: bool) -> tuple[int, bool]:
        """Make receipts durable; sign if it is time, or ``last``. Returns batches signed and whether receipts are left unsigned.

        All or nothing. Receipts that are there already, from a commit whose success was not seen, are left as they are.
        """
        now = self._clock.monotonic()
        if self._unsure:
            sure_of = self._newest
            self._load()
            there = {body for _, body in self._numbered("last > ?", sure_of)}
            rows = [row for row in rows if row[1] not in there]
        slots: dict[int, list[bytes]] = {}
        for at, body in rows:
            slots.setdefault(at // SLOT_MS, []).append(body)
        leaves, newest, db = list(self._leaves), self._newest, self._db
        packs: list[Any] = []
        for slot, bodies in slots.items():
            newest += len(bodies)
            leaves += leaf_hashes(bodies)
            packs += (newest, slot, _pack(bodies))
        batch = None
        if leaves and (last or now - self._signed_at >= SIGN_EVERY_S):
            batch = self._sign(self._number + 1, len(leaves), root_hash(leaves), self._previous)
        forgetting = now - self._forgot_at >= FORGET_EVERY_S
        # Each statement lets go of the interpreter's lock and must get it back from the event loop. One alone is a transaction by itself.
        alone = not forgetting and batch is None and len(packs) <= 3 * PACKS_AT_ONCE
        try:
            if not alone:
                db.execute("BEGIN IMMEDIATE")
            for at in range(0, len(packs), 3 * PACKS_AT_ONCE):
                some = packs[at : at + 3 * PACKS_AT_ONCE]
                db.execute(f"INSERT INTO packs VALUES {', '.join(['(?, ?, ?)'] * (len(some) // 3))}", some)
            if batch is not None:
                db.execute("INSERT INTO batches VALUES (?, ?, ?)", (self._number + 1, newest, batch))
            if forgetting:
                self._forget(now)
            if not alone:
                db.execute("COMMIT")
        except BaseException:
            self._unsure = True
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        self._leaves, self._newest = leaves, newest
        if batch is not None:
            self._number, self._previous = self._number + 1, batch_digest(batch)
            self._leaves, self._signed_at = [], now
        return (0 if batch is None else 1), bool(self._leaves)

    def _numbered(self, which: str, *values: int) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of the receipts in some packs, in the order of writing."""
        return _unpacked(self._db.execute(f"SELECT last, receipts FROM packs WHERE {which} ORDER BY last", values))

    def _load(self) -> None:
        """Go by what is on disk: the newest batch, and the receipts that no batch holds yet."""
        newest = self._db.execute("SELECT number, last, signed FROM batches ORDER BY number DESC LIMIT 1").fetchone()
        self._number, self._newest = newest[:2] if newest else (0, 0)
        self._previous = batch_digest(newest[2]) if newest else b""
        self._leaves = []
        for n, body in self._numbered("last > ?", self._newest):
            self._leaves.append(leaf_hash(body))
            self._newest = n
        self._unsure = False

    def _forget(self, now: float) -> None:
        """Drop the batches all of whose receipts are older than is kept. The newest stays: the next one names it."""
        oldest = int((self._clock.wall() - self._keep_s) * 1000)
        gone = 0
        while gone < FORGET_AT_ONCE:
            batch = self._db.execute("SELECT number, last FROM batches ORDER BY number LIMIT 1").fetchone()
            if batch is None or batch[0] == self._number:
                break
            newest = self._db.execute("SELECT max(slot) FROM packs WHERE last <= ?", (batch[1],)).fetchone()[0]
            if newest is not None and (newest + 1) * SLOT_MS > oldest:
                break
            gone += self._db.execute("DELETE FROM packs WHERE last <= ?", (batch[1],)).rowcount
            self._db.execute("DELETE FROM batches WHERE number = ?", (batch[0],))
        else:
            return  # there is more: go on at the next write
        self._forgot_at = now

    def page(self, query: Query) -> Page:
        last = self._read.execute("SELECT coalesce(max(last), 0) FROM packs").fetchone()[0]
        receipts: list[bytes] = []
        size = reached = 0
        with closing(self._matching(query)) as found:
            for n, body in found:
                size += len(body) + 3
                if size > PAGE_BYTES or len(receipts) == PAGE_RECEIPTS:
                    return Page(receipts=tuple(receipts), more=True, last=last if query.written is None else reached)
                receipts.append(body)
                reached = n
        return Page(receipts=tuple(receipts), more=False, last=max(last, reached))

    def _matching(self, query: Query) -> Generator[tuple[int, bytes]]:
        """Number and bytes of the receipts asked for, in the order asked for. A pack that nobody in it is wanted of is not opened."""
        where, values = ["slot >= ?", "slot <= ?"], [max(query.since, query.after[0]) // SLOT_MS, (query.until - 1) // SLOT_MS]
        wanted: list[tuple[str, str | bytes]] = [
            (name, value) for name, value in (("p", query.project), ("key", query.key)) if value is not None
        ]
        needles = [value.encode() if isinstance(value, str) else value for _, value in wanted]
        where += ["instr(receipts, ?)"] * len(needles)

        def about(body: bytes) -> Order | None:
            """Where a receipt stands, if it is asked for."""
            for needle in needles:
                if needle not in body:
                    return None
            fields = msgpack.unpackb(body)
            order: Order = (fields["at"], fields["id"], fields["n"])
            if not query.since <= order[0] < query.until or any(fields.get(name, type(value)()) != value for name, value in wanted):
                return None
            return order

        if query.written is not None:
            text = f"SELECT last, receipts FROM packs WHERE last > ? AND {' AND '.join(where)} ORDER BY last"
            for n, body in _unpacked(self._read.execute(text, (query.written, *values, *needles))):
                if n > query.written and about(body) is not None:
                    yield n, body
            return
        text = f"SELECT last, receipts, slot FROM packs WHERE {' AND '.join(where)} ORDER BY slot, last"
        for _, packs in groupby(self._read.execute(text, (*values, *needles)), key=itemgetter(2)):
            found: dict[Order, tuple[int, bytes]] = {}  # of one place, which only a peer that repeats itself can bring about, the first
            for n, body in _unpacked(packs):
                if (order := about(body)) is not None and order > query.after:
                    found.setdefault(order, (n, body))
            for order in sorted(found):
                yield found[order]

    def prove(self, request_id: str, since: int) -> list[Proof]:
        db, needle = self._read, request_id.encode()
        packs = db.execute("SELECT last, receipts FROM packs WHERE slot >= ? AND instr(receipts, ?)", (since // SLOT_MS, needle))
        found: list[tuple[Order, int, bytes]] = []
        for n, body in _unpacked(packs):
            fields = msgpack.unpackb(body) if needle in body else {}
            if fields.get("id") == request_id and fields["at"] >= since:
                found.append(((fields["at"], request_id, fields["n"]), n, body))
        proofs = []
        for _, n, body in sorted(found)[:MAX_PROOFS]:
            batch = db.execute("SELECT number, last, signed FROM batches WHERE last >= ? ORDER BY last LIMIT 1", (n,)).fetchone()
            if batch is None:
                continue
            number, last, signed = batch
            before = db.execute("SELECT last FROM batches WHERE number = ?", (number - 1,)).fetchone()
            packs = db.execute(
                "SELECT last, receipts FROM packs WHERE last > ? AND last <= ? ORDER BY last", (before[0] if before else 0, last)
            )
            leaves = [(place, leaf_hash(each)) for place, each in _unpacked(packs)]
            index = next(at for at, (place, _) in enumerate(leaves) if place == n)
            path = audit_path([leaf for _, leaf in leaves], index)
            proofs.append(Proof(receipt=body, index=index, path=tuple(path), batch=signed))
        return proofs


def _pack(bodies: Sequence[bytes]) -> bytes:
    packed: bytes = msgpack.packb(bodies)
    return packed


def _unpacked(packs: Iterable[Sequence[Any]]) -> Iterator[tuple[int, bytes]]:
    """From rows that begin with ``last`` and ``receipts``: number and bytes of each receipt."""
    for last, packed, *_ in packs:
        bodies = msgpack.unpackb(packed)
        yield from enumerate(bodies, last - len(bodies) + 1)


def _has_table(db: sqlite3.Connection, name: str) -> bool:
    return db.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (name,)).fetchone() is not None
