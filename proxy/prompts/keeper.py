"""Keeps prompts and answers of the calls whose endpoint says so, beside the requests: never in their way, and rather not at all than late.

A call that is to be kept gets a `Watched` in place of its `Downstream`; no other call pays anything. What was held of calls that are over
goes, all together a few times a second, to one thread, which redacts, seals and writes it. If that cannot keep up, or the disk does not
take it, records are dropped and counted.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from mesh.clock import Clock
from mesh.endpoints import Endpoint
from mesh.errors import Overloaded
from mesh.link.questions import Questions
from mesh.prompts import TASK, Kept, PromptPage, PromptQuery, encode_page, parse_query, seal_record
from proxy.prompts.record import MAX_BODY_BYTES, make_record
from proxy.prompts.store import PromptStore, Record
from proxy.prompts.watched import Watched

log = structlog.get_logger(__name__)

FILE = "prompts.db"
SWEEP_S = 30.0
WRITE_EVERY_S = 0.25
"""Waking a thread costs a proxy more than what it then does, so it is done for several calls at once."""
MAX_WAITING = 1_000
MAX_WAITING_BYTES = 32 << 20
"""Calls, and their bytes, that wait for the thread."""
ANSWERS_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One call, for the thread. ``body`` None: it had ``size`` bytes, too many."""

    endpoint: Endpoint
    about: dict[str, Any]
    body: bytes | bytearray | None
    size: int
    answer: bytearray | None
    stream: bool

    @property
    def held_bytes(self) -> int:
        return len(self.body or b"") + len(self.answer or b"")


class Prompts:
    """One proxy's. ``path`` is where they are kept; the file is made with the first."""

    def __init__(self, path: Path, *, clock: Clock) -> None:
        self.kept = 0
        self.dropped = 0
        self._path = path
        self._clock = clock
        self._store: PromptStore | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._waiting: list[_Job] = []
        self._held = self._held_bytes = 0
        self._due: asyncio.TimerHandle | None = None
        self._closed = False
        self.questions = Questions(self._answer, about=TASK, at_once=ANSWERS_AT_ONCE)

    async def run(self) -> None:
        """A task for the life of the process: forget what is over."""
        while True:
            if self._store is not None or self._path.exists():
                try:
                    await asyncio.get_running_loop().run_in_executor(self._thread, self._sweep)
                except (sqlite3.Error, OSError) as error:
                    log.warning("prompts.not_swept", error=str(error))
            await self._clock.sleep(SWEEP_S)

    async def stop(self) -> None:
        """Write what waits, and close."""
        if self._due is not None:
            self._due.cancel()
        self._closed = True
        if self._waiting:
            self._hand_over()
        await self.questions.stop()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
        if self._store is not None:
            self._store.close()
            self._store = None

    # -- a call

    def keep(self, request_id: str, at: int, watched: Watched, status: str) -> None:
        """The call is over, that came at ``at`` (wall-clock ms)."""
        call = watched.call
        assert call.endpoint is not None
        job = _Job(
            endpoint=call.endpoint,
            about={"request": request_id, "at": at, "model": call.model, "task": call.task, "status": status},
            body=call.body if len(call.body) <= MAX_BODY_BYTES else None,
            size=len(call.body),
            answer=watched.answer if watched.whole or watched.is_stream else None,
            stream=watched.is_stream,
        )
        if self._closed or self._held >= MAX_WAITING or self._held_bytes + job.held_bytes > MAX_WAITING_BYTES:
            self.dropped += 1
            return
        self._held += 1
        self._held_bytes += job.held_bytes
        self._waiting.append(job)
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(WRITE_EVERY_S, self._hand_over)

    def _hand_over(self) -> None:
        jobs, self._waiting = self._waiting, []
        written = asyncio.get_running_loop().run_in_executor(self._thread, self._write, jobs)
        written.add_done_callback(partial(self._written, jobs))

    def _written(self, jobs: list[_Job], written: asyncio.Future[int]) -> None:
        """What cannot be kept is nobody's trouble. No error's text is told: it might hold what was to be kept."""
        self._held -= len(jobs)
        self._held_bytes -= sum(job.held_bytes for job in jobs)
        kept = 0
        if not written.cancelled():
            if (error := written.exception()) is not None:
                log.warning("prompts.not_kept", error=type(error).__name__)
            else:
                kept = written.result()
        self.kept += kept
        self.dropped += len(jobs) - kept
        self._due = asyncio.get_running_loop().call_later(WRITE_EVERY_S, self._hand_over) if self._waiting else None

    # -- in the thread

    def _write(self, jobs: list[_Job]) -> int:
        """How many of them are kept."""
        records = []
        for job in jobs:
            try:
                records.append(self._record(job))
            except Exception as error:  # a fault in here must not cost the others
                log.warning("prompts.not_kept", error=type(error).__name__)
        self._opened().add(records)
        return len(records)

    def _record(self, job: _Job) -> Record:
        endpoint, request_id = job.endpoint, job.about["request"]
        recording = endpoint.recording
        assert recording is not None
        record = make_record(job.body, job.size, job.answer, stream=job.stream, full=recording.full, about=job.about)
        sealed = seal_record(record, recording.public_key, project=endpoint.project, endpoint=endpoint.name, request_id=request_id)
        ends = int((self._clock.wall() + recording.keep_s) * 1000)
        return Record(endpoint.project, endpoint.name, Kept(id=request_id, at=job.about["at"], sealed=sealed), ends)

    def _sweep(self) -> None:
        self._opened().sweep(int(self._clock.wall() * 1000))

    def _page(self, query: PromptQuery) -> PromptPage:
        if self._store is None and not self._path.exists():
            return PromptPage(kept=(), more=False, last=query.after)
        return self._opened().page(query, int(self._clock.wall() * 1000))

    def _opened(self) -> PromptStore:
        if self._store is None:
            self._store = PromptStore(self._path)
        return self._store

    # -- who asks

    async def page(self, query: PromptQuery) -> PromptPage:
        """Of this proxy's own. Raises `Overloaded` where they cannot be read right now."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._page, query)
        except (sqlite3.Error, OSError):
            raise Overloaded("What this proxy has kept of prompts cannot be read right now", retry_after_s=5.0) from None

    async def _answer(self, head: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """For another proxy. What it gets is sealed."""
        page = await self.page(parse_query(head))
        return encode_page(page.kept), {"more": page.more, "last": page.last}


class PromptsCollector(Collector):
    """For /metrics."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily("infermesh_prompts_kept", "Calls of which prompt and answer were kept.", value=self._prompts.kept)
        yield CounterMetricFamily("infermesh_prompts_dropped", "Calls that were to be kept and could not be.", value=self._prompts.dropped)
