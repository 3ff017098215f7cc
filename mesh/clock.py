"""Time as an argument.

Nothing in the project reads the clock behind its caller's back: whoever needs time is given a `Clock`, so that
the simulator can run hours in seconds and a test can move the wall clock under a running node.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """What code may ask of time. All values are seconds as floats."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back; for intervals."""
        ...

    def wall(self) -> float:
        """Seconds since the Unix epoch; for what is signed and compared between machines."""
        ...

    async def sleep(self, delay_s: float) -> None: ...


class SystemClock:
    """The machine's own clocks and the running loop's sleep."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
