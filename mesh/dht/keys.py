"""Which keys a record may stand under, and how a key with too many records overflows into sub-keys.

A key holds at most so many records (`DirectoryConfig.shard_size`). Holders keep those whose node ids rank lowest and answer
the rest "full"; those go one level down, to one of eight sub-keys chosen by three bits of their node id. A reader that finds a
key full reads its sub-keys too. So the number of shards follows the number of workers by itself, nobody decides it, and a lie
about it only costs a look-up: a record stays with every holder that accepts it, and a reader descends if anybody says "full".

Shards are numbered level by level: 0; 1-8; 9-72; 73-584; 585-4680; 4681-37448 (what fits the two bytes a key has for them).
"""

from __future__ import annotations

from collections.abc import Iterator

from mesh.records import Record, State, directory_key

FANOUT_BITS = 3
FANOUT = 1 << FANOUT_BITS
MAX_LEVEL = 5


def first_shard(level: int) -> int:
    """The number of a level's first shard: (8^level - 1) / 7."""
    return ((1 << FANOUT_BITS * level) - 1) // (FANOUT - 1)


def shard_of(node_id: bytes, level: int) -> int:
    """The shard a node belongs to at ``level``."""
    return first_shard(level) + (int.from_bytes(node_id[:2]) >> (16 - FANOUT_BITS * level))


def sub_shards(shard: int) -> range:
    """The eight shards under one, numbered."""
    return range(shard * FANOUT + 1, shard * FANOUT + 1 + FANOUT)


def level_of(shard: int) -> int:
    level = 0
    while shard >= first_shard(level + 1):
        level += 1
    return level


def depth_of(records: int, shard_size: int) -> int:
    """The level down to which so many records fill the keys, each of which takes ``shard_size``."""
    return next((level for level in range(MAX_LEVEL) if records <= shard_size * first_shard(level + 1)), MAX_LEVEL)


def rank(node_id: bytes) -> bytes:
    """Who stays when a key is full: the lowest. Other bits of the id than those that choose the shard."""
    return node_id[16:]


def indexes(record: Record) -> Iterator[tuple[str, str]]:
    """The (kind, name) pairs a record is found under: as `mesh.records.record_keys`, before sharding."""
    yield "role", str(record.role)
    if record.state == State.READY:
        for entry in record.models:
            yield "model", entry.name


class AllowedKeys:
    """Every key, at any level, that a record may be stored under: made as far as anybody asks, since most stand at the first level."""

    def __init__(self, record: Record) -> None:
        node_id, names = record.node_id, list(indexes(record))
        self._made: set[bytes] = set()
        self._left = (directory_key(kind, name, shard_of(node_id, level)) for level in range(MAX_LEVEL + 1) for kind, name in names)

    def __contains__(self, key: object) -> bool:
        while key not in self._made:
            made = next(self._left, None)
            if made is None:
                return False
            self._made.add(made)
        return True
