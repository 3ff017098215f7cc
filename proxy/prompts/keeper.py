"""Keeps prompts and answers of the calls whose endpoint says so, beside the requests: never in their way, and rather not at all than late.

A call that is to be kept gets a `Watched` in place of its `Downstream`; no other call pays anything. What it held goes, once the call is
over, to one thread, which redacts, seals and writes it. If that cannot keep up, or the disk does not take it, the record is dropped and
counted.
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
from mesh.errors import MeshError, Overloaded, ProtocolError
from mesh.link.link import IncomingStream
from mesh.prompts import Kept, PromptPage, PromptQuery, encode_page, parse_query, seal_record
from proxy.prompts.record import MAX_BODY_BYTES, make_record
from proxy.prompts.store import PromptStore
from proxy.prompts.watched import Watched

log = structlog.get_logger(__name__)

FILE = "prompts.db"
SWEEP_S = 30.0
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
        self._waiting = self._waiting_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()

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
        """What has not been written by now is not kept."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(None, lambda: self._thread.shutdown(cancel_futures=True))
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
        if self._waiting >= MAX_WAITING or self._waiting_bytes + job.held_bytes > MAX_WAITING_BYTES:
            self.dropped += 1
            return
        try:
            written = asyncio.get_running_loop().run_in_executor(self._thread, self._write, job)
        except RuntimeError:  # this process ends
            self.dropped += 1
            return
        self._waiting += 1
        self._waiting_bytes += job.held_bytes
        written.add_done_callback(partial(self._written, job.held_bytes))

    def _written(self, size: int, written: asyncio.Future[None]) -> None:
        """What cannot be kept is nobody's trouble. The error's text is not told: it might hold what was to be kept."""
        self._waiting -= 1
        self._waiting_bytes -= size
        error = None if written.cancelled() else written.exception()
        if error is not None:
            log.warning("prompts.not_kept", error=type(error).__name__)
        if error is not None or written.cancelled():
            self.dropped += 1
        else:
            self.kept += 1

    # -- in the thread

    def _write(self, job: _Job) -> None:
        endpoint, request_id = job.endpoint, job.about["request"]
        recording = endpoint.recording
        assert recording is not None
        record = make_record(job.body, job.size, job.answer, stream=job.stream, full=recording.full, about=job.about)
        sealed = seal_record(record, recording.public_key, project=endpoint.project, endpoint=endpoint.name, request_id=request_id)
        kept = Kept(id=request_id, at=job.about["at"], sealed=sealed)
        self._opened().add(endpoint.project, endpoint.name, kept, ends=int((self._clock.wall() + recording.keep_s) * 1000))

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

    def open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        """Another proxy asks: answer in a task of its own. What it gets is sealed."""
        if len(self._tasks) >= ANSWERS_AT_ONCE:
            stream.fail(Overloaded("too many questions for prompts at once", retry_after_s=1.0))
            return
        task = asyncio.create_task(self._answer(stream, head))
        stream.on_cancel = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        try:
            page = await self.page(parse_query(head))
            await stream.send(encode_page(page.kept))
            stream.end({"more": page.more, "last": page.last})
        except MeshError as error:
            stream.fail(error)
        except Exception:
            log.exception("prompts.crashed")
            stream.fail(ProtocolError("the prompts could not be read"))


class PromptsCollector(Collector):
    """For /metrics."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily("infermesh_prompts_kept", "Calls of which prompt and answer were kept.", value=self._prompts.kept)
        yield CounterMetricFamily("infermesh_prompts_dropped", "Calls that were to be kept and could not be.", value=self._prompts.dropped)
