"""The proxy's own description, as OpenAPI 3.1: made from its routes, who may call them, what it reads of a body and the errors it gives.

Pure. What the proxy does not read belongs to the engine, and is allowed here as it is there: any other field of a body, of any type.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable
from typing import Any

import msgspec

from mesh import __version__
from mesh.errors import (
    BodyTooLarge,
    CapacityError,
    DirectoryError,
    HeadersTooLarge,
    InvalidKey,
    InvalidRequest,
    KeyNotAllowed,
    MeshError,
    MethodNotAllowed,
    RouteNotFound,
    SlowRequest,
)
from mesh.usage import DIMENSIONS
from proxy.access import Access, access_of
from proxy.openai import BODIES, MAX_MODEL_CHARS, TASKS
from proxy.respond import STATUS, status_of

PATH = "/openapi.json"
_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array"}
_LIMITS: dict[str, dict[str, Any]] = {
    "model": {"minLength": 1, "maxLength": MAX_MODEL_CHARS},
    "messages": {"minItems": 1},
}
_BELOW = {"/v1/models/": ("model",), "/mesh/v1/documents/": ("kind", "name")}
"""What the rest of a path that ends with a slash is made of."""
_MOMENT = {"type": "integer", "minimum": 0, "maximum": 10**11, "description": "Seconds since 1970."}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 1 << 62}
_QUERIES: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("GET", "/mesh/v1/lookup"): {"model": {"type": "string"}, "role": {"type": "string"}},
    ("GET", "/v1/usage"): {
        "since": _MOMENT,
        "until": _MOMENT,
        "by": {"type": "string", "description": f"Names separated by commas: {', '.join(DIMENSIONS)}."},
        "of": {"type": "string", "enum": ["key", "project"]},
    },
    ("GET", "/mesh/v1/receipts"): {
        **dict.fromkeys(("since", "until", "after_at", "after_n", "written"), _COUNT),
        **{key: {"type": "string"} for key in ("node", "key", "project", "after_id", "prove")},
    },
    ("GET", "/mesh/v1/prompts"): {
        **dict.fromkeys(("since", "until", "after"), _COUNT),
        **{key: {"type": "string"} for key in ("node", "endpoint", "project")},
    },
    ("GET", "/mesh/v1/documents"): {"kind": {"type": "string"}},
    ("GET", "/mesh/v1/documents/"): {
        "project": {"type": "string"},
        "seq": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
        "history": {"type": "string"},
    },
}
_ALWAYS: tuple[type[MeshError], ...] = (
    InvalidRequest,
    RouteNotFound,
    MethodNotAllowed,
    SlowRequest,
    HeadersTooLarge,
    CapacityError,
    MeshError,
)
_WITH_BODY: tuple[type[MeshError], ...] = (BodyTooLarge,)
_JSON, _BYTES = "application/json", "application/octet-stream"


def describe_api(routes: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The whole document. ``routes`` are method and path; a path that ends with a slash stands for all below it."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path in sorted(routes):
        paths.setdefault(_template(path), {})[method.lower()] = _operation(method, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Infermesh", "version": __version__, "description": "An OpenAI-compatible API over a mesh of GPU workers."},
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key: im_…"}},
            "schemas": {"Error": _ERROR, **{_schema_name(task): _body_schema(kind) for task, kind in BODIES.items()}},
        },
    }


def encode_api(routes: Iterable[tuple[str, str]]) -> bytes:
    return json.dumps(describe_api(routes)).encode()


def _template(path: str) -> str:
    return path + "/".join(f"{{{name}}}" for name in _BELOW.get(path, ("rest",))) if path.endswith("/") else path


def _operation(method: str, path: str) -> dict[str, Any]:
    access = access_of(method, path)
    task = TASKS.get(path)
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}{path.replace('/', '_').rstrip('_')}",
        "summary": f"Takes {'no key' if access in (Access.PUBLIC, Access.SIGNED) else f'a key: {access}'}.",
        "parameters": _parameters(method, path),
        "responses": _responses(method, path, access, task),
    }
    if access in (Access.PUBLIC, Access.SIGNED, Access.LOCAL_VIEWER):
        operation["security"] = [{}] if access is not Access.LOCAL_VIEWER else [{}, {"key": []}]
    if task is not None:
        schema = {"$ref": f"#/components/schemas/{_schema_name(task)}"}
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
    elif method != "GET":
        operation["requestBody"] = {"required": True, "content": {_BYTES: {"schema": {"type": "string", "format": "binary"}}}}
    return operation


def _parameters(method: str, path: str) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    if path.endswith("/"):
        named = _BELOW.get(path, ("rest",))
        parameters += [{"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in named]
    queries = _QUERIES.get((method, path), {})
    return parameters + [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in queries.items()]


def _responses(method: str, path: str, access: Access, task: str | None) -> dict[str, Any]:
    """What may come back: of an inference route every error there is, of others those that their kind can give."""
    if task is not None or access is Access.SIGNED:
        kinds = [kind for kind in STATUS if task is not None or kind is not InvalidKey]
    else:
        kinds = [*_ALWAYS]
    if access not in (Access.PUBLIC, Access.SIGNED):
        kinds += [InvalidKey, KeyNotAllowed]
    if method != "GET":
        kinds += _WITH_BODY
    if path.startswith("/mesh/"):
        kinds += [DirectoryError]
    statuses: dict[int, set[str]] = {}
    for kind in kinds:
        statuses.setdefault(status_of(kind("x"))[0], set()).add(kind.code)
    error = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {"200": {"description": "As asked.", "content": _content(path, task)}}
    for status, codes in sorted(statuses.items()):
        responses[str(status)] = {"description": ", ".join(sorted(codes)), "content": error}
    if path == "/readyz":
        responses["503"] = {"description": "Cannot serve.", "content": {_JSON: {"schema": {"type": "object"}}}}
    return responses


def _content(path: str, task: str | None) -> dict[str, Any]:
    if path == "/metrics":
        return {"text/plain": {"schema": {"type": "string"}}}
    content: dict[str, Any] = {_JSON: {"schema": {"type": "object"}}}
    if task in ("chat", "completions", "responses"):
        content["text/event-stream"] = {"schema": {"type": "string"}}
    if path == "/mesh/v1/documents/":
        content[_BYTES] = {"schema": {"type": "string", "format": "binary"}}
    return content


def _schema_name(task: str) -> str:
    return f"{task.capitalize()}Request"


def _body_schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """What the proxy reads of a body, from the very types it reads it with."""
    fields = msgspec.structs.fields(kind)
    return {
        "type": "object",
        "required": [field.encode_name for field in fields if field.required],
        "properties": {field.encode_name: _field_schema(field.encode_name, field.type) for field in fields},
    }


def _field_schema(name: str, hint: Any) -> dict[str, Any]:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    said: list[str] = []
    bounds: dict[str, Any] = {}
    for kind in kinds:
        if typing.get_origin(kind) is typing.Annotated:
            kind, meta = typing.get_args(kind)
            bounds = {"minimum": meta.ge, "maximum": meta.le}
        said.append("null" if kind is types.NoneType else _NAMES.get(typing.get_origin(kind) or kind, ""))
    if "" in said:
        return {}  # the engine's to read
    return {"type": said if len(said) > 1 else said[0], **bounds, **_LIMITS.get(name, {})}


_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
