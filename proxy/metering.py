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
from mesh.link.link import MAX_TRAIL_BYTES
from mesh.receipts import MAX_TOKENS, Row, Slip, pack_receipt
from mesh.trail import count_tokens
from proxy.downstream import Downstream
from proxy.moves import Passage
from proxy.prompts.watched import Watched

_NOT_TRIED = frozenset({Rerouted.code, Overloaded.code})
"""Attempts that ended so never reached an engine: no receipt of their own, unless the request ended with them."""
MAX_NAME = 256
_CHAT = "chat"
RETRY_AFTER_S = 5.0


class Attempted:
    """One attempt, as it goes. ``begin`` it, then set ``status`` and ``trailer`` as they come, and ``end`` it."""

    __slots__ = (
        "_downstream",
        "_pieces",
        "_sent",
        "_trail_at",
        "final",
        "first_at",
        "noted",
        "number",
        "pieces",
        "resumed",
        "sent",
        "status",
        "tokens",
        "trailer",
        "worker",
        "written",
    )

    def __init__(self, noted: Noted, number: int, worker: bytes, downstream: Downstream) -> None:
        self.noted = noted
        self.final = self.written = False
        self.number = number
        self.worker = worker
        self.status = "cancelled"
        self.trailer: Mapping[str, Any] | None = None
        self.first_at: float | None = None
        self.sent = self.pieces = self.resumed = self._trail_at = 0
        self.tokens: int | None = None
        self._downstream: Downstream | None = downstream
        self._sent = downstream.bytes_sent
        self._pieces = downstream.pieces

    def follow(self, passage: Passage) -> int:
        """Its stream has a trail; returns how much of it there is."""
        self._trail_at = len(passage.trail)
        return self._trail_at

    def end(self, first_at: float | None, passage: Passage | None = None) -> None:
        """No more will come of this attempt. ``first_at``: when its first byte came, None if none did."""
        downstream, self._downstream = self._downstream, None
        if first_at is not None and downstream is not None:
            self.first_at = first_at
            self.sent = downstream.bytes_sent - self._sent
            self.pieces = downstream.pieces - self._pieces
            if self.trailer is None and passage is not None and self._trail_at < len(passage.trail) < MAX_TRAIL_BYTES:
                # A piece may have held several events: what it came to, the trail knows.
                self.tokens, self.resumed = count_tokens(passage.trail, self._trail_at), passage.tokens if self._trail_at else 0

    def row(self) -> Row:
        """For the ledger."""
        return self.noted.row_of(self)


class Noted:
    """One request, as it goes; also its own receipt where no worker was tried."""

    __slots__ = ("at", "endpoint", "id", "key", "model", "notes", "started", "status", "task", "took_s", "watched")

    def __init__(self, request_id: str, task: str, at: int, started: float) -> None:
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

        Written by its short names: making a `Receipt` first would take three times as long, and this runs in the proxy.
        """
        key, at, model, took_ms = self.key, self.at, self.model, int(self.took_s * 1000 + 0.5)
        assert key is not None
        if not model.isprintable() or len(model) > MAX_NAME:
            model = _printable(model)
        status, peer, final, own, number = self.status, b"", True, False, 0
        pieces = sent = first_ms = prompt = cached = completion = reasoning = resumed = 0
        if attempted is not None:
            number, peer, final, trailer = attempted.number, attempted.worker, attempted.final, attempted.trailer
            if not final:
                status = attempted.status
            if attempted.first_at is not None:
                pieces, sent = attempted.pieces, attempted.sent
                first_ms = int((attempted.first_at - self.started) * 1000 + 0.5)
            if trailer is None:
                opening = 1 if self.task == _CHAT else 0  # a chat's first event names the role and holds no token
                own, resumed = True, attempted.resumed
                completion = attempted.tokens if attempted.tokens is not None else max(0, pieces - opening)
            else:
                prompt, completion, cached = trailer.get("in", 0), trailer.get("out", 0), trailer.get("cached", 0)
                if not (
                    type(prompt) is type(completion) is type(cached) is int
                    and 0 <= prompt <= MAX_TOKENS
                    and 0 <= completion <= MAX_TOKENS
                    and 0 <= cached <= MAX_TOKENS
                ):
                    prompt, completion, cached = _sound(prompt), _sound(completion), _sound(cached)
                if "think" in trailer or "base" in trailer:
                    reasoning, resumed = _sound(trailer.get("think")), _sound(trailer.get("base"))
        elif self.notes:  # they have receipts of their own, by which it is charged
            peer, own, completion = self.notes[-1].worker, True, sum(note.pieces for note in self.notes)
        slip = Slip(
            self.id,
            number,
            at,
            True,
            key.project,
            key.id,
            self.task,
            took_ms,
            at + took_ms,
            model,
            self.endpoint,
            "" if status == "ok" else status,
            final,
            own,
            peer,
            pieces,
            sent,
            first_ms,
            prompt,
            cached,
            completion,
            reasoning,
            resumed,
        )
        return (at, pack_receipt(slip))


def _sound(count: Any) -> int:
    """What a worker says of tokens; what is nonsense counts as nothing."""
    return count if type(count) is int and 0 < count <= MAX_TOKENS else 0


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
        if self._ledger is not None and self._ledger.full:
            raise CapacityError("This proxy cannot write down what requests use right now; try again shortly", retry_after_s=RETRY_AFTER_S)

    def open(self, request_id: str, task: str, started: float) -> Noted:
        """A request has come; ``started`` on the monotonic clock."""
        return Noted(request_id, task, int(self._wall() * 1000), started)

    def close(self, noted: Noted, status: str, ended: float) -> None:
        """The request is over. One whose key did not hold leaves nothing: strangers must not be able to fill a disk."""
        notes, ledger = noted.notes, self._ledger
        if noted.key is not None and ledger is not None:
            noted.status = status
            noted.took_s = ended - noted.started
            if not notes or notes[-1].written:
                ledger.add(noted)
            else:
                final = notes[-1]
                if len(notes) > 1:
                    final = next((note for note in reversed(notes) if note.status == "ok"), final)
                    for note in notes:
                        if note is not final:
                            self._write(note, ledger)
                final.final = True
                ledger.add(final)
        noted.notes = []

    def lost(self, noted: Noted) -> None:
        """An answer that has begun lost its worker and may wait long for another: what was delivered is written down now.

        If none is found, the end of the request has a receipt of its own (number 0).
        """
        if noted.key is not None and self._ledger is not None:
            noted.took_s = time.monotonic() - noted.started
            for note in noted.notes:
                self._write(note, self._ledger)

    def _write(self, note: Attempted, ledger: Ledger) -> None:
        """An attempt that was not the request's last."""
        if not note.written and note.status not in _NOT_TRIED:
            note.written = True
            ledger.add(note)


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
    return "".join(char if char.isprintable() else "?" for char in text[:MAX_NAME])
