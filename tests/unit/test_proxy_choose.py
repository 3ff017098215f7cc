"""The choice of a worker: never one to avoid, never a busier one, and no favourites among equals."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from proxy.choose import Wish, choose, cost

ANY = Wish(model="m")


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Implements `proxy.choose.Candidate`."""

    node_id: bytes
    in_flight: int = 0
    elsewhere: int = 0
    kv_use: float = 0.0
    max_concurrency: int = 10


SEATS = st.lists(
    st.builds(
        Seat,
        node_id=st.binary(min_size=1, max_size=2),
        in_flight=st.integers(0, 10**6),
        elsewhere=st.integers(0, 10**6),
        kv_use=st.floats(0, 1),
        max_concurrency=st.integers(0, 10**6),
    ),
    max_size=8,
)


@given(SEATS, st.integers())
def test_nobody_that_was_not_chosen_costs_less(seats: list[Seat], seed: int) -> None:
    chosen = choose(seats, ANY, random.Random(seed))
    assert (chosen is None) == (not seats)
    if chosen is not None:
        assert chosen in seats
        assert cost(chosen) == min(map(cost, seats))


@given(SEATS, st.sets(st.binary(min_size=1, max_size=2)), st.integers())
def test_whoever_is_to_be_avoided_is_never_chosen(seats: list[Seat], avoid: set[bytes], seed: int) -> None:
    chosen = choose(seats, Wish(model="m", avoid=frozenset(avoid)), random.Random(seed))
    left = [seat for seat in seats if seat.node_id not in avoid]
    assert (chosen is None) == (not left)
    assert chosen is None or chosen in left


@given(SEATS, st.integers())
def test_choice_depends_on_nothing_but_its_arguments(seats: list[Seat], seed: int) -> None:
    assert choose(seats, ANY, random.Random(seed)) is choose(list(seats), ANY, random.Random(seed))


@given(SEATS, st.integers(0, 100))
def test_more_work_never_costs_less(seats: list[Seat], more: int) -> None:
    for seat in seats:
        busier = Seat(**{**vars(seat), "in_flight": seat.in_flight + more})
        fuller = Seat(**{**vars(seat), "kv_use": 1.0})
        assert cost(busier) >= cost(seat)
        assert cost(fuller) >= cost(seat)


def test_equals_are_chosen_equally_often() -> None:
    seats, rng = [Seat(node_id=bytes((index,))) for index in range(4)], random.Random(7)
    counts = Counter(seat.node_id for _ in range(4000) if (seat := choose(seats, ANY, rng)) is not None)
    assert len(counts) == 4
    assert min(counts.values()) > 800


def test_load_is_weighed_by_size() -> None:
    small, large = Seat(node_id=b"s", in_flight=2, max_concurrency=4), Seat(node_id=b"l", in_flight=100, max_concurrency=500)
    assert choose([small, large], ANY, random.Random(1)) is large


def test_work_given_by_others_counts_like_our_own() -> None:
    ours, theirs = Seat(node_id=b"a", in_flight=3), Seat(node_id=b"b", elsewhere=2)
    assert choose([ours, theirs], ANY, random.Random(1)) is theirs


def test_kv_cache_counts_only_near_its_end() -> None:
    assert cost(Seat(node_id=b"a", kv_use=0.9)) == 0
    assert cost(Seat(node_id=b"a", kv_use=0.95)) > cost(Seat(node_id=b"a", in_flight=4))


def test_requests_spread_evenly_over_equal_workers() -> None:
    flights, rng = Counter[bytes](), random.Random(3)
    for _ in range(300):
        seats = [Seat(node_id=bytes((index,)), in_flight=flights[bytes((index,))]) for index in range(3)]
        chosen = choose(seats, ANY, rng)
        assert chosen is not None
        flights[chosen.node_id] += 1
    assert set(flights.values()) == {100}
