"""What a proxy hands to its ledger, and when: each attempt once, at the latest when the request is over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from mesh.apikey import ApiKey
from mesh.ledger import Entry, Ledger
from mesh.receipts import MAX_TOKENS, Receipt, parse_receipt
from mesh.usage import Charge, Copy, settle
from proxy.downstream import Downstream
from proxy.metering import Meter, Noted
from proxy.moves import Moves, Passage
from worker.moving.trail import Begin, encode_begin, encode_token

KEY = ApiKey(id=b"12345678", project="search", roles=frozenset({"invoker"}), not_before=0, expires=1)
WORKERS = b"a" * 32, b"b" * 32
PROXY = b"p" * 32


class Pages:
    """In a ledger's place: what is added is on disk at once."""

    full = False

    def __init__(self) -> None:
        self.receipts: list[Receipt] = []

    def add(self, entry: Entry) -> None:
        self.receipts.append(parse_receipt(entry.row()[1]))

    def charges(self) -> list[Charge]:
        return settle([Copy(receipt=receipt, node_id=PROXY) for receipt in self.receipts])


class Sent:
    bytes_sent = 0
    pieces = 0


class Desk:
    """A meter, its pages and one request that has begun."""

    def __init__(self) -> None:
        self.pages, self.client = Pages(), Sent()
        self.meter = Meter(cast(Ledger, self.pages), wall=lambda: 1_800_000_000.0)
        self.noted: Noted = self.meter.open("req_1", "chat", 1.0)
        self.noted.key, self.noted.model = KEY, "m"
        self.passage = Passage(cast(Moves, None), "req_1")

    def attempt(self, worker: bytes, status: str, *, pieces: int = 0, trailer: dict[str, Any] | None = None, tokens: int = 0) -> None:
        """``tokens`` of them on the stream's trail."""
        note = self.noted.begin(worker, cast(Downstream, self.client))
        note.follow(self.passage)
        if tokens and not self.passage.trail:
            self.passage.trail += encode_begin(Begin(id="c", model="m", created=1, prompt_tokens=9))
        self.passage.trail += encode_token(4, 17) * tokens
        self.client.pieces += pieces
        self.client.bytes_sent += 100 * pieces
        note.status, note.trailer = status, trailer
        note.end(2.0 if pieces else None, self.passage)

    def written(self) -> list[tuple[int, str, bool]]:
        return [(receipt.attempt, receipt.status, receipt.final) for receipt in self.pages.receipts]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_an_attempt_says_what_came_of_it(desk: Desk) -> None:
    desk.attempt(WORKERS[0], "ok", pieces=11, trailer={"in": 100, "out": 10, "cached": 40, "think": 3, "base": 0})
    desk.meter.close(desk.noted, "ok", 3.5)
    (receipt,) = desk.pages.receipts
    assert (receipt.prompt, receipt.completion, receipt.cached, receipt.reasoning, receipt.own_count) == (100, 10, 40, 3, False)
    assert (receipt.events, receipt.size_bytes, receipt.first_ms, receipt.took_ms) == (11, 1100, 1000, 2500)
    assert (receipt.at, receipt.done) == (1_800_000_000_000, 1_800_000_002_500)
    assert (receipt.project, receipt.key, receipt.peer, receipt.task, receipt.final) == ("search", b"12345678", WORKERS[0], "chat", True)


@pytest.mark.parametrize("nonsense", [-1, True, 1.5, "9", None, MAX_TOKENS + 1, [1]])
def test_claims_that_make_no_sense_count_as_nothing(desk: Desk, nonsense: Any) -> None:
    desk.attempt(WORKERS[0], "ok", pieces=2, trailer=dict.fromkeys(("in", "out", "cached", "think", "base"), nonsense))
    desk.meter.close(desk.noted, "ok", 3.0)
    (receipt,) = desk.pages.receipts
    assert (receipt.prompt, receipt.completion, receipt.cached, receipt.reasoning, receipt.resumed) == (0, 0, 0, 0, 0)


def test_what_was_delivered_is_written_before_another_worker_is_waited_for(desk: Desk) -> None:
    desk.attempt(WORKERS[0], "worker_lost", pieces=6)
    desk.meter.lost(desk.noted)
    assert desk.written() == [(1, "worker_lost", False)]
    assert [charge.completion for charge in desk.pages.charges()] == [5]


def test_a_stream_that_went_on_has_each_attempt_once(desk: Desk) -> None:
    desk.attempt(WORKERS[0], "worker_lost", pieces=6)
    desk.meter.lost(desk.noted)
    desk.attempt(WORKERS[1], "ok", pieces=7, trailer={"in": 105, "out": 7, "base": 5})
    desk.meter.close(desk.noted, "ok", 3.0)
    assert desk.written() == [(1, "worker_lost", False), (2, "ok", True)]
    charges = desk.pages.charges()
    assert sum(charge.completion for charge in charges) == 12
    assert [charge.ends for charge in charges] == [False, True]


def test_a_stream_that_nobody_went_on_with_ends_with_a_receipt_of_its_own(desk: Desk) -> None:
    desk.attempt(WORKERS[0], "worker_lost", pieces=6)
    desk.meter.lost(desk.noted)
    desk.meter.close(desk.noted, "no_worker", 9.0)
    assert desk.written() == [(1, "worker_lost", False), (0, "no_worker", True)]
    assert desk.pages.receipts[-1].peer == WORKERS[0]
    (charge,) = desk.pages.charges()
    assert (charge.attempt, charge.completion, charge.status, charge.took_ms, charge.ends) == (1, 5, "no_worker", 8000, True)


def test_a_stream_lost_again_and_again_is_written_as_far_as_it_came(desk: Desk) -> None:
    desk.attempt(WORKERS[0], "worker_lost", pieces=6)
    desk.meter.lost(desk.noted)
    desk.attempt(WORKERS[1], "overloaded")
    desk.meter.lost(desk.noted)
    desk.attempt(WORKERS[1], "worker_lost", pieces=3)
    desk.meter.lost(desk.noted)
    desk.meter.close(desk.noted, "cancelled", 9.0)
    assert desk.written() == [(1, "worker_lost", False), (3, "worker_lost", False), (0, "cancelled", True)]


def test_tokens_of_a_lost_stream_are_those_of_its_trail_however_few_pieces_they_came_in(desk: Desk) -> None:
    desk.attempt(WORKERS[0], "worker_lost", pieces=4, tokens=33)
    desk.meter.lost(desk.noted)
    desk.passage.tokens = 31
    desk.attempt(WORKERS[1], "worker_lost", pieces=2, tokens=10)
    desk.meter.lost(desk.noted)
    desk.meter.close(desk.noted, "no_worker", 9.0)
    assert [(receipt.completion, receipt.resumed) for receipt in desk.pages.receipts[:2]] == [(33, 0), (10, 31)]
    assert [charge.completion for charge in desk.pages.charges()] == [31, 10]


@pytest.mark.parametrize("notes", [["overloaded", "ok"], ["ok", "outrun"], ["rerouted", "rerouted"]])
def test_attempts_before_the_first_byte_wait_for_the_end(desk: Desk, notes: Sequence[str]) -> None:
    for status in notes:
        desk.attempt(WORKERS[0], status, pieces=status == "ok", trailer={} if status == "ok" else None)
    assert desk.written() == []
    desk.meter.close(desk.noted, "ok", 3.0)
    assert [final for *_, final in desk.written()].count(True) == 1


def test_a_request_without_a_good_key_leaves_nothing(desk: Desk) -> None:
    desk.noted.key = None
    desk.meter.lost(desk.noted)
    desk.meter.close(desk.noted, "invalid_api_key", 2.0)
    assert desk.written() == []
