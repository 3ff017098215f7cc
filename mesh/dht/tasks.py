"""The background tasks of one node: each ends with it, and none fails in silence."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog

from mesh.clock import Clock

log = structlog.get_logger(__name__)

_MAX_TASKS = 1_000
_PAUSE_AFTER_FAILURE_S = 1.0


class Tasks:
    """At most a thousand tasks at once; what is started beyond is not run."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._closed = False

    def start(self, work: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any] | None:
        if self._closed or len(self._tasks) >= _MAX_TASKS:
            work.close()
            return None
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def repeat(self, step: Callable[[], Awaitable[float]], clock: Clock, *, name: str) -> None:
        """Run ``step`` for as long as the node lives, pausing for the seconds it returns. One that fails is logged and tried again."""

        async def forever() -> None:
            while True:
                try:
                    pause_s = await step()
                except Exception:
                    log.exception("directory.step_failed", task=name)
                    pause_s = _PAUSE_AFTER_FAILURE_S
                await clock.sleep(pause_s)

        self.start(forever(), name=name)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("directory.task_failed", task=task.get_name(), exc_info=error)

    async def stop(self) -> None:
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
