"""Asking another node for its receipts, over the link the two have: a stream with the task ``receipts``, one page each.

Only proxies ask: workers and proxies answer them, and TLS says who it is that answers. A proxy passes a question on to a worker that it is
linked with and the asker is not. Who among people may see which receipts is decided by the proxy they ask, before it asks others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgpack

from mesh.claims import read_bool, read_bytes, read_int, read_str
from mesh.errors import InvalidRequest, MalformedEnvelope, ProtocolError
from mesh.ledger import PAGE_BYTES, PAGE_RECEIPTS, START, Ledger, Order, Page, Query
from mesh.link import questions
from mesh.link.link import Link
from mesh.link.questions import Questions
from mesh.receipts import MAX_PROOF_BYTES

TASK = "receipts"
ANSWERS_AT_ONCE = 16
_FAR = 1 << 62


def encode_query(query: Query, node: bytes = b"") -> dict[str, Any]:
    """The fields of an OPEN. ``node``: whose receipts, where it is not the node that is asked."""
    fields: dict[str, Any] = {"id": "receipts", "task": TASK, "size": 0, "since": query.since, "until": query.until}
    if query.after != START:
        fields["after"] = list(query.after)
    if query.project is not None:
        fields["only"] = query.project
    if query.key is not None:
        fields["key"] = query.key
    if query.written is not None:
        fields["written"] = query.written
    if query.prove:
        fields["prove"] = query.prove
    if node:
        fields["node"] = node
    return fields


def parse_query(fields: Mapping[str, Any]) -> tuple[Query, bytes]:
    """Raises `ProtocolError`."""
    try:
        after: Order = START
        if "after" in fields:
            told = fields["after"]
            if not isinstance(told, list | tuple) or len(told) != 3:
                raise MalformedEnvelope("'after' must be a moment, an id and an attempt")
            named = dict(zip(("at", "id", "n"), told, strict=True))
            after = (read_int(named, "at"), read_str(named, "id", max_len=64), read_int(named, "n"))
        query = Query(
            since=read_int(fields, "since", default=0),
            until=read_int(fields, "until", default=_FAR),
            after=after,
            project=read_str(fields, "only", max_len=64) if "only" in fields else None,
            key=read_bytes(fields, "key", size=8) if "key" in fields else None,
            written=read_int(fields, "written") if "written" in fields else None,
            prove=read_str(fields, "prove", default="", max_len=64),
        )
        return query, read_bytes(fields, "node", size=32) if "node" in fields else b""
    except MalformedEnvelope as error:
        raise ProtocolError(f"bad question for receipts: {error.message}") from None


def encode_page(receipts: Iterable[bytes]) -> bytes:
    """Receipts one after the other, each a msgpack bin."""
    packer = msgpack.Packer(use_bin_type=True)
    return b"".join(packer.pack(receipt) for receipt in receipts)


def parse_page(data: bytes) -> tuple[bytes, ...]:
    """Raises `ProtocolError`."""
    if len(data) > PAGE_BYTES + PAGE_RECEIPTS * 8:
        raise ProtocolError("a page of receipts that is too large")
    unpacker = msgpack.Unpacker(None, max_buffer_size=len(data) or 1, max_bin_len=MAX_PROOF_BYTES, max_str_len=0, max_array_len=0)
    try:
        unpacker.feed(data)
        receipts = tuple(unpacker)
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a page that is none ({type(error).__name__})") from None
    if unpacker.tell() != len(data) or not all(isinstance(receipt, bytes) for receipt in receipts):
        raise ProtocolError("a page that is none")
    return receipts


def _page(data: bytes, trailer: Mapping[str, Any]) -> Page:
    """Raises `ProtocolError`."""
    try:
        more, last = read_bool(trailer, "more"), read_int(trailer, "last", default=0)
    except MalformedEnvelope as error:
        raise ProtocolError(f"bad end of a page: {error.message}") from None
    return Page(receipts=parse_page(data), more=more, last=last)


async def ask(link: Link, query: Query, *, node: bytes = b"") -> Page:
    """A page of a peer's receipts, or of those of a ``node`` that the peer is linked with. Raises a `MeshError`."""
    return _page(*await questions.ask(link, encode_query(query, node), about=TASK))


class Books:
    """Answers such questions. ``link_of`` finds the link to a node that questions may be passed on to."""

    def __init__(self, ledger: Ledger, *, link_of: Callable[[bytes], Link | None] = lambda node: None) -> None:
        self._ledger = ledger
        self._link_of = link_of
        self.questions = Questions(self._answer, about=TASK, at_once=ANSWERS_AT_ONCE)
        self.open, self.stop = self.questions.open, self.questions.stop

    async def _answer(self, head: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        page = await self.page(*parse_query(head))
        return encode_page(page.receipts), {"more": page.more, "last": page.last}

    async def page(self, query: Query, node: bytes = b"") -> Page:
        """This node's own, or a linked one's. Raises a `MeshError`."""
        if not node:
            return await self._ledger.page(query)
        link = self._link_of(node)
        if link is None:
            raise InvalidRequest("this node is not linked with the one asked for")
        return await ask(link, query)
