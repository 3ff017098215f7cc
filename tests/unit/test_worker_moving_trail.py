"""The trail: what is written comes back; what anybody else may have written is refused or does no harm."""

from __future__ import annotations

import contextlib

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import NotResumed
from worker.moving import trail as trails
from worker.moving.trail import MAX_GAP_BYTES, MAX_TOKEN_ID, Begin, Gap, parse_trail

BEGIN = Begin(id="chatcmpl-1", model="m", created=1_790_000_000, prompt_tokens=12, prompt_hash=b"12345678")
OPENING = trails.encode_begin(BEGIN)
IDS = st.lists(st.integers(0, MAX_TOKEN_ID), max_size=8)
CHARS = st.integers(0, 100_000)


def test_what_was_written_comes_back() -> None:
    data = OPENING + trails.encode_event(3, [17]) + trails.encode_event(0, [200_000]) + trails.encode_event(5, [1, 2, 3])
    data += trails.encode_gap(1, 3, 249, "🌟") + trails.encode_event(0, [9]) + trails.FINISH + trails.USAGE
    trail = parse_trail(data)
    assert trail.begin == BEGIN
    assert trail.ids == [17, 200_000, 1, 2, 3, 0, 0, 249, 9]
    assert trail.gaps == [Gap(at=5, count=3, text="🌟")]
    assert (trail.chars, trail.settled) == (9, 8), "the last token has brought no text"
    assert (trail.finished, trail.usage_sent, trail.done, trail.fixed) == (True, True, False, "")
    assert parse_trail(data + trails.DONE).done


def test_begin_without_a_hash_and_with_long_names() -> None:
    begin = Begin(id="i" * 256, model="ü" * 256, created=0, prompt_tokens=1)
    assert parse_trail(trails.encode_begin(begin)).begin == begin


@given(st.lists(st.tuples(CHARS, IDS), max_size=30))
def test_any_events_come_back(events: list[tuple[int, list[int]]]) -> None:
    trail = parse_trail(OPENING + b"".join(trails.encode_event(chars, ids) for chars, ids in events))
    assert trail.ids == [token for _, ids in events for token in ids]
    assert trail.chars == sum(chars for chars, _ in events)
    last = max((n for n, (chars, _) in enumerate(events) if chars), default=-1)
    assert trail.settled == sum(len(ids) for _, ids in events[: last + 1])


def test_cut_takes_back_tokens_of_which_nothing_was_seen() -> None:
    data = OPENING + trails.encode_event(4, [1, 2]) + trails.encode_event(0, [3, 4]) + trails.encode_cut(2) + trails.encode_event(1, [5])
    trail = parse_trail(data)
    assert (trail.ids, trail.chars, trail.settled) == ([1, 2, 5], 5, 3)
    assert trail.marks == [(2, 4), (3, 5)]


def test_all_text_belongs_to_what_a_cut_has_left() -> None:
    """An event may bring text and the first half of a character: that half is made again."""
    trail = parse_trail(OPENING + trails.encode_event(4, [1, 2]) + trails.encode_cut(1))
    assert (trail.ids, trail.chars, trail.settled, trail.marks) == ([1], 4, 1, [(1, 4)])


def test_nothing_after_the_word_that_a_stream_is_fixed_counts() -> None:
    trail = parse_trail(OPENING + trails.encode_event(4, [1]) + trails.encode_fixed("reasoning") + b"\xff\xff\xff")
    assert (trail.fixed, trail.ids) == ("reasoning", [1])


def test_usual_token_takes_six_bytes() -> None:
    assert len(trails.encode_event(5, [100_000])) == 6


GAP = trails.encode_gap(2, 2, 7, "ab")
BAD: dict[str, bytes] = {
    "nothing": b"",
    "another version": b"\x02" + OPENING[1:],
    "no beginning": b"\x01" + trails.encode_event(1, [1]),
    "two beginnings": OPENING + OPENING[1:],
    "a beginning cut off": OPENING[:-1],
    "an event cut off": OPENING + trails.encode_event(1, [300, 301])[:-1],
    "more tokens than bytes": OPENING + trails.encode_event(1, [])[:-1] + b"\xff\xff\xff\x7f",
    "a number without end": OPENING + b"\xff" * 6,
    "a token that cannot be": OPENING + trails.encode_event(1, [2**32 - 1]),
    "an unknown record": OPENING + b"\x07",
    "a gap of one": OPENING + trails.encode_gap(1, 1, 7, "a"),
    "a gap without text": OPENING + trails.encode_gap(1, 2, 7, ""),
    "a gap of too much": OPENING + trails.encode_gap(1, MAX_GAP_BYTES + 1, 7, "a"),
    "a gap of too much text": OPENING + trails.encode_gap(1, 2, 7, "a" * (MAX_GAP_BYTES + 1)),
    "a gap of no text at all": OPENING + GAP[:-2] + b"\xff\xfe",
    "a cut into a gap": OPENING + GAP + trails.encode_cut(1),
    "a cut beyond the end": OPENING + trails.encode_event(1, [1]) + trails.encode_cut(2),
    "an event after the finish": OPENING + trails.FINISH + trails.encode_event(1, [1]),
    "anything after the end": OPENING + trails.DONE + trails.USAGE,
    "a reason that is none": OPENING + b"\x05\x03a b",
    "a reason of another tongue": OPENING + b"\x05\x02\xc3\xa9",
    "an endless answer": OPENING + trails.encode_event(2**30, []),
    "a name that cannot be printed": b"\x01\x00\x1b" + msgpack.packb({"id": "a\nb", "model": "m", "at": 1, "p": 1}),
    "a hash of the wrong length": trails.encode_begin(Begin(id="i", model="m", created=1, prompt_tokens=1, prompt_hash=b"123")),
    "a number for a name": b"\x01\x00\x14" + msgpack.packb({"id": 7, "model": "m", "at": 1, "p": 1}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_trail_is_refused(name: str) -> None:
    with pytest.raises(NotResumed):
        parse_trail(BAD[name])


@given(st.binary(max_size=400))
def test_random_bytes_are_refused_or_read_but_never_raise_anything_else(data: bytes) -> None:
    for hostile in (data, OPENING + data):
        with contextlib.suppress(NotResumed):
            trail = parse_trail(hostile)
            assert trail.settled <= len(trail.ids) <= len(hostile) * MAX_GAP_BYTES


@settings(max_examples=200)
@given(st.data())
def test_mutated_trail_never_raises_anything_else(data: st.DataObject) -> None:
    whole = bytearray(
        OPENING + trails.encode_event(3, [17]) + GAP + trails.encode_cut(3) + trails.encode_event(3, [18, 19]) + trails.FINISH + trails.DONE
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(NotResumed):
        parse_trail(bytes(whole))
