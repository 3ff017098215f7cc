"""What the proxy writes down of every call: its own count of what went through, and what the worker claimed. Also the audit log.

Nothing is parsed and nothing is written here. A request costs two small objects and, once it is over, a receipt made of them and handed to
the ledger. Per piece of an answer there is one addition, in `proxy.downstream`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mesh.apikey import ApiKey
from mesh.doctor import Finding, Severity
from mesh.errors import CapacityError, Overloaded, Rerouted
from mesh.ledger import Ledger
from mesh.receipts import MAX_TOKENS, Row, pack_receipt
from proxy.downstream import Downstream
from proxy.prompts.watched import Watched

_NOT_TRIED = frozenset({Rerouted.code, Overloaded.code})
"""Attempts that ended so never reached an engine: no receipt of their own, unless the request ended with them."""
_CLAIMED = ("in", "out", "cached", "think", "base")
"""In a worker's END and in a receipt alike."""
_CHAT = "chat"
RETRY_AFTER_S = 5.0


class Attempted:
    """One attempt, as it goes. ``begin`` it, then set ``status`` and ``trailer`` as they come, and ``end`` it."""

    __slots__ = ("_downstream", "_pieces", "_sent", "final", "first_at", "noted", "number", "pieces", "sent", "status", "trailer", "worker")

    def __init__(self, noted: Noted, number: int, worker: bytes, downstream: Downstream) -> None:
        self.noted = noted
        self.final = False
        self.number = number
        self.worker = worker
        self.status = "cancelled"
        self.trailer: Mapping[str, Any] | None = None
        self.first_at: float | None = None
        self.sent = self.pieces = 0
        self._downstream: Downstream | None = downstream
        self._sent = downstream.bytes_sent
        self._pieces = downstream.pieces

    def end(self, first_at: float | None) -> None:
        """No more will come of this attempt. ``first_at``: when its first byte came, None if none did."""
        downstream, self._downstream = self._downstream, None
        if first_at is not None and downstream is not None:
            self.first_at = first_at
            self.sent = downstream.bytes_sent - self._sent
            self.pieces = downstream.pieces - self._pieces

    def row(self) -> Row:
        """For the ledger."""
        return self.noted.row_of(self)


class Noted:
    """One request, as it goes; also its own receipt where no worker was tried."""

    __slots__ = ("at", "endpoint", "id", "key", "model", "notes", "started", "status", "task", "took_s", "watched")

    def __init__(self, request_id: str, task: str, *, at: int, started: float) -> None:
        self.id = request_id
        self.task = task
        self.at = at
        self.started = started
        self.key: ApiKey | None = None
        self.model = ""
        self.endpoint = ""
        self.watched: Watched | None = None
        self.notes: list[Attempted] = []
        self.status = ""
        self.took_s = 0.0

    def begin(self, worker: bytes, downstream: Downstream) -> Attempted:
        """A worker is tried. The note's number goes to it in OPEN."""
        note = Attempted(self, len(self.notes) + 1, worker, downstream)
        self.notes.append(note)
        return note

    def row(self) -> Row:
        """For the ledger."""
        return self.row_of(None)

    def row_of(self, attempted: Attempted | None) -> Row:
        """The receipt of an attempt; of a request that came to none, of the request.

        Written by its short names: making a `Receipt` first would take twice the time, and this runs in the proxy.
        """
        key, took_ms = self.key, round(self.took_s * 1000)
        assert key is not None
        at = self.at
        fields: dict[str, Any] = {"id": self.id, "n": 0, "at": at, "px": True, "p": key.project, "key": key.id, "t": self.task}
        fields["ms"], fields["done"] = took_ms, at + took_ms
        if self.model:
            fields["m"] = _printable(self.model)
        if self.endpoint:
            fields["ep"] = self.endpoint
        status = self.status
        if attempted is None or attempted.final:
            fields["fin"] = True
        else:
            status = attempted.status
        if status != "ok":
            fields["st"] = status
        if attempted is not None:
            fields["n"], fields["peer"] = attempted.number, attempted.worker
            if attempted.first_at is not None:
                fields["ev"], fields["b"] = attempted.pieces, attempted.sent
                fields["first"] = max(0, round((attempted.first_at - self.started) * 1000))
            if attempted.trailer is None:
                opening = 1 if self.task == _CHAT else 0  # a chat's first event names the role and holds no token
                fields["own"], fields["out"] = True, max(0, attempted.pieces - opening)
            else:
                claimed = attempted.trailer.get
                for name in _CLAIMED:
                    count = claimed(name)
                    if count and type(count) is int and 0 < count <= MAX_TOKENS:  # what is nonsense counts as nothing
                        fields[name] = count
        return (at, pack_receipt(fields))


class Meter:
    """Takes what `App` tells of each call and gives the ledger its entries. ``ledger`` None: nothing is kept."""

    def __init__(self, ledger: Ledger | None, *, wall: Callable[[], float] = time.time) -> None:
        self._ledger = ledger
        self._wall = wall

    @property
    def full(self) -> bool:
        """Whether what requests use could not be written down."""
        return self._ledger is not None and self._ledger.full

    def check(self) -> None:
        """Raises `CapacityError` while `full`."""
        if self.full:
            raise CapacityError("This proxy cannot write down what requests use right now; try again shortly", retry_after_s=RETRY_AFTER_S)

    def open(self, request_id: str, task: str, started: float) -> Noted:
        """A request has come; ``started`` on the monotonic clock."""
        return Noted(request_id, task, at=int(self._wall() * 1000), started=started)

    def close(self, noted: Noted, status: str, ended: float) -> None:
        """The request is over. One whose key did not hold leaves nothing: strangers must not be able to fill a disk."""
        attempts, noted.notes = noted.notes, []
        if noted.key is None or self._ledger is None:
            return
        noted.status = status
        noted.took_s = ended - noted.started
        if not attempts:
            self._ledger.add(noted)
            return
        final = attempts[-1]
        for attempt in attempts[:-1]:
            if attempt.status == "ok":
                final = attempt
        final.final = True
        for attempt in attempts:
            if attempt is final or attempt.status not in _NOT_TRIED:
                self._ledger.add(attempt)


def look_at(ledger: Ledger) -> list[Finding]:
    """What the doctor says of it."""
    if ledger.trouble:
        what = "receipts cannot be written to disk" + (", so no requests are taken" if ledger.full else "")
        advice = "make room on the disk of the state folder, or mend it; what waits is written as soon as that works"
        return [
            Finding(check="receipts", severity=Severity.FAIL, what=what, detail=f"{ledger.waiting} wait: {ledger.trouble}", advice=advice)
        ]
    if ledger.full:
        advice = "the disk is too slow for the load: add proxies, or give the state folder a faster disk"
        return [Finding(check="receipts", severity=Severity.FAIL, what="too many receipts wait for the disk", advice=advice)]
    return [Finding(check="receipts", severity=Severity.OK, what=f"receipts are written: {ledger.written} since the start")]


class LedgerCollector(Collector):
    """How the ledger is, for /metrics."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def collect(self) -> Iterable[Metric]:
        ledger = self._ledger
        yield GaugeMetricFamily("infermesh_receipts_waiting", "Receipts that are not on disk yet.", value=ledger.waiting)
        yield GaugeMetricFamily("infermesh_receipts_failing", "1 while receipts cannot be written to disk.", value=bool(ledger.trouble))
        yield CounterMetricFamily("infermesh_receipts_written", "Receipts made durable.", value=ledger.written)
        yield CounterMetricFamily("infermesh_receipt_batches_signed", "Batches of receipts signed.", value=ledger.signed)


def _printable(text: str) -> str:
    """A client may name its model as it likes."""
    return text[:256] if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text[:256])
