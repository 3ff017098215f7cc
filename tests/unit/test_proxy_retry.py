"""When a request is tried elsewhere: before the first byte, within the budget, and never a client's own mistake."""

from __future__ import annotations

import pytest

from mesh.errors import (
    BodyTooLarge,
    EngineUnavailable,
    InvalidRequest,
    MeshError,
    ModelNotFound,
    NoWorker,
    Overloaded,
    ProtocolError,
    RequestError,
    UpstreamTimeout,
    WorkerError,
    WorkerLost,
)
from proxy.respond import status_of
from proxy.retry import RetryPolicy, counts_against_worker

POLICY = RetryPolicy(failures=3)
FAILURES = [WorkerError, WorkerLost, EngineUnavailable, ProtocolError]


@pytest.mark.parametrize("kind", FAILURES)
def test_failed_worker_is_followed_by_another_within_the_budget(kind: type[MeshError]) -> None:
    assert [POLICY.again(kind("x"), failed=failed, started=False) for failed in (1, 2, 3, 4)] == [True, True, False, False]
    assert counts_against_worker(kind("x"))


@pytest.mark.parametrize("kind", [*FAILURES, Overloaded, UpstreamTimeout, InvalidRequest])
def test_nothing_is_tried_again_after_the_first_byte(kind: type[MeshError]) -> None:
    assert not POLICY.again(kind("x"), failed=1, started=True)


@pytest.mark.parametrize("kind", [InvalidRequest, ModelNotFound, BodyTooLarge, RequestError])
def test_clients_mistake_is_never_tried_again_nor_held_against_the_worker(kind: type[MeshError]) -> None:
    assert 400 <= status_of(kind("x"))[0] < 500
    assert not POLICY.again(kind("x"), failed=0, started=False)
    assert not counts_against_worker(kind("x"))


def test_full_worker_is_followed_by_another_without_end_and_is_no_failure() -> None:
    assert POLICY.again(Overloaded("full"), failed=100, started=False)
    assert not counts_against_worker(Overloaded("full"))


def test_timeout_is_not_tried_again_but_held_against_the_worker() -> None:
    assert not POLICY.again(UpstreamTimeout("x"), failed=1, started=False)
    assert counts_against_worker(UpstreamTimeout("x"))


def test_no_worker_is_final() -> None:
    assert not POLICY.again(NoWorker("x"), failed=0, started=False)
    assert not RetryPolicy(failures=1).again(WorkerLost("x"), failed=1, started=False)


def test_a_mesh_full_of_full_workers_is_not_asked_to_the_last() -> None:
    asked = [POLICY.again(Overloaded("full"), failed=0, refused=refused, started=False) for refused in range(1, 12)]
    assert asked == [True] * 7 + [False] * 4
