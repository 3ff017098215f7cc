"""Whom a node links with: `mesh.subset` applied to what the directory knows.

In a mesh with more workers than a proxy should keep links to, each proxy takes its share. It takes enough of each model to choose among,
so a rare model is linked by all. A worker only guesses how many workers there are, and dials the proxies that are surely its own; the
rest dial it. A worker that only dials out dials every proxy: nobody else can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from mesh.clock import Clock
from mesh.directory import Directory
from mesh.records import Record
from mesh.subset import copies_for, place_of
from mesh.trust import Role

LINKED_WORKERS = 1_000
"""Workers a proxy links with, where there are more. A link costs a proxy a heartbeat a second each way and about 100 KB."""
WORKERS_PER_MODEL = 16
"""Of each model a proxy links with so many on average, or all there are."""
_COUNT_EVERY_S = 5.0
_SLACK = 1


class Neighbours:
    """Decides for one node. ``size`` is `LINKED_WORKERS` or the operator's own; 0: everybody."""

    def __init__(
        self,
        node_id: bytes,
        role: Role,
        directory: Directory,
        *,
        size: int,
        outbound_only: Callable[[], bool],
        clock: Clock,
    ) -> None:
        self._node_id = node_id
        self._role = role
        self._directory = directory
        self._size = size
        self._outbound_only = outbound_only
        self._clock = clock
        self._counted_at = float("-inf")
        self._workers = 0
        self._of_model: Counter[str] = Counter()
        self._proxies: list[bytes] = []
        self._places: dict[bytes, int] = {}

    def wants(self, record: Record) -> bool:
        """Whether to dial this node."""
        return self._within(record, slack=0)

    def keeps(self, record: Record) -> bool:
        """Whether a link that is up may stay: a little longer than `wants`, so that a number that wavers ends no links."""
        return not record.addresses or self._within(record, slack=_SLACK)

    def shares(self) -> bool:
        """Whether some of the mesh's workers are left to other proxies."""
        self._count()
        return self._copies(None) < len(self._proxies)

    def _within(self, record: Record, *, slack: int) -> bool:
        if not self._size or self._role == record.role or self._outbound_only():
            return True
        self._count()
        worker, proxy = (record.node_id, self._node_id) if self._role == Role.PROXY else (self._node_id, record.node_id)
        copies = self._copies(record if self._role == Role.PROXY else None) + slack
        return copies >= len(self._proxies) or self._place(worker, proxy) < copies

    def _copies(self, record: Record | None) -> int:
        """How many proxies link with a worker."""
        count = len(self._proxies)
        most = copies_for(self._workers, count, size=self._size)
        for entry in record.models if record is not None else ():
            serving = self._of_model[entry.name]
            most = max(most, -(-WORKERS_PER_MODEL * count // serving) if serving else count)
        return most

    def _place(self, worker: bytes, proxy: bytes) -> int:
        """Remembered, because every record of every worker asks again."""
        node_id = worker if self._role == Role.PROXY else proxy
        place = self._places.get(node_id)
        if place is None:
            place = self._places[node_id] = place_of(worker, proxy, self._proxies)
        return place

    def _count(self) -> None:
        now = self._clock.monotonic()
        if now - self._counted_at < _COUNT_EVERY_S:
            return
        self._counted_at = now
        own = {self._node_id} if self._role == Role.PROXY else set()
        proxies = sorted({record.node_id for record in self._directory.known(Role.PROXY)} | own)
        if self._role == Role.PROXY:
            workers = self._directory.known(Role.WORKER)
            self._workers = len(workers)
            self._of_model = Counter(entry.name for record in workers for entry in record.models)
        else:
            self._workers = max(0, int(self._directory.stats()["nodes_estimated"]) - len(proxies))
        if proxies != self._proxies or len(self._places) > 2 * self._workers:
            self._proxies = proxies
            self._places.clear()
