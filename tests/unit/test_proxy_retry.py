"""When a request is tried elsewhere: before the first byte, within the budget, and never a client's own mistake."""

from __future__ import annotations

import pytest

from mesh.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    EngineUnavailable,
    InvalidRequest,
    MeshError,
    ModelNotFound,
    NotResumed,
    NoWorker,
    Overloaded,
    ProtocolError,
    RequestError,
    UpstreamTimeout,
    WorkerError,
    WorkerLost,
)
from proxy.respond import status_of
from proxy.retry import FLOOR, WINDOW_S, RetryBudget, RetryPolicy, counts_against_worker, spends

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


# -- the budget


def retries(budget: RetryBudget, *, now: float, most: int = 10_000) -> int:
    return sum(budget.take(now) for _ in range(most))


def test_a_fifth_of_the_requests_may_be_tried_again() -> None:
    budget = RetryBudget(0.2)
    for _ in range(1_000):
        budget.request(5.5)
    assert retries(budget, now=5.9) == 200
    assert budget.refused == 10_000 - 200


def test_a_few_are_always_allowed_and_come_back_with_time() -> None:
    budget = RetryBudget(0.2)
    assert retries(budget, now=100.0) == FLOOR
    assert retries(budget, now=100.0 + WINDOW_S - 1) == 0
    assert retries(budget, now=100.0 + WINDOW_S) == FLOOR
    assert retries(budget, now=1e9) == FLOOR


def test_what_is_long_ago_does_not_count() -> None:
    budget = RetryBudget(0.5)
    for second in range(20):
        for _ in range(100):
            budget.request(float(second))
    assert retries(budget, now=19.0) == 500
    for second in range(20, 30):
        budget.request(float(second))
        assert retries(budget, now=float(second)) == (0 if second < 29 else FLOOR)


def test_budget_of_nothing_still_allows_a_few_and_a_clock_that_stands_does_no_harm() -> None:
    budget = RetryBudget(0.0)
    budget.request(50.0)
    budget.request(49.0)
    assert retries(budget, now=49.0) == FLOOR


def test_moving_from_a_dead_worker_costs_nothing() -> None:
    assert not spends(WorkerLost("x"))
    assert spends(EngineUnavailable("x"))
    assert spends(Overloaded("x"))


def test_deadline_is_final_and_nobodys_fault() -> None:
    assert not POLICY.again(DeadlineExceeded(), failed=0, started=False)
    assert not counts_against_worker(DeadlineExceeded())
    assert status_of(DeadlineExceeded())[0] == 504


def test_stream_may_be_offered_to_a_few_others_and_to_more_that_are_only_full() -> None:
    offered = [failed for failed in range(10) if POLICY.moves_on(NotResumed("x"), failed=failed, refused=0)]
    assert offered == list(range(POLICY.moves))
    full = [refused for refused in range(20) if POLICY.moves_on(Overloaded("x"), failed=9, refused=refused)]
    assert full == list(range(POLICY.refusals))
    assert not counts_against_worker(NotResumed("x")), "not being able to go on exactly is no failure"
