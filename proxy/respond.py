"""From a `MeshError` to HTTP: status, OpenAI's type and code, headers. The only such mapping."""

from __future__ import annotations

import json

from aiohttp import web

from mesh.errors import (
    BodyTooLarge,
    CapacityError,
    DeadlineExceeded,
    DirectoryError,
    DocumentConflict,
    DocumentNotFound,
    DocumentRefused,
    HeadersTooLarge,
    InvalidKey,
    InvalidRequest,
    KeyNotAllowed,
    MeshError,
    MethodNotAllowed,
    ModelNotFound,
    NoWorker,
    OrderRefused,
    Overloaded,
    QuotaSpent,
    RateLimited,
    RequestError,
    RouteNotFound,
    SlowRequest,
    StreamStuck,
    UpstreamTimeout,
    WorkerError,
)
from proxy.openai import error_body

STATUS: dict[type[MeshError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    InvalidKey: (401, "authentication_error"),
    KeyNotAllowed: (403, "permission_error"),
    ModelNotFound: (404, "invalid_request_error"),
    DocumentRefused: (403, "permission_error"),
    OrderRefused: (403, "permission_error"),
    DocumentNotFound: (404, "invalid_request_error"),
    RouteNotFound: (404, "invalid_request_error"),
    MethodNotAllowed: (405, "invalid_request_error"),
    SlowRequest: (408, "invalid_request_error"),
    DocumentConflict: (409, "invalid_request_error"),
    BodyTooLarge: (413, "invalid_request_error"),
    HeadersTooLarge: (431, "invalid_request_error"),
    DeadlineExceeded: (504, "api_error"),
    RequestError: (400, "invalid_request_error"),
    QuotaSpent: (429, "insufficient_quota"),
    RateLimited: (429, "rate_limit_error"),
    Overloaded: (429, "rate_limit_error"),
    NoWorker: (503, "service_unavailable_error"),
    CapacityError: (503, "service_unavailable_error"),
    DirectoryError: (503, "service_unavailable_error"),
    UpstreamTimeout: (504, "api_error"),
    WorkerError: (502, "api_error"),
    StreamStuck: (502, "api_error"),
    MeshError: (500, "api_error"),
}
"""Status and OpenAI type by error class; a class not listed takes its nearest ancestor's."""


def status_of(error: MeshError) -> tuple[int, str]:
    """HTTP status and OpenAI error type."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def error_response(error: MeshError, *, request_id: str) -> web.Response:
    """The whole HTTP answer for an error that comes before the first byte."""
    status, kind = status_of(error)
    headers = {"x-request-id": request_id}
    retry_after_s = error.retry_after_s
    if retry_after_s is None and status in (429, 503):
        retry_after_s = 1.0
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(retry_after_s)))
        headers["retry-after-ms"] = str(max(1, round(retry_after_s * 1000)))
    if isinstance(error, RateLimited):
        headers |= error.headers
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = ", ".join(error.allow)
    body = json.dumps(error_body(error, kind=kind, code=error.code)).encode()
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


def error_event(error: MeshError) -> bytes:
    """A server-sent event that tells a stream's reader that the answer will not be completed.

    The leading blank line ends whatever event was cut off.
    """
    _, kind = status_of(error)
    return b"\n\ndata: " + json.dumps(error_body(error, kind=kind, code=error.code)).encode() + b"\n\n"
