"""Which join tokens have admitted whom: the one thing a bootstrap node must not forget.

A use is on disk before the newcomer hears of it. A token counts *nodes*, not requests: one that lost the answer may ask
again and is not counted twice.
"""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

from mesh.errors import ConfigError, TokenSpent
from mesh.invite import Invite

KEEP_EXPIRED_S = 3600.0
"""Uses of a token are forgotten this long after it expired: past any doubt about clocks."""


class Ledger:
    """One SQLite file. Every method may be called from the event loop; the disk is waited for in a thread."""

    def __init__(self, path: Path) -> None:
        try:
            path.touch(mode=0o600)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS uses"
                " (token BLOB, node BLOB, at REAL NOT NULL, expires REAL NOT NULL, PRIMARY KEY (token, node)) WITHOUT ROWID"
            )
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{path} cannot be used as the list of spent join tokens: {error}") from None
        self._one_at_a_time = asyncio.Lock()

    async def spend(self, invite: Invite, node_id: bytes, *, now: float) -> int:
        """Note that ``node_id`` uses the token; returns how many uses are left. Raises `TokenSpent`."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._spend, invite, node_id, now)

    def close(self) -> None:
        self._db.close()

    def _spend(self, invite: Invite, node_id: bytes, now: float) -> int:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("DELETE FROM uses WHERE expires < ?", (now - KEEP_EXPIRED_S,))
            nodes = {row[0] for row in self._db.execute("SELECT node FROM uses WHERE token = ?", (invite.id,))}
            if node_id in nodes:
                return invite.uses - len(nodes)
            if len(nodes) >= invite.uses:
                times = "once" if invite.uses == 1 else f"{invite.uses} times"
                raise TokenSpent(f"this join token was good for use {times} and is used up; make another with `mesh invite`")
            self._db.execute("INSERT INTO uses VALUES (?, ?, ?, ?)", (invite.id, node_id, now, invite.expires))
            return invite.uses - len(nodes) - 1
