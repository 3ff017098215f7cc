"""Which workers hold the beginning of a prompt: what they told over their links, and what this proxy has just sent them. Pure.

One table for all workers: a hash leads to a number with a bit for each worker that holds it. Following a prompt's chain through it finds
how far every worker agrees at once, in as many steps as the chain has blocks, whether there are two workers or five hundred.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from mesh.errors import ProtocolError
from mesh.prefix import MAX_HELD, Chain, PrefixNews

HOPE_S = 5.0
"""A worker tells what it holds within about 0.1 s of getting a request. What it has not confirmed by then, it did not take."""
MAX_HOPED = 4_096
NEWS_BURST = 8 * MAX_HELD
NEWS_PER_S = 2 * MAX_HELD
"""More hashes than these from one worker, and its link is ended: an honest one turns its whole cache over in minutes."""

W = TypeVar("W")


class _Told:
    """One worker's part of the table."""

    __slots__ = ("allowance", "bit", "hashes", "heard_at", "hoped")

    def __init__(self, bit: int, now: float) -> None:
        self.bit = bit
        self.hashes: set[bytes] = set()
        self.hoped: dict[bytes, float] = {}
        self.allowance = float(NEWS_BURST)
        self.heard_at = now


class PrefixIndex(Generic[W]):
    """Workers are whatever its user calls them, as long as they can be dictionary keys. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._masks: dict[bytes, int] = {}
        self._told: dict[W, _Told] = {}
        self._workers: list[W | None] = []

    def __len__(self) -> int:
        """How many different hashes are known."""
        return len(self._masks)

    def join(self, worker: W, *, now: float) -> None:
        """A worker is linked. Nothing is known of it yet."""
        slot = next((slot for slot, taken in enumerate(self._workers) if taken is None), len(self._workers))
        self._workers[slot : slot + 1] = [worker]
        self._told[worker] = _Told(1 << slot, now)

    def leave(self, worker: W) -> None:
        """Its link is gone, and with it what it told."""
        told = self._told.pop(worker, None)
        if told is not None:
            for key in told.hashes.union(told.hoped):
                self._clear(key, told.bit)
            self._workers[told.bit.bit_length() - 1] = None

    def held_by(self, worker: W) -> set[bytes]:
        """What a worker told it holds."""
        told = self._told.get(worker)
        return set(told.hashes) if told is not None else set()

    def take(self, worker: W, news: PrefixNews, *, now: float) -> None:
        """A worker's news. Raises `ProtocolError` if it tells more, or more often, than any honest worker."""
        told = self._told.get(worker)
        if told is None:
            return
        told.allowance = min(NEWS_BURST, told.allowance + (now - told.heard_at) * NEWS_PER_S) - len(news.added) - len(news.removed) - 1
        told.heard_at = now
        if told.allowance < 0:
            raise ProtocolError("PREFIX frames faster than any cache changes")
        self._expire(told, now)
        for key in told.hashes.copy() if news.anew else news.removed:
            told.hashes.discard(key)
            if key not in told.hoped:
                self._clear(key, told.bit)
        for key in news.added:
            told.hoped.pop(key, None)
            told.hashes.add(key)
            self._masks[key] = self._masks.get(key, 0) | told.bit
        if len(told.hashes) > MAX_HELD:
            raise ProtocolError(f"more than {MAX_HELD} prefix hashes held")

    def hope(self, worker: W, chain: Chain, *, now: float) -> None:
        """A prompt was sent to a worker: it will hold it, though it has not said so yet."""
        told = self._told.get(worker)
        if told is None:
            return
        self._expire(told, now)
        for key in chain:
            if key not in told.hashes and (key in told.hoped or len(told.hoped) < MAX_HOPED):
                told.hoped.pop(key, None)  # to the end: the oldest is first
                told.hoped[key] = now + HOPE_S
                self._masks[key] = self._masks.get(key, 0) | told.bit

    def doubt(self, worker: W, chain: Chain) -> None:
        """A prompt did not get there after all."""
        told = self._told.get(worker)
        if told is None:
            return
        for key in chain:
            if told.hoped.pop(key, None) is not None and key not in told.hashes:
                self._clear(key, told.bit)

    def find(self, chain: Chain) -> dict[W, int]:
        """How many leading blocks of a prompt each worker holds; workers that hold none are left out."""
        masks = self._masks
        found: dict[W, int] = {}
        alive = masks.get(chain[0], 0) if chain else 0
        for depth in range(1, len(chain)):
            held = masks.get(chain[depth], 0) & alive
            if held != alive:
                self._name(alive & ~held, depth, found)
                alive = held
                if not held:
                    return found
        self._name(alive, len(chain), found)
        return found

    def _name(self, bits: int, depth: int, found: dict[W, int]) -> None:
        while bits:
            low = bits & -bits
            worker = self._workers[low.bit_length() - 1]
            if worker is not None:
                found[worker] = depth
            bits ^= low

    def _expire(self, told: _Told, now: float) -> None:
        while told.hoped:
            key = next(iter(told.hoped))
            if told.hoped[key] > now:
                return
            del told.hoped[key]
            if key not in told.hashes:
                self._clear(key, told.bit)

    def _clear(self, key: bytes, bit: int) -> None:
        mask = self._masks.get(key, 0) & ~bit
        if mask:
            self._masks[key] = mask
        else:
            self._masks.pop(key, None)
