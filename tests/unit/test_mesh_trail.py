"""Counting a trail's tokens: what its writer put there, from any record on, and nothing of what is no trail."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.trail import count_tokens
from worker.moving.trail import (
    DONE,
    FINISH,
    USAGE,
    Begin,
    encode_begin,
    encode_cut,
    encode_event,
    encode_fixed,
    encode_gap,
    encode_token,
)

BEGIN = encode_begin(Begin(id="cmpl-1", model="m", created=1_800_000_000, prompt_tokens=300, prompt_hash=b"12345678"))
TOKEN = st.integers(0, 2**31 - 1)
RECORDS = st.one_of(
    st.builds(lambda chars, token: (encode_token(chars, token), 1), st.integers(0, 300), TOKEN),
    st.builds(lambda chars, ids: (encode_event(chars, ids), len(ids)), st.integers(0, 300), st.lists(TOKEN, max_size=4)),
    st.builds(
        lambda count, last, text: (encode_gap(2, count, last, text), count), st.integers(2, 9), TOKEN, st.text(min_size=1, max_size=9)
    ),
    st.sampled_from([(FINISH, 0), (USAGE, 0), (DONE, 0), (encode_cut(0), 0)]),
)


@given(former=st.lists(RECORDS, max_size=20), later=st.lists(RECORDS, max_size=20))
def test_tokens_are_those_that_were_written(former: list[tuple[bytes, int]], later: list[tuple[bytes, int]]) -> None:
    begun = BEGIN + b"".join(record for record, _ in former)
    trail = bytearray(begun + b"".join(record for record, _ in later))
    assert count_tokens(begun) == sum(count for _, count in former)
    assert count_tokens(trail) == sum(count for _, count in (*former, *later))
    assert count_tokens(trail, len(begun)) == sum(count for _, count in later)


def test_many_usual_events_are_counted() -> None:
    assert count_tokens(BEGIN + encode_token(5, 17) * 30_000) == 30_000


def test_a_trail_that_does_not_tell_has_no_count() -> None:
    assert count_tokens(BEGIN + encode_token(5, 17) + encode_fixed("large")) is None
    assert count_tokens((BEGIN + encode_token(5, 17))[:-1]) is None
    assert count_tokens(BEGIN + USAGE * 100_000) is None, "nobody is held up by it"
    assert count_tokens(BEGIN + b"\x01\x02" + b"\xff\xff\xff\xff\x7f" + bytes(8)) is None


@given(st.binary(max_size=200))
def test_nonsense_is_no_trouble(data: bytes) -> None:
    count_tokens(data)
    count_tokens(BEGIN + data, len(BEGIN))
