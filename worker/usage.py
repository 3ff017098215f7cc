"""Counting tokens: what the engine says a request used, and hiding that where the client did not ask. Pure.

The worker always asks a streaming engine for its usage (``stream_options.include_usage``), so that every request is counted; the
extra event is passed on only to clients that asked for it themselves.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from mesh.errors import EngineUnavailable, InvalidRequest, MeshError


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request at one engine. ``resumed`` of the ``prompt`` are an answer that another worker began."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    resumed: int = 0

    def to_trailer(self) -> dict[str, int]:
        fields = {"in": self.prompt, "out": self.completion, "cached": self.cached}
        if self.resumed:
            fields["base"] = self.resumed
        return fields | {"think": self.reasoning} if self.reasoning else fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request body ready for the engine. ``show_usage``: the client asked for the usage event itself.

    ``wish`` goes before ``body``, in the place of its first ``skip`` bytes. ``fixed``: in one word why its stream cannot go on at another
    worker, empty if it can; None if nobody asked.
    """

    body: bytes | bytearray
    stream: bool
    show_usage: bool
    wish: bytes = b""
    skip: int = 0
    fixed: str | None = None

    @property
    def size(self) -> int:
        return len(self.wish) + len(self.body) - self.skip

    async def pieces(self) -> AsyncIterator[bytes | memoryview]:
        """What to send, in order; a large body is never copied as a whole."""
        yield self.wish
        rest = memoryview(self.body)[self.skip :]
        for at in range(0, len(rest), PIECE_BYTES):
            yield rest[at : at + PIECE_BYTES]


class _Asked(msgspec.Struct):
    stream: bool | None = None
    stream_options: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET


_decode_asked = msgspec.json.Decoder(_Asked).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
LARGE_BYTES = 1 << 20
PIECE_BYTES = 256 << 10
NO_WISH: Mapping[str, Any] = {}


def prepare_body(body: bytes | bytearray, *, task: str, engine_model: str | None, wish: Mapping[str, Any] = NO_WISH) -> Prepared:
    """Change only what must be: the model's name towards the engine, and the wish for usage. Raises `InvalidRequest`.

    ``engine_model`` None leaves the name as it is. ``wish`` are more fields to be set. Every other field keeps its bytes. In the usual
    case the wish is put in front of the first field and nothing is encoded again, so a body of many megabytes costs one scan and one copy.
    """
    try:
        asked = _decode_asked(body)
        stream, absent = bool(asked.stream), asked.stream_options is msgspec.UNSET
        options = asked.stream_options or None
        show_usage = bool(options and options.get("include_usage"))
        new: dict[str, Any] = dict(wish)
        if stream and not show_usage and task in ("chat", "completions"):
            new["stream_options"] = {**(options or {}), "include_usage": True}
        if engine_model is not None or any(b'"%b"' % name.encode() in body for name in wish) or (not absent and "stream_options" in new):
            body = _rewritten(body, engine_model, new)
        elif new:
            skip, front = body.index(b"{") + 1, msgspec.json.encode(new)[:-1] + b","
            if len(body) >= LARGE_BYTES:
                return Prepared(body=body, stream=stream, show_usage=show_usage, wish=front, skip=skip)
            body = front + body[skip:]
    except msgspec.ValidationError as error:
        param = str(error).partition("`$.")[2].partition("`")[0].partition(".")[0] or None
        raise InvalidRequest(f"The request body is not valid: {error}", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}") from None
    if options and not stream:
        raise InvalidRequest("'stream_options' is only allowed with 'stream': true", param="stream_options")
    return Prepared(body=body, stream=stream, show_usage=show_usage)


def _rewritten(body: bytes | bytearray, engine_model: str | None, new: dict[str, Any]) -> bytes:
    """The body with the model's name and other fields replaced."""
    fields = _decode_fields(body)
    if engine_model is not None:
        new = {"model": engine_model, **new}
    return msgspec.json.encode({**fields, **new})


_ABSENT = msgspec.Raw()


class _Details(msgspec.Struct):
    cached_tokens: int | float | None = None
    reasoning_tokens: int | float | None = None


class _UsageFields(msgspec.Struct):
    prompt_tokens: int | float | None = None
    completion_tokens: int | float | None = None
    input_tokens: int | float | None = None
    output_tokens: int | float | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Inner(msgspec.Struct):
    usage: _UsageFields | None = None


class _Answer(msgspec.Struct):
    usage: _UsageFields | None = None
    response: _Inner | None = None
    choices: list[msgspec.Raw] | None = None
    type: str | None = None
    object: str | None = None
    error: msgspec.Raw = _ABSENT

    @property
    def failed(self) -> bool:
        """Whether it says that the engine gave up: ``error`` beside or instead of an answer, or the Responses API's event of that type."""
        if self.object == "response":
            return False  # its ``status`` says so, and whoever asked for one reads that
        return bytes(self.error) not in (b"", b"null") or self.type == "error"


class _Bare(msgspec.Struct):
    error: msgspec.Raw = _ABSENT


_decode_bare = msgspec.json.Decoder(_Bare).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode


def read_answer(data: bytes) -> tuple[Usage | None, _Answer | None]:
    """Usage in an answer or event of the engine, and the answer's outline; None where there is none or it is not JSON.

    JSON of an unusual shape has an empty outline, but for its ``error``.
    """
    try:
        answer = _decode_answer(data)
    except msgspec.ValidationError:
        return None, _odd_answer(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None, None
    fields = answer.usage or (answer.response.usage if answer.response is not None else None)
    if fields is None:
        return None, answer
    details = fields.prompt_tokens_details or fields.input_tokens_details
    said = fields.completion_tokens_details or fields.output_tokens_details
    usage = Usage(
        prompt=_count(fields.prompt_tokens, fields.input_tokens),
        completion=_count(fields.completion_tokens, fields.output_tokens),
        cached=_count(details.cached_tokens if details is not None else None),
        reasoning=_count(said.reasoning_tokens if said is not None else None),
    )
    return usage, answer


def _odd_answer(data: bytes) -> _Answer | None:
    """What can be said of an answer whose fields have odd types; None of what is not JSON."""
    try:
        return _Answer(error=_decode_bare(data).error)
    except msgspec.ValidationError:
        return _Answer() if _is_json(data) else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _count(*values: int | float | None) -> int:
    for value in values:
        if value is not None:
            return int(min(max(0, value), 10**9))
    return 0


class EventStream:
    """Cuts an engine's server-sent events at event boundaries, reads usage on the way, and knows whether it ended properly.

    ``feed`` returns the bytes to pass on: whole events only, without the usage event if the client did not ask for it. In the usual case, a
    read that holds whole events and no usage, the bytes are returned as they came.
    """

    MAX_EVENT_BYTES = 16 * 1024 * 1024

    def __init__(self, *, show_usage: bool) -> None:
        self.usage = Usage()
        self.complete = False
        self.failure: bytes | None = None
        """The event in which the engine said that it gave up. It is not passed on, nor is anything after it."""
        self._show_usage = show_usage
        self._rest = bytearray()

    @property
    def so_far(self) -> Usage:
        """What the engine has told of its usage by now."""
        return self.usage

    def feed(self, data: bytes) -> bytes:
        """Raises `ValueError` if one event grows beyond `MAX_EVENT_BYTES`."""
        whole = self.cut(data)
        find = whole.find  # half of what `in` takes: that tries each time whether it was asked for a number
        if find(b'"usage"') < 0 and find(b"[DONE]") < 0 and find(b"response.") < 0 and find(b'"error"') < 0:
            return whole
        return self._look(whole)

    def close(self) -> bytes:
        """What is left when the engine's stream ends: a last event whose closing blank line is missing.

        Passed on only if it is the stream's proper end; else it may be half an event, and that is dropped.
        """
        rest = self.rest()
        last = self._look(rest) if rest else b""
        return last if self.complete else b""

    @property
    def waiting(self) -> bool:
        """Whether the beginning of an event waits for its end."""
        return bool(self._rest)

    def rest(self) -> bytes:
        """What is left, as if its closing blank line were there."""
        rest, self._rest = bytes(self._rest), bytearray()
        return rest.rstrip(b"\r\n") + b"\n\n" if rest.strip() else b""

    def cut(self, data: bytes) -> bytes:
        """All whole events so far; what is left waits for the next read. Looks at no byte twice, however small the reads."""
        rest = self._rest
        if not rest and data.endswith(b"\n\n"):
            return data
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
            if self.failure is not None:
                break
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
        if answer.failed:
            self.failure, self.complete = data, False
            return False
        if answer.type in ("response.completed", "response.failed", "response.incomplete"):
            self.complete = True
        return self._show_usage or usage is None or answer.choices != []


def engine_failure(said: bytes) -> MeshError:
    """What an engine's own word that it gave up, in an answer it had begun, is to the client: its mistake or the engine's."""
    try:
        parsed: Any = msgspec.json.decode(said)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        parsed = None
    found = parsed.get("error") if isinstance(parsed, dict) else None
    code = found.get("code") if isinstance(found, dict) else None
    status = code if type(code) is int and 400 <= code < 600 else 500
    complaint = engine_complaint(said, status)
    if status < 500 and status != 429:
        return InvalidRequest(complaint)
    return EngineUnavailable(f"The worker's engine gave up in the middle of its answer: {complaint[:500]}")


def engine_complaint(body: bytes, status: int) -> str:
    """The message in an engine's error answer, whatever its shape, for the client to read."""
    try:
        parsed: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return f"the engine answered {status}"
    found = parsed.get("error", parsed) if isinstance(parsed, dict) else None
    message = found.get("message") if isinstance(found, dict) else found
    return message[:2000] if isinstance(message, str) and message else f"the engine answered {status}"
