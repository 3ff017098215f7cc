"""Of which requests an answer can be gone on with exactly, by a prompt of token ids and nothing else. Pure.

A list of what is known to be harmless, not of what is known to do harm: a parameter that is not here may be anything.
"""

from __future__ import annotations

from typing import Any

import msgspec

from worker.engine.base import Task, TokenIds

CARRIED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "logit_bias",
    "repetition_penalty",
    "ignore_eos",
    "stop_token_ids",
    "skip_special_tokens",
)
"""Fields that mean the same for the rest of an answer as for the whole of it: they go to the successor's engine as they are."""
MAX_STOPS = 16
MAX_STOP_CHARS = 1024


class _Part(msgspec.Struct):
    type: str


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None


class _Format(msgspec.Struct):
    type: str


class Asked(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A request's body, as far as it can be gone on with. What is `Any` only has to be passed on, or does not matter."""

    model: str
    stream: bool | None = None
    stream_options: _Options | None = None
    max_tokens: int | msgspec.UnsetType | None = msgspec.UNSET
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    skip_special_tokens: bool | None = None
    logprobs: bool | int | None = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    seed: Any = None
    logit_bias: Any = None
    repetition_penalty: Any = None
    ignore_eos: Any = None
    stop_token_ids: Any = None
    user: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    metadata: Any = None
    store: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return tuple(text for text in found if text)

    @property
    def show_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def limit(self, way: TokenIds) -> int | None:
        """The most tokens that the whole answer may have; None for what the context holds."""
        return self.max_tokens or None


class _Chat(Asked, kw_only=True):
    messages: list[_Message]
    max_completion_tokens: int | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: _Format | None = None
    modalities: list[str] | None = None
    chat_template_kwargs: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None

    def limit(self, way: TokenIds) -> int | None:
        return self.max_completion_tokens or self.max_tokens or None


class _Completions(Asked, kw_only=True):
    prompt: str | list[Any]
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def limit(self, way: TokenIds) -> int | None:
        absent = self.max_tokens is msgspec.UNSET
        return VLLM_COMPLETION_TOKENS if absent and way is TokenIds.VLLM else self.max_tokens or None


VLLM_COMPLETION_TOKENS = 16
"""What vLLM takes for a completion's ``max_tokens`` if it is not given."""
_DECODERS: dict[Task, msgspec.json.Decoder[Any]] = {
    Task.CHAT: msgspec.json.Decoder(_Chat),
    Task.COMPLETIONS: msgspec.json.Decoder(_Completions),
}


def read_asked(body: bytes | bytearray, task: Task) -> Asked | str:
    """The request, or in one word why its stream could not be gone on with exactly."""
    decoder = _DECODERS.get(task)
    if decoder is None:
        return "task"
    try:
        asked: Asked = decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "parameter"
    if isinstance(asked, _Chat):
        reason = _reason_of_chat(asked)
    else:
        assert isinstance(asked, _Completions)
        reason = _reason_of_completions(asked)
    return reason or _reason(asked) or asked


def _reason(asked: Asked) -> str:
    if not asked.stream:
        return "whole"
    if asked.n not in (None, 1):
        return "n"
    if asked.presence_penalty or asked.frequency_penalty:
        return "penalty"
    if asked.logprobs is not None and asked.logprobs is not False:
        return "logprobs"
    if asked.skip_special_tokens is False:
        return "special"
    if len(asked.stops) > MAX_STOPS or any(len(text) > MAX_STOP_CHARS for text in asked.stops):
        return "stop"
    return ""


def _reason_of_chat(asked: _Chat) -> str:
    if asked.tools or asked.functions:
        return "tools"
    if asked.response_format is not None and asked.response_format.type != "text":
        return "guided"
    if asked.top_logprobs:
        return "logprobs"
    if asked.modalities not in (None, ["text"]):
        return "media"
    for message in asked.messages:
        if isinstance(message.content, list) and any(part.type != "text" for part in message.content):
            return "media"
    return ""


def _reason_of_completions(asked: _Completions) -> str:
    if isinstance(asked.prompt, list) and not (asked.prompt and all(type(token) is int for token in asked.prompt)):
        return "prompts"
    if asked.echo:
        return "echo"
    if asked.suffix:
        return "suffix"
    return "n" if asked.best_of not in (None, 1) else ""
