"""How each kind of engine tells token ids: what to ask for, where they are in its events, how they come out of them again. Pure.

vLLM has a parameter for it, and tells every token. llama.cpp has none in its OpenAI routes, but tells the id of each event's last token
with the log probabilities and the count of tokens with the timings; both are asked for in the way that costs it nothing (what is left
after sampling, one candidate; no difference in tokens/s on SmolLM2-135M). It sends no event while a character is incomplete, so of an
event with several tokens all but the last are unknown: a gap, which whoever goes on fills by tokenizing its text and counting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from worker.engine.base import TOKEN_IDS_ASKED, Task, TokenIds

WISHES: Mapping[tuple[TokenIds, Task], Mapping[str, Any]] = {
    **{(way, Task.COMPLETIONS): fields for way, fields in TOKEN_IDS_ASKED.items()},
    (TokenIds.VLLM, Task.CHAT): TOKEN_IDS_ASKED[TokenIds.VLLM],
    (TokenIds.LLAMACPP, Task.CHAT): {**TOKEN_IDS_ASKED[TokenIds.LLAMACPP], "logprobs": True, "top_logprobs": 1},
}
"""What a request must ask for so that the answer's events tell ids."""


class Told(msgspec.Struct, frozen=True):
    """What one event of an engine says.

    ``shown``: the event as it would have been, had nobody asked for ids. ``count`` new tokens, ``ids`` those that are known: all of them,
    or the last. ``odd``: in one word, what no answer has that can be gone on with.
    """

    shown: bytes
    text: str = ""
    ids: Sequence[int] = ()
    count: int = 0
    finish: str | None = None
    prompt_ids: list[int] | None = None
    prompt_tokens: int | None = None
    id: str = ""
    model: str = ""
    created: int = 0
    usage: bool = False
    odd: str = ""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    audio: Any = None


class _LastToken(msgspec.Struct):
    id: int


class Logprobs(msgspec.Struct):
    """Of llama.cpp: those of an event's last token."""

    content: list[_LastToken] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: Logprobs | None = None


class Timings(msgspec.Struct):
    """Of llama.cpp: how many tokens so far."""

    cache_n: int = 0
    prompt_n: int = 0
    predicted_n: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    id: str = ""
    model: str = ""
    created: int = 0
    usage: Any = None
    timings: Timings | None = None
    prompt_token_ids: list[int] | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_choices = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode
_NULL = msgspec.Raw(b"null")
_NO_DELTA = _Delta()


def read_event(way: TokenIds, data: bytes, seen: int) -> Told:
    """One event's JSON; ``seen`` tokens were told before it. Raises a `msgspec.DecodeError` or `UnicodeDecodeError` on anything else."""
    event = _decode(data)
    if len(event.choices) != 1 or event.error is not None:
        if event.choices == [] and event.usage is not None:
            return Told(data, usage=True)
        return Told(data, odd="error" if event.error is not None else "shape")
    choice = event.choices[0]
    delta = choice.delta or _NO_DELTA
    odd = ""
    if choice.index or delta is not _NO_DELTA:
        odd = _odd(choice, delta)
    text = (delta.content if choice.text is None else choice.text) or ""
    if way is TokenIds.VLLM:
        prompt_ids = event.prompt_token_ids or choice.prompt_token_ids
        ids = choice.token_ids or ()
        shown = _without(data, b'"token_ids":') if ids else data
        if prompt_ids:
            shown = _without(shown, b'"prompt_token_ids":')
        return Told(
            shown,
            text,
            ids,
            len(ids),
            choice.finish_reason,
            prompt_ids,
            len(prompt_ids) if prompt_ids else None,
            event.id,
            event.model,
            event.created,
            odd=odd,
        )
    logprobs, timings = choice.logprobs, event.timings
    last = tuple(token.id for token in logprobs.content) if logprobs is not None and logprobs.content else ()
    if len(last) > 1 or (last and timings is None):
        odd = odd or "shape"
    return Told(
        _without_logprobs(data, choice.finish_reason is not None),
        text,
        last,
        timings.predicted_n - seen if timings is not None and last else 0,
        choice.finish_reason,
        None,
        timings.cache_n + timings.prompt_n if timings is not None else None,
        event.id,
        event.model,
        event.created,
        odd=odd,
    )


def _odd(choice: _Choice, delta: _Delta) -> str:
    if choice.index:
        return "n"
    if delta.tool_calls or delta.function_call is not None:
        return "tools"
    if delta.reasoning_content or delta.reasoning:
        return "reasoning"
    return "shape" if delta.refusal or delta.audio is not None else ""


def _without(data: bytes, field: bytes) -> bytes:
    """Null in place of a list of numbers, as vLLM writes it where nobody asked. In a JSON text's strings no such field can be:
    its quotes would be escaped."""
    at = data.rfind(field)
    if at < 0:
        return data
    start = data.index(b"[", at)
    return data[:start] + b"null" + data[data.index(b"]", start) + 1 :]


def _without_logprobs(data: bytes, is_last: bool) -> bytes:
    """As llama.cpp writes an event without log probabilities: a chat's has no such field, a completion's a null."""
    fields = _decode_fields(data)
    if not is_last:
        fields.pop("timings", None)  # the last event has them in any case
    choices = _decode_choices(fields["choices"])
    for choice in choices:
        if "delta" in choice:
            choice.pop("logprobs", None)
        elif "logprobs" in choice:
            choice["logprobs"] = _NULL
    fields["choices"] = msgspec.Raw(msgspec.json.encode(choices))
    return msgspec.json.encode(fields)
