"""The choice of a worker: never one to avoid, never a costlier one, no favourites among equals, and no crowd around a hot prefix."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.choose import LOOKED_AT, POLICIES, REASONS, Choice, Wish, choose

ANY = Wish(model="m")


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Implements `proxy.choose.Candidate`."""

    node_id: bytes
    in_flight: int = 0
    elsewhere: int = 0
    queued: float = 0.0
    rate: float = 0.0
    kv_use: float = 0.0
    max_concurrency: int = 10
    rank: int = field(default=-1)

    def __post_init__(self) -> None:
        if self.rank < 0:
            object.__setattr__(self, "rank", int.from_bytes(random.Random(self.node_id).randbytes(8)))

    def queued_tokens(self, now: float) -> float:
        return self.queued


SEATS = st.lists(
    st.builds(
        Seat,
        node_id=st.binary(min_size=1, max_size=2),
        in_flight=st.integers(0, 10**6),
        elsewhere=st.integers(0, 10**6),
        queued=st.floats(0, 1e9),
        rate=st.sampled_from([0.0, 100.0, 7000.0]),
        kv_use=st.floats(0, 1),
        max_concurrency=st.integers(0, 10**6),
    ),
    max_size=40,
    unique_by=lambda seat: seat.node_id,
)


def chosen(seats: list[Seat], wish: Wish = ANY, seed: int = 1) -> Seat:
    choice = choose(seats, wish, random.Random(seed))
    assert choice is not None
    return choice.worker


def asking(tokens: int, cached: Mapping[Seat, int] | None = None, **more: int) -> Wish:
    return Wish(model="m", tokens=tokens, cached=cached or {}, **more)


@st.composite
def wishes(draw: st.DrawFn) -> tuple[list[Seat], Wish]:
    seats = draw(SEATS)
    tokens = draw(st.integers(0, 10**6))
    cached = {seat: draw(st.integers(0, tokens)) for seat in seats if draw(st.booleans())}
    avoid = frozenset(seat.node_id for seat in seats if draw(st.integers(0, 3)) == 0)
    return seats, Wish("m", avoid, tokens, cached, 0.0, draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 100)))


@pytest.mark.parametrize("policy", POLICIES)
@given(case=wishes(), seed=st.integers())
def test_every_policy_chooses_a_candidate_that_is_not_to_be_avoided_if_there_is_one(
    policy: str, case: tuple[list[Seat], Wish], seed: int
) -> None:
    seats, wish = case
    choice: Choice[Seat] | None = POLICIES[policy](seats, wish, random.Random(seed))
    left = [seat for seat in seats if seat.node_id not in wish.avoid]
    assert (choice is None) == (not left)
    if choice is not None:
        assert choice.worker in left
        assert choice.reason in REASONS
        assert choice == POLICIES[policy](list(seats), wish, random.Random(seed)), "it depends on nothing but its arguments"


@given(SEATS, st.integers(0, 10**6), st.integers())
def test_nobody_that_was_not_chosen_is_better_in_everything(seats: list[Seat], tokens: int, seed: int) -> None:
    if not 1 < len(seats) <= LOOKED_AT:
        return
    winner = chosen(seats, asking(tokens), seed)
    for seat in seats:
        assert not (
            seat.in_flight + seat.elsewhere < winner.in_flight + winner.elsewhere
            and seat.queued < winner.queued
            and seat.kv_use < winner.kv_use
            and seat.rate == winner.rate
            and seat.max_concurrency >= winner.max_concurrency
        )


def test_equals_are_chosen_equally_often() -> None:
    seats, rng = [Seat(node_id=bytes((index,))) for index in range(4)], random.Random(7)
    counts = Counter(choice.worker.node_id for _ in range(4000) if (choice := choose(seats, ANY, rng)) is not None)
    assert len(counts) == 4
    assert min(counts.values()) > 800


def test_load_is_weighed_by_size() -> None:
    small, large = Seat(node_id=b"s", in_flight=2, max_concurrency=4), Seat(node_id=b"l", in_flight=100, max_concurrency=500)
    assert chosen([small, large]) is large


def test_work_given_by_others_counts_like_our_own() -> None:
    ours, theirs = Seat(node_id=b"a", in_flight=3), Seat(node_id=b"b", elsewhere=2)
    assert chosen([ours, theirs]) is theirs


def test_kv_cache_counts_only_near_its_end() -> None:
    assert chosen([Seat(node_id=b"a", kv_use=0.9), Seat(node_id=b"b", in_flight=1)]).node_id == b"a"
    assert chosen([Seat(node_id=b"a", kv_use=0.95), Seat(node_id=b"b", in_flight=4)]).node_id == b"b"


def test_requests_spread_evenly_over_equal_workers() -> None:
    flights, rng = Counter[bytes](), random.Random(3)
    for _ in range(300):
        seats = [Seat(node_id=bytes((index,)), in_flight=flights[bytes((index,))]) for index in range(3)]
        choice = choose(seats, ANY, rng)
        assert choice is not None
        flights[choice.worker.node_id] += 1
    assert set(flights.values()) == {100}


def test_whoever_holds_the_prompt_gets_it_and_the_reason_says_so() -> None:
    idle, holder = Seat(node_id=b"i", max_concurrency=500), Seat(node_id=b"h", in_flight=3, max_concurrency=500)
    choice = choose([idle, holder], asking(10_000, {holder: 9_000}), random.Random(1))
    assert choice is not None
    assert (choice.worker, choice.reason, choice.cached, choice.of) == (holder, "prefix", 9_000, 2)


def test_holder_with_more_queued_than_it_saves_is_passed_over() -> None:
    idle, holder = Seat(node_id=b"i"), Seat(node_id=b"h", queued=9_500)
    choice = choose([idle, holder], asking(10_000, {holder: 9_000}), random.Random(1))
    assert choice is not None
    assert (choice.worker, choice.reason) == (idle, "spread")


def test_hot_prefix_spreads_before_its_worker_is_swamped() -> None:
    names, flights = [bytes((index,)) for index in range(8)], Counter[bytes]()
    rng, holders = random.Random(1), {names[0]}
    for _ in range(200):
        seats = [Seat(node_id=name, in_flight=flights[name], max_concurrency=500) for name in names]
        wish = asking(100_000, {seat: 100_000 for seat in seats if seat.node_id in holders})
        choice = choose(seats, wish, rng)
        assert choice is not None
        flights[choice.worker.node_id] += 1
        holders.add(choice.worker.node_id)
        assert max(flights.values()) <= 2 * sum(flights.values()) / len(names) + 5
    assert len(holders) >= 4


def test_slow_worker_is_worth_waiting_for_only_if_it_holds_much() -> None:
    slow, fast = Seat(node_id=b"s", rate=500.0), Seat(node_id=b"f", rate=8000.0, queued=2_000)
    assert chosen([slow, fast], asking(10_000)) is fast
    assert chosen([slow, fast], asking(10_000, {slow: 9_900})) is slow


def test_rates_that_differ_by_chance_do_not_break_ties() -> None:
    seats, rng = [Seat(node_id=bytes((index,)), rate=7000.0 + 100 * index) for index in range(4)], random.Random(2)
    counts = Counter(choice.worker.node_id for _ in range(400) if (choice := choose(seats, asking(5_000), rng)) is not None)
    assert len(counts) == 4


@given(st.integers(1, 2**64 - 1), st.integers(), st.integers())
def test_session_goes_to_the_same_worker_through_every_proxy(session: int, one: int, other: int) -> None:
    seats = [Seat(node_id=bytes((index,))) for index in range(8)]
    wish = asking(0, session=session)
    assert chosen(seats, wish, one) is chosen(seats[::-1], wish, other)


def test_sessions_are_spread_over_all_workers_and_move_only_if_theirs_is_gone() -> None:
    seats, rng = [Seat(node_id=bytes((index,))) for index in range(8)], random.Random(5)
    sessions = [rng.getrandbits(64) for _ in range(4000)]
    homes = {session: chosen(seats, asking(0, session=session)) for session in sessions}
    assert min(Counter(homes.values()).values()) > 350
    for session in sessions:
        left = chosen(seats[1:], asking(0, session=session))
        assert left is homes[session] or homes[session] is seats[0]


def test_session_breaks_ties_but_does_not_outweigh_load_or_a_prefix() -> None:
    seats = [Seat(node_id=bytes((index,)), max_concurrency=500) for index in range(4)]
    own = chosen(seats, asking(0, session=77))
    busy = Seat(node_id=own.node_id, in_flight=9, max_concurrency=500, rank=own.rank)
    others = [seat for seat in seats if seat is not own]
    assert chosen([busy, *others], asking(0, session=77)) is not busy
    assert chosen(seats, asking(9_000, {others[0]: 9_000}, session=77)) is others[0]


def test_of_many_candidates_the_holder_is_still_found_and_no_herd_forms() -> None:
    seats = [Seat(node_id=index.to_bytes(2), max_concurrency=500) for index in range(500)]
    holder = seats[321]
    assert chosen(seats, asking(50_000, {holder: 40_000})) is holder
    idlest = [*seats[1:], Seat(node_id=b"idlest", max_concurrency=500)]
    busy = [Seat(node_id=seat.node_id, in_flight=1, max_concurrency=500) for seat in idlest[:-1]]
    picked = Counter(chosen([*busy, idlest[-1]], ANY, seed).node_id for seed in range(300))
    assert picked[b"idlest"] < 30, "proxies with the same view do not all run to the one idle worker"


def test_round_robin_takes_each_in_turn() -> None:
    seats = [Seat(node_id=bytes((index,)), in_flight=index) for index in range(3)]
    turns = [POLICIES["round-robin"](seats, Wish("m", turn=turn), random.Random(1)) for turn in range(6)]
    assert [choice.worker.node_id[0] for choice in turns if choice is not None] == [0, 1, 2, 0, 1, 2]


def test_power_of_two_never_takes_the_busiest_of_three() -> None:
    seats = [Seat(node_id=bytes((index,)), in_flight=index) for index in range(3)]
    for seed in range(50):
        choice = POLICIES["power-of-two"](seats, ANY, random.Random(seed))
        assert choice is not None
        assert choice.worker is not seats[2]


def test_consistent_hash_leaves_a_crowded_worker_for_the_next_in_order() -> None:
    seats = [Seat(node_id=bytes((index,))) for index in range(4)]
    policy, wish = POLICIES["consistent-hash"], asking(0, session=99)
    first = policy(seats, wish, random.Random(1))
    assert first is not None
    crowded = Seat(node_id=first.worker.node_id, in_flight=50, rank=first.worker.rank)
    others = [seat for seat in seats if seat is not first.worker]
    second, without = policy([crowded, *others], wish, random.Random(2)), policy(others, wish, random.Random(3))
    assert second is not None
    assert without is not None
    assert second.worker is without.worker
