"""Progress of a model download: a bar for a person at a terminal, a line now and then for a log."""

from __future__ import annotations

import sys
from collections.abc import Callable

import structlog
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

log = structlog.get_logger(__name__)


class DownloadProgress:
    """Called with (bytes done, bytes in all or None). ``on_step`` hears of every tenth of the way, for whoever else wants to know."""

    def __init__(self, what: str, on_step: Callable[[int, int | None], None]) -> None:
        self._what = what
        self._on_step = on_step
        self._step = -1
        self._bar: Progress | None = None

    def __call__(self, done_bytes: int, total_bytes: int | None) -> None:
        if sys.stderr.isatty():
            self._draw(done_bytes, total_bytes)
        step = done_bytes * 10 // total_bytes if total_bytes else 0
        if step != self._step:
            self._step = step
            self._on_step(done_bytes, total_bytes)
            if self._bar is None:
                log.info("model.progress", model=self._what, done_bytes=done_bytes, total_bytes=total_bytes)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, done_bytes: int, total_bytes: int | None) -> None:
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task(self._what, total=total_bytes)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done_bytes, total=total_bytes)
        if done_bytes == total_bytes:
            self.close()
