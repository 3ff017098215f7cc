"""From errors to HTTP: every error of the tree has its status, and every answer its shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import cast

import pytest
from aiohttp import web

from mesh.errors import (
    BodyTooLarge,
    CapacityError,
    EngineUnavailable,
    InvalidKey,
    InvalidRequest,
    KeyNotAllowed,
    MeshError,
    MethodNotAllowed,
    ModelNotFound,
    NoWorker,
    Overloaded,
    ProtocolError,
    RateLimited,
    RouteNotFound,
    UpstreamTimeout,
    WorkerLost,
)
from proxy.respond import STATUS, error_event, error_response, status_of


def tree(root: type[MeshError] = MeshError) -> Iterator[type[MeshError]]:
    """Every class of mesh/errors.py."""
    if root.__module__ == MeshError.__module__:
        yield root
    for kind in root.__subclasses__():
        yield from tree(kind)


def make(kind: type[MeshError]) -> MeshError:
    return kind("what went wrong")


@pytest.mark.parametrize("kind", list(tree()))
def test_every_error_has_a_status_a_type_and_the_whole_shape(kind: type[MeshError]) -> None:
    response = error_response(make(kind), request_id="req_7")
    status, name = status_of(make(kind))
    assert response.status == status
    assert 400 <= status <= 599
    assert response.content_type == "application/json"
    assert response.headers["x-request-id"] == "req_7"
    body = json.loads(cast(bytes, response.body))
    assert body == {"error": {"message": "what went wrong", "type": name, "param": None, "code": kind.code}}


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (InvalidRequest, 400),
        (InvalidKey, 401),
        (KeyNotAllowed, 403),
        (ModelNotFound, 404),
        (RouteNotFound, 404),
        (MethodNotAllowed, 405),
        (BodyTooLarge, 413),
        (RateLimited, 429),
        (Overloaded, 429),
        (NoWorker, 503),
        (CapacityError, 503),
        (WorkerLost, 502),
        (EngineUnavailable, 502),
        (ProtocolError, 502),
        (UpstreamTimeout, 504),
        (MeshError, 500),
    ],
)
def test_status_of_each_kind(kind: type[MeshError], status: int) -> None:
    assert status_of(make(kind))[0] == status


def test_codes_are_stable_and_each_names_one_class() -> None:
    kinds = list(tree())
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert all(kind in kinds for kind in STATUS)


@pytest.mark.parametrize("kind", [kind for kind in tree() if status_of(make(kind))[0] in (429, 503)])
@pytest.mark.parametrize(
    ("wait_s", "seconds", "milliseconds"), [(None, "1", "1000"), (0.0, "1", "1"), (0.25, "1", "250"), (7.6, "8", "7600")]
)
def test_errors_that_pass_say_when_to_try_again(kind: type[MeshError], wait_s: float | None, seconds: str, milliseconds: str) -> None:
    response = error_response(kind("full", retry_after_s=wait_s), request_id="req_7")
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == (seconds, milliseconds)


def test_errors_that_do_not_pass_do_not_say_when_to_try_again() -> None:
    assert "retry-after" not in error_response(InvalidRequest("no"), request_id="r").headers


def test_refused_key_is_told_the_scheme() -> None:
    assert error_response(InvalidKey("no"), request_id="r").headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("message", ['"quotes"', "line\r\n\r\nHTTP/1.1 200 OK", "\ud800", "ü" * 100, "\x00", "</script>"])
def test_odd_messages_stay_inside_the_json(message: str) -> None:
    error = InvalidRequest(message, param=message)
    response = error_response(error, request_id="req_7")
    assert isinstance(response, web.Response)
    assert json.loads(cast(bytes, response.body))["error"]["message"] == message
    event = error_event(error)
    assert event.startswith(b"\n\ndata: ")
    assert event.endswith(b"\n\n")
    assert event.strip().count(b"\n") == 0
    assert json.loads(event.strip().removeprefix(b"data: "))["error"]["param"] == message
