"""Clients' connections: how many there may be, how long each may take over the head of a request, and who goes when there is no room.

aiohttp bounds what a request's head may hold and how long a connection may be idle. What it lacks is here: a deadline for a head that
has begun, a bound on the bytes of an unfinished one, a bound on connections, and an end for those whose client does not read.
When all places are taken, the connection that has waited longest between two requests is closed for the newcomer: a crowd of idle
connections keeps nobody out.
"""

from __future__ import annotations

import asyncio
import fcntl
import termios
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import structlog
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from mesh.errors import HeadersTooLarge, InvalidRequest, MeshError, NoRoom, SlowRequest
from proxy.respond import error_response, status_of

log = structlog.get_logger(__name__)

TICK_S = 0.5
UNREAD_S = 60.0
"""A client that takes not a byte of its answer for so long is given up."""
UNREAD_EVERY = 20
"""Ticks between two looks at what clients have not read."""
SLICE = 500
"""Connections looked at before everything else gets a turn."""
TRIES = 256
"""Busy connections passed over, at most, in the search for an idle one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """``per_address`` 0: no limit of its own. ``head_s`` runs from the first byte of a request's head to its last."""

    total: int
    per_address: int
    head_s: float
    head_bytes: int


class Connection(RequestHandler):
    """aiohttp's protocol for one client connection, within limits, answering in OpenAI's shape."""

    __slots__ = ("_connections", "_head_bytes", "address", "unread")

    def __init__(self, connections: Connections, server: web.Server, **settings: Any) -> None:
        super().__init__(server, **settings)
        self._connections = connections
        self._head_bytes = 0
        self.address = ""
        self.unread = (0, 0.0)
        """Bytes that wait for the client, and since when there have been so many."""

    @property
    def is_idle(self) -> bool:
        """Whether no whole request has come that is not answered."""
        return self._waiter is not None and not self._waiter.done()

    @property
    def has_unread(self) -> bool:
        """Whether bytes have arrived that this process has yet to read."""
        if self.transport is None or self.transport.is_closing():
            return False
        count = array("i", [0])
        fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.FIONREAD, count)
        return count[0] > 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.address = peer[0] if peer else ""
        if not self._connections.enter(self):
            self.refuse(NoRoom())
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waiter = self._waiter
        if (not waiter.done()) if waiter is not None else (not self._request_count):
            self._head_bytes += len(data)
            self._connections.awaits_head(self, self._head_bytes)
        elif self._head_bytes:
            self._head_bytes = 0
            self._connections.has_head(self)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Said by every body that is read; aiohttp then has the parser look again, whether or not reading was paused."""
        if self._reading_paused or self._buffer_paused:
            super().resume_reading(resume_parser)

    def give_up(self, error: MeshError) -> None:
        """Answer a head that will not be waited for, and close."""
        if self.is_idle:
            self._messages.append((_ErrInfo(status=status_of(error)[0], exc=error, message=error.message), EMPTY_PAYLOAD))
            cast("asyncio.Future[None]", self._waiter).set_result(None)

    def refuse(self, error: MeshError) -> None:
        """Say why, to somebody who has not been heard."""
        response = error_response(error, request_id="req_unparsed")
        body = cast(bytes, response.body)
        head = {**response.headers, "Content-Length": str(len(body)), "Connection": "close"}
        lines = [f"HTTP/1.1 {response.status} {response.reason}", *(f"{name}: {value}" for name, value in head.items())]
        if self.transport is not None:
            self.transport.write("\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        error: MeshError
        if isinstance(exc, MeshError):
            error = exc
        elif isinstance(exc, LineTooLong) or message == "Too many headers received":
            error = HeadersTooLarge()
        elif status < 500:
            error = InvalidRequest("This is not a valid HTTP request")
        else:
            log.error("http.failed", error=type(exc).__name__ if exc else None)
            error = MeshError("The proxy failed to handle this request")
        response = error_response(error, request_id="req_unparsed")
        response.force_close()
        return response


class Connections:
    """All connections of one listening proxy. ``sweep`` is a task for the life of the process."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self._open: dict[Connection, None] = {}
        self._by_address: Counter[str] = Counter()
        self._heads: dict[Connection, float] = {}
        """Those in the middle of a head: when it must be there. All have the same time, so the first is due first."""
        self.refused = 0
        self.evicted = 0
        self.slow = 0

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: Connection) -> bool:
        """Whether there is room; if need be, an idle one makes it."""
        limits = self._limits
        if limits.per_address and self._by_address[connection.address] >= limits.per_address:
            self.refused += 1
            return False
        if len(self._open) >= limits.total and not self._evict():
            self.refused += 1
            return False
        self._open[connection] = None
        self._by_address[connection.address] += 1
        return True

    def leave(self, connection: Connection) -> None:
        if connection in self._open:
            del self._open[connection]
            self._heads.pop(connection, None)
            self._by_address[connection.address] -= 1
            if not self._by_address[connection.address]:
                del self._by_address[connection.address]

    def awaits_head(self, connection: Connection, size: int) -> None:
        """A piece of a head came and it is still not whole; ``size`` is what has come of it."""
        if size > self._limits.head_bytes:
            connection.give_up(HeadersTooLarge())
        elif connection not in self._heads and connection in self._open:
            self._heads[connection] = asyncio.get_running_loop().time() + self._limits.head_s

    def has_head(self, connection: Connection) -> None:
        self._heads.pop(connection, None)

    def close_idle(self) -> None:
        """Close those on which nothing is being asked, nor has just been: bytes that wait in the kernel are a request to be answered."""
        for connection in list(self._open):
            if connection.is_idle and not connection.has_unread:
                connection.force_close()  # `close` would end the reader and leave the connection open

    def _evict(self) -> bool:
        for connection in list(_first(self._open, TRIES)):
            if connection.is_idle:
                self.leave(connection)
                self.evicted += 1
                connection.force_close()
                return True
            del self._open[connection]
            self._open[connection] = None  # busy: to the end of the queue
        return False

    async def sweep(self) -> None:
        """End what takes too long. Never returns."""
        loop, tick = asyncio.get_running_loop(), 0
        while True:
            await asyncio.sleep(TICK_S)
            self._end_slow_heads(loop.time())
            tick += 1
            if tick % UNREAD_EVERY == 0:
                await self._end_unread(loop)

    def _end_slow_heads(self, now: float) -> None:
        due = []
        for connection, deadline in self._heads.items():
            if deadline > now:
                break
            due.append(connection)
        for connection in due:
            del self._heads[connection]
            self.slow += 1
            connection.give_up(SlowRequest(f"The head of the request did not arrive within {self._limits.head_s:g} s"))

    async def _end_unread(self, loop: asyncio.AbstractEventLoop) -> None:
        for number, connection in enumerate(list(self._open)):
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
            transport = connection.transport
            size = transport.get_write_buffer_size() if transport is not None else 0
            if not size or size != connection.unread[0]:
                connection.unread = (size, loop.time())
            elif loop.time() - connection.unread[1] > UNREAD_S and transport is not None:
                self.slow += 1
                transport.abort()


class ConnectionServer(web.Server):
    """aiohttp's low-level server, making `Connection`."""

    def __init__(self, connections: Connections, handler: Any, **settings: Any) -> None:
        super().__init__(handler, **settings)
        self._within = connections

    def __call__(self) -> RequestHandler:
        return Connection(self._within, self, loop=self._loop, **self._kwargs)


def _first(items: dict[Connection, None], count: int) -> Any:
    return (item for _, item in zip(range(count), items, strict=False))
