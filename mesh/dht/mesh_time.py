"""The mesh's own idea of the time.

Every datagram carries its sender's wall clock. The median of what peers show corrects a clock that is off, so that records
of honest nodes whose clocks disagree by half a minute are judged alike everywhere. A minority cannot move a median.
"""

from __future__ import annotations

from collections import OrderedDict
from statistics import median

from mesh.clock import Clock

MAX_SHIFT_S = 90.0
"""Datagrams whose time differs more are refused: two honest clocks, each half a minute off, and a slow path."""
_WRAP = 1 << 32
_MIN_PEERS = 5
_MIN_OFFSET_S = 1.0
_RECOMPUTE_EVERY = 16


class MeshTime:
    """Wall time, corrected once enough peers agree that ours is wrong."""

    def __init__(self, clock: Clock, *, size: int = 64) -> None:
        self._clock = clock
        self._size = size
        self._offsets: OrderedDict[bytes, float] = OrderedDict()
        self._samples = 0
        self.offset_s = 0.0

    def now(self) -> float:
        """Seconds since the epoch as the mesh counts them."""
        return self._clock.wall() + self.offset_s

    def stamp(self) -> int:
        """Our clock in the 32 bits of a datagram: milliseconds, wrapping every 49 days."""
        return int(self._clock.wall() * 1000) % _WRAP

    def shift(self, stamp: int) -> float:
        """By how many seconds the clock that wrote ``stamp`` is ahead of ours."""
        difference = (stamp - self.stamp()) % _WRAP
        return (difference - _WRAP if difference >= _WRAP // 2 else difference) / 1000

    def is_fresh(self, stamp: int) -> bool:
        return abs(self.shift(stamp) - self.offset_s) <= MAX_SHIFT_S

    def offsets(self) -> dict[bytes, float]:
        """By node id, how many seconds each peer's clock was ahead of ours when it last answered."""
        return dict(self._offsets)

    def observe(self, node_id: bytes, stamp: int, rtt_s: float) -> None:
        """A reply showed the peer's clock half a round trip ago."""
        self._offsets[node_id] = self.shift(stamp) + rtt_s / 2
        self._offsets.move_to_end(node_id)
        if len(self._offsets) > self._size:
            self._offsets.popitem(last=False)
        self._samples += 1
        if len(self._offsets) >= _MIN_PEERS and self._samples % _RECOMPUTE_EVERY == 0:
            middle = median(self._offsets.values())
            self.offset_s = middle if abs(middle) >= _MIN_OFFSET_S else 0.0
