"""How old the news is: since when a proxy can be sure that its revocation list is the newest. Pure, and the task that keeps it so.

Nobody signs the list again and again; what counts is when the list was last *confirmed*: the moment as of which the newest version was

* signed by the operator, or
* known to a bootstrap node, asked for this, that had none newer, or
* known to more than half of the proxies that were seen within a day, this one among them, each having said that it had none newer.

The last rule lets traffic flow when every bootstrap node is away, and it fails a proxy, or a handful of them, that has been cut off from
the rest with some workers. A proxy that left with a good-bye does not count. Before the first look nothing is confirmed. A mesh that has
published no list has nothing to be behind with.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from mesh.clock import Clock
from mesh.directory import Directory
from mesh.errors import MalformedEnvelope
from mesh.identity import write_private
from mesh.records import State
from mesh.revocations import KIND, NAME, RevocationList
from mesh.trust import Role

log = structlog.get_logger(__name__)

MEMORY_S = 86_400.0
"""A proxy counts for so long after it was last seen: as long as its certificate lasts."""
CONFIRM_S = 20.0
"""How often a bootstrap node is asked; more often where the list may not get that old."""
FIRST_LOOK_S = 3.0
"""So long a proxy that has just started looks for the list before it goes by what it has."""
NEVER_STALE = float("inf")
_FILE = "revocations.json"
_SAVE_S = 60.0


@dataclass(slots=True, kw_only=True)
class Freshness:
    """All times are wall-clock seconds. ``stale_s`` is how old the confirmation may be, 0 for any age."""

    stale_s: float
    confirmed: float = 0.0
    looked: bool = False
    seen: dict[bytes, float] = field(default_factory=dict)
    """Other proxies, and when each was last known to live."""
    heard: dict[bytes, float] = field(default_factory=dict)
    """When each last said that it knew no newer list."""
    fresh_until: float = 0.0
    """What a request is held against: one comparison."""

    def saw(self, node_id: bytes, *, now: float) -> None:
        self.seen[node_id] = now

    def left(self, node_id: bytes) -> None:
        """It said good-bye."""
        self.seen.pop(node_id, None)

    def agreed(self, node_id: bytes, *, now: float) -> None:
        """Another proxy has told what it holds, and it holds no newer list than this one."""
        self.heard[node_id] = self.seen[node_id] = now

    def settle(self, revoked: RevocationList, *, now: float, anchored: bool = False) -> None:
        """Work out `fresh_until`. ``anchored``: a bootstrap node has just said that it has none newer."""
        for node_id in [node_id for node_id, at in self.seen.items() if at <= now - MEMORY_S]:
            del self.seen[node_id]
        for node_id in self.heard.keys() - self.seen.keys():
            del self.heard[node_id]
        if not self.looked:
            return
        newest = revoked.newest
        self.confirmed = max(self.confirmed, min(newest.issued, now), now if anchored else 0.0, self._majority(now))
        self.fresh_until = self.confirmed + self.stale_s if self.stale_s and newest.seq else NEVER_STALE

    def _majority(self, now: float) -> float:
        """The moment since which more than half of the known proxies have been heard, this one always being up to date with itself."""
        times = sorted((now, *(self.heard.get(node_id, 0.0) for node_id in self.seen)), reverse=True)
        return times[len(times) // 2]

    def dump(self) -> dict[str, Any]:
        return {"confirmed": self.confirmed, "proxies": {node_id.hex(): at for node_id, at in self.seen.items()}}

    def load(self, data: Any) -> None:
        """Raises `ValueError`, `TypeError` or `KeyError` if it makes no sense."""
        confirmed, proxies = float(data["confirmed"]), {bytes.fromhex(name): float(at) for name, at in data["proxies"].items()}
        self.confirmed, self.seen = confirmed, proxies


def follow_revocations(directory: Directory, revoked: RevocationList, then: Callable[[], None] = lambda: None) -> None:
    """Take the list from what this node holds, now and whenever there is a newer one. Call it once the directory has started."""

    def take(document: Any) -> None:
        if (document.kind, document.name, document.project) != (KIND, NAME, ""):
            return
        try:
            revoked.take(document)
        except MalformedEnvelope as error:
            log.error("revocations.unreadable", seq=document.seq, reason=error.message)
        else:
            log.info("revocations.taken", seq=document.seq, keys=len(revoked.newest.keys))
            then()

    directory.on_document(take)
    for document in directory.held_documents(KIND):
        take(document)


class Watch:
    """Keeps a proxy's `Freshness`, and keeps it on disk in ``folder``."""

    def __init__(self, directory: Directory, revoked: RevocationList, *, own: bytes, stale_s: float, folder: Path, clock: Clock) -> None:
        self.freshness = Freshness(stale_s=stale_s)
        self._directory = directory
        self._revoked = revoked
        self._own = own
        self._path = folder / _FILE
        self._clock = clock
        self._load()

    def agreed(self, node_id: bytes) -> None:
        """See `mesh.bulletin.Bulletin.on_agreed`."""
        self.freshness.agreed(node_id, now=self._clock.wall())
        self.settle()

    def settle(self, *, anchored: bool = False) -> None:
        self.freshness.settle(self._revoked, now=self._clock.wall(), anchored=anchored)

    async def run(self, rng: random.Random) -> None:
        """A task for as long as the proxy runs. Raises nothing."""
        saved = float("-inf")
        pause_s = min(CONFIRM_S, self.freshness.stale_s / 4 or CONFIRM_S)
        while True:
            try:
                self._see()
                document = self._directory.held_document(KIND, NAME)
                self.settle(anchored=document is not None and await self._directory.confirm_document(document))
            except Exception:  # what a peer sent must not end the proxy; unconfirmed, the list grows stale by itself
                log.exception("revocations.unconfirmed")
            if self._clock.wall() >= self.freshness.fresh_until:
                log.error("revocations.stale", confirmed=int(self.freshness.confirmed), seq=self._revoked.newest.seq)
            if self._clock.monotonic() - saved >= _SAVE_S:
                saved = self._clock.monotonic()
                await asyncio.to_thread(self._save, json.dumps(self.freshness.dump()).encode())
            await self._clock.sleep(pause_s * rng.uniform(0.75, 1.0))

    async def look_first(self) -> None:
        """A proxy that has just started may have missed anything: it serves once it has asked, or found that there is nobody to ask."""
        try:
            async with asyncio.timeout(FIRST_LOOK_S):
                if await self._directory.joined(timeout_s=FIRST_LOOK_S):
                    await self._directory.get_document(KIND, NAME)
        except TimeoutError:
            log.warning("revocations.nobody_to_ask")
        self.freshness.looked = True
        self._see()
        self.settle()

    def _see(self) -> None:
        now = self._clock.wall()
        for record in self._directory.known(Role.PROXY):
            if record.node_id == self._own:
                continue
            if record.state == State.DRAINING:
                self.freshness.left(record.node_id)
            else:
                self.freshness.saw(record.node_id, now=now)

    def _load(self) -> None:
        try:
            self.freshness.load(json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("revocations.state_unreadable", path=str(self._path), error=str(error))

    def _save(self, data: bytes) -> None:
        try:
            write_private(self._path, data)
        except OSError as error:
            log.warning("revocations.state_unsaved", error=str(error))
