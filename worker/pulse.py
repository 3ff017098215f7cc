"""Whether the engine makes steps. Pure: what was seen in, verdict out, time as an argument.

A process that runs and answers its health check may compute nothing any more. A long prompt looks the same to whoever waits for its
first token, so the judgement rests on what the engine does for all requests together: bytes of any answer, or counters of its own that
a step moves. Quiet for `patience_s` with work to do means `stuck`: proxies hear it and send nothing more. That is no proof; the engine
is then asked for a token (`Supervisor.doubt`), and only after much longer is it given up.

A quiet that turned out to be work teaches patience, so that an engine with long steps is suspected once and not again.
"""

from __future__ import annotations

from collections.abc import Hashable

PATIENCE_S = 3.0
MOST_PATIENCE_S = 60.0
LEARNS = 1.5
"""The next quiet may last so many times as long as one that ended well."""
DEAF_S = 4.0
"""An engine without work speaks by its health check, once a second."""


class Pulse:
    """One engine's. Whoever reads its answers adds to ``signs``, and keeps count of requests: ``begun`` ones have had a byte, ``held`` ones
    wait for their client and not for the engine."""

    def __init__(self) -> None:
        self.signs = 0
        self.begun = 0
        self.held = 0
        self.stuck = False
        self.halted = False
        """Stuck, and it cannot be otherwise: its process has been stopped."""
        self.quiet_s = 0.0
        """How long it has been quiet that should not be."""
        self.patience_s = PATIENCE_S
        self._since = 0.0
        self._heard_at = 0.0
        self._tells = self._working = False
        self._seen: tuple[int, Hashable, int] = (0, None, 0)

    def reset(self, now: float) -> None:
        """Another life of the engine, or none."""
        self.stuck = self.halted = self._tells = self._working = False
        self._since = self._heard_at = now
        self.quiet_s = 0.0

    def look(self, now: float, *, work: int, steps: Hashable, proofs: int, heard_at: float) -> bool:
        """Judge, a few times a second; returns `stuck`.

        ``work`` requests are at the engine. ``steps`` is anything that differs after a step, None where the engine does not tell;
        ``proofs`` counts the tokens it gave for the asking; ``heard_at`` is when its last health check was good.
        """
        self._tells = self._tells or steps is not None
        seen = (self.signs, self._seen[1] if steps is None else steps, proofs)
        heard = heard_at > self._heard_at
        self._heard_at = max(heard_at, self._heard_at)
        if seen != self._seen:
            self._alive(now)
        elif not self.stuck and (
            (heard and not work) or (work and not self._working) or (work and not self._tells and self.begun <= self.held)
        ):
            self._since = now  # it owes nothing yet
        self._seen, self._working = seen, bool(work)
        self.quiet_s = now - self._since
        self.stuck = self.quiet_s > (self.patience_s if work or self.stuck else DEAF_S)
        return self.stuck

    def _alive(self, now: float) -> None:
        if self.stuck:
            self.patience_s = min(MOST_PATIENCE_S, max(self.patience_s, LEARNS * (now - self._since)))
        self._since = now
