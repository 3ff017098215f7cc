"""The client's side of a proxy's connection, in memory: what was written to it, and how fast it takes it."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.support.answers import Answer, read_answer


class ClientTransport(asyncio.Transport):
    """A transport that keeps what it was given. ``take`` is the client reading; until then it stays in the buffer if ``slow``."""

    def __init__(self, *, slow: bool = False) -> None:
        super().__init__()
        self.data = bytearray()
        self.slow = slow
        self.aborted = False
        self._closing = False
        self._unread = 0
        self._drained = asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing:
            raise RuntimeError("the handler is closed")  # what uvloop does
        self.data += data
        if self.slow:
            self._unread += len(data)

    def take(self, count: int) -> None:
        self._unread = max(0, self._unread - count)
        self._drained.set()

    def get_write_buffer_size(self) -> int:
        return self._unread

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True

    def abort(self) -> None:
        self.aborted = True
        self._closing = True

    async def drained(self) -> None:
        while self._unread > 0 and not self._closing:
            self._drained.clear()
            await self._drained.wait()

    def answer(self) -> Answer | None:
        return read_answer(bytes(self.data), ended=self._closing and not self.aborted)


class Writer:
    """What an attempt asks of aiohttp's writer."""

    def __init__(self, transport: ClientTransport) -> None:
        self._transport = transport
        self.error: Exception | None = None

    async def drain(self) -> None:
        if self.error is not None:
            raise self.error
        await self._transport.drained()


class ClientRequest:
    """What `proxy.downstream` asks of a request."""

    def __init__(self, transport: ClientTransport, *, version: tuple[int, int] = (1, 1)) -> None:
        self.version = version
        self.writer: Any = Writer(transport)
