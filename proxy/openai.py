"""The OpenAI API's shapes: what a request must look like, what an error and a model list look like. Pure.

Only what the proxy acts on is read; everything else belongs to the engine and passes through untouched. The body is decoded with
msgspec, which skips over the fields that are not asked for, so twenty megabytes of images cost no more than a scan.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec

from mesh.endpoints import Endpoint
from mesh.errors import InvalidRequest, MeshError
from mesh.prefix import BLOCK_BYTES, MAX_TEXT_BYTES, Chain, hash_chain

TASKS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "responses",
}
"""Inference routes by path: which task a worker must serve."""
PRIORITIES = ("interactive", "standard", "batch")
"""As clients name them, the most urgent first."""
MOST_TIMEOUT_S = 86_400
SHORT_BYTES = 2 * BLOCK_BYTES
"""A body up to this length has a prompt of at most 256 tokens or so: some milliseconds of a GPU, and not worth the microseconds here."""

MAX_MODEL_CHARS = 256
MAX_COUNT = 2**31 - 1
"""No honest number of tokens or answers is beyond it, and some engines' integers end there."""

_ABSENT = msgspec.Raw()
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
_Answers = Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)]


class _Body(msgspec.Struct):
    model: str
    stream: bool | None = None
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    max_output_tokens: _Tokens | None = None
    temperature: float | None = None
    n: _Answers | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    service_tier: msgspec.Raw = _ABSENT


class _Chat(_Body, kw_only=True):
    messages: list[msgspec.Raw]
    tools: msgspec.Raw = _ABSENT


class _Completions(_Body, kw_only=True):
    prompt: msgspec.Raw


class _Input(_Body, kw_only=True):
    input: msgspec.Raw
    instructions: msgspec.Raw = _ABSENT
    tools: msgspec.Raw = _ABSENT


class _Name:
    """A key of the body's object, each one of its own, so that two of a name are two entries."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


_decode_outline = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_names = msgspec.json.Decoder(dict[_Name, msgspec.Raw], dec_hook=lambda kind, value: kind(value)).decode

BODIES: dict[str, type[_Body]] = {"chat": _Chat, "completions": _Completions, "embeddings": _Input, "responses": _Input}
"""What is read of a body, by task; everything else in it is the engine's."""
_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {task: msgspec.json.Decoder(kind) for task, kind in BODIES.items()}


class Call(NamedTuple):
    """One inference request, as far as the proxy needs to know it. ``body`` is the client's own bytes, ``parsed`` what was read of it.

    ``model`` is what is to answer: what the client named, unless that is an endpoint.
    """

    task: str
    path: str
    model: str
    stream: bool
    body: bytes | bytearray
    parsed: _Body
    endpoint: Endpoint | None = None


def parse_call(path: str, body: bytes | bytearray) -> Call:
    """Read a request body. Raises `InvalidRequest` naming the parameter.

    A name may stand there once: of two, which one counts depends on who reads, and a key that may use one model must not get another.
    Some engines even take ``Model`` for ``model``.
    """
    task = TASKS[path]
    try:
        parsed = _DECODERS[task].decode(body)
        names = () if _are_plain(body) else [name.text for name in _decode_names(body)]
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at `$.")
        param = where.rstrip("`").split(".")[0].split("[")[0] or _missing(reason)
        raise InvalidRequest(f"The request body is not valid: {error}", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}") from None
    if names and len({*map(str.casefold, names)}) != len(names):
        raise _twice(names)
    if not parsed.model or len(parsed.model) > MAX_MODEL_CHARS:
        raise InvalidRequest("'model' must name a model; GET /v1/models lists them", param="model")
    if task == "chat" and not parsed.messages:
        raise InvalidRequest("'messages' must hold at least one message", param="messages")
    return Call(task, path, parsed.model, parsed.stream is True, body, parsed)


def prompt_of(call: Call) -> tuple[Chain, int]:
    """The chain of a prompt's text, and how many bytes of text count, at most `MAX_TEXT_BYTES`; nothing of one too short to matter.

    The text is the client's own JSON: tools and instructions first, as chat templates have them, then each message as it was written. A
    conversation that goes on begins with the same bytes.
    """
    if len(call.body) <= SHORT_BYTES or call.task == "embeddings":
        return (), 0
    pieces = tuple(_pieces(call.parsed))
    chain = hash_chain(f"{call.task}\0{call.model}".encode(), map(memoryview, pieces))
    return chain, min(MAX_TEXT_BYTES, sum(map(len, pieces))) if chain else 0


def _pieces(parsed: _Body) -> Iterator[msgspec.Raw]:
    if isinstance(parsed, _Completions):
        yield parsed.prompt
        return
    assert isinstance(parsed, _Chat | _Input)
    yield parsed.tools
    if isinstance(parsed, _Chat):
        yield from parsed.messages
        return
    yield parsed.instructions
    yield parsed.input


def session_of(call: Call, header: str | None) -> str | None:
    """What names the conversation that a request belongs to: ``x-session-id``, else OpenAI's ``prompt_cache_key``, else ``user``."""
    return header or call.parsed.prompt_cache_key or call.parsed.user


def priority_of(call: Call, header: str | None) -> int:
    """0 interactive, 1 standard, 2 batch: ``x-priority``, else batch for OpenAI's ``service_tier`` "flex". Raises `InvalidRequest`.

    A request without either is interactive, so that nobody can get ahead of the others by asking; anybody may step back.
    """
    if header is not None:
        try:
            return PRIORITIES.index(header.strip().lower())
        except ValueError:
            raise InvalidRequest(f"'x-priority' must be one of {', '.join(PRIORITIES)}", param="x-priority") from None
    return PRIORITIES.index("batch") if bytes(call.parsed.service_tier) == b'"flex"' else 0


_SECONDS = re.compile(r"[0-9]{1,5}(?:\.[0-9]{1,6})?")


def timeout_of(header: str | None, default_s: float) -> float:
    """Seconds the whole answer may take, by ``x-request-timeout``; 0 for no limit. Raises `InvalidRequest`."""
    if header is None:
        return default_s
    match = _SECONDS.fullmatch(header.strip())
    if match is None or not 0 < (asked_s := float(match[0])) <= MOST_TIMEOUT_S:
        raise InvalidRequest(
            f"'x-request-timeout' is a number of seconds, more than 0 and at most {MOST_TIMEOUT_S}", param="x-request-timeout"
        )
    return asked_s


def error_body(error: MeshError, *, kind: str, code: str) -> dict[str, Any]:
    """OpenAI's error object. ``kind`` is its ``type``."""
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def model_list(models: Iterable[str], *, created: int) -> dict[str, Any]:
    """The answer of GET /v1/models."""
    return {"object": "list", "data": [model_object(name, created=created) for name in sorted(models)]}


def model_object(name: str, *, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "infermesh"}


def _are_plain(body: bytes | bytearray) -> bool:
    """Whether it is certain at little cost that no name stands there twice, however spelt: names of small letters, none of them twice
    anywhere in a short body, and no escapes that could spell another."""
    if len(body) > SHORT_BYTES or b"\\u" in body:
        return False
    quoted = _quoted(*_decode_outline(body))
    return quoted is not None and max(map(body.count, quoted), default=0) <= 1


@functools.lru_cache(maxsize=256)
def _quoted(*names: str) -> tuple[bytes, ...] | None:
    """How plain names stand in a body; None if one of them has other spellings."""
    if not all(name.isidentifier() and name.islower() and name.isascii() for name in names):
        return None
    return tuple(b'"%b"' % name.encode() for name in names)


def _twice(names: Sequence[str]) -> InvalidRequest:
    folded = [name.casefold() for name in names]
    name = next(name for name, fold in zip(names, folded, strict=True) if folded.count(fold) > 1)[:64]
    return InvalidRequest(f"The request body is not valid: '{name}' is given twice", param=name)


def _missing(reason: str) -> str | None:
    """The parameter in msgspec's «Object missing required field `x`»."""
    return reason.split("`")[1] if "missing required field" in reason and reason.count("`") >= 2 else None
