"""The language of `mesh logs --filter`: what it says, and that nothing else gets through."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import UsageError
from mesh.filters import MAX_CHARS, parse_filter

NUMBERS = {"latency": "latency_ms", "output": "completion_tokens"}
TEXTS = {"status": "status", "model": "model"}
RECORD = {"latency_ms": 1500, "completion_tokens": 20, "status": "worker_lost", "model": "qwen3 8b"}


def holds(text: str, **fields: Any) -> bool:
    return parse_filter(text, numbers=NUMBERS, texts=TEXTS)(RECORD | fields)


@pytest.mark.parametrize(
    "text",
    [
        "latency>1000ms",
        "latency > 1.4s and latency<2s",
        "latency=1500",
        "latency >= 1500 and not latency > 1500",
        "status=worker_lost",
        "status != ok",
        "status~lost",
        "model='qwen3 8b'",
        'model="qwen3 8b" and output=20',
        "status=ok or output<21",
        "(status=ok or output<21) and latency>1s",
        "not (status=ok and output=20)",
        "status=ok and output=1 or latency<=1500ms",
        "not not status=worker_lost",
    ],
)
def test_a_filter_that_holds(text: str) -> None:
    assert holds(text)


@pytest.mark.parametrize(
    "text", ["latency>1500ms", "status=ok", "status~ok and model~q", "not status~lost", "status=ok and (output=20 or latency>1s)"]
)
def test_a_filter_that_does_not_hold(text: str) -> None:
    assert not holds(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "ends where it needs a field"),
        ("latency", "ends where it needs"),
        ("latency>", "ends where it needs a value"),
        ("latency>fast", "a time such as 250ms"),
        ("output>2s", "a number"),
        ("output>nan", "a number"),
        ("colour=red", "knows no field 'colour'"),
        ("__class__=x", "knows no field"),
        ("status>ok", "takes = != ~"),
        ("latency~1", "takes = != >"),
        ("status=ok output=1", "goes on after its end"),
        ("(status=ok", "lacks a closing parenthesis"),
        ("status=ok)", "goes on after its end"),
        ("status=)", "lacks a value"),
        ("status='ok", "cannot be read"),
        ("(" * 100 + "status=ok", "nested too deeply"),
        ("not " * 100 + "status=ok", "nested too deeply"),
        ("status=" + "x" * MAX_CHARS, "at most"),
    ],
)
def test_what_is_no_filter_is_refused_with_a_reason(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says.replace("(", r"\(").replace(")", r"\)")):
        holds(text)


@given(st.text(st.sampled_from(list("latencysuodr=!<>~()'\" 0123456789ms.")), max_size=60))
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    try:
        assert holds(text) in (True, False)
    except UsageError:
        return


def test_a_text_in_quotes_is_never_a_word_of_the_language() -> None:
    assert holds("model='and' or status=worker_lost", model="or")
    assert holds("model=')'", model=")")
