"""Reading fields of a payload that was signed, but not necessarily by someone sensible."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mesh.claims import (
    CLOCK_SKEW_S,
    check_time,
    read_bool,
    read_bytes,
    read_int,
    read_maps,
    read_number,
    read_str,
    read_strs,
)
from mesh.errors import Expired, MalformedEnvelope, NotYetValid

READERS = (read_str, read_bytes, read_int, read_number, read_bool, read_strs)


@pytest.mark.parametrize("reader", READERS)
def test_missing_field_is_named(reader: Any) -> None:
    with pytest.raises(MalformedEnvelope, match="'x' is missing"):
        reader({}, "x")


@pytest.mark.parametrize(
    ("reader", "bad"),
    [
        (read_str, [1, b"a", None, ["a"], "a" * 257, "line\nbreak", "\x1b[31m", "\u202eabc"]),
        (read_bytes, ["a", 1, None, b"a" * 4097]),
        (read_int, [True, 1.0, "1", -1, 2**63, None]),
        (read_number, [True, "1", math.nan, math.inf, -1, 1e19, None]),
        (read_bool, [0, 1, "true", None]),
        (read_strs, ["abc", [1], ["a" * 257], ["a\n"], ["a"] * 65, {"a": 1}, None]),
        (read_maps, [[1], [{1: 2}], {"a": 1}, "x", [{}] * 65, None]),
    ],
)
def test_wrong_type_or_size_is_malformed(reader: Any, bad: list[Any]) -> None:
    for value in bad:
        with pytest.raises(MalformedEnvelope, match="'x'"):
            reader({"x": value}, "x")


@pytest.mark.parametrize(
    ("reader", "value", "expected"),
    [
        (read_str, "grün", "grün"),
        (read_bytes, b"", b""),
        (read_int, 0, 0),
        (read_number, 1, 1.0),
        (read_bool, False, False),
        (read_strs, ["a", "b"], ("a", "b")),
        (read_maps, [{"a": 1}], ({"a": 1},)),
    ],
)
def test_good_values_pass(reader: Any, value: Any, expected: Any) -> None:
    assert reader({"x": value}, "x") == expected


def test_bytes_of_a_fixed_size() -> None:
    assert read_bytes({"x": b"1234"}, "x", size=4) == b"1234"
    with pytest.raises(MalformedEnvelope):
        read_bytes({"x": b"123"}, "x", size=4)


def test_default_stands_in_for_a_missing_field_only() -> None:
    assert read_int({}, "x", default=5) == 5
    with pytest.raises(MalformedEnvelope):
        read_int({"x": None}, "x", default=5)


def test_time_is_good_from_its_start_to_just_before_its_end() -> None:
    check_time("it", not_before=100.0, expires=200.0, now=100.0)
    check_time("it", not_before=100.0, expires=200.0, now=199.999)
    with pytest.raises(Expired, match="it has expired"):
        check_time("it", not_before=100.0, expires=200.0, now=200.0)


def test_clock_skew_forgives_an_early_start_and_never_a_late_end() -> None:
    check_time("it", not_before=100.0, expires=200.0, now=100.0 - CLOCK_SKEW_S)
    with pytest.raises(NotYetValid, match="clock"):
        check_time("it", not_before=100.0, expires=200.0, now=100.0 - CLOCK_SKEW_S - 0.1)
