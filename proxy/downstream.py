"""The client's side of an answer: bytes from the link straight to the client's transport.

The proxy frames the chunks itself and counts the bytes of sized answers, so a worker can never put a second response, or half a one, into
a client's connection. A broken answer is never ended cleanly: a stream gets an error event and no last chunk, a sized answer a
closed connection.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from mesh.errors import MeshError, ProtocolError
from proxy.respond import error_event

_CONTENT_TYPE = re.compile(r"[a-z]+/[a-z0-9.+-]+(; ?charset=[A-Za-z0-9-]+)?")
_EVENT_STREAM = "text/event-stream"
_USUAL = (_EVENT_STREAM, "application/json")
LINGER_S = 30.0
"""How long a client may take to read the end of an answer that was broken off, before its connection is cut."""


class Downstream:
    """One client waiting for one answer. Nothing is written until `start`; after that only this object writes."""

    __slots__ = (
        "_chunked",
        "_head",
        "_keep_alive",
        "_length",
        "_sent",
        "_stream",
        "_wants_keep_alive",
        "pieces",
        "request",
        "started",
        "transport",
    )

    def __init__(self, request: web.BaseRequest, transport: asyncio.Transport, *, keep_alive: bool) -> None:
        self.request = request
        self.transport = transport
        self.started = False
        self._wants_keep_alive = self._keep_alive = keep_alive
        self._chunked = False
        self._stream = False
        self._length: int | None = None
        self._sent = 0
        self.pieces = 0
        """Pieces of the body handed to the client so far: of a stream, about one a token."""
        self._head = b""

    @property
    def is_stream(self) -> bool:
        """Whether the answer is one of events, and not a whole."""
        return self._stream

    @property
    def bytes_sent(self) -> int:
        """Body bytes handed to the client so far."""
        return self._sent

    def prepare(self, head: Mapping[str, Any], headers: str) -> None:
        """Take the worker's HEAD: ``status`` (200), ``type`` and, unless it is a stream of events, ``length``. Raises `ProtocolError`.

        ``headers`` are lines of the response's head, each with its end. Nothing is written yet; the head leaves with the first byte of
        the body.
        """
        status, content_type, length = head.get("status"), head.get("type"), head.get("length")
        if self._head or self.started:
            raise ProtocolError("a second HEAD")
        if status != 200 or type(status) is not int:
            # Not even 204: an answer that has no body by its status, but is followed by one, would be read as the next answer.
            raise ProtocolError("HEAD with a status other than 200")
        if content_type not in _USUAL and (
            not isinstance(content_type, str) or len(content_type) > 128 or _CONTENT_TYPE.fullmatch(content_type) is None
        ):
            raise ProtocolError("HEAD with a bad content type")
        self._stream = content_type.startswith(_EVENT_STREAM)
        if self._stream != (length is None) or (length is not None and (type(length) is not int or length < 0)):
            # A stream that breaks can say so in-band; anything else must be seen to be too short.
            raise ProtocolError("HEAD with a bad length")
        self._length = length
        http_1_1 = self.request.version >= (1, 1)
        told = ""
        if length is not None:
            told = f"Content-Length: {length}\r\n"
        elif http_1_1:
            self._chunked = True
            told = "Transfer-Encoding: chunked\r\n"
        else:
            self._keep_alive = False
        if self._stream:
            told += "Cache-Control: no-cache\r\n"
        if not self._keep_alive:
            told += "Connection: close\r\n"
        elif not http_1_1:
            told += "Connection: keep-alive\r\n"
        self._head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n{told}{headers}\r\n".encode("ascii")

    def write(self, data: bytes) -> None:
        """Pass on body bytes. Raises `ProtocolError` beyond the announced length."""
        self._sent += len(data)
        self.pieces += 1
        if self._length is not None and self._sent > self._length:
            raise ProtocolError("more bytes than HEAD announced")
        if self._chunked and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if not self.started:
            data = self._start() + data
        self.transport.write(data)

    def finish(self) -> None:
        """The answer is complete. Raises `ProtocolError` if it is not."""
        if not self._head:
            raise ProtocolError("END before HEAD")
        if self._length is not None and self._sent != self._length:
            raise ProtocolError("fewer bytes than HEAD announced")
        tail = b"0\r\n\r\n" if self._chunked else b""
        if not self.started:
            tail = self._start() + tail
        if tail and not self.transport.is_closing():
            self.transport.write(tail)

    def break_off(self, error: MeshError) -> None:
        """The answer will not be completed and its beginning is gone already: say so, and end the connection uncleanly."""
        self._keep_alive = False
        if self._stream and not self.transport.is_closing():
            event = error_event(error)
            self.transport.write(b"%x\r\n%b\r\n" % (len(event), event) if self._chunked else event)
        self.transport.close()
        asyncio.get_running_loop().call_later(LINGER_S, self.transport.abort)

    def forget_head(self) -> None:
        """A failed attempt's HEAD is dropped; the next attempt brings its own."""
        self._head, self._chunked, self._stream, self._length, self._sent = b"", False, False, None, 0
        self._keep_alive = self._wants_keep_alive

    def response(self) -> web.StreamResponse:
        """What the HTTP server is given once everything has been written."""
        return _KEEP if self._keep_alive else _CLOSE

    def _start(self) -> bytes:
        if not self._head:
            raise ProtocolError("DATA before HEAD")
        self.started = True
        return self._head


class _Written(web.StreamResponse):
    """An answer whose bytes have left already: the server only asks it whether to keep the connection."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._keep = keep_alive

    @property
    def keep_alive(self) -> bool:
        return self._keep

    async def prepare(self, request: web.BaseRequest) -> None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


_KEEP, _CLOSE = _Written(keep_alive=True), _Written(keep_alive=False)
"""They say nothing but whether to keep the connection, so two are enough for everybody."""
