"""Counting what happened, and saying so in the log without ever being made to shout."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

import structlog

log = structlog.get_logger(__name__)

_PAUSE_S = 10.0


class Durations:
    """How many of what took how long. ``counts`` has one more entry than `BOUNDS_S`: for what took longer than the last of them."""

    BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

    def __init__(self) -> None:
        self.counts = [0] * (len(self.BOUNDS_S) + 1)
        self.total_s = 0.0

    def observe(self, took_s: float) -> None:
        self.counts[bisect_left(self.BOUNDS_S, took_s)] += 1
        self.total_s += took_s


class Counts:
    """Named counters. A refusal is also logged, at most once in ten seconds per reason."""

    def __init__(self) -> None:
        self.values: Counter[str] = Counter()
        self.lookups = Durations()
        self._logged: dict[str, tuple[float, int]] = {}

    def add(self, name: str, amount: int = 1) -> None:
        self.values[name] += amount

    def refuse(self, reason: str, source: object, *, now: float) -> None:
        """Something from outside was not accepted. ``reason`` comes from our own code, never from the datagram."""
        name = f"refused_{reason}"
        self.values[name] += 1
        at, seen = self._logged.get(reason, (float("-inf"), 0))
        if now - at >= _PAUSE_S:
            self._logged[reason] = (now, self.values[name])
            log.warning("directory.refused", reason=reason, source=str(source), count=self.values[name] - seen)
