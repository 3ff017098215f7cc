"""Merkle trees over receipts: one signature for many, and a short proof for each. Pure.

The tree of RFC 6962, section 2.1: leaves and inner nodes are hashed apart (0x00 and 0x01), so that no inner node passes for a leaf, and a
list is cut at the largest power of two below its length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256

HASH_BYTES = 32
_LEAF, _INNER = b"\x00", b"\x01"


def leaf_hash(data: bytes) -> bytes:
    """The hash of one entry."""
    return sha256(_LEAF + data).digest()


def leaf_hashes(entries: Iterable[bytes]) -> list[bytes]:
    """Those of many, without a call for each."""
    return [sha256(_LEAF + data).digest() for data in entries]


def root_hash(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes; of an empty list, the hash of nothing."""
    if not leaves:
        return sha256(b"").digest()
    level = list(leaves)
    while len(level) > 1:  # an odd one out moves up as it is, which is the RFC's cut at a power of two, from below
        steps = iter(level)
        paired = [sha256(_INNER + left + right).digest() for left, right in zip(steps, steps, strict=False)]
        level = [*paired, level[-1]] if len(level) % 2 else paired
    return level[0]


def audit_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """What `verify_path` needs beside the leaf: the siblings on its way up, from the bottom. Raises `IndexError`."""
    if not 0 <= index < len(leaves):
        raise IndexError(index)
    path, level = [], list(leaves)
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            path.append(level[sibling])
        paired = [_inner(level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
        level = [*paired, level[-1]] if len(level) % 2 else paired
        index //= 2
    return path


def verify_path(leaf: bytes, index: int, count: int, path: Sequence[bytes], root: bytes) -> bool:
    """Whether ``leaf`` is entry ``index`` of ``count`` under ``root``."""
    if not 0 <= index < count:
        return False
    steps = iter(path)
    found = leaf
    try:
        while count > 1:
            if index ^ 1 < count:
                sibling = next(steps)
                found = _inner(sibling, found) if index % 2 else _inner(found, sibling)
            index, count = index // 2, (count + 1) // 2
    except StopIteration:
        return False
    return found == root and next(steps, None) is None


def _inner(left: bytes, right: bytes) -> bytes:
    return sha256(_INNER + left + right).digest()
