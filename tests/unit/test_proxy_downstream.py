"""What a client gets: framing that holds whatever a worker does, and no broken answer that looks like a whole one."""

from __future__ import annotations

from typing import Any, cast

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import MeshError, ProtocolError, WorkerLost
from proxy.downstream import Downstream
from tests.support.answers import Answer
from tests.support.web_client import ClientRequest, ClientTransport

EVENTS = {"status": 200, "type": "text/event-stream"}
HEADERS = "x-request-id: req_1\r\n"


def sized(length: int) -> dict[str, Any]:
    return {"status": 200, "type": "application/json", "length": length}


class Client:
    def __init__(self, *, version: tuple[int, int] = (1, 1), keep_alive: bool = True) -> None:
        self.transport = ClientTransport()
        request = cast(web.BaseRequest, ClientRequest(self.transport, version=version))
        self.downstream = Downstream(request, self.transport, keep_alive=keep_alive)

    @property
    def answer(self) -> Answer:
        answer = self.transport.answer()
        assert answer is not None
        return answer

    def serve(self, head: dict[str, Any], *pieces: bytes) -> None:
        self.downstream.prepare(head, HEADERS)
        for piece in pieces:
            self.downstream.write(piece)


@pytest.fixture
async def client() -> Client:
    return Client()


@pytest.fixture
async def old_client() -> Client:
    return Client(version=(1, 0), keep_alive=False)


async def test_stream_is_chunked_and_ends_with_the_last_chunk(client: Client) -> None:
    client.serve(EVENTS, b"data: 1\n\n", b"data: 2\n\n")
    assert not client.answer.complete
    client.downstream.finish()
    answer = client.answer
    assert answer.complete
    assert answer.rest == b""
    assert (answer.status, answer.body) == (200, b"data: 1\n\ndata: 2\n\n")
    assert answer.headers == {
        "content-type": "text/event-stream",
        "transfer-encoding": "chunked",
        "cache-control": "no-cache",
        "x-request-id": "req_1",
    }
    assert client.downstream.response().keep_alive


@given(st.lists(st.binary(max_size=70_000), max_size=6))
def test_any_pieces_are_one_chunked_body(pieces: list[bytes]) -> None:
    client = Client()
    client.serve(EVENTS, *pieces)
    client.downstream.finish()
    assert client.answer.complete
    assert client.answer.body == b"".join(pieces)
    assert client.downstream.bytes_sent == len(client.answer.body)


async def test_sized_answer_has_its_length_and_nothing_after_it(client: Client) -> None:
    client.serve(sized(5), b"he", b"llo")
    client.downstream.finish()
    assert client.answer.complete
    assert (client.answer.body, client.answer.rest) == (b"hello", b"")
    assert client.answer.headers["content-length"] == "5"


async def test_empty_answer_still_has_a_head(client: Client) -> None:
    client.serve(sized(0))
    assert not client.downstream.started
    client.downstream.finish()
    assert client.answer.complete
    assert client.answer.body == b""


async def test_nothing_is_written_before_the_first_byte(client: Client) -> None:
    client.serve(EVENTS)
    assert client.transport.data == b""
    assert not client.downstream.started


async def test_empty_piece_is_no_last_chunk(client: Client) -> None:
    client.serve(EVENTS, b"", b"data: 1\n\n", b"", b"data: 2\n\n")
    assert not client.answer.complete
    client.downstream.finish()
    assert client.answer.body == b"data: 1\n\ndata: 2\n\n"


async def test_longer_answer_than_announced_is_refused_before_the_excess_is_written(client: Client) -> None:
    client.serve(sized(5), b"hell")
    with pytest.raises(ProtocolError):
        client.downstream.write(b"o, world")
    assert client.answer.body == b"hell"
    client.downstream.break_off(ProtocolError("too much"))
    assert not client.answer.complete
    assert client.transport.is_closing()


async def test_shorter_answer_than_announced_is_never_complete(client: Client) -> None:
    client.serve(sized(5), b"hell")
    with pytest.raises(ProtocolError):
        client.downstream.finish()
    client.downstream.break_off(ProtocolError("too little"))
    assert client.answer.body == b"hell"
    assert not client.answer.complete
    assert client.transport.is_closing()
    assert not client.downstream.response().keep_alive


async def test_broken_stream_gets_an_error_event_no_last_chunk_and_a_closed_connection(client: Client) -> None:
    client.serve(EVENTS, b'data: {"a": 1}\n\n')
    client.downstream.break_off(WorkerLost("the link to the worker broke"))
    assert not client.answer.complete
    assert client.transport.is_closing()
    first, error = client.answer.events()
    assert first == {"a": 1}
    assert error["error"]["code"] == "worker_lost"
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert "[DONE]" not in client.answer.events()
    assert not client.downstream.response().keep_alive


async def test_broken_stream_of_a_client_that_is_gone_writes_nothing(client: Client) -> None:
    client.serve(EVENTS, b"data: 1\n\n")
    client.transport.close()
    before = bytes(client.transport.data)
    client.downstream.break_off(WorkerLost("lost"))
    assert client.transport.data == before


async def test_end_of_an_answer_to_a_client_that_is_gone_writes_nothing(client: Client) -> None:
    client.serve(EVENTS, b"data: 1\n\n")
    client.transport.close()
    client.downstream.finish()  # on uvloop, writing to a closed transport raises: that would cost every client of the link


@pytest.mark.parametrize("head", [{**EVENTS, "length": 1000}, {"status": 200, "type": "application/json"}])
async def test_stream_has_no_length_and_every_other_answer_has_one(client: Client, head: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        client.downstream.prepare(head, HEADERS)


# -- HTTP/1.0


async def test_http_1_0_client_gets_no_chunks_and_a_closed_connection(old_client: Client) -> None:
    old_client.serve(EVENTS, b"data: 1\n\n", b"data: 2\n\n")
    old_client.downstream.finish()
    assert "transfer-encoding" not in old_client.answer.headers
    assert old_client.answer.headers["connection"] == "close"
    assert old_client.answer.body == b"data: 1\n\ndata: 2\n\n"
    assert not old_client.downstream.response().keep_alive


async def test_http_1_0_client_with_keep_alive_keeps_it_for_a_sized_answer_only() -> None:
    for head, kept in ((sized(2), True), (EVENTS, False)):
        client = Client(version=(1, 0), keep_alive=True)
        client.serve(head, b"{}")
        client.downstream.finish()
        assert client.answer.headers["connection"] == ("keep-alive" if kept else "close")
        assert client.downstream.response().keep_alive is kept


async def test_broken_stream_to_http_1_0_ends_with_the_error_event(old_client: Client) -> None:
    old_client.serve(EVENTS, b"data: 1\n\n")
    old_client.downstream.break_off(WorkerLost("lost"))
    assert old_client.answer.events()[-1]["error"]["code"] == "worker_lost"


async def test_connection_close_is_said_when_it_will_not_be_kept() -> None:
    client = Client(keep_alive=False)
    client.serve(sized(2), b"{}")
    client.downstream.finish()
    assert client.answer.headers["connection"] == "close"
    assert not client.downstream.response().keep_alive


# -- heads


BAD_STATUSES = (0, -1, 100, 101, 199, 201, 204, 205, 206, 299, 301, 304, 400, 500, 2**64 - 1)
BAD_HEADS: list[dict[str, Any]] = [
    {},
    {"status": 200},
    {"type": "application/json"},
    {"status": "200", "type": "application/json"},
    {"status": True, "type": "application/json"},
    {"status": 200.0, "type": "application/json"},
    *({"status": status, "type": "application/json", "length": 2} for status in BAD_STATUSES),
    *(
        {"status": 200, "type": kind, "length": 2}
        for kind in (
            None,
            b"application/json",
            5,
            "",
            "text/plain\r\nX-Evil: 1",
            "text/plain\n",
            "text/plain\r\n\r\nHTTP/1.1 200 OK",
            "text/plain; charset=utf-8\r\nSet-Cookie: a=b",
            "text/html; x=y",
            "TEXT/HTML",
            "text/plain ",
            "a" * 10_000,
            "text/plain; charset=ütf",
            "text/event-stream\x00",
        )
    ),
    *({"status": 200, "type": "application/json", "length": length} for length in (-1, "5", 5.0, True, [5], b"5")),
]


@pytest.mark.parametrize("head", BAD_HEADS, ids=lambda head: repr(head)[:60])
async def test_head_that_could_deceive_a_client_is_refused(client: Client, head: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        client.downstream.prepare(head, HEADERS)
    assert client.transport.data == b""
    assert not client.downstream.started
    with pytest.raises(ProtocolError):
        client.downstream.finish()


ODD = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary() | st.just([1])


@given(st.fixed_dictionaries({}, optional={"status": ODD | st.just(200), "type": ODD | st.just("text/plain"), "length": ODD, "x": ODD}))
def test_any_head_is_taken_or_refused_and_what_is_taken_reads_as_http(head: dict[str, Any]) -> None:
    client = Client()
    try:
        client.downstream.prepare(head, HEADERS)
        client.downstream.write(b"")
    except ProtocolError:
        return
    assert client.answer.status == 200
    assert set(client.answer.headers) <= {"content-type", "content-length", "transfer-encoding", "cache-control", "x-request-id"}


async def test_second_head_is_refused_before_and_after_the_first_byte(client: Client) -> None:
    client.downstream.prepare(EVENTS, HEADERS)
    with pytest.raises(ProtocolError):
        client.downstream.prepare(EVENTS, HEADERS)
    client.downstream.write(b"x")
    with pytest.raises(ProtocolError):
        client.downstream.prepare(EVENTS, HEADERS)


async def test_data_and_end_before_head_are_refused(client: Client) -> None:
    with pytest.raises(ProtocolError):
        client.downstream.write(b"x")
    with pytest.raises(ProtocolError):
        client.downstream.finish()
    assert client.transport.data == b""


@pytest.mark.parametrize("broken", ["data without head", "more than announced", "only a head"])
async def test_next_attempt_is_not_held_to_what_a_failed_one_announced_or_sent(client: Client, broken: str) -> None:
    if broken == "data without head":
        with pytest.raises(ProtocolError):
            client.downstream.write(b"a whole lot")
    elif broken == "more than announced":
        client.downstream.prepare(sized(1), HEADERS)
        with pytest.raises(ProtocolError):
            client.downstream.write(b"a whole lot")
    else:
        client.downstream.prepare(EVENTS, HEADERS)
    assert not client.downstream.started
    client.downstream.forget_head()
    client.serve(sized(5), b"hello")
    client.downstream.finish()
    assert client.answer.complete
    assert client.answer.body == b"hello"
    assert client.downstream.bytes_sent == 5


async def test_error_in_the_middle_of_an_event_is_an_event_of_its_own(client: Client) -> None:
    client.serve(EVENTS, b'data: {"a": 1}\n\ndata: {"b"')
    client.downstream.break_off(MeshError("it broke"))
    last = client.answer.body.rsplit(b"\n\n", 2)[-2]
    assert last.startswith(b'data: {"error"')
