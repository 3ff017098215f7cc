"""How much of request bodies the worker holds in memory, all together. Pure bookkeeping.

A body stays until its answer is complete: its engine may have to be asked again. Small ones are not counted, as admission bounds their
number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from mesh.errors import BodyTooLarge, Overloaded

SMALL_BYTES = 64 * 1024


class Room:
    """``owner`` is whoever brings a body (its link). One owner fills at most half, so that a bad one does not keep the others out."""

    def __init__(self, most_bytes: int) -> None:
        self.held_bytes = 0
        self._most_bytes = most_bytes
        self._by_owner: Counter[Hashable] = Counter()

    @contextmanager
    def hold(self, owner: Hashable, size: int) -> Iterator[None]:
        """Room for ``size`` bytes, for the length of a block. Raises `Overloaded`, or `BodyTooLarge` where it never fits."""
        if size <= SMALL_BYTES:
            yield
            return
        if size > self._most_bytes // 2:
            raise BodyTooLarge(f"This worker takes request bodies of up to {self._most_bytes // 2} bytes")
        if self.held_bytes + size > self._most_bytes or self._by_owner[owner] + size > self._most_bytes // 2:
            raise Overloaded("This worker holds as many request bodies as it may", retry_after_s=1.0)
        self.held_bytes += size
        self._by_owner[owner] += size
        try:
            yield
        finally:
            self.held_bytes -= size
            self._by_owner[owner] -= size
            if not self._by_owner[owner]:
                del self._by_owner[owner]
