"""Buckets at their owner: rates, bursts, fair shares, budgets and slots, with all of a limit's shares or some."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.limits.buckets import Ask, Bucket, Grant, Kind, fair_share

ALICE, BOB, CAROL = (name.encode() for name in ("alice", "bob", "carol"))
LONG_AGO = -1e6


class Owner:
    """One bucket and its clock."""

    def __init__(self, kind: Kind, limit: float, burst: float = 0.0, *, since: float = LONG_AGO) -> None:
        self.bucket = Bucket(kind, 0.0)
        self.kind, self.limit, self.burst, self.since = kind, limit, burst, since
        self.now = 0.0
        self.fraction = 1.0
        self.used = 0.0

    def ask(self, who: bytes = ALICE, want: float = 0.0, least: float | None = None, **fields: Any) -> Grant:
        fields = {"limit": self.limit, "burst": self.burst} | fields
        ask = Ask(bucket=b"b", kind=self.kind, want=want, least=want if least is None else least, **fields)
        return self.bucket.ask(who, ask, fraction=self.fraction, since=self.since, used=self.used, own=b"me", now=self.now)


# -- fair shares


@given(st.floats(0, 1e6), st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_fair_share_uses_all_there_is_and_gives_nobody_more_than_it_wants(supply: float, demands: list[float]) -> None:
    share = fair_share(supply, demands)
    given_ = [min(demand, share) for demand in demands]
    assert sum(given_) <= supply * (1 + 1e-9) + 1e-6
    if sum(demands) > supply:
        assert sum(given_) == pytest.approx(supply, abs=1e-6, rel=1e-6)
    elif share < float("inf"):
        assert share >= max(demands) - 1e-6


def test_small_demand_is_met_before_a_large_one() -> None:
    assert fair_share(100, [10, 1000, 1000]) == 45


# -- rates


def test_full_bucket_gives_a_burst_and_then_the_rate() -> None:
    owner = Owner(Kind.RATE, 10, 20)
    assert owner.ask(want=30, least=1).given == 20
    refused = owner.ask(want=1)
    assert (refused.given, refused.wait_s) == (0, pytest.approx(0.1))
    owner.now = 0.5
    assert owner.ask(want=30, least=1).given == pytest.approx(5)
    owner.now = 1000
    assert owner.ask(want=30, least=1).given == 20


def test_bucket_that_has_only_just_changed_hands_is_empty() -> None:
    owner = Owner(Kind.RATE, 10, 20, since=0.0)
    assert owner.ask(want=20, least=1).given == 0
    owner.now = 0.3
    assert owner.ask(want=20, least=1).given == pytest.approx(3)


def test_what_comes_back_can_be_had_again_but_never_more_than_a_burst() -> None:
    owner = Owner(Kind.RATE, 10, 20)
    owner.ask(want=15)
    assert owner.ask(want=20, back=15).given == 20
    assert owner.ask(want=40, least=1, back=1e9).given == 20


def test_nobody_gives_back_more_than_it_was_given() -> None:
    owner = Owner(Kind.RATE, 10, 20)
    owner.ask(BOB, want=15)
    assert owner.ask(ALICE, want=5).given == 5
    assert owner.ask(ALICE, want=20, least=1, back=1e9).given == 5
    assert owner.ask(CAROL, want=20, least=1, back=1e9, held=1e9).given == 0


def test_request_larger_than_the_bucket_takes_it_when_full_and_leaves_a_debt() -> None:
    owner = Owner(Kind.RATE, 10, 20)
    assert owner.ask(want=50).given == 50
    owner.now = 3.0
    assert owner.ask(want=1).given == 0
    owner.now = 4.0
    assert owner.ask(want=1).given == 1
    assert owner.ask(want=50).given == 0
    owner.now = 5.2
    assert owner.ask(want=50).given == 50


def test_part_of_the_shares_gives_that_part_of_rate_and_burst() -> None:
    owner = Owner(Kind.RATE, 10, 20)
    owner.fraction = 0.25
    assert owner.ask(want=20, least=1).given == 5
    owner.now = 1.0
    assert owner.ask(want=20, least=1).given == pytest.approx(2.5)
    owner.fraction = 0.0
    owner.now = 100.0
    assert owner.ask(want=20, least=1).given == 0


def test_rate_that_went_up_meanwhile_does_not_count_for_the_past() -> None:
    owner = Owner(Kind.RATE, 10, 20)
    owner.ask(want=20)
    owner.fraction = 0.1
    owner.ask(want=0)
    owner.now, owner.fraction = 1.0, 1.0
    assert owner.ask(want=20, least=1).given == pytest.approx(1)


def test_lowest_limit_that_anybody_knows_holds_and_the_owners_own_before_all() -> None:
    owner = Owner(Kind.RATE, 100, 100)
    assert owner.ask(ALICE, want=100, least=1, limit=1e9, burst=1e9).given == 100
    owner = Owner(Kind.RATE, 100, 100)
    owner.ask(BOB, limit=10, burst=10)
    assert owner.ask(ALICE, want=100, least=1, limit=1e9, burst=1e9).given == 10
    owner = Owner(Kind.RATE, 100, 100)
    owner.ask(b"me", limit=50, burst=50)
    owner.ask(BOB, limit=10, burst=10)
    assert owner.ask(ALICE, want=100, least=1).given == 50


@pytest.mark.parametrize("greed", [1e3, 1e12])
def test_greedy_proxy_cannot_starve_the_others(greed: float) -> None:
    owner = Owner(Kind.RATE, 90, 90)
    got = {ALICE: 0.0, BOB: 0.0, CAROL: 0.0}
    for step in range(600):
        owner.now = step * 0.1
        for who, demand in ((ALICE, greed), (BOB, 40.0), (CAROL, 10.0)):
            wanted = demand * 0.1 if who != ALICE else greed
            got[who] += owner.ask(who, want=wanted, least=0, demand=demand).given
    assert got[CAROL] == pytest.approx(600, rel=0.05)
    assert got[BOB] == pytest.approx(2400, rel=0.05)
    assert sum(got.values()) <= 90 * 60 + 90 + 1e-6
    assert sum(got.values()) >= 0.98 * 90 * 60


def test_large_requests_of_many_proxies_each_get_their_turn() -> None:
    owner = Owner(Kind.RATE, 100, 100)
    asked = [bytes([number]) * 8 for number in range(16)]
    got = dict.fromkeys(asked, 0.0)
    for step in range(1200):
        owner.now = step * 0.1
        for who in asked:
            got[who] += owner.ask(who, want=90, demand=300).given
    assert sum(got.values()) >= 0.98 * 100 * 120
    assert max(got.values()) <= 2 * min(got.values())


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 50), st.floats(0, 50), st.sampled_from([0.25, 0.5, 1.0])), max_size=60))
def test_rate_is_never_exceeded_however_it_is_asked(steps: list[tuple[float, float, float, float]]) -> None:
    owner = Owner(Kind.RATE, 10, 20)
    total = most = 0.0
    for passed, want, least, fraction in steps:
        owner.now += passed
        owner.fraction = fraction
        grant = owner.ask(want=max(want, least), least=least)
        total += grant.given
        most = max(most, least)
        assert total <= 10 * owner.now + 20 + max(0.0, most - 20) + 30 + 1e-6


def test_idle_bucket_is_kept_until_it_would_be_full_anyway() -> None:
    owner = Owner(Kind.RATE, 1, 100)
    owner.ask(want=100)
    assert not owner.bucket.idle(50, 0)
    assert owner.bucket.idle(101, 0)


# -- budgets


def test_budget_is_what_has_not_been_used_nor_handed_out() -> None:
    owner = Owner(Kind.BUDGET, 100)
    assert owner.ask(ALICE, want=60).given == 60
    assert owner.ask(BOB, want=60).given == 0
    assert owner.ask(BOB, want=40).given == 40
    owner.used = 50
    assert owner.ask(ALICE, want=10, used=50, back=10).given == 10, "50 used, 10 back, 40 with bob"
    assert owner.ask(ALICE, want=1, used=50).given == 0


def test_new_owner_counts_what_was_used_and_what_others_say_they_hold() -> None:
    owner = Owner(Kind.BUDGET, 100)
    owner.used = 30
    owner.ask(ALICE, held=40.0, used=20.0)
    owner.ask(BOB, held=20.0, used=10.0)
    assert owner.ask(BOB, want=11, used=10.0).given == 0
    assert owner.ask(BOB, want=10, used=10.0).given == 10


def test_parted_owners_together_give_no_more_than_was_left() -> None:
    here, there = Owner(Kind.BUDGET, 100), Owner(Kind.BUDGET, 100)
    given_ = here.ask(ALICE, want=20).given
    here.used = there.used = given_
    here.ask(ALICE, used=given_)
    here.fraction, there.fraction = 0.5, 0.5
    for owner, who, before in ((here, ALICE, given_), (there, BOB, 0.0)):
        mine = 0.0
        for _ in range(100):
            mine += owner.ask(who, want=3, used=before + mine).given
            owner.used = given_ + mine
        assert 37 <= mine <= 40


def test_less_than_half_of_the_proxies_use_next_to_nothing_of_a_budget_when_they_are_apart() -> None:
    here = Owner(Kind.BUDGET, 100_000)
    here.ask(ALICE, want=20)
    here.fraction = 3 / 8
    mine = 0.0
    for _ in range(1000):
        mine += here.ask(ALICE, want=10, used=20 + mine).given
        here.used = 20 + mine
    assert 300 <= mine <= 375, "a hundredth of their part"
    here.fraction = 1.0
    assert here.ask(ALICE, want=50_000, used=20 + mine).given == 50_000


def test_lost_proxy_may_have_used_what_it_had_of_a_budget_and_its_slots_are_free() -> None:
    budget, slots = Owner(Kind.BUDGET, 100), Owner(Kind.SLOTS, 10)
    budget.ask(ALICE, want=60.0)
    budget.ask(ALICE, used=20.0)
    slots.ask(ALICE, want=6.0)
    assert budget.bucket.lost(ALICE) == 60
    budget.used = 60
    assert budget.ask(BOB, want=50).given == 0
    assert budget.ask(BOB, want=40).given == 40
    assert slots.bucket.lost(ALICE) == 0
    assert slots.ask(BOB, want=10).given == 10


# -- slots


def test_slots_are_whole_numbers_and_come_back() -> None:
    owner = Owner(Kind.SLOTS, 5)
    assert owner.ask(ALICE, want=3.5, least=1).given == 3
    assert owner.ask(BOB, want=3, least=1).given == 1, "what is left is shared"
    assert owner.ask(BOB, want=3, least=1).given == 1
    assert owner.ask(BOB, want=1).given == 0
    assert owner.ask(ALICE, back=2).given == 0
    assert owner.ask(BOB, want=2).given == 2


def test_part_of_the_slots_is_rounded_down() -> None:
    owner = Owner(Kind.SLOTS, 5)
    owner.fraction = 0.5
    assert owner.ask(want=5, least=1).given == 2
