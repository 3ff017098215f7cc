"""Request bodies: read within limits of size, time and memory."""

from __future__ import annotations

import asyncio
import codecs

from aiohttp import StreamReader, web

from mesh.errors import BodyTooLarge, InvalidRequest, NoRoom, SlowRequest


class Bodies:
    """Reads bodies, and counts what those that came in pieces hold of this process's memory until they are given back.

    ``most_bytes`` is one body's limit, ``room_bytes`` that of all together, ``patience_s`` how long one may take.
    """

    def __init__(self, *, most_bytes: int, room_bytes: int, patience_s: float) -> None:
        self.held_bytes = 0
        self._most_bytes = most_bytes
        self._room_bytes = room_bytes
        self._patience_s = patience_s

    async def read(self, request: web.BaseRequest) -> bytes | bytearray:
        """The whole body; to be given to `release` when done with. Raises a `RequestError`, or `NoRoom`."""
        headers, limit, content = request.headers, self._most_bytes, request.content
        if "Content-Encoding" in headers and headers["Content-Encoding"].lower() != "identity":
            raise InvalidRequest("Send the body without Content-Encoding")
        if headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
            raise InvalidRequest("Send the body without Transfer-Encoding, or with 'chunked' alone")
        if content.is_eof() and content.exception() is None and content.total_bytes <= limit:
            body = content.read_nowait()  # it came together with the head: the usual case
            if not body and (request.content_length or 0) > limit:
                raise self._too_large()  # so large that the parser takes it for none
            if not body.isascii():
                _check_utf8(codecs.getincrementaldecoder("utf-8")(), body, final=True)
            return body
        if (request.content_length or 0) > limit:
            raise self._too_large()
        if headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(self._patience_s):
                return await self._gather(content)
        except TimeoutError:
            raise SlowRequest(f"The request body did not arrive within {self._patience_s:g} s") from None
        except web.RequestPayloadError:
            raise InvalidRequest("The request body is not valid HTTP") from None

    def release(self, body: bytes | bytearray) -> None:
        """A body is no longer needed."""
        if isinstance(body, bytearray):
            self.held_bytes -= len(body)

    async def _gather(self, content: StreamReader) -> bytearray:
        """A body that comes in pieces, gathered as it comes: joining or copying a large one at the end would stall every stream."""
        body, text = bytearray(), codecs.getincrementaldecoder("utf-8")()
        whole = False
        try:
            while piece := await content.readany():
                body += piece
                self.held_bytes += len(piece)
                if len(body) > self._most_bytes:
                    raise self._too_large()
                if self.held_bytes > self._room_bytes:
                    raise NoRoom("This proxy holds as many request bodies as it may; try another, or again shortly", retry_after_s=2.0)
                if not piece.isascii() or text.getstate()[0]:
                    _check_utf8(text, piece)
            _check_utf8(text, b"", final=True)
            whole = True
            return body
        finally:
            if not whole:
                self.held_bytes -= len(body)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The request body is larger than the {self._most_bytes} bytes allowed here")


def _check_utf8(decoder: codecs.IncrementalDecoder, data: bytes, *, final: bool = False) -> None:
    """Engines refuse, or worse, what is not UTF-8; and the JSON scanner looks into no string that the proxy has no use for."""
    try:
        decoder.decode(data, final)
    except UnicodeDecodeError:
        raise InvalidRequest("The request body is not valid JSON: it is not UTF-8") from None
