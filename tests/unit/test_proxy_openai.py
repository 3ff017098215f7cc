"""Which request bodies are taken, and what is said of the others."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import InvalidRequest, ModelNotFound
from mesh.prefix import MAX_BLOCKS, MAX_TEXT_BYTES
from proxy.openai import TASKS, _are_plain, error_body, model_list, parse_call, priority_of, prompt_of, session_of

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
REQUIRED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hi"},
    "/v1/embeddings": {"input": ["a", "b"]},
    "/v1/responses": {"input": "hi"},
}


def refusal(path: str, body: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_call(path, body)
    return caught.value


@pytest.mark.parametrize("path", TASKS)
def test_smallest_request_of_each_route_is_taken_and_its_bytes_kept(path: str) -> None:
    body = json.dumps({"model": "m", **REQUIRED[path]}).encode()
    call = parse_call(path, body)
    assert (call.task, call.path, call.model, call.stream) == (TASKS[path], path, "m", False)
    assert call.body is body


@pytest.mark.parametrize(("value", "stream"), [(True, True), (False, False), (None, False)])
def test_stream_is_read(value: bool | None, stream: bool) -> None:
    assert parse_call(CHAT, json.dumps({"model": "m", "messages": MESSAGES, "stream": value}).encode()).stream is stream


def test_fields_the_proxy_does_not_act_on_pass_whatever_they_hold() -> None:
    body = {"model": "m", "messages": [1, None, {"x": []}], "tools": {"odd": 1}, "logit_bias": "?", "guided_json": [[]], "stop": 5}
    assert parse_call(CHAT, json.dumps(body).encode()).model == "m"


@pytest.mark.parametrize("path", TASKS)
def test_missing_required_field_is_named(path: str) -> None:
    (name,) = REQUIRED[path]
    assert refusal(path, b'{"model": "m"}').param == name
    assert refusal(path, json.dumps(REQUIRED[path]).encode()).param == "model"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 5),
        ("model", None),
        ("model", ["m"]),
        ("model", ""),
        ("model", "m" * 257),
        ("messages", "hi"),
        ("messages", {}),
        ("messages", []),
        ("messages", None),
        ("stream", "true"),
        ("stream", 1),
        ("max_tokens", "5"),
        ("max_tokens", 1.5),
        ("max_tokens", -1),
        ("max_completion_tokens", -1),
        ("max_output_tokens", -5),
        ("n", 0),
        ("n", "2"),
        ("temperature", "hot"),
        ("user", 5),
        ("prompt_cache_key", {}),
    ],
)
def test_wrong_value_is_refused_by_name(field: str, value: Any) -> None:
    body = {"model": "m", "messages": MESSAGES, field: value}
    error = refusal(CHAT, json.dumps(body).encode())
    assert error.param == field
    assert error.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"model": "m"',
        b"[]",
        b"null",
        b"5",
        b'"model"',
        b"\xef\xbb\xbf{}",
        b'{"model": "m", "messages": [1]} trailing',
        b'{"model": "\xff", "messages": [1]}',
        b'{"model": "\\ud800", "messages": [1]}',
        b"{'model': 'm'}",
        b'{"model": "m", "messages": [NaN}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "m", "messages": [' + b"[" * 100_000,
        b"\x1f\x8b\x08\x00",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    assert refusal(CHAT, body).message


@given(st.binary(max_size=100))
def test_any_bytes_are_a_call_or_an_invalid_request(body: bytes) -> None:
    for path in TASKS:
        try:
            parse_call(path, body)
        except InvalidRequest:
            continue


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["model", "messages", "stream", "max_tokens", "n", "user", "prompt", "input", "temperature"])


@given(st.dictionaries(FIELDS, JSON, max_size=5))
def test_any_json_is_a_call_or_an_invalid_request(body: dict[str, Any]) -> None:
    for path in TASKS:
        try:
            call = parse_call(path, json.dumps(body).encode())
        except InvalidRequest as error:
            named = error.param
        else:
            named = None
            assert call.model == body["model"]
        assert named is None or named in {*body, "model", "messages", "prompt", "input"}


NAMES = st.sampled_from(["model", "Model", "mod\\u0065l", "user", "\\u0075ser", "n", "a/b", "a\\/b", "ſ", "s", ""])


@given(st.lists(st.tuples(NAMES, st.sampled_from(["1", '"user"', '"n"', '{"model": 1}', '"\\"model\\""'])), max_size=5))
def test_body_called_plain_names_nothing_twice(fields: list[tuple[str, str]]) -> None:
    body = ("{" + ", ".join(f'"{name}": {value}' for name, value in fields) + "}").encode()
    names = [json.loads(f'"{name}"').casefold() for name, _ in fields]
    assert not _are_plain(body) or len(set(names)) == len(names)


def test_usual_body_is_called_plain() -> None:
    assert _are_plain(json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi\n"}], "max_tokens": 5}).encode())


@pytest.mark.parametrize("second", ["model", "Model", "mod\\u0065l"])
def test_field_given_twice_is_refused(second: str) -> None:
    # Python's json and msgspec take the last, others the first, Go's any capitals: a key's scope must be checked against what runs.
    body = f'{{"model": "allowed", "messages": [1], "{second}": "smuggled"}}'.encode()
    error = refusal(CHAT, body)
    assert (error.param, "twice" in error.message) == ("model", True)


def test_refusal_does_not_repeat_the_prompt() -> None:
    error = refusal(CHAT, json.dumps({"model": 5, "messages": ["top secret"]}).encode())
    assert "secret" not in error.message


def test_model_list_has_openais_shape() -> None:
    assert model_list({"b", "a"}, created=7) == {
        "object": "list",
        "data": [
            {"id": "a", "object": "model", "created": 7, "owned_by": "infermesh"},
            {"id": "b", "object": "model", "created": 7, "owned_by": "infermesh"},
        ],
    }


def test_error_body_has_openais_shape() -> None:
    error = ModelNotFound("no such model", param="model")
    assert error_body(error, kind="invalid_request_error", code=error.code) == {
        "error": {"message": "no such model", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    }


# -- what a request is routed by


def chat(*contents: str, **more: object) -> bytes:
    messages = [{"role": "user" if index % 2 == 0 else "assistant", "content": text} for index, text in enumerate(contents)]
    return json.dumps({"model": "m", "messages": messages, **more}).encode()


def test_conversation_that_goes_on_begins_with_the_chain_it_had() -> None:
    first, second = chat("a" * 5000), chat("a" * 5000, "b" * 300, "c" * 900)
    (one, size), (two, longer) = (prompt_of(parse_call("/v1/chat/completions", body)) for body in (first, second))
    assert len(one) == size // 512 == 9
    assert two[:9] == one
    assert longer > size
    assert len(two) > len(one)


def test_tools_come_before_messages_and_other_models_and_tasks_have_other_chains() -> None:
    def chain(body: bytes, path: str = "/v1/chat/completions") -> tuple[bytes, ...]:
        return prompt_of(parse_call(path, body))[0]

    tools = [{"type": "function", "function": {"name": "f" * 700}}]
    assert chain(chat("x" * 2000, tools=tools))[0] == chain(chat("y" * 2000, tools=tools))[0]
    assert chain(chat("x" * 2000, tools=tools))[0] != chain(chat("x" * 2000))[0]
    other = json.loads(chat("x" * 2000)) | {"model": "n"}
    assert set(chain(json.dumps(other).encode())).isdisjoint(chain(chat("x" * 2000)))
    assert chain(b'{"model":"m","input":"%s"}' % (b"x" * 2000), "/v1/embeddings") == ()


def test_short_prompt_and_long_settings_around_it_have_no_chain() -> None:
    assert prompt_of(parse_call("/v1/chat/completions", chat("x" * 600))) == ((), 0)
    assert prompt_of(parse_call("/v1/chat/completions", chat("x" * 100, guided_json="y" * 10_000))) == ((), 0)


def test_only_the_beginning_of_a_giant_body_is_looked_at() -> None:
    chain, size = prompt_of(parse_call("/v1/chat/completions", chat("x" * (4 << 20))))
    assert (len(chain), size) == (MAX_BLOCKS, MAX_TEXT_BYTES)


def test_session_is_named_by_header_then_cache_key_then_user() -> None:
    call = parse_call("/v1/chat/completions", chat("x", user="u", prompt_cache_key="k"))
    assert session_of(call, "h") == "h"
    assert session_of(call, None) == "k"
    assert session_of(parse_call("/v1/chat/completions", chat("x", user="u")), None) == "u"
    assert session_of(parse_call("/v1/chat/completions", chat("x")), None) is None


@pytest.mark.parametrize(
    ("header", "tier", "priority"),
    [
        (None, None, 0),
        (None, "auto", 0),
        (None, "priority", 0),
        (None, "flex", 2),
        (None, {"odd": 1}, 0),
        ("interactive", "flex", 0),
        (" Standard", None, 1),
        ("batch", None, 2),
    ],
)
def test_priority_is_named_by_header_then_service_tier(header: str | None, tier: object, priority: int) -> None:
    more = {} if tier is None else {"service_tier": tier}
    assert priority_of(parse_call("/v1/chat/completions", chat("x", **more)), header) == priority


def test_unknown_priority_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest) as caught:
        priority_of(parse_call("/v1/chat/completions", chat("x")), "urgent")
    assert caught.value.param == "x-priority"
