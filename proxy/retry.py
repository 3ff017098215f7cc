"""When to try again, and where. Pure.

A request that has not given its client a byte may be tried on another worker; one that has may not. A client's own mistake is never
tried again, and never held against a worker.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.errors import MeshError, Overloaded, UpstreamTimeout, WorkerError


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """``failures`` attempts may fail before the client is told; being turned away by a full worker does not count as one.

    After ``refusals`` full workers the mesh counts as full: asking hundreds more would only add to the load.
    """

    failures: int = 3
    refusals: int = 8

    def again(self, error: MeshError, *, failed: int, refused: int = 0, started: bool) -> bool:
        """Whether to try elsewhere after ``error``; ``failed`` and ``refused`` count it."""
        if started:
            return False
        if isinstance(error, Overloaded):
            return refused < self.refusals
        if isinstance(error, UpstreamTimeout):
            return False  # the client has waited long enough
        return isinstance(error, WorkerError) and failed < self.failures


def counts_against_worker(error: MeshError) -> bool:
    """Whether an error tells something bad about the worker that answered with it."""
    return isinstance(error, WorkerError)
