"""Chains of hashes: alike as far as the texts are, the same however the text comes in pieces; and how they travel."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ProtocolError
from mesh.prefix import (
    BLOCK_BYTES,
    ENDS,
    MAX_BLOCKS,
    MAX_HASHES_PER_FRAME,
    MAX_TEXT_BYTES,
    PrefixNews,
    encode_news,
    hash_chain,
    join_chain,
    news_frames,
    parse_news,
    split_chain,
    text_bytes,
)

TEXT = random.Random(1).randbytes(200_000)


def cut(text: bytes, rng: random.Random) -> list[bytes]:
    pieces, at = [], 0
    while at < len(text):
        size = rng.choice((0, 1, 7, 511, 512, 513, 3000, 40_000))
        pieces.append(text[at : at + size])
        at += size
    return pieces


@given(st.integers(0, len(TEXT)), st.integers())
def test_chain_is_the_same_in_whatever_pieces_the_text_comes(size: int, seed: int) -> None:
    text = TEXT[:size]
    assert hash_chain(b"m", cut(text, random.Random(seed))) == hash_chain(b"m", [text])


@given(st.integers(0, 100_000), st.integers(1, 100_000), st.integers(1, 100_000))
def test_chains_agree_exactly_as_far_as_whole_blocks_do(shared: int, one: int, other: int) -> None:
    text = TEXT[:shared]
    first, second = hash_chain(b"m", [text, b"1" * one]), hash_chain(b"m", [text, b"2" * other])
    agree = next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    assert text_bytes(agree) <= shared
    assert agree == sum(end <= shared for end in ENDS) or agree == min(len(first), len(second))


def test_blocks_grow_so_that_a_chain_is_short_and_the_text_looked_at_bounded() -> None:
    assert hash_chain(b"m", [b"x" * (BLOCK_BYTES - 1)]) == ()
    assert len(hash_chain(b"m", [b"x" * BLOCK_BYTES])) == 1
    chain = hash_chain(b"m", [b"x" * MAX_TEXT_BYTES])
    assert len(chain) == MAX_BLOCKS
    assert hash_chain(b"m", [b"x" * MAX_TEXT_BYTES, b"y" * 10_000]) == chain
    assert all((after - before) * 16 <= before for before, after in pairwise(ENDS[32:])), "known to within a sixteenth"
    assert len(set(chain)) == MAX_BLOCKS


def test_seed_names_another_prefix() -> None:
    assert set(hash_chain(b"m", [TEXT])).isdisjoint(hash_chain(b"n", [TEXT]))


@given(st.lists(st.binary(min_size=8, max_size=8), max_size=MAX_BLOCKS))
def test_chain_comes_back(chain: list[bytes]) -> None:
    assert split_chain(join_chain(chain)) == tuple(chain)


@pytest.mark.parametrize("data", [b"1234567", b"123456789", bytes(8 * (MAX_BLOCKS + 1))])
def test_broken_and_endless_chains_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        split_chain(data)


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.booleans())
def test_news_of_any_size_comes_back_in_frames_of_bounded_size(added: int, removed: int, anew: bool) -> None:
    plus, minus = [at.to_bytes(8) for at in range(added)], [at.to_bytes(8, "little") for at in range(removed)]
    frames = [parse_news(encode_news(news)) for news in news_frames(plus, minus, anew=anew)]
    assert [key for news in frames for key in news.added] == plus
    assert [key for news in frames for key in news.removed] == minus
    assert [news.anew for news in frames] == ([anew] + [False] * (len(frames) - 1) if frames else [])
    assert all(max(len(news.added), len(news.removed)) <= MAX_HASHES_PER_FRAME for news in frames)
    assert bool(frames) == bool(added or removed or anew)


@pytest.mark.parametrize(
    "fields",
    [{"add": "text"}, {"add": b"123"}, {"del": 7}, {"new": 1}, {"add": bytes(8 * (MAX_HASHES_PER_FRAME + 1))}, {"del": None}],
)
def test_odd_news_is_a_protocol_error(fields: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        parse_news(fields)


def test_empty_news_says_nothing() -> None:
    assert parse_news({"unknown": 1}) == PrefixNews()
