"""What has been used of each budget, by whom: counters that only grow, so that they can be told twice and in any order.

One counter per budget and process that used it. Owner, heir and user of a budget each hold all they have heard of, in memory and on disk,
so that any one of them may be lost.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

SOURCE_BYTES = 16
"""The first 8 bytes of a node id, and when it started: a process that begins again counts from nothing under a new name."""
MAX_BUDGETS = 65_536
MAX_SOURCES = 4_096
_SCHEMA = "CREATE TABLE IF NOT EXISTS used (bucket BLOB, source BLOB, used REAL, ends REAL, PRIMARY KEY (bucket, source)) WITHOUT ROWID"


class Counters:
    """``path`` is its file, None for one that forgets. `save` may run in a thread of its own; nothing else may."""

    def __init__(self, path: Path | None = None) -> None:
        self._counts: dict[bytes, dict[bytes, float]] = {}
        self._ends: dict[bytes, float] = {}
        self._path = path
        self._changed: set[tuple[bytes, bytes]] = set()

    def load(self, *, wall: float) -> None:
        """Read what was kept. A file that cannot be read is begun anew, with a warning."""
        if self._path is None:
            return
        try:
            with sqlite3.connect(self._path) as file:
                file.execute("PRAGMA journal_mode=WAL")
                file.execute(_SCHEMA)
                file.execute("DELETE FROM used WHERE ends < ?", (wall,))
                for bucket, source, used, ends in file.execute("SELECT bucket, source, used, ends FROM used"):
                    self.put(bucket, source, used, ends=ends)
            file.close()
        except (sqlite3.Error, OSError) as error:
            log.warning("limits.counters_unreadable", path=str(self._path), error=str(error))
            for path in (self._path, *(self._path.with_name(self._path.name + end) for end in ("-wal", "-shm"))):
                path.unlink(missing_ok=True)
        self._changed.clear()

    def put(self, bucket: bytes, source: bytes, used: float, *, ends: float) -> None:
        """Hear of a counter."""
        counts = self._counts.get(bucket)
        if counts is None:
            if len(self._counts) >= MAX_BUDGETS:
                return
            counts = self._counts[bucket] = {}
            self._ends[bucket] = ends
        if used > counts.get(source, 0.0) and (source in counts or len(counts) < MAX_SOURCES):
            counts[source] = used
            self._changed.add((bucket, source))

    def total(self, bucket: bytes) -> float:
        counts = self._counts.get(bucket)
        return sum(counts.values()) if counts else 0.0

    def of(self, bucket: bytes, source: bytes) -> float:
        return self._counts.get(bucket, {}).get(source, 0.0)

    def __iter__(self) -> Iterator[tuple[bytes, float, dict[bytes, float]]]:
        """Each budget, when it ends, and its counters."""
        return ((bucket, self._ends[bucket], counts) for bucket, counts in self._counts.items())

    def forget(self, wall: float) -> None:
        """Drop what is over."""
        for bucket in [bucket for bucket, ends in self._ends.items() if ends < wall]:
            del self._counts[bucket], self._ends[bucket]

    def changes(self) -> list[tuple[bytes, bytes, float, float]]:
        """Rows that have changed since the last time, for `save`."""
        rows = [
            (bucket, source, self._counts[bucket][source], self._ends[bucket])
            for bucket, source in self._changed
            if bucket in self._counts and self._path is not None
        ]
        self._changed.clear()
        return rows

    def save(self, rows: list[tuple[bytes, bytes, float, float]], *, wall: float) -> None:
        """Write them. A disk that is full costs what it would have kept, and a warning."""
        assert self._path is not None
        try:
            with sqlite3.connect(self._path) as file:
                file.execute("PRAGMA synchronous=NORMAL")
                file.execute(_SCHEMA)
                file.executemany("INSERT OR REPLACE INTO used VALUES (?, ?, ?, ?)", rows)
                file.execute("DELETE FROM used WHERE ends < ?", (wall,))
            file.close()
        except sqlite3.Error as error:
            log.warning("limits.counters_unsaved", path=str(self._path), error=str(error))
