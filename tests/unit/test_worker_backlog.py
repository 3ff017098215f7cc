"""Prefill yet to be done: flows off at the rate seen, and is never beyond what first tokens prove."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.backlog import ASSUMED_RATE, Backlog


def test_work_flows_off_at_the_rate_that_was_seen() -> None:
    backlog = Backlog()
    ticket = backlog.add(8_000, now=0)
    backlog.done(ticket, now=2, computed=True)
    assert backlog.rate == 4_000
    backlog.add(10_000, now=10)
    assert backlog.level(now=11) == 6_000
    assert backlog.level(now=20) == 0, "its first token is late, but it is the oldest"


def test_only_the_oldest_may_be_done_without_a_first_token() -> None:
    backlog = Backlog()
    for _ in range(3):
        backlog.add(1_000, now=0)
    assert backlog.level(now=100) == 2_000


def test_first_token_that_comes_early_sets_the_account_right() -> None:
    backlog = Backlog()
    first = backlog.add(50_000, now=0)
    backlog.add(1_000, now=0)
    backlog.done(first, now=0.1, computed=True)
    assert backlog.level(now=0.1) == 1_000


def test_answers_that_are_not_streamed_only_flow_off() -> None:
    backlog = Backlog()
    ticket = backlog.add(round(ASSUMED_RATE), now=0, streamed=False)
    assert backlog.level(now=0.5) == ASSUMED_RATE / 2
    assert backlog.level(now=60) == 0
    backlog.done(ticket, now=60, computed=True)
    assert backlog.rate == 0, "the time of a whole answer says nothing about prefill"


def test_prompt_that_nobody_wants_any_more_is_gone_and_says_nothing_about_the_rate() -> None:
    backlog = Backlog()
    ticket = backlog.add(5_000, now=0)
    backlog.done(ticket, now=9, computed=False)
    backlog.done(ticket, now=9, computed=True)
    assert (backlog.level(now=9), backlog.rate) == (0, 0)


def test_rate_of_prompts_that_wait_for_each_other_is_the_engines_not_theirs() -> None:
    backlog = Backlog()
    tickets = [backlog.add(7_000, now=0) for _ in range(20)]
    for at, ticket in enumerate(tickets):
        backlog.done(ticket, now=at + 1.0, computed=True)
    assert backlog.rate == pytest.approx(7_000)


@given(st.integers())
def test_level_stays_between_nothing_and_all_that_is_pending(seed: int) -> None:
    rng, backlog, now = random.Random(seed), Backlog(), 0.0
    pending: dict[int, int] = {}
    for _ in range(60):
        now += rng.choice((0.0, 0.01, 1.0, 10.0))
        if pending and rng.random() < 0.5:
            ticket = rng.choice(list(pending))
            backlog.done(ticket, now=now, computed=rng.random() < 0.8)
            del pending[ticket]
        else:
            tokens = rng.choice((0, 1, 600, 100_000))
            pending[backlog.add(tokens, now=now, streamed=rng.random() < 0.7)] = tokens
        assert 0 <= backlog.level(now=now) <= sum(pending.values())
    for ticket in pending:
        backlog.done(ticket, now=now, computed=True)
    assert backlog.level(now=now) == 0
