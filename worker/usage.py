"""Counting tokens: what the engine says a request used, and hiding that where the client did not ask. Pure.

The worker always asks a streaming engine for its usage (``stream_options.include_usage``), so that every request is counted; the
extra event is passed on only to clients that asked for it themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from mesh.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def to_trailer(self) -> dict[str, int]:
        return {"in": self.prompt, "out": self.completion, "cached": self.cached}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request body ready for the engine. ``show_usage``: the client asked for the usage event itself."""

    body: bytes
    stream: bool
    show_usage: bool


_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def prepare_body(body: bytes, *, task: str, engine_model: str | None) -> Prepared:
    """Change only what must be: the model's name towards the engine, and the wish for usage. Raises `InvalidRequest`.

    ``engine_model`` None leaves the name as it is. Every other field keeps its bytes.
    """
    try:
        fields = _decode_fields(body)
        stream = bool(msgspec.json.decode(fields.get("stream", b"false")))
        options = msgspec.json.decode(fields.get("stream_options", b"null"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}") from None
    if options is not None and not isinstance(options, dict):
        raise InvalidRequest("'stream_options' must be an object", param="stream_options")
    if options and not stream:
        raise InvalidRequest("'stream_options' is only allowed with 'stream': true", param="stream_options")
    show_usage = bool(options and options.get("include_usage"))
    changed = False
    if engine_model is not None:
        fields["model"] = msgspec.Raw(msgspec.json.encode(engine_model))
        changed = True
    if stream and task in ("chat", "completions") and not show_usage:
        fields["stream_options"] = msgspec.Raw(msgspec.json.encode({**(options or {}), "include_usage": True}))
        changed = True
    return Prepared(body=msgspec.json.encode(fields) if changed else body, stream=stream, show_usage=show_usage)


class _Details(msgspec.Struct):
    cached_tokens: int | float | None = None


class _UsageFields(msgspec.Struct):
    prompt_tokens: int | float | None = None
    completion_tokens: int | float | None = None
    input_tokens: int | float | None = None
    output_tokens: int | float | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


class _Inner(msgspec.Struct):
    usage: _UsageFields | None = None


class _Answer(msgspec.Struct):
    usage: _UsageFields | None = None
    response: _Inner | None = None
    choices: list[msgspec.Raw] | None = None
    type: str | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode


def read_answer(data: bytes) -> tuple[Usage | None, _Answer | None]:
    """Usage in an answer or event of the engine, and the answer's outline; None where there is none or it is not JSON.

    JSON of an unusual shape has an empty outline.
    """
    try:
        answer = _decode_answer(data)
    except msgspec.ValidationError:
        return None, _Answer() if _is_json(data) else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None, None
    fields = answer.usage or (answer.response.usage if answer.response is not None else None)
    if fields is None:
        return None, answer
    details = fields.prompt_tokens_details or fields.input_tokens_details
    usage = Usage(
        prompt=_count(fields.prompt_tokens, fields.input_tokens),
        completion=_count(fields.completion_tokens, fields.output_tokens),
        cached=_count(details.cached_tokens if details is not None else None),
    )
    return usage, answer


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _count(*values: int | float | None) -> int:
    return next((int(min(max(0, value), 10**9)) for value in values if value is not None), 0)


class EventStream:
    """Cuts an engine's server-sent events at event boundaries, reads usage on the way, and knows whether it ended properly.

    ``feed`` returns the bytes to pass on: whole events only, without the usage event if the client did not ask for it. In the usual case, a
    read that holds whole events and no usage, the bytes are returned as they came.
    """

    MAX_EVENT_BYTES = 16 * 1024 * 1024

    def __init__(self, *, show_usage: bool) -> None:
        self.usage = Usage()
        self.complete = False
        self._show_usage = show_usage
        self._rest = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Raises `ValueError` if one event grows beyond `MAX_EVENT_BYTES`."""
        whole = data if not self._rest and data.endswith(b"\n\n") else self._cut(data)
        if b'"usage"' not in whole and b"[DONE]" not in whole and b"response." not in whole:
            return whole
        return self._look(whole)

    def close(self) -> bytes:
        """What is left when the engine's stream ends: a last event whose closing blank line is missing.

        Passed on only if it is the stream's proper end; else it may be half an event, and that is dropped.
        """
        rest, self._rest = bytes(self._rest), bytearray()
        last = self._look(rest.rstrip(b"\r\n") + b"\n\n") if rest.strip() else b""
        return last if self.complete else b""

    def _cut(self, data: bytes) -> bytes:
        """All whole events so far; what is left waits for the next read. Looks at no byte twice, however small the reads."""
        rest = self._rest
        at = max(0, len(rest) - 3)
        rest += data
        lf, crlf = rest.rfind(b"\n\n", at), rest.rfind(b"\n\r\n", at)
        end = max(lf + 2 if lf >= 0 else 0, crlf + 3 if crlf >= 0 else 0)
        if not end:
            if len(rest) > self.MAX_EVENT_BYTES:
                raise ValueError("an event without end")
            return b""
        whole = bytes(rest[:end])
        del rest[:end]
        return whole

    def _look(self, whole: bytes) -> bytes:
        """Event by event: take the usage, note the end, drop what the client did not ask for."""
        kept = []
        for event in whole.replace(b"\r\n", b"\n").split(b"\n\n"):
            if event and self._keep(event):
                kept.append(event)
        return b"\n\n".join([*kept, b""]) if kept else b""

    def _keep(self, event: bytes) -> bool:
        data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        if data == b"[DONE]":
            self.complete = True
            return True
        usage, answer = read_answer(data)
        if usage is not None:
            self.usage = usage
        if answer is None:
            return True
        if answer.type in ("response.completed", "response.failed", "response.incomplete"):
            self.complete = True
        return self._show_usage or usage is None or answer.choices != []


def engine_complaint(body: bytes, status: int) -> str:
    """The message in an engine's error answer, whatever its shape, for the client to read."""
    try:
        parsed: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return f"the engine answered {status}"
    found = parsed.get("error", parsed) if isinstance(parsed, dict) else None
    message = found.get("message") if isinstance(found, dict) else found
    return message[:2000] if isinstance(message, str) and message else f"the engine answered {status}"
