"""Questions for receipts over a link: pages that join, nodes that cannot be asked, bytes that are no page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.books import Books, ask, encode_page, encode_query, parse_page, parse_query
from mesh.errors import MeshError, ProtocolError, UpstreamTimeout
from mesh.ledger import Ledger, Query
from mesh.link import questions
from mesh.receipts import encode_receipt, parse_receipt
from mesh.trust import Role
from tests.support.authority import make_mesh
from tests.support.ledgers import AT, make_receipt, open_ledger
from tests.support.pipe import Pair, linked

MESH = make_mesh(now=time.time() - 60)


@pytest.fixture
async def pair() -> Pair:
    return await linked()


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    found = open_ledger(tmp_path, MESH.identity(Role.WORKER, now=time.time()))
    for number in range(10):
        found.add(make_receipt(number, project="ads" if number % 2 else "search"))
    await found.settled()
    yield found
    await found.stop()


async def pumped(pair: Pair, question: Any) -> Any:
    """The answer, with the links moved until it is there."""
    task = asyncio.ensure_future(question)
    while not task.done():
        await pair.settle()
        await asyncio.sleep(0.001)
    return task.result()


async def test_a_linked_node_answers_with_its_receipts(pair: Pair, ledger: Ledger) -> None:
    pair.bob_owner.on_stream = Books(ledger).open
    page = await pumped(pair, ask(pair.alice, Query(project="ads", since=AT + 2)))
    assert [parse_receipt(body) for body in page.receipts] == [make_receipt(number, project="ads") for number in (3, 5, 7, 9)]
    assert not page.more
    assert page.last == 10


async def test_what_is_written_later_can_be_followed(pair: Pair, ledger: Ledger) -> None:
    pair.bob_owner.on_stream = Books(ledger).open
    last = (await pumped(pair, ask(pair.alice, Query(since=1 << 60)))).last
    ledger.add(make_receipt(99, at=AT - 5_000))
    await ledger.settled()
    page = await pumped(pair, ask(pair.alice, Query(written=last)))
    assert [parse_receipt(body).id for body in page.receipts] == [make_receipt(99).id]
    assert (await pumped(pair, ask(pair.alice, Query(written=page.last)))).receipts == ()


async def test_a_node_that_is_not_linked_cannot_be_asked_through_this_one(pair: Pair, ledger: Ledger) -> None:
    pair.bob_owner.on_stream = Books(ledger).open
    with pytest.raises(MeshError, match="not linked"):
        await pumped(pair, ask(pair.alice, Query(), node=b"x" * 32))


async def test_a_node_that_does_not_answer_is_given_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "ANSWER_S", 0.05)
    pair.bob_owner.on_stream = lambda stream, head: None
    with pytest.raises(UpstreamTimeout):
        await pumped(pair, ask(pair.alice, Query()))


async def test_an_answer_that_is_none_is_refused(pair: Pair) -> None:
    def lie(stream: Any, head: dict[str, Any]) -> None:
        stream.send_now(b"\xc1 nonsense")
        stream.end({"more": False})

    pair.bob_owner.on_stream = lie
    with pytest.raises(ProtocolError, match="page"):
        await pumped(pair, ask(pair.alice, Query()))


@given(
    st.integers(0, 2**62),
    st.one_of(st.none(), st.text("abc", max_size=8)),
    st.one_of(st.none(), st.binary(min_size=8, max_size=8)),
    st.one_of(st.none(), st.integers(0, 2**40)),
    st.text("xyz", max_size=10),
)
def test_a_question_arrives_as_it_was(since: int, project: str | None, key: bytes | None, written: int | None, prove: str) -> None:
    query = Query(since=since, until=since + 1, after=(since, "req", 1), project=project, key=key, written=written, prove=prove)
    assert parse_query(encode_query(query, b"n" * 32)) == (query, b"n" * 32)


@pytest.mark.parametrize(
    "fields", [{"after": 3}, {"after": [1, 2]}, {"after": [1, 2, 3]}, {"key": b"1"}, {"node": b"1"}, {"since": -1}, {"only": 4}]
)
def test_a_bad_question_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        parse_query(fields)


def test_a_page_comes_back_as_it_was() -> None:
    receipts = tuple(encode_receipt(make_receipt(number)) for number in range(50))
    assert parse_page(encode_page(receipts)) == receipts
    assert parse_page(b"") == ()


@given(st.binary(max_size=300))
def test_any_bytes_are_a_page_or_refused(data: bytes) -> None:
    try:
        assert all(isinstance(receipt, bytes) for receipt in parse_page(data))
    except ProtocolError:
        return
