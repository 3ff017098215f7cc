"""A document's bytes, page by page: what a holder lists and sends is believed only when the whole of it verifies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from mesh.clock import Clock
from mesh.dht.documents import HISTORY
from mesh.dht.rpc import Reply
from mesh.documents import DIGEST_BYTES, Document
from mesh.envelope import MAX_ENVELOPE_BYTES

PART_FRAME_BYTES = 64
_MAX_REQUESTS = 24
_FETCH_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One version as a holder lists it: unverified until it is fetched."""

    seq: int
    digest: bytes
    issued: float


async def fetch(ask: Callable[[bytes], Awaitable[Reply | None]], clock: Clock, key: bytes, version: Version) -> bytes | None:
    """All of one version from the node that ``ask`` sends a DOC_GET to; parts that were lost are asked for again.

    None if the node is silent, too slow, or sends something else.
    """
    pieces: dict[int, bytes] = {}
    size = 0
    deadline = clock.monotonic() + _FETCH_S
    for _ in range(_MAX_REQUESTS):
        offset = _first_gap(pieces)
        if size and offset >= size:
            return b"".join(pieces[at] for at in sorted(pieces))
        if clock.monotonic() > deadline:
            return None
        reply = await ask(msgpack.packb([key, version.seq, offset]))
        if reply is None:
            return None
        for part in reply.bodies:
            piece = _parse_part(part, version)
            if piece is None:
                return None
            size, at, data = piece
            pieces[at] = data
    return None


def parts_of(document: Document, offset: int, room: int, most: int) -> list[list[Any]]:
    """The bodies of the reply to DOC_GET; one with no bytes if there are none beyond ``offset``."""
    data, size = document.signed, len(document.signed)
    starts = range(offset, size, room)[:most] or range(size, size + 1)
    return [[document.seq, document.digest, size, at, data[at : at + room]] for at in starts]


def parse_list(reply: Reply | None) -> dict[int, Version]:
    """What a holder lists, by seq: one version of each and no more than are kept. What makes no sense is left out."""
    items = reply.bodies[0] if reply is not None and reply.bodies else []
    listed: dict[int, Version] = {}
    for item in items[:HISTORY]:
        if (
            isinstance(item, list)
            and len(item) == 3
            and type(item[0]) is int
            and 0 < item[0] < 2**63
            and isinstance(item[1], bytes)
            and len(item[1]) == DIGEST_BYTES
            and type(item[2]) is int
            and 0 <= item[2] < 2**53
        ):
            listed.setdefault(item[0], Version(seq=item[0], digest=item[1], issued=float(item[2])))
    return listed


def _first_gap(pieces: dict[int, bytes]) -> int:
    at = 0
    while pieces.get(at):
        at += len(pieces[at])
    for start in [start for start in pieces if start > at]:
        del pieces[start]  # pages follow each other from the gap on; what lies beyond comes again
    return at


def _parse_part(part: list[Any], version: Version) -> tuple[int, int, bytes] | None:
    """Size of the whole, offset and bytes of one part; None if it is of another version or makes no sense."""
    if len(part) != 5 or part[0] != version.seq or part[1] != version.digest:
        return None
    _, _, size, at, data = part
    if type(size) is not int or not 0 < size <= MAX_ENVELOPE_BYTES or type(at) is not int or not isinstance(data, bytes):
        return None
    return (size, at, data) if 0 <= at <= size and at + len(data) <= size else None
