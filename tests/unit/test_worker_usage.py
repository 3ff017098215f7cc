"""Counting tokens: exact whatever the pieces, shown only to who asked, and a stream that was cut is known to be."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import EngineUnavailable, InvalidRequest
from worker.usage import EventStream, Usage, engine_complaint, engine_failure, prepare_body, read_answer


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def chunk(text: str, **more: Any) -> dict[str, Any]:
    return {"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}], **more}


USAGE = {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13, "prompt_tokens_details": {"cached_tokens": 8}}
USAGE_EVENT = event({"id": "c", "choices": [], "usage": USAGE})
TOKENS = event(chunk("one")) + event(chunk('two [DONE] response. "usage"'))
DONE = event(b"[DONE]")
COUNTED = Usage(prompt=11, completion=2, cached=8)


def run(pieces: list[bytes], *, show_usage: bool) -> tuple[bytes, EventStream]:
    events = EventStream(show_usage=show_usage)
    passed = b"".join([*(events.feed(piece) for piece in pieces), events.close()])
    return passed, events


@pytest.mark.parametrize("show_usage", [True, False])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_usage_is_exact_whatever_two_pieces_it_comes_in(show_usage: bool, newline: bytes) -> None:
    stream = TOKENS + USAGE_EVENT + DONE
    expected = stream if show_usage else TOKENS + DONE
    sent = stream.replace(b"\n", newline)
    for at in range(len(sent) + 1):
        passed, events = run([piece for piece in (sent[:at], sent[at:]) if piece], show_usage=show_usage)
        assert passed.replace(b"\r\n", b"\n") == expected
        assert events.usage == COUNTED
        assert events.complete


@pytest.mark.parametrize("show_usage", [True, False])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_usage_is_exact_byte_by_byte(show_usage: bool, newline: bytes) -> None:
    sent = (TOKENS + USAGE_EVENT + DONE).replace(b"\n", newline)
    passed, events = run([bytes((byte,)) for byte in sent], show_usage=show_usage)
    assert passed.replace(b"\r\n", b"\n") == (TOKENS + USAGE_EVENT + DONE if show_usage else TOKENS + DONE)
    assert events.usage == COUNTED


TEXTS = st.text(max_size=12) | st.sampled_from(["[DONE]", "data: [DONE]\n\n", '"usage"', "\n\n", "\r\n\r\n", "response.", "\\u0022"])


@given(st.lists(TEXTS, max_size=5), st.lists(st.integers(0, 600), max_size=6), st.booleans(), st.sampled_from([b"\n", b"\r\n"]))
def test_any_texts_in_any_pieces_pass_unchanged_and_are_counted(texts: list[str], cuts: list[int], show: bool, newline: bytes) -> None:
    events = [event(chunk(text)) for text in texts]
    usage = {"prompt_tokens": 5, "completion_tokens": len(texts)}
    stream = b"".join([*events, event({"choices": [], "usage": usage}), DONE]).replace(b"\n", newline)
    marks = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[start:end] for start, end in itertools.pairwise(marks) if end > start]
    passed, found = run(pieces, show_usage=show)
    parts = passed.replace(b"\r\n", b"\n").split(b"\n\n")
    said = [json.loads(part.removeprefix(b"data: ")) for part in parts if part not in (b"", b"data: [DONE]")]
    assert [item["choices"][0]["delta"]["content"] for item in said if item["choices"]] == texts
    assert [item for item in said if not item["choices"]] == ([{"choices": [], "usage": usage}] if show else [])
    assert found.usage == Usage(prompt=5, completion=len(texts))
    assert found.complete


def test_only_whole_events_are_passed_on() -> None:
    events = EventStream(show_usage=True)
    stream = TOKENS + DONE
    passed = b""
    for byte in stream:
        passed += events.feed(bytes((byte,)))
        assert passed == b"" or passed.endswith(b"\n\n")


def test_usual_read_is_passed_on_as_the_very_same_bytes() -> None:
    events = EventStream(show_usage=False)
    data = event(chunk("hello"))
    assert events.feed(data) is data


BLANK_LINES = [b"data: 1\n\r\n", b"data: 1\r\n\n", b"data: 1\n\n", b"data: 1\r\n\r\n", b": ping\n\n", b"event: x\ndata: 1\n\n"]


@pytest.mark.parametrize("mixed", BLANK_LINES)
def test_any_blank_line_ends_an_event(mixed: bytes) -> None:
    assert EventStream(show_usage=True).feed(mixed) == mixed


@pytest.mark.parametrize("at", range(len(TOKENS)))
def test_stream_cut_anywhere_is_incomplete_and_half_an_event_is_dropped(at: int) -> None:
    passed, events = run([TOKENS[:at]] if at else [], show_usage=True)
    assert not events.complete
    assert passed == TOKENS[: TOKENS.rfind(b"\n\n", 0, at) + 2 if b"\n\n" in TOKENS[:at] else 0]


@pytest.mark.parametrize("end", [b"data: [DONE]", b"data: [DONE]\n", b"data: [DONE]\r\n", b"data:[DONE]\n\n"])
def test_end_without_its_blank_line_is_still_the_end(end: bytes) -> None:
    passed, events = run([event(chunk("one")), end], show_usage=True)
    assert events.complete
    assert passed.endswith(b"[DONE]\n\n")


def test_done_inside_a_text_is_not_the_end() -> None:
    _, events = run([event(chunk("data: [DONE]"))], show_usage=True)
    assert not events.complete


@pytest.mark.parametrize("kind", ["response.completed", "response.failed", "response.incomplete"])
def test_responses_api_ends_with_its_own_event_and_tells_usage_there(kind: str) -> None:
    response = {"id": "r", "usage": {"input_tokens": 9, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 3}}}
    delta = event({"type": "response.output_text.delta", "delta": "x"})
    stream = delta + b"event: " + kind.encode() + b"\n" + event({"type": kind, "response": response})
    passed, events = run([stream], show_usage=False)
    assert passed == stream
    assert events.complete
    assert events.usage == Usage(prompt=9, completion=4, cached=3)


def test_usage_beside_choices_is_never_hidden() -> None:
    stream = event(chunk("one", usage={"prompt_tokens": 5, "completion_tokens": 1})) + event(chunk("two", usage=None)) + DONE
    passed, events = run([stream], show_usage=False)
    assert passed == stream
    assert events.usage == Usage(prompt=5, completion=1)


@pytest.mark.parametrize(
    "data",
    [
        b"{not json",
        b"\xff\xfe",
        b"[1, 2]",
        b'"usage"',
        b'{"usage": 5}',
        b'{"usage": {"prompt_tokens": "x"}}',
        b'{"type": 5, "usage": {}}',
        b"[" * 5000,
    ],
)
def test_odd_events_pass_and_count_nothing(data: bytes) -> None:
    stream = b'data: "usage"\n\n' + event(data) + DONE
    passed, events = run([stream], show_usage=False)
    assert passed == stream
    assert events.usage == Usage()
    assert events.complete


def test_event_without_end_is_refused_and_costs_no_more_than_its_size() -> None:
    events = EventStream(show_usage=False)
    piece = b"x" * (64 * 1024)
    with pytest.raises(ValueError, match="without end"):  # noqa: PT012 - the bound falls somewhere in the loop
        for _ in range(EventStream.MAX_EVENT_BYTES // len(piece) + 2):
            assert events.feed(piece) == b""


@given(st.lists(st.binary(max_size=50), max_size=6), st.booleans())
def test_any_bytes_are_taken(pieces: list[bytes], show_usage: bool) -> None:
    run([piece for piece in pieces if piece], show_usage=show_usage)


# -- what the engine is asked


def test_stream_is_always_asked_for_its_usage_and_shown_only_to_who_asked() -> None:
    for options, shown in ((None, False), ({}, False), ({"include_usage": False}, False), ({"include_usage": True}, True)):
        body: dict[str, Any] = {"model": "m", "stream": True, "messages": []}
        if options is not None:
            body["stream_options"] = options
        prepared = prepare_body(json.dumps(body).encode(), task="chat", engine_model=None)
        assert json.loads(prepared.body)["stream_options"]["include_usage"] is True
        assert (prepared.stream, prepared.show_usage) == (True, shown)


def test_other_stream_options_are_kept() -> None:
    body = b'{"stream": true, "stream_options": {"continuous_usage_stats": true}}'
    options = json.loads(prepare_body(body, task="completions", engine_model=None).body)["stream_options"]
    assert options == {"continuous_usage_stats": True, "include_usage": True}


@pytest.mark.parametrize(("task", "stream"), [("chat", False), ("embeddings", False), ("responses", True), ("responses", False)])
def test_body_that_need_not_change_keeps_its_bytes(task: str, stream: bool) -> None:
    body = json.dumps({"model": "m", "stream": stream, "messages": [{"x": 1.0}]}).encode()
    assert prepare_body(body, task=task, engine_model=None).body is body


def test_model_is_renamed_and_every_other_field_keeps_its_bytes() -> None:
    body = b'{"model": "ours", "temperature": 0.10, "seed": 12345678901234567890, "x": [ 1e2 ], "stream": null}'
    changed = prepare_body(body, task="chat", engine_model="theirs").body
    assert json.loads(changed) == json.loads(body) | {"model": "theirs"}
    for kept in (b"0.10", b"12345678901234567890", b"[ 1e2 ]"):
        assert kept in changed


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"stream": true, "stream_options": 5}', "stream_options"),
        (b'{"stream": true, "stream_options": []}', "stream_options"),
        (b'{"stream_options": {"include_usage": true}}', "stream_options"),
        (b"[]", None),
        (b"{", None),
        (b"\xff", None),
        (b"", None),
        (b"[" * 100_000, None),
    ],
)
def test_body_that_cannot_be_prepared_is_the_clients_mistake(body: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prepare_body(body, task="chat", engine_model=None)
    assert caught.value.param == param


@given(st.binary(max_size=60))
def test_any_body_is_prepared_or_refused(body: bytes) -> None:
    try:
        prepare_body(body, task="chat", engine_model="x")
    except InvalidRequest:
        return


# -- answers and complaints


def test_usage_of_a_whole_answer_is_read() -> None:
    usage, _ = read_answer(json.dumps({"choices": [{"message": {}}], "usage": USAGE}).encode())
    assert usage == COUNTED
    usage, _ = read_answer(b'{"data": [], "usage": {"prompt_tokens": 7, "total_tokens": 7}}')
    assert usage == Usage(prompt=7)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"prompt_tokens": -5, "completion_tokens": 10**30}, Usage(prompt=0, completion=10**9)),
        ({"prompt_tokens": 12.0, "completion_tokens": None}, Usage(prompt=12)),
        ({}, Usage()),
    ],
)
def test_odd_counts_are_kept_within_reason(counts: dict[str, Any], expected: Usage) -> None:
    assert read_answer(json.dumps({"usage": counts}).encode())[0] == expected


@pytest.mark.parametrize("data", [b'{"usage": "none"}', b'{"choices": 5}', b"[]", b'{"type": []}', b'{"response": "text"}'])
def test_json_of_an_unusual_shape_is_an_answer_without_usage(data: bytes) -> None:
    usage, answer = read_answer(data)
    assert usage is None
    assert answer is not None


@pytest.mark.parametrize("data", [b"", b"<html>", b'{"choices": [', b'{"usage": "x", ', b"\xff", b'{"choices": 5, "half'])
def test_what_is_no_json_is_no_answer(data: bytes) -> None:
    assert read_answer(data) == (None, None)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"message": "too long"}', "too long"),
        (b'{"error": "too long"}', "too long"),
        (b'{"object": "error", "message": "too long"}', "too long"),
        (b"{}", "the engine answered 400"),
        (b'{"error": {"message": 5}}', "the engine answered 400"),
        (b"<html>", "the engine answered 400"),
        (b"[1]", "the engine answered 400"),
        (b"", "the engine answered 400"),
        (b'{"error": {"message": "' + b"x" * 5000 + b'"}}', "x" * 2000),
    ],
)
def test_complaint_of_any_shape_is_found(body: bytes, said: str) -> None:
    assert engine_complaint(body, 400) == said


async def test_a_large_body_gets_the_wish_without_being_copied_as_a_whole() -> None:
    image = "A" * (3 << 20)
    body = bytearray(json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": image}]}).encode())
    prepared = prepare_body(body, task="chat", engine_model=None)
    assert prepared.body is body
    pieces = [bytes(piece) async for piece in prepared.pieces()]
    assert max(map(len, pieces)) <= 256 << 10
    assert prepared.size == sum(map(len, pieces))
    sent = json.loads(b"".join(pieces))
    assert sent["stream_options"] == {"include_usage": True}
    assert sent["messages"][0]["content"] == image


def test_null_stream_options_are_replaced_and_not_doubled() -> None:
    prepared = prepare_body(b'{"model": "m", "stream_options": null, "stream": true}', task="chat", engine_model=None)
    assert prepared.body.count(b"stream_options") == 1
    assert json.loads(prepared.body)["stream_options"] == {"include_usage": True}


# -- an engine that gives up


GAVE_UP = b'data: {"error": {"message": "the engine died", "type": "x", "code": 500}}\n\n'


@pytest.mark.parametrize(
    "event",
    [
        GAVE_UP,
        GAVE_UP.replace(b"\n", b"\r\n"),
        b'data: {"error": "out of memory"}\n\n',
        b'event: error\ndata: {"type": "error", "message": "x"}\n\n',
        b'data: {"choices": 5, "error": {}}\n\n',
        b'data: {"choices": [], "usage": {"prompt_tokens": 1}, "error": true}\n\n',
    ],
)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_error_event_is_a_failure_whatever_follows_it(event: bytes, size: int) -> None:
    token = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
    data, said = token + event + token + b"data: [DONE]\n\n", b""
    stream = EventStream(show_usage=True)
    for at in range(0, len(data), size):
        said += stream.feed(data[at : at + size])
        if stream.failure is not None:
            break
    assert stream.failure is not None
    assert not stream.complete
    assert said == token


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices": [{"delta": {"content": "an \\"error\\" of mine"}}], "usage": null}\n\n',
        b'data: {"choices": [{"delta": {"content": "error"}}], "error": null}\n\n',
        b'data: {"choices": [{"delta": {"tool_calls": [{"error": 1}]}}]}\n\n',
        b'data: {"type": "response.failed", "response": {"error": {"message": "x"}}}\n\n',
    ],
)
def test_talk_of_errors_is_none(event: bytes) -> None:
    stream = EventStream(show_usage=True)
    assert stream.feed(event) == event
    assert stream.failure is None


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (b'{"error": {"message": "too long", "code": 400}}', InvalidRequest),
        (b'{"error": {"message": "slow down", "code": 429}}', EngineUnavailable),
        (b'{"error": {"message": "x", "code": "bad"}}', EngineUnavailable),
        (b'{"error": "out of memory"}', EngineUnavailable),
        (b'{"error": []}', EngineUnavailable),
        (b"not json", EngineUnavailable),
    ],
)
def test_failure_is_the_clients_or_the_engines(said: bytes, kind: type[Exception]) -> None:
    assert type(engine_failure(said)) is kind
