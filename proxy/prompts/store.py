"""Where a proxy keeps what endpoints ask for: one SQLite file (0600) of sealed records, each with its end.

Used by one thread. What is deleted is overwritten, and what is over goes when it is due or, where the room is used up, the oldest first.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mesh.prompts import PAGE_BYTES, Kept, PromptPage, PromptQuery

ROOM_BYTES = 1 << 30
_OVERHEAD = 128
"""Bytes of a record in a page beside its seal, at most."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS prompts (
    number INTEGER PRIMARY KEY AUTOINCREMENT, project TEXT NOT NULL, endpoint TEXT NOT NULL, id TEXT NOT NULL,
    at INTEGER NOT NULL, ends INTEGER NOT NULL, sealed BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS prompts_by_endpoint ON prompts (project, endpoint, number);
CREATE INDEX IF NOT EXISTS prompts_by_end ON prompts (ends);
"""


class Record(NamedTuple):
    """What is written. ``ends``: when it is to be gone, in wall-clock ms."""

    project: str
    endpoint: str
    kept: Kept
    ends: int


class PromptStore:
    """Raises `sqlite3.Error` or `OSError` if the file cannot be used. Times are wall-clock ms."""

    def __init__(self, path: Path, *, room_bytes: int = ROOM_BYTES) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for pragma in ("auto_vacuum=INCREMENTAL", "journal_mode=WAL", "synchronous=NORMAL", "secure_delete=ON"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.executescript(_SCHEMA)
        self._room_bytes = room_bytes
        self._bytes: int = self._database.execute("SELECT coalesce(sum(length(sealed)), 0) FROM prompts").fetchone()[0]

    def add(self, records: Iterable[Record]) -> None:
        rows = [(project, endpoint, kept.id, kept.at, ends, kept.sealed) for project, endpoint, kept, ends in records]
        with self._database:
            self._database.execute("BEGIN")
            self._database.executemany("INSERT INTO prompts (project, endpoint, id, at, ends, sealed) VALUES (?, ?, ?, ?, ?, ?)", rows)
        self._bytes += sum(len(row[-1]) for row in rows)
        while self._bytes > self._room_bytes:
            self._drop("number IN (SELECT number FROM prompts ORDER BY number LIMIT 64)")

    def sweep(self, now: int) -> int:
        """Forget what is over; returns how many records that were."""
        gone = self._drop("ends <= ?", now)
        if gone:
            self._database.execute("PRAGMA incremental_vacuum").fetchall()
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return gone

    def page(self, query: PromptQuery, now: int) -> PromptPage:
        """What is not over yet."""
        rows = self._database.execute(
            "SELECT number, id, at, sealed FROM prompts"
            " WHERE project = ? AND endpoint = ? AND number > ? AND at >= ? AND at < ? AND ends > ? ORDER BY number",
            (query.project, query.endpoint, query.after, query.since, query.until, now),
        )
        kept: list[Kept] = []
        size, last = 0, query.after
        for number, request_id, at, sealed in rows:
            size += len(sealed) + _OVERHEAD
            if size > PAGE_BYTES:
                return PromptPage(kept=tuple(kept), more=True, last=last)
            kept.append(Kept(id=request_id, at=at, sealed=sealed))
            last = number
        return PromptPage(kept=tuple(kept), more=False, last=last)

    def close(self) -> None:
        self._database.close()

    def _drop(self, where: str, *values: int) -> int:
        dropped = self._database.execute(f"DELETE FROM prompts WHERE {where} RETURNING length(sealed)", values).fetchall()
        self._bytes -= sum(size for (size,) in dropped)
        return len(dropped)
