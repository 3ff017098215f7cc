"""Questions that one node asks another over the link the two have: a stream for each, answered with one page.

What is asked and what a page holds is `mesh.books`' and `mesh.prompts`' matter. A page fits into a stream's first credit, so nothing waits
for the asker to take it, and no asker can be made to hold more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog

from mesh.errors import MeshError, Overloaded, ProtocolError, UpstreamTimeout
from mesh.link.link import IncomingStream, Link

log = structlog.get_logger(__name__)

ANSWER_S = 10.0

Answer = Callable[[dict[str, Any]], Awaitable[tuple[bytes, dict[str, Any]]]]
"""From a question's fields to a page and the fields of END. Raises a `MeshError`, which the asker is told."""


async def ask(link: Link, fields: Mapping[str, Any], *, about: str) -> tuple[bytes, dict[str, Any]]:
    """A page and what END says of it; ``fields`` are OPEN's. Raises a `MeshError`."""
    gathered = _Gathered()
    stream = link.open(fields, gathered)
    stream.end()
    try:
        async with asyncio.timeout(ANSWER_S):
            trailer = await gathered.done
    except TimeoutError:
        raise UpstreamTimeout(f"no {about} within {ANSWER_S:.0f} s") from None
    finally:
        stream.cancel()
        if gathered.done.done() and not gathered.done.cancelled():
            gathered.done.exception()
    return bytes(gathered.data), trailer


class Questions:
    """Answers those about one matter, each in a task of its own, ``at_once`` at the most. ``about`` is OPEN's task, too."""

    def __init__(self, answer: Answer, *, about: str, at_once: int) -> None:
        self._answer = answer
        self.about = about
        self._at_once = at_once
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        """A peer asks."""
        if len(self._tasks) >= self._at_once:
            stream.fail(Overloaded(f"too many questions for {self.about} at once", retry_after_s=1.0))
            return
        task = asyncio.create_task(self._serve(stream, head))
        stream.on_cancel = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """End whatever is still being answered."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        try:
            page, trailer = await self._answer(head)
            await stream.send(page)
            stream.end(trailer)
        except MeshError as error:
            stream.fail(error)
        except Exception:
            log.exception(f"{self.about}.crashed")
            stream.fail(ProtocolError(f"the {self.about} could not be read"))


class _Gathered:
    """Implements `mesh.link.link.StreamSink`. ``data`` is what has come, ``done`` END's fields or what went wrong."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    def on_accepted(self) -> None:
        pass

    def on_progress(self, info: dict[str, Any]) -> None:
        pass

    def on_head(self, head: dict[str, Any]) -> None:
        pass

    def on_data(self, data: bytes) -> None:
        self.data += data  # bounded by the stream's first credit: none is given back

    def on_end(self, trailer: dict[str, Any]) -> None:
        if not self.done.done():
            self.done.set_result(trailer)

    def on_error(self, error: MeshError) -> None:
        if not self.done.done():
            self.done.set_exception(error)
