"""Which requests can be gone on with: those of which it is known, and no others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from worker.engine import Task, TokenIds
from worker.moving.movable import MAX_STOP_CHARS, MAX_STOPS, Asked, read_asked

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
CHAT = {"model": "m", "messages": MESSAGES, "stream": True}
COMPLETION = {"model": "m", "prompt": "Once", "stream": True}
MEDIA = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
HISTORY = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, {"role": "tool", "content": "7", "tool_call_id": "1"}]


def asked(body: dict[str, Any], task: Task = Task.CHAT) -> Asked | str:
    return read_asked(json.dumps(body).encode(), task)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": -1, "seed": 3, "logit_bias": {"7": 1.5}, "repetition_penalty": 1.1},
        {"n": 1, "logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": "none", "presence_penalty": 0, "frequency_penalty": 0.0},
        {"n": None, "logprobs": None, "tools": None, "response_format": None, "stop": None, "max_completion_tokens": None},
        {"response_format": {"type": "text"}, "modalities": ["text"], "user": "u", "metadata": {"a": "b"}, "service_tier": "auto"},
        {"stop": ["a", "b"], "include_stop_str_in_output": True, "stop_token_ids": [7], "skip_special_tokens": True, "ignore_eos": True},
        {"stream_options": {"include_usage": True}, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": MESSAGES + HISTORY},
    ],
)
def test_plain_chat_can_move(more: dict[str, Any]) -> None:
    assert isinstance(asked({**CHAT, **more}), Asked)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "guided"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "guided"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"messages": MEDIA}, "media"),
        ({"modalities": ["text", "audio"]}, "media"),
        ({"presence_penalty": 0.1}, "penalty"),
        ({"frequency_penalty": -1}, "penalty"),
        ({"skip_special_tokens": False}, "special"),
        ({"stop": ["x"] * (MAX_STOPS + 1)}, "stop"),
        ({"stop": "x" * (MAX_STOP_CHARS + 1)}, "stop"),
        ({"guided_json": {}}, "parameter"),
        ({"structured_outputs": {}}, "parameter"),
        ({"return_token_ids": True}, "parameter"),
        ({"min_tokens": 5}, "parameter"),
        ({"reasoning_effort": "low"}, "parameter"),
        ({"use_beam_search": True}, "parameter"),
        ({"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, "parameter"),
        ({"max_tokens": "many"}, "parameter"),
        ({"stream": False}, "whole"),
    ],
)
def test_what_cannot_be_exact_says_why(more: dict[str, Any], why: str) -> None:
    assert asked({**CHAT, **more}) == why


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({}, None),
        ({"prompt": [1, 2, 3]}, None),
        ({"prompt": ["a", "b"]}, "prompts"),
        ({"prompt": [[1], [2]]}, "prompts"),
        ({"prompt": []}, "prompts"),
        ({"echo": True}, "echo"),
        ({"echo": False, "best_of": 1, "suffix": ""}, None),
        ({"best_of": 2}, "n"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": 3}, "logprobs"),
    ],
)
def test_completions(more: dict[str, Any], why: str | None) -> None:
    found = asked({**COMPLETION, **more}, Task.COMPLETIONS)
    assert found == why if why else isinstance(found, Asked)


@pytest.mark.parametrize("task", [Task.RESPONSES, Task.EMBEDDINGS])
def test_other_tasks_never_move(task: Task) -> None:
    assert asked({"model": "m", "input": "x", "stream": True}, task) == "task"


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"model": 3}', b"\xff", b'{"model":"m","messages":' + b"[" * 20_000])
def test_what_is_no_request_cannot_move(body: bytes) -> None:
    assert read_asked(body, Task.CHAT) == "parameter"


@pytest.mark.parametrize(
    ("task", "more", "way", "limit"),
    [
        (Task.CHAT, {}, TokenIds.VLLM, None),
        (Task.CHAT, {"max_tokens": 7}, TokenIds.VLLM, 7),
        (Task.CHAT, {"max_tokens": 7, "max_completion_tokens": 5}, TokenIds.VLLM, 5),
        (Task.COMPLETIONS, {}, TokenIds.VLLM, 16),
        (Task.COMPLETIONS, {"max_tokens": None}, TokenIds.VLLM, None),
        (Task.COMPLETIONS, {}, TokenIds.LLAMACPP, None),
        (Task.COMPLETIONS, {"max_tokens": 9}, TokenIds.LLAMACPP, 9),
    ],
)
def test_limit_of_the_whole_answer(task: Task, more: dict[str, Any], way: TokenIds, limit: int | None) -> None:
    found = asked({**(CHAT if task is Task.CHAT else COMPLETION), **more}, task)
    assert isinstance(found, Asked)
    assert found.limit(way) == limit


def test_stop_strings_one_or_many() -> None:
    for given, wanted in (("a", ("a",)), (["a", "", "b"], ("a", "b")), ([], ()), ("", ())):
        found = asked({**CHAT, "stop": given})
        assert isinstance(found, Asked)
        assert found.stops == wanted
