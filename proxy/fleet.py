"""The workers this proxy can reach right now, as their links tell it.

Nothing here asks the directory: a request is routed over the links that are up, by what came over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import structlog

from mesh.claims import read_int, read_number
from mesh.errors import MalformedEnvelope, ProtocolError
from mesh.link.link import IncomingStream, Link
from mesh.records import Record, State
from mesh.trust import Role

log = structlog.get_logger(__name__)


class Worker:
    """One linked worker: its newest record, the load it pushed, and what this proxy gave it."""

    __slots__ = (
        "elsewhere",
        "failed",
        "in_flight",
        "kv_use",
        "link",
        "max_concurrency",
        "node_id",
        "record",
        "served",
        "waiting",
    )

    def __init__(self, link: Link, record: Record) -> None:
        self.link = link
        self.node_id = record.node_id
        self.in_flight = 0
        self.elsewhere = record.load.running + record.load.waiting
        self.waiting = record.load.waiting
        self.kv_use = record.load.kv_use
        self.served = 0
        self.failed = 0
        self.take(record)

    def take(self, record: Record) -> None:
        self.record = record
        self.max_concurrency = record.capability.max_concurrency

    @property
    def routable(self) -> bool:
        return self.record.state == State.READY and not self.link.draining and not self.link.closed


class Fleet:
    """Implements `mesh.link.peers.PeersOwner` for a proxy."""

    def __init__(self, *, on_record: Callable[[Record], None]) -> None:
        self.workers: dict[bytes, Worker] = {}
        self._by_model: dict[tuple[str, str], list[Worker]] = {}
        self._on_record = on_record

    def candidates(self, model: str, task: str) -> Sequence[Worker]:
        """The ready workers of a model that can do a task."""
        return self._by_model.get((model, task), ())

    def models(self) -> set[str]:
        """The models that some linked worker serves right now."""
        return {model for model, _ in self._by_model}

    def tasks(self, model: str) -> set[str]:
        return {task for name, task in self._by_model if name == model}

    # -- PeersOwner

    def on_up(self, link: Link, record: Record) -> None:
        if record.role == Role.WORKER:
            self.workers[record.node_id] = Worker(link, record)
            self._index()
        self._on_record(record)

    def on_down(self, link: Link, reason: str) -> None:
        worker = self.workers.get(link.node_id)
        if worker is not None and worker.link is link:
            del self.workers[link.node_id]
            self._index()

    def on_record(self, link: Link, record: Record) -> None:
        worker = self.workers.get(link.node_id)
        if worker is not None and record.order > worker.record.order:
            changed = (record.state, record.models) != (worker.record.state, worker.record.models)
            worker.take(record)
            if changed:
                log.info("worker.state", worker=record.node_id.hex()[:12], state=str(record.state), reason=record.reason)
                self._index()
        self._on_record(record)

    def on_load(self, link: Link, fields: dict[str, Any]) -> None:
        worker = self.workers.get(link.node_id)
        if worker is None:
            return
        try:
            running, waiting = read_int(fields, "run", high=10**6), read_int(fields, "wait", high=10**6)
            yours = read_int(fields, "yours", high=10**6)
            worker.kv_use = read_number(fields, "kv", default=0.0, high=1.0)
        except MalformedEnvelope as error:
            raise ProtocolError(f"bad LOAD: {error.message}") from None
        worker.elsewhere = max(0, running + waiting - yours)
        worker.waiting = waiting

    def on_drain(self, link: Link) -> None:
        self._index()

    def on_open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        raise ProtocolError("a proxy serves no streams")

    def _index(self) -> None:
        index: dict[tuple[str, str], list[Worker]] = {}
        for worker in self.workers.values():
            if worker.routable:
                for entry in worker.record.models:
                    for name in (entry.name, *entry.adapters):
                        for task in entry.tasks:
                            index.setdefault((name, task), []).append(worker)
        self._by_model = index
