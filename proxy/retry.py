"""When to try again, and where. Pure.

A request that has not given its client a byte may be tried on another worker; of those that have, only a stream that is followed token by
token may move (`proxy.moves`). A client's own mistake is never tried again, and never held against a worker.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.errors import MeshError, Overloaded, UpstreamTimeout, WorkerError, WorkerLost

WINDOW_S = 10
FLOOR = 64
"""Retries that are always allowed in a window: about what one engine has at work when it dies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """``failures`` attempts may fail before the client is told; being turned away by a full worker does not count as one.

    After ``refusals`` full workers the mesh counts as full: asking hundreds more would only add to the load. A stream that has lost its
    worker may fail at ``moves`` others in a row.
    """

    failures: int = 3
    refusals: int = 8
    moves: int = 3

    def again(self, error: MeshError, *, failed: int, refused: int = 0, started: bool) -> bool:
        """Whether to try elsewhere after ``error``; ``failed`` and ``refused`` count it."""
        if started:
            return False
        if isinstance(error, Overloaded):
            return refused < self.refusals
        if isinstance(error, UpstreamTimeout):
            return False  # the client has waited long enough
        return isinstance(error, WorkerError) and failed < self.failures

    def moves_on(self, error: MeshError, *, failed: int, refused: int) -> bool:
        """Whether to offer a stream to another worker; ``failed`` and ``refused`` count those that did not take it since it went on."""
        return refused < self.refusals if isinstance(error, Overloaded) else failed < self.moves


def counts_against_worker(error: MeshError) -> bool:
    """Whether an error tells something bad about the worker that answered with it."""
    return isinstance(error, WorkerError)


def spends(error: MeshError) -> bool:
    """Whether trying again costs the mesh anything: a lost worker does no more work, so moving its requests adds none."""
    return not isinstance(error, WorkerLost)


class RetryBudget:
    """At most ``share`` retries for each request of the last `WINDOW_S` seconds, or `FLOOR` if that is more.

    When everything fails at once, requests then fail early instead of coming back several times over. Times are monotonic seconds.
    """

    __slots__ = ("_requests", "_retries", "_second", "_share", "refused", "retried")

    def __init__(self, share: float) -> None:
        self._share = share
        self._second = 0
        self._requests = [0] * WINDOW_S
        self._retries = [0] * WINDOW_S
        self.refused = self.retried = 0
        """Failed attempts that were not tried elsewhere for want of budget; those that were, also where it cost nothing."""

    def request(self, now: float) -> None:
        """One more request came."""
        if int(now) != self._second:
            self._turn(int(now))
        self._requests[self._second % WINDOW_S] += 1

    def take(self, now: float) -> bool:
        """Whether one more retry is allowed; then it counts."""
        self._turn(int(now))
        if sum(self._retries) >= max(FLOOR, self._share * sum(self._requests)):
            self.refused += 1
            return False
        self._retries[self._second % WINDOW_S] += 1
        return True

    def counts(self) -> dict[str, int]:
        """For people."""
        return {"retried": self.retried, "refused": self.refused}

    def _turn(self, second: int) -> None:
        for passed in range(max(self._second + 1, second - WINDOW_S + 1), second + 1):
            self._requests[passed % WINDOW_S] = self._retries[passed % WINDOW_S] = 0
        self._second = max(second, self._second)
