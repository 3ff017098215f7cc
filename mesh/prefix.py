"""Prefixes of prompts as chains of short hashes: what an engine may still have in its KV cache, said in few bytes. Pure.

A proxy cuts the beginning of a prompt's text into blocks and hashes everything up to each block's end. Two prompts that begin
alike have chains that begin alike, and how far the chains agree says how much of the one's computed prefix serves the other. Proxies send
the chain along with a request; workers tell every proxy which hashes they hold (the PREFIX frame). Hashes stand for text, never for
tokens: no tokenizer is needed, and a block's length in tokens follows from what the engine counted.

Blocks grow with depth: 512 bytes (about 128 tokens) over the first 32 KiB, then twice as long after every 64 blocks. What is shared is so
known to within a few percent at any depth, a chain has at most 256 hashes (2 KiB in OPEN), and no more than the first 480 KiB of a
prompt are ever looked at: about 0.4 ms of hashing, whatever the body's size.

512 bytes because engines share whole pages of 16 tokens and up, so that finer blocks would promise little more, and because one
hash (0.6 µs, 8 bytes to every proxy) should stand for clearly more prefill than it costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from mesh.claims import read_bool, read_bytes
from mesh.errors import MalformedEnvelope, ProtocolError

BLOCK_BYTES = 512
GROWS_AFTER = 64
MAX_BLOCKS = 256
HASH_BYTES = 8
"""64 bits: with 16 million different blocks in a mesh, one chance in 100,000 that any two of them are taken for each other."""

SIZES = tuple(BLOCK_BYTES << at // GROWS_AFTER for at in range(MAX_BLOCKS))
"""The length of each block in bytes of text."""
ENDS = tuple(accumulate(SIZES))
"""Where each block ends."""
MAX_TEXT_BYTES = ENDS[-1]

MAX_HELD = 16_384
"""Hashes a worker may say it holds: two million tokens and more of KV cache. Bounds what a proxy keeps of one worker to about 3 MB."""
MAX_HASHES_PER_FRAME = 4_096

Chain = tuple[bytes, ...]


def hash_chain(seed: bytes, pieces: Iterable[bytes | bytearray | memoryview]) -> Chain:
    """The chain of a text given in pieces: for each whole block, a hash of ``seed`` and all the text up to its end.

    ``seed`` names what the prefix is computed by: the same text under another model is another prefix.
    """
    state = hashlib.sha256(seed)
    update, digest = state.update, state.digest
    chain: list[bytes] = []
    end, at = ENDS[0], 0
    for piece in pieces:
        view = memoryview(piece)
        begin, size = 0, len(view)
        while at + size - begin >= end:
            update(view[begin : begin + end - at])
            chain.append(digest()[:HASH_BYTES])
            begin, at = begin + end - at, end
            if len(chain) == MAX_BLOCKS:
                return tuple(chain)
            end = ENDS[len(chain)]
        if begin < size:
            update(view[begin:])
            at += size - begin
    return tuple(chain)


def join_chain(chain: Iterable[bytes]) -> bytes:
    """As it travels: one hash after the other."""
    return b"".join(chain)


def split_chain(data: bytes, *, most: int = MAX_BLOCKS) -> Chain:
    """Raises `ProtocolError` if it is no whole number of hashes, or more than ``most``."""
    if len(data) % HASH_BYTES or len(data) > most * HASH_BYTES:
        raise ProtocolError("bad prefix hashes")
    return tuple(data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES))


def text_bytes(blocks: int) -> int:
    """How much text the first ``blocks`` of a chain stand for."""
    return ENDS[blocks - 1] if blocks else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixNews:
    """What a PREFIX frame says. ``anew``: forget everything told before; then ``removed`` are gone, then ``added`` are held."""

    anew: bool = False
    added: Chain = ()
    removed: Chain = ()


def encode_news(news: PrefixNews) -> dict[str, Any]:
    """The fields of a PREFIX frame."""
    fields: dict[str, Any] = {"new": news.anew, "add": join_chain(news.added), "del": join_chain(news.removed)}
    return {name: value for name, value in fields.items() if value}


def parse_news(fields: Mapping[str, Any]) -> PrefixNews:
    """Raises `ProtocolError`."""
    most_bytes = MAX_HASHES_PER_FRAME * HASH_BYTES
    try:
        added = read_bytes(fields, "add", max_len=most_bytes) if "add" in fields else b""
        removed = read_bytes(fields, "del", max_len=most_bytes) if "del" in fields else b""
        anew = read_bool(fields, "new", default=False)
    except MalformedEnvelope as error:
        raise ProtocolError(f"bad PREFIX: {error.message}") from None
    return PrefixNews(
        anew=anew, added=split_chain(added, most=MAX_HASHES_PER_FRAME), removed=split_chain(removed, most=MAX_HASHES_PER_FRAME)
    )


def news_frames(added: Sequence[bytes], removed: Sequence[bytes], *, anew: bool = False) -> Iterable[PrefixNews]:
    """A change cut into frames of bounded size. A dump is ``anew`` in its first frame, which may be empty."""
    step = MAX_HASHES_PER_FRAME
    for at in range(0, max(len(added), len(removed), 1 if anew else 0), step):
        yield PrefixNews(anew=anew and at == 0, added=tuple(added[at : at + step]), removed=tuple(removed[at : at + step]))
