"""Clocks that stand still until a test moves them."""

from __future__ import annotations

import asyncio


class StoppedClock:
    """Implements `mesh.clock.Clock`. ``sleep`` moves the time on by itself and notes for how long it was asked."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    async def sleep(self, delay_s: float) -> None:
        self.slept.append(delay_s)
        self.now += delay_s
        await asyncio.sleep(0)
