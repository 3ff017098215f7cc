"""Which workers are trusted: what is evidence, what is proof, and how far suspicion may go. Time is a number here."""

from __future__ import annotations

import pytest

from proxy.health import (
    FAILURES,
    FORGIVEN_S,
    HOLD_FIRST_S,
    HOLD_MOST_S,
    HOLD_SLOW_S,
    Cause,
    Health,
    Standing,
    Watch,
    may_eject,
)


@pytest.fixture
def watch() -> Watch:
    return Watch()


def fleet(count: int) -> list[Health]:
    return [Health() for _ in range(count)]


def fail(watch: Watch, health: Health, group: list[Health], *, now: float, times: int = FAILURES) -> None:
    for _ in range(times):
        watch.failed(health, "engine_unavailable", group, now=now)


def on_trial(watch: Watch, health: Health) -> float:
    """Let its hold-off pass; returns when."""
    assert watch.tick([health], now=health.until)
    assert health.standing is Standing.TRIAL
    return health.until


def test_three_failures_in_a_row_eject_and_two_do_not(watch: Watch) -> None:
    group = fleet(4)
    fail(watch, group[0], group, now=0.0, times=FAILURES - 1)
    assert group[0].in_service
    fail(watch, group[0], group, now=0.0, times=1)
    assert group[0].standing is Standing.EJECTED
    assert not group[0].in_service
    assert "engine_unavailable" in group[0].reason
    assert watch.ejections == {Cause.FAILURES: 1}


def test_success_in_between_starts_the_count_again(watch: Watch) -> None:
    group = fleet(4)
    for _ in range(10):
        fail(watch, group[0], group, now=0.0, times=FAILURES - 1)
        watch.succeeded(group[0], now=0.0)
    assert group[0].standing is Standing.TRUSTED


def test_one_request_at_a_time_is_tried_after_the_hold_off_and_one_success_is_proof(watch: Watch) -> None:
    group = fleet(4)
    fail(watch, group[0], group, now=10.0)
    assert not watch.tick(group, now=10.0 + HOLD_FIRST_S - 0.01)
    assert not group[0].in_service
    now = on_trial(watch, group[0])
    assert group[0].in_service
    group[0].trials = 1
    assert not group[0].in_service, "the next request does not go there too"
    assert watch.succeeded(group[0], now=now)
    assert group[0].standing is Standing.TRUSTED
    assert group[0].reason == ""


def test_failed_trial_doubles_the_hold_off_up_to_a_minute_and_long_trust_forgives(watch: Watch) -> None:
    group = fleet(4)
    fail(watch, group[0], group, now=0.0)
    now, holds = 0.0, [group[0].until]
    for _ in range(8):
        now = on_trial(watch, group[0])
        watch.failed(group[0], "worker_error", group, now=now)
        holds.append(group[0].until - now)
    assert holds[:4] == [1, 2, 4, 8]
    assert holds[-1] == HOLD_MOST_S
    watch.succeeded(group[0], now=on_trial(watch, group[0]))
    fail(watch, group[0], group, now=group[0].until + 5)
    assert group[0].until - (now + HOLD_MOST_S + 5) == HOLD_MOST_S, "soon after: not the first time"
    later = on_trial(watch, group[0])
    watch.succeeded(group[0], now=later)
    fail(watch, group[0], group, now=later + FORGIVEN_S + 1)
    assert group[0].until == later + FORGIVEN_S + 1 + HOLD_FIRST_S


@pytest.mark.parametrize(("workers", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (10, 5)])
def test_at_most_half_are_ejected_and_never_the_last(watch: Watch, workers: int, most: int) -> None:
    group = fleet(workers)
    for health in group:
        fail(watch, health, group, now=0.0, times=20)
    assert sum(health.standing is Standing.EJECTED for health in group) == most
    assert any(health.in_service for health in group)


def test_worker_on_trial_counts_as_out(watch: Watch) -> None:
    group = fleet(2)
    fail(watch, group[0], group, now=0.0)
    on_trial(watch, group[0])
    assert not may_eject(group[1], group)


def test_first_loss_costs_nothing_and_flapping_is_held_off_longer_each_time(watch: Watch) -> None:
    (health,) = fleet(1)
    assert not watch.lost(health, now=0.0)
    assert health.in_service
    holds = []
    for now in range(10, 70, 10):
        watch.lost(health, now=float(now))
        holds.append(health.until - now)
    assert holds == [1, 2, 4, 8, 16, 32]
    assert health.cause is Cause.FLAPPING
    watch.succeeded(health, now=on_trial(watch, health))
    assert health.standing is Standing.TRUSTED


def test_losses_long_apart_are_no_flapping(watch: Watch) -> None:
    (health,) = fleet(1)
    for day in range(5):
        assert not watch.lost(health, now=day * 86400.0)


def stream(health: Health, *, per_s: float, seconds: float = 0.5) -> None:
    health.stream.add(per_s * seconds, seconds)


def run(watch: Watch, group: list[Health], rates: list[float], *, start: float = 0.0, for_s: float = 10.0) -> float | None:
    """Let each stream at its rate; when the first was ejected."""
    now = start
    while now < start + for_s:
        now += 0.5
        for health, rate in zip(group, rates, strict=True):
            if rate >= 0:
                stream(health, per_s=rate)
        watch.judge(group, now=now)
        if group[0].standing is Standing.EJECTED:
            return now - start
    return None


def test_worker_ten_times_slower_than_its_peers_is_ejected_within_seconds(watch: Watch) -> None:
    group = fleet(4)
    took_s = run(watch, group, [100, 1000, 1100, 900])
    assert took_s is not None
    assert took_s <= 4
    assert group[0].cause is Cause.SLOW
    assert "10 times slower" in group[0].reason
    assert group[0].until == took_s + HOLD_SLOW_S


def test_worker_that_slows_down_is_noticed_though_it_was_quick_before(watch: Watch) -> None:
    group = fleet(4)
    assert run(watch, group, [1000, 1000, 1000, 1000], for_s=120) is None
    took_s = run(watch, group, [100, 1000, 1000, 1000], start=120, for_s=60)
    assert took_s is not None
    assert took_s <= 25


def test_worker_slower_than_its_own_past_is_ejected_while_the_others_idle(watch: Watch) -> None:
    group = fleet(2)
    assert run(watch, group, [1000, -1], for_s=60) is None
    assert run(watch, group, [50, -1], start=60, for_s=40) is not None


def test_worker_half_as_fast_is_left_alone(watch: Watch) -> None:
    assert run(watch, fleet(3), [400, 1000, 1000], for_s=60) is None


def test_only_worker_is_never_ejected_for_being_slow(watch: Watch) -> None:
    group = fleet(1)
    run(watch, group, [1000], for_s=60)
    assert run(watch, group, [1], start=60, for_s=60) is None


def test_slow_worker_comes_back_only_once_it_is_quick(watch: Watch) -> None:
    group = fleet(3)
    took_s = run(watch, group, [50, 1000, 1000])
    assert took_s is not None
    now = on_trial(watch, group[0])
    assert not watch.succeeded(group[0], now=now), "an answer alone is no proof of speed"
    again_s = run(watch, group, [50, 1000, 1000], start=now)
    assert again_s is not None, "still slow"
    now = on_trial(watch, group[0])
    run(watch, group, [1000, 1000, 1000], start=now)
    assert group[0].standing is Standing.TRUSTED


def test_late_first_tokens_are_slow_too_but_small_differences_are_not(watch: Watch) -> None:
    late, little = fleet(3), fleet(3)
    for _ in range(5):
        for health in late[1:] + little[1:]:
            health.first.add(0.05, 1)
        late[0].first.add(3.0, 1)
        little[0].first.add(0.9, 1)
    assert watch.judge(late, now=5)
    assert not watch.judge(little, now=5), "ten times, but not a second"


def test_whole_answers_are_compared_by_their_tokens(watch: Watch) -> None:
    group = fleet(3)
    for health in group[1:]:
        health.whole.add(400, 4.0)
    group[0].whole.add(30, 4.0)
    assert watch.judge(group, now=1.0)
    assert group[0].cause is Cause.SLOW


def test_standing_outlives_the_link(watch: Watch) -> None:
    watch.of(b"a").eject(Cause.SLOW, "x", now=0.0)
    assert watch.of(b"a").standing is Standing.EJECTED
    assert watch.of(b"b").standing is Standing.TRUSTED
