"""Where a node keeps its receipts: one SQLite file, written behind the requests' backs, durable before anybody is told.

`Ledger.add` costs an append. What has gathered for `COMMIT_EVERY_S` is written in one transaction by a thread and synced to disk; once a
second what was written is signed (`mesh.receipts`). What a reader gets has always been synced: a receipt that was ever told
of survives kill -9 and power cuts, and is there once.

A disk that is full or too slow loses nothing silently. Receipts wait in memory, the node says so (`Ledger.trouble`, metrics, doctor), and
with `MAX_WAITING` of them it takes no further requests until they are on disk.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from mesh.clock import Clock
from mesh.errors import ConfigError
from mesh.identity import Identity
from mesh.merkle import audit_path, leaf_hash, root_hash
from mesh.receipts import Proof, Row, batch_digest, pack_proof, parse_receipt, seal_batch

log = structlog.get_logger(__name__)

LEDGER_FILE = "receipts.db"
COMMIT_EVERY_S = 0.1
SIGN_EVERY_S = 1.0
RETRY_S = 1.0
MAX_WAITING = 50_000
"""Receipts that may wait for the disk: about 50 MB of memory, and minutes of a busy node."""
FORGET_EVERY_S = 600.0
FORGET_AT_ONCE = 5_000
"""Old receipts dropped in one transaction, so that new ones never wait long."""
PAGE_BYTES = 128 * 1024
"""What one answer holds at most; a link's stream takes it without waiting for credit."""
PAGE_RECEIPTS = 2_000
MAX_PROOFS = 16

_SCHEMA = """
CREATE TABLE IF NOT EXISTS receipts
  (n INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, id TEXT NOT NULL, attempt INTEGER NOT NULL, project TEXT NOT NULL,
   key BLOB NOT NULL, body BLOB NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS receipts_by_time ON receipts (at, id, attempt);
CREATE TABLE IF NOT EXISTS batches (number INTEGER PRIMARY KEY, last INTEGER NOT NULL, signed BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS batches_by_last ON batches (last);
"""
Sign = Callable[[int, int, bytes, bytes], bytes]
"""From number, count, root and the digest of the batch before to a signed batch."""
Order = tuple[int, str, int]
START: Order = (-1, "", 0)


class Entry(Protocol):
    """What can be added: a receipt, or something that becomes one when the thread gets to it."""

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
        self._waiting: list[Entry] = []
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
        """Take a receipt; it is on disk about `COMMIT_EVERY_S` later."""
        self._waiting.append(entry)
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
        entries, self._waiting = self._waiting, []
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._writer, self._store.write, entries, True)
            self.written += len(entries)
        except sqlite3.Error as error:
            log.error("ledger.receipts_lost", receipts=len(entries), reason=str(error))
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
        entries, self._waiting = self._waiting, []
        self._writing = len(entries)
        loop = asyncio.get_running_loop()
        self._job = loop.run_in_executor(self._writer, self._store.write, entries, False)
        self._job.add_done_callback(lambda job: self._written(entries, job))

    def _written(self, entries: list[Entry], job: asyncio.Future[tuple[int, bool]]) -> None:
        self._job = None
        self._writing = 0
        again_s: float | None
        error = job.exception()
        if error is None:
            batches, unsigned = job.result()
            if self.trouble:
                log.warning("ledger.recovered", receipts=len(entries))
                self.trouble = ""
            self.written += len(entries)
            self.signed += batches
            again_s = COMMIT_EVERY_S if self._waiting else SIGN_EVERY_S if unsigned else None
        else:
            self._waiting[:0] = entries
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
        self._number = self._last = self._newest = 0
        self._previous = b""
        self._unsure = False
        self._leaves: list[bytes] = []
        try:
            path.touch(mode=0o600)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
            self._read = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._read.execute("PRAGMA query_only = ON")
            self._load()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"{path} cannot be used to keep receipts: {error}; free or repair the disk, or move the file away to begin another"
            ) from None
        self._signed_at = self._forgot_at = clock.monotonic()

    def close(self) -> None:
        self._db.close()
        self._read.close()

    def write(self, entries: Sequence[Entry], last: bool) -> tuple[int, bool]:
        """Make entries durable; sign if it is time, or ``last``. Returns batches signed and whether receipts are left unsigned.

        All or nothing. A receipt that is there already, from a commit whose success was not seen, is left as it is.
        """
        rows = [row for entry in entries if (row := _row(entry)) is not None]
        now = self._clock.monotonic()
        if self._unsure:
            self._load()
        leaves, newest, db = list(self._leaves), self._newest, self._db
        batch = None
        db.execute("BEGIN IMMEDIATE")
        try:
            if rows:
                added = db.executemany(
                    "INSERT OR IGNORE INTO receipts (at, id, attempt, project, key, body) VALUES (?, ?, ?, ?, ?, ?)", rows
                ).rowcount
                bodies = [row[5] for row in rows]
                if added < len(rows):
                    bodies = [body for (body,) in db.execute("SELECT body FROM receipts WHERE n > ? ORDER BY n", (newest,))]
                leaves += map(leaf_hash, bodies)
                newest = db.execute("SELECT seq FROM sqlite_sequence").fetchone()[0]
            if leaves and (last or now - self._signed_at >= SIGN_EVERY_S):
                batch = self._sign(self._number + 1, len(leaves), root_hash(leaves), self._previous)
                db.execute("INSERT INTO batches VALUES (?, ?, ?)", (self._number + 1, newest, batch))
            if now - self._forgot_at >= FORGET_EVERY_S:
                self._forget(now)
            db.execute("COMMIT")
        except BaseException:
            self._unsure = True
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        self._leaves, self._newest = leaves, newest
        if batch is not None:
            self._number, self._last, self._previous = self._number + 1, newest, batch_digest(batch)
            self._leaves, self._signed_at = [], now
        return (0 if batch is None else 1), bool(self._leaves)

    def _load(self) -> None:
        """Go by what is on disk: the newest batch, and the receipts that no batch holds yet."""
        newest = self._db.execute("SELECT number, last, signed FROM batches ORDER BY number DESC LIMIT 1").fetchone()
        self._number, self._last = newest[:2] if newest else (0, 0)
        self._previous = batch_digest(newest[2]) if newest else b""
        rows = self._db.execute("SELECT body FROM receipts WHERE n > ? ORDER BY n", (self._last,))
        self._leaves = [leaf_hash(body) for (body,) in rows]
        sequence = self._db.execute("SELECT seq FROM sqlite_sequence").fetchone()
        self._newest = sequence[0] if sequence else 0
        self._unsure = False

    def _forget(self, now: float) -> None:
        """Drop the batches all of whose receipts are older than is kept. The newest stays: the next one names it."""
        oldest = int((self._clock.wall() - self._keep_s) * 1000)
        gone = 0
        while gone < FORGET_AT_ONCE:
            batch = self._db.execute("SELECT number, last FROM batches ORDER BY number LIMIT 1").fetchone()
            if batch is None or batch[0] == self._number:
                break
            newest = self._db.execute("SELECT max(at) FROM receipts WHERE n <= ?", (batch[1],)).fetchone()[0]
            if newest is not None and newest >= oldest:
                break
            gone += self._db.execute("DELETE FROM receipts WHERE n <= ?", (batch[1],)).rowcount
            self._db.execute("DELETE FROM batches WHERE number = ?", (batch[0],))
        else:
            return  # there is more: go on at the next write
        self._forgot_at = now

    def page(self, query: Query) -> Page:
        where, order = ["at >= ?", "at < ?"], "at, id, attempt"
        values: list[Any] = [query.since, query.until]
        last = self._read.execute("SELECT coalesce(max(n), 0) FROM receipts").fetchone()[0]
        if query.written is not None:
            where, values, order = [*where, "n > ?"], [*values, query.written], "n"
        elif query.after != START:
            where, values = ["(at, id, attempt) > (?, ?, ?)", "at < ?"], [*query.after, query.until]
        for column, value in (("project", query.project), ("key", query.key)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
        found = self._read.execute(
            f"SELECT n, body FROM receipts WHERE {' AND '.join(where)} ORDER BY {order} LIMIT ?", (*values, PAGE_RECEIPTS + 1)
        )
        receipts: list[bytes] = []
        size = reached = 0
        for n, body in found:
            size += len(body) + 3
            if size > PAGE_BYTES or len(receipts) == PAGE_RECEIPTS:
                found.close()
                return Page(receipts=tuple(receipts), more=True, last=last if query.written is None else reached)
            receipts.append(body)
            reached = n
        return Page(receipts=tuple(receipts), more=False, last=max(last, reached))

    def prove(self, request_id: str, since: int) -> list[Proof]:
        db, proofs = self._read, []
        rows = db.execute(
            "SELECT n, body FROM receipts WHERE at >= ? AND id = ? ORDER BY at, attempt LIMIT ?", (since, request_id, MAX_PROOFS)
        )
        for n, body in rows.fetchall():
            batch = db.execute("SELECT number, last, signed FROM batches WHERE last >= ? ORDER BY last LIMIT 1", (n,)).fetchone()
            if batch is None:
                continue
            number, last, signed = batch
            before = db.execute("SELECT last FROM batches WHERE number = ?", (number - 1,)).fetchone()
            rows = db.execute("SELECT n, body FROM receipts WHERE n > ? AND n <= ? ORDER BY n", (before[0] if before else 0, last))
            leaves = [(place, leaf_hash(each)) for place, each in rows]
            index = next(at for at, (place, _) in enumerate(leaves) if place == n)
            path = audit_path([leaf for _, leaf in leaves], index)
            proofs.append(Proof(receipt=body, index=index, path=tuple(path), batch=signed))
        return proofs


def _row(entry: Entry) -> Row | None:
    """What is stored of an entry. One that cannot be written down is a fault in the program: said, and no reason to lose the others."""
    try:
        return entry.row()
    except Exception:
        log.exception("ledger.bad_receipt")
        return None
