"""What an engine should still hold: as much as it has room for, the least recently used gone first, a prompt's tail before its head."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from mesh.prefix import BLOCK_BYTES, MAX_BLOCKS, MAX_HELD, Chain
from worker.prefixes import HeldPrefixes


def chain(name: int, blocks: int, *, shared: int = 0) -> Chain:
    return tuple((0 if at < shared else name).to_bytes(4) + at.to_bytes(4) for at in range(blocks))


def room(blocks: int) -> HeldPrefixes:
    """Room for so many of the first blocks, at 0.25 tokens a byte."""
    return HeldPrefixes(capacity_tokens=blocks * BLOCK_BYTES // 4)


def count(held: HeldPrefixes, prompt: Chain, *, cached: int, expected: int, tokens: int | None = None) -> None:
    size = BLOCK_BYTES * len(prompt)
    held.served(prompt, size_bytes=size, prompt_tokens=tokens or size // 4, completion_tokens=0, cached_tokens=cached, expected=expected)


def test_what_was_served_is_held_until_there_is_no_room_and_its_tail_goes_first() -> None:
    held = room(20)
    held.add(chain(1, 12))
    assert held.depth(chain(1, 30)) == 12
    held.add(chain(2, 12))
    assert held.depth(chain(2, 12)) == 12
    assert held.depth(chain(1, 12)) == 8


def test_what_is_used_again_stays() -> None:
    held = room(20)
    for name in (1, 2, 1, 3):
        held.add(chain(name, 8))
    assert [held.depth(chain(name, 8)) for name in (1, 2, 3)] == [8, 4, 8]


def test_answers_take_room_too() -> None:
    held = room(20)
    held.add(chain(1, 10))
    prompt = chain(2, 8)
    held.add(prompt)
    held.served(prompt, size_bytes=8 * BLOCK_BYTES, prompt_tokens=8 * 128, completion_tokens=5 * 128, cached_tokens=0, expected=0)
    assert held.depth(prompt) == 8
    assert held.depth(chain(1, 10)) == 7


def test_tokens_of_a_block_are_learned_from_what_the_engine_counts() -> None:
    held = room(1000)
    for name in range(100):
        count(held, chain(name, 4), cached=0, expected=0, tokens=4 * BLOCK_BYTES // 2)
    assert abs(held.tokens_per_byte - 0.5) < 0.01
    assert held.tokens(4) == 4 * BLOCK_BYTES // 2


def test_engine_that_has_less_than_expected_has_less_room_than_was_thought() -> None:
    held = room(1000)
    for name in range(60):
        held.add(chain(name, 10))
    before = len(held)
    for _ in range(80):
        count(held, chain(1, 10), cached=1, expected=10)
    assert len(held) < before / 2
    for _ in range(400):
        count(held, chain(1, 10), cached=1280, expected=10)
    for name in range(60):
        held.add(chain(name, 10))
    assert held.depth(chain(2, 10)) == 10


def test_engine_that_never_counts_cached_tokens_is_not_believed_to_cache_nothing() -> None:
    held = room(1000)
    held.add(chain(1, 10))
    for _ in range(100):
        count(held, chain(1, 10), cached=0, expected=10)
    for name in range(2, 90):
        held.add(chain(name, 10))
    assert held.depth(chain(1, 10)) == 10


def test_prompt_that_was_not_computed_is_dropped() -> None:
    held = room(100)
    held.add(chain(1, 5))
    held.drop(chain(1, 5)[2:])
    assert held.depth(chain(1, 5)) == 2


@given(st.integers(), st.integers(1, 400))
def test_changes_add_up_to_what_is_held_and_room_is_kept(seed: int, blocks: int) -> None:
    rng, held, told = random.Random(seed), room(blocks), set[bytes]()
    for _ in range(80):
        prompt = chain(rng.randint(1, 12), rng.randint(0, min(MAX_BLOCKS, 60)), shared=rng.randint(0, 20))
        match rng.randint(0, 9):
            case 0:
                held.drop(prompt)
            case 1 if rng.random() < 0.1:
                held.clear()
            case 2 | 3:
                count(held, prompt or chain(1, 1), cached=rng.randint(0, 5000), expected=held.depth(prompt))
            case _:
                held.add(prompt)
        assert held.total_tokens <= held.capacity_tokens + 1e-6
        assert len(held.hashes()) <= MAX_HELD
        if rng.random() < 0.3:
            added, removed = held.take_changes()
            assert told.isdisjoint(added), "nothing is told twice"
            assert told.issuperset(removed)
            told = (told | set(added)) - set(removed)
            assert told == set(held.hashes())


def test_number_of_hashes_is_bounded_whatever_the_room() -> None:
    held = HeldPrefixes(capacity_tokens=10**12)
    for name in range(MAX_HELD // MAX_BLOCKS + 10):
        held.add(chain(name, MAX_BLOCKS))
    assert len(held) == MAX_HELD
