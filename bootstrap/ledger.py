"""Which join tokens have admitted whom: the one thing a bootstrap node must not forget.

A use is on disk before the newcomer hears of it. A token counts *nodes*, not requests: one that lost the answer may ask again
and is not counted twice. What other bootstrap nodes have seen of a token is added to what this one has seen, so that between
bootstrap nodes that can reach each other a token is good for as many nodes as it says, and not for as many at each.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from mesh.errors import ConfigError, TokenSpent
from mesh.invite import Invite

KEEP_EXPIRED_S = 3600.0
"""Uses of a token are forgotten this long after it expired: past any doubt about clocks."""
MAX_EXCESS = 64
"""So many nodes beyond its uses are noted for a token at most; by then it is long refused everywhere."""


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

    async def spend(self, invite: Invite, node_id: bytes, *, now: float) -> set[bytes]:
        """Note that ``node_id`` uses the token; returns all nodes that do. Raises `TokenSpent`, with nothing noted."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._note, invite, (node_id,), now, refuse=True)

    async def note(self, invite: Invite, node_ids: Iterable[bytes], *, now: float) -> set[bytes]:
        """Note uses that have happened at another bootstrap node; returns all nodes that use the token."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._note, invite, tuple(node_ids), now, refuse=False)

    def close(self) -> None:
        self._db.close()

    def _note(self, invite: Invite, node_ids: tuple[bytes, ...], now: float, *, refuse: bool) -> set[bytes]:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("DELETE FROM uses WHERE expires < ?", (now - KEEP_EXPIRED_S,))
            known = {row[0] for row in self._db.execute("SELECT node FROM uses WHERE token = ?", (invite.id,))}
            fresh = [node_id for node_id in dict.fromkeys(node_ids) if node_id not in known]
            if refuse:
                check_uses(invite, known | set(fresh))
            fresh = fresh[: max(0, invite.uses + MAX_EXCESS - len(known))]
            self._db.executemany("INSERT INTO uses VALUES (?, ?, ?, ?)", [(invite.id, node, now, invite.expires) for node in fresh])
            return known | set(fresh)


def check_uses(invite: Invite, nodes: set[bytes]) -> None:
    """Raises `TokenSpent` if the token has been used by more nodes than it admits."""
    if len(nodes) > invite.uses:
        times = "once" if invite.uses == 1 else f"{invite.uses} times"
        raise TokenSpent(f"this join token was good for use {times} and is used up; make another with `mesh invite`")
