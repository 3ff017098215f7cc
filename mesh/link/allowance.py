"""What a peer may send that costs it nothing: frames that no credit bounds. Pure.

A node that is enrolled may still be malicious. Bytes of answers and bodies are bounded by credit; what is bounded here is everything else:
control frames, streams opened and cancelled again, and what still comes on streams that this side has closed.
"""

from __future__ import annotations

from mesh.errors import ProtocolError
from mesh.link.frames import Frame

BURST = 200_000.0
PER_S = 100_000.0
"""An honest proxy spends seven or eight for a request and a worker as many, and one core passes on 5,000 requests a second and more, all
to one worker if there is but one: 40,000 a second. All the 4,096 streams of a link cancelled at once are a twelfth of the burst."""
COSTS: dict[int, float] = {Frame.OPEN: 4.0, Frame.CANCEL: 4.0, Frame.LOAD: 4.0, Frame.RECORD: 100.0, Frame.HELLO: 100.0}
"""By what they make this side do; all others cost 1. A record's signature takes as long to check as a hundred frames to read."""
BYTES = 256
"""So many bytes of payload cost 1 more."""
LATE_BYTES = 512 * 1024
"""A stream that this side closes may still bring what its peer had credit for, with the frames' own trappings."""


class Allowance:
    """One peer's, over one link. ``now`` is monotonic seconds."""

    __slots__ = ("_at", "_late", "_left")

    def __init__(self, now: float) -> None:
        self._left = BURST
        self._at = now
        self._late = 0

    def spend(self, kind: int, size: int) -> bool:
        """A frame that costs came; False if `refill` must be called."""
        self._left -= COSTS.get(kind, 1.0) + size // BYTES
        return self._left >= 0

    def refill(self, now: float) -> None:
        """Raises `ProtocolError` if the peer has sent more than any honest one."""
        self._left = min(BURST, self._left + (now - self._at) * PER_S)
        self._at = now
        if self._left < 0:
            raise ProtocolError("more control frames than an honest peer sends")

    def closed(self) -> None:
        """This side closed a stream whose peer may not know it yet."""
        self._late += LATE_BYTES

    def spend_late(self, size: int) -> None:
        """Bytes came on a stream that is closed. Raises `ProtocolError` if they cannot have been under way."""
        self._late -= size
        if self._late < 0:
            raise ProtocolError("DATA on streams that are over")
