"""What can be told of a stream's trail without going on with it: how many tokens it holds. Pure. The format is in PROTOCOL.md.

A proxy asks for the tokens of a stream that lost its worker, and so the worker's own count of what the client has got.
"""

from __future__ import annotations

import re

BEGIN, GAP, FINISH, USAGE, DONE, FIXED, CUT, EVENT = 0, 1, 2, 3, 4, 5, 6, 16
"""What a record begins with; an event with `EVENT` and its characters on top."""
MAX_GAP = 4096
MOST_NUMBER_BYTES = 5
_TOKEN_BYTES = 4
_USUAL = re.compile(rb"(?:[\x10-\x7f]\x01[\x00-\xff]{4})*+")
"""Events of one token and few characters, one after the other: nearly all of a trail."""
_USUAL_BYTES = 6
_MOST_UNUSUAL = 5_000
"""Of a trail with more other records a worker may say what it likes: reading them holds everybody up."""


def count_tokens(trail: bytes | bytearray, since: int = 0) -> int | None:
    """How many tokens there are after the first ``since`` bytes; None of a trail that does not tell."""
    at, count = since or 1, 0
    try:
        for _ in range(_MOST_UNUSUAL):
            usual = _USUAL.match(trail, at)
            assert usual is not None
            count += (usual.end() - at) // _USUAL_BYTES
            at = usual.end()
            if at == len(trail):
                return count
            tokens, at = _skip(trail, at)
            count += tokens
            if at > len(trail):
                return None
    except (IndexError, ValueError):
        pass
    return None


def _skip(trail: bytes | bytearray, at: int) -> tuple[int, int]:
    """The tokens of the record there, and where the next one begins. Raises `IndexError` or `ValueError` for what is none."""
    kind, at = _number(trail, at)
    if kind >= EVENT:
        tokens, at = _number(trail, at)
        return tokens, at + _TOKEN_BYTES * tokens
    if kind == GAP:
        _, at = _number(trail, at)
        tokens, at = _number(trail, at)
        size, at = _number(trail, at + _TOKEN_BYTES)
        if tokens > MAX_GAP:
            raise ValueError(tokens)
        return tokens, at + size
    if kind in (FINISH, USAGE, DONE):
        return 0, at
    if kind in (BEGIN, CUT):
        number, at = _number(trail, at)
        return 0, at + (number if kind == BEGIN else 0)
    raise ValueError(kind)


def _number(trail: bytes | bytearray, at: int) -> tuple[int, int]:
    """LEB128."""
    value = 0
    for step in range(MOST_NUMBER_BYTES):
        byte = trail[at + step]
        value |= (byte & 127) << 7 * step
        if byte < 128:
            return value, at + step + 1
    raise ValueError(value)
