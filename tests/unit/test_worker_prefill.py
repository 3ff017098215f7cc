"""Prompts at a worker: what is cached and queued, what each proxy knows of it, and who is sent back to think again."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from mesh.errors import Rerouted
from mesh.prefix import Chain
from tests.support.clocks import StoppedClock
from worker.prefill import HISTORY, SURPRISE_TOKENS, Prefill, Prompt
from worker.prefixes import HeldPrefixes
from worker.usage import Usage

LONG = 4 * SURPRISE_TOKENS + 4 * 10_000
"""Bytes of text that are well beyond a surprise at four bytes a token."""


@dataclass(eq=False)
class StandInLink:
    last_incoming: int = 0
    told: list[dict[str, int]] = field(default_factory=list)


@pytest.fixture
def prefill() -> Prefill:
    made = Prefill(StoppedClock(100.0), held=HeldPrefixes(capacity_tokens=1_000_000))
    made.tell = lambda link: link.told.append(made.load_fields(link))
    return made


@pytest.fixture
def alice() -> StandInLink:
    return StandInLink()


@pytest.fixture
def bob() -> StandInLink:
    return StandInLink()


def prompt(name: int = 1, *, blocks: int = 3, size_bytes: int = LONG, seen: int | None = None) -> Prompt:
    chain: Chain = tuple(name.to_bytes(4) + at.to_bytes(4) for at in range(blocks))
    return Prompt(chain=chain, size_bytes=size_bytes, streamed=True, seen=seen)


def test_only_what_is_not_cached_is_work(prefill: Prefill, alice: StandInLink) -> None:
    first = prefill.arrive(alice, prompt(size_bytes=1536))
    again = prefill.arrive(alice, prompt(size_bytes=2048))
    assert (first.cached, again.cached) == (0, 3)
    assert prefill.backlog.ever == 1536 // 4 + 512 // 4


def test_served_prompt_is_held_and_one_that_failed_before_its_first_token_is_not(prefill: Prefill, alice: StandInLink) -> None:
    served, failed, broken = (prefill.arrive(alice, prompt(name)) for name in (1, 2, 3))
    prefill.computed(served)
    prefill.leave(served, Usage(prompt=300, completion=5))
    prefill.leave(failed, None)
    prefill.computed(broken)
    prefill.leave(broken, None)
    assert [prefill.held.depth(prompt(name).chain) for name in (1, 2, 3)] == [3, 0, 3]
    assert prefill.backlog.level(now=100.0) == 0


def test_request_placed_on_old_news_goes_back_with_the_news(prefill: Prefill, alice: StandInLink, bob: StandInLink) -> None:
    prefill.tell(alice)
    prefill.tell(bob)
    prefill.arrive(alice, prompt(1, seen=1))
    with pytest.raises(Rerouted):
        prefill.arrive(bob, prompt(2, seen=1))
    assert bob.told[-1]["n"] == 2
    assert bob.told[-1]["pre"] == LONG // 4
    prefill.arrive(bob, prompt(2, seen=2))
    assert prefill.rerouted == 1


def test_own_requests_are_no_surprise(prefill: Prefill, alice: StandInLink) -> None:
    prefill.tell(alice)
    for name in range(10):
        prefill.arrive(alice, prompt(name, seen=1))


def test_news_that_is_under_way_does_not_count_as_known(prefill: Prefill, alice: StandInLink, bob: StandInLink) -> None:
    prefill.tell(bob)
    prefill.arrive(alice, prompt(1))
    prefill.tell(bob)  # sent, but the request below was on its way already
    with pytest.raises(Rerouted):
        prefill.arrive(bob, prompt(2, seen=1))


def test_request_that_is_to_stay_stays(prefill: Prefill, alice: StandInLink, bob: StandInLink) -> None:
    prefill.tell(bob)
    prefill.arrive(alice, prompt(1))
    prefill.arrive(bob, prompt(2))


def test_work_that_is_done_is_no_surprise_any_more(prefill: Prefill, alice: StandInLink, bob: StandInLink) -> None:
    prefill.tell(bob)
    work = prefill.arrive(alice, prompt(1))
    prefill.computed(work)
    prefill.arrive(bob, prompt(2, seen=1))


def test_little_is_no_surprise(prefill: Prefill, alice: StandInLink, bob: StandInLink) -> None:
    prefill.tell(bob)
    prefill.arrive(alice, prompt(1, size_bytes=4 * SURPRISE_TOKENS))
    prefill.arrive(bob, prompt(2, seen=1))


def test_link_that_was_told_nothing_or_names_what_was_never_sent_is_served(prefill: Prefill, alice: StandInLink, bob: StandInLink) -> None:
    prefill.arrive(alice, prompt(1))
    prefill.arrive(bob, prompt(2, seen=0))
    prefill.tell(bob)
    prefill.arrive(bob, prompt(3, seen=10**9))


def test_what_a_link_was_told_long_ago_is_forgotten(prefill: Prefill, alice: StandInLink, bob: StandInLink) -> None:
    prefill.tell(bob)
    prefill.arrive(alice, prompt(1))
    for _ in range(HISTORY):
        prefill.tell(bob)
    prefill.arrive(bob, prompt(2, seen=1))


def test_load_counts_streams_up_to_the_newest(prefill: Prefill, alice: StandInLink) -> None:
    alice.last_incoming = 41
    prefill.arrive(alice, prompt(1))
    assert prefill.load_fields(alice) == {"n": 1, "pre": LONG // 4, "rate": 0, "last": 41}


def test_prompt_whose_beginning_is_still_being_computed_says_nothing_about_the_room(prefill: Prefill, alice: StandInLink) -> None:
    first, second = prefill.arrive(alice, prompt(1)), prefill.arrive(alice, prompt(1))
    assert (second.cached, second.sure) == (3, 0)
    prefill.computed(first)
    third = prefill.arrive(alice, prompt(1))
    assert (third.cached, third.sure) == (3, 3)
    for work in (second, third):
        prefill.leave(work, None)
    assert not prefill._computing


def test_room_that_it_is_given_is_the_room_it_uses() -> None:
    held = HeldPrefixes(capacity_tokens=7)
    assert Prefill(StoppedClock(0.0), held=held).held is held
