"""The OpenAI API's shapes: what a request must look like, what an error and a model list look like. Pure.

Only what the proxy acts on is read; everything else belongs to the engine and passes through untouched. The body is decoded with
msgspec, which skips over the fields that are not asked for, so twenty megabytes of images cost no more than a scan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from mesh.errors import InvalidRequest, MeshError

TASKS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "responses",
}
"""Inference routes by path: which task a worker must serve."""


class _Body(msgspec.Struct):
    model: str
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    n: int | None = None
    user: str | None = None
    prompt_cache_key: str | None = None


class _Chat(_Body, kw_only=True):
    messages: list[msgspec.Raw]


class _Completions(_Body, kw_only=True):
    prompt: msgspec.Raw


class _Input(_Body, kw_only=True):
    input: msgspec.Raw


_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {
    "chat": msgspec.json.Decoder(_Chat),
    "completions": msgspec.json.Decoder(_Completions),
    "embeddings": msgspec.json.Decoder(_Input),
    "responses": msgspec.json.Decoder(_Input),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One inference request, as far as the proxy needs to know it. ``body`` is the client's own bytes."""

    task: str
    path: str
    model: str
    stream: bool
    body: bytes | bytearray


def parse_call(path: str, body: bytes | bytearray) -> Call:
    """Read a request body. Raises `InvalidRequest` naming the parameter."""
    task = TASKS[path]
    try:
        parsed = _DECODERS[task].decode(body)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at `$.")
        param = where.rstrip("`").split(".")[0].split("[")[0] or _missing(reason)
        raise InvalidRequest(f"The request body is not valid: {error}", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}") from None
    if not parsed.model or len(parsed.model) > 256:
        raise InvalidRequest("'model' must name a model; GET /v1/models lists them", param="model")
    if task == "chat" and not parsed.messages:
        raise InvalidRequest("'messages' must hold at least one message", param="messages")
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n"):
        value = getattr(parsed, name)
        if value is not None and value < (1 if name == "n" else 0):
            raise InvalidRequest(f"'{name}' is too small: {value}", param=name)
    return Call(task=task, path=path, model=parsed.model, stream=bool(parsed.stream), body=body)


def error_body(error: MeshError, *, kind: str, code: str) -> dict[str, Any]:
    """OpenAI's error object. ``kind`` is its ``type``."""
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def model_list(models: Iterable[str], *, created: int) -> dict[str, Any]:
    """The answer of GET /v1/models."""
    return {"object": "list", "data": [model_object(name, created=created) for name in sorted(models)]}


def model_object(name: str, *, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "infermesh"}


def _missing(reason: str) -> str | None:
    """The parameter in msgspec's «Object missing required field `x`»."""
    return reason.split("`")[1] if "missing required field" in reason and reason.count("`") >= 2 else None
