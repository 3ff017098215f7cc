"""Request bodies in a worker's memory: bounded together, shared between proxies."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from mesh.errors import BodyTooLarge, Overloaded
from worker.room import SMALL_BYTES, Room

MIB = 1 << 20


def test_bodies_together_are_bounded_and_room_comes_back() -> None:
    room = Room(10 * MIB)
    with ExitStack() as held:
        for owner in "aabbb":
            held.enter_context(room.hold(owner, 1_500_000))
        assert room.held_bytes == 7_500_000
        with pytest.raises(Overloaded), room.hold("c", 4 * MIB):
            pass
    assert room.held_bytes == 0
    with room.hold("c", 4 * MIB):
        assert room.held_bytes == 4 * MIB


def test_one_proxy_fills_at_most_half() -> None:
    room = Room(10 * MIB)
    with room.hold("greedy", 4 * MIB):
        with pytest.raises(Overloaded), room.hold("greedy", 2 * MIB):
            pass
        with room.hold("modest", 4 * MIB):
            assert room.held_bytes == 8 * MIB
    assert room._by_owner == {}


def test_body_that_never_fits_is_too_large_and_small_ones_always_fit() -> None:
    room = Room(2 * MIB)
    with pytest.raises(BodyTooLarge), room.hold("a", MIB + 1):
        pass
    with ExitStack() as held:
        for _ in range(1000):
            held.enter_context(room.hold("a", SMALL_BYTES))
    assert room.held_bytes == 0


def test_room_comes_back_from_a_request_that_fails() -> None:
    room = Room(10 * MIB)
    with pytest.raises(ValueError, match="x"), room.hold("a", MIB):
        raise ValueError("x")
    assert room.held_bytes == 0
