"""Errors on the wire: which may cross a link, and what they become on the other side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh.claims import read_number, read_str
from mesh.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    EngineUnavailable,
    InvalidRequest,
    MalformedEnvelope,
    MeshError,
    ModelNotFound,
    NotResumed,
    Overloaded,
    ProtocolError,
    Rerouted,
    UpstreamTimeout,
    WorkerError,
)

_KINDS: dict[str, type[MeshError]] = {
    kind.code: kind
    for kind in (
        BodyTooLarge,
        DeadlineExceeded,
        EngineUnavailable,
        InvalidRequest,
        ModelNotFound,
        NotResumed,
        Overloaded,
        ProtocolError,
        Rerouted,
        UpstreamTimeout,
        WorkerError,
    )
}
MAX_MESSAGE_CHARS = 2000


def encode_error(error: MeshError) -> dict[str, Any]:
    """The fields of an ERROR frame."""
    fields: dict[str, Any] = {"code": error.code, "message": error.message[:MAX_MESSAGE_CHARS]}
    if error.param is not None:
        fields["param"] = error.param[:256]
    if error.retry_after_s is not None:
        fields["retry"] = error.retry_after_s
    return fields


def parse_error(fields: Mapping[str, Any]) -> MeshError:
    """From a peer's fields. An unknown code becomes a plain `WorkerError`. Raises `ProtocolError` on wrong types."""
    message = fields.get("message", "")
    if not isinstance(message, str):
        raise ProtocolError("bad ERROR frame")
    try:
        code = read_str(fields, "code", max_len=64)
        param = read_str(fields, "param") if "param" in fields else None
        retry = read_number(fields, "retry", high=86400.0) if "retry" in fields else None
    except MalformedEnvelope as error:
        raise ProtocolError(f"bad ERROR frame: {error.message}") from None
    return _KINDS.get(code, WorkerError)(message[:MAX_MESSAGE_CHARS], param=param, retry_after_s=retry)
