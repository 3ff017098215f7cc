"""What receipts come to: each attempt once, whatever is missing, doubled, shuffled or contradicts; bills that are their sums."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import UpstreamTimeout, UsageError
from mesh.ledger import Page, Query
from mesh.prices import (
    ANY,
    Period,
    PriceList,
    TokenPrice,
    due,
    encode_prices,
    parse_amount,
    parse_prices,
    show_cost,
    show_micro,
)
from mesh.receipts import Kind, Receipt, encode_receipt, parse_receipt
from mesh.trust import Role
from mesh.usage import Copy, Flag, Summary, Survey, settle
from tests.support.ledgers import AT, make_receipt, random_receipt

WORKER, PROXY, OTHER = b"w" * 32, b"p" * 32, b"o" * 32


def copies(number: int = 1, *, worker: dict[str, Any] | None = None, proxy: dict[str, Any] | None = None, **both: Any) -> tuple[Copy, Copy]:
    """A request's receipts at its worker and its proxy."""
    theirs = make_receipt(number, peer=PROXY, **{**both, **(worker or {})})
    ours = replace(make_receipt(number, **both), side=Role.PROXY, peer=WORKER, final=True, digest="")
    return Copy(receipt=theirs, node_id=WORKER), Copy(receipt=replace(ours, **(proxy or {})), node_id=PROXY)


def test_two_sides_of_one_attempt_are_one_charge() -> None:
    worker, proxy = copies()
    (charge,) = settle([worker, proxy])
    assert (charge.prompt, charge.cached, charge.completion) == (100, 40, 20)
    assert charge.confirmed
    assert charge.ends
    assert not charge.flags
    assert not charge.partial


@pytest.mark.parametrize("lost", [0, 1])
def test_with_either_side_lost_the_charge_is_the_same(lost: int) -> None:
    both = copies()
    (whole,), (half,) = settle(both), settle([both[1 - lost]])
    assert (half.prompt, half.cached, half.completion, half.project, half.key, half.model, half.worker) == (
        whole.prompt,
        whole.cached,
        whole.completion,
        whole.project,
        whole.key,
        whole.model,
        whole.worker,
    )
    assert not half.confirmed


def test_what_was_not_delivered_is_not_charged() -> None:
    (charge,) = settle(copies(status="cancelled", size_bytes=0, completion=7))
    assert (charge.prompt, charge.completion, charge.partial) == (0, 0, False)


def test_what_was_cut_off_is_charged_for_what_reached_the_client() -> None:
    worker, proxy = copies(worker={"completion": 20, "size_bytes": 4000, "own_count": True}, proxy={"size_bytes": 3000}, status="cancelled")
    (charge,) = settle([worker, proxy])
    assert (charge.completion, charge.partial, charge.estimated, charge.status) == (15, True, True, "cancelled")


def test_a_worker_that_completed_what_its_proxy_could_not_deliver_is_paid_for_what_arrived() -> None:
    worker, proxy = copies(proxy={"status": "cancelled", "size_bytes": 1000, "prompt": 0, "completion": 5, "own_count": True})
    (charge,) = settle([worker, proxy])
    assert (charge.prompt, charge.completion, charge.partial) == (100, 5, True)


def test_a_prompt_is_charged_once_and_completions_add_up() -> None:
    first = copies(attempt=1, status="worker_lost", completion=8, own_count=True, worker={"prompt": 100})
    second = copies(attempt=2, resumed=8, prompt=108, completion=12)
    charges = settle([*first, *second])
    assert [charge.completion for charge in charges] == [8, 12]
    assert sum(charge.prompt for charge in charges) == 100
    assert [charge.ends for charge in charges] == [False, True]


def test_what_a_lost_worker_cannot_tell_its_successor_does() -> None:
    _, lost = copies(attempt=1, status="worker_lost", own_count=True, prompt=0, cached=0, completion=5)
    charges = settle([lost, *copies(attempt=2, resumed=8, prompt=108, completion=12)])
    assert [charge.completion for charge in charges] == [8, 12]
    assert [charge.prompt for charge in charges] == [0, 100]
    assert not charges[0].estimated


def test_a_stream_that_moved_before_its_first_token_owes_nothing_for_its_beginning() -> None:
    _, lost = copies(attempt=1, status="worker_lost", own_count=True, prompt=0, cached=0, completion=1, size_bytes=200)
    charges = settle([lost, *copies(attempt=2, completion=12)])
    assert [charge.completion for charge in charges] == [0, 12]
    assert [charge.prompt for charge in charges] == [0, 100]


def test_a_successor_that_delivered_nothing_does_not_tell_what_had_been_delivered() -> None:
    _, lost = copies(attempt=1, status="worker_lost", own_count=True, prompt=0, cached=0, completion=5)
    assert [charge.completion for charge in settle([lost, *copies(attempt=2, status="no_worker", size_bytes=0, completion=0)])] == [5, 0]


def test_of_attempts_that_left_no_receipt_their_successor_tells() -> None:
    alone, proxys = copies(attempt=3, resumed=8, prompt=108, completion=12)
    (charge,) = settle([alone])
    assert (charge.prompt, charge.completion) == (100, 20)
    (charge,) = settle([alone, proxys])
    assert charge.completion == 12, "their proxy is there, and says of no such attempts"
    idle, _ = copies(attempt=2, status="cancelled", resumed=8, prompt=108, completion=0, size_bytes=0)
    (charge,) = settle([idle])
    assert (charge.prompt, charge.completion) == (100, 8), "even if it said nothing itself"
    former, _ = copies(attempt=2, status="cancelled", resumed=3, prompt=103, completion=5)
    assert sum(charge.completion for charge in settle([former, alone])) == 20


def test_an_end_that_says_more_than_the_receipt_is_flagged_and_the_lower_counts() -> None:
    (charge,) = settle(copies(proxy={"completion": 30}, worker={"completion": 20}))
    assert (charge.completion, charge.flags) == (20, {Flag.CLAIM})
    (charge,) = settle(copies(proxy={"completion": 10}, worker={"completion": 20}))
    assert (charge.completion, charge.flags) == (10, {Flag.CLAIM})


def test_bytes_that_do_not_agree_are_flagged() -> None:
    (charge,) = settle(copies(proxy={"size_bytes": 3999}))
    assert charge.flags == {Flag.BYTES}


def test_more_tokens_than_bytes_are_flagged() -> None:
    (charge,) = settle(copies(completion=5000, size_bytes=4000))
    assert charge.flags == {Flag.IMPLAUSIBLE}


def test_a_third_node_that_claims_an_attempt_gets_nothing_and_is_flagged() -> None:
    worker, proxy = copies()
    forged = Copy(receipt=replace(worker.receipt, completion=9999), node_id=OTHER)
    (charge,) = settle([forged, worker, proxy])
    assert (charge.completion, charge.worker, charge.flags) == (20, WORKER.hex(), {Flag.IDENTITY})
    (charge,) = settle([forged, proxy])
    assert (charge.completion, charge.flags) == (20, {Flag.IDENTITY})


def test_a_project_is_the_one_whose_key_the_proxy_checked() -> None:
    (charge,) = settle(copies(worker={"project": "others"}))
    assert (charge.project, charge.flags) == ("search", {Flag.IDENTITY})


def test_an_adapters_call_is_charged_under_the_adapters_name() -> None:
    (charge,) = settle(copies(worker={"adapter": "legal"}, proxy={"model": "legal"}))
    assert (charge.model, charge.flags) == ("legal", frozenset())


def test_a_complete_answer_of_which_the_other_side_knows_nothing_is_flagged_once_it_should() -> None:
    worker, _ = copies()
    answered = frozenset({PROXY, WORKER})
    assert settle([worker], answered=answered, now=AT + 60_000)[0].flags == {Flag.UNMATCHED}
    assert settle([worker], answered=answered, now=AT + 5_000)[0].flags == frozenset()
    assert settle([worker], answered=frozenset({WORKER}), now=AT + 60_000)[0].flags == frozenset()


def test_a_refused_call_is_a_request_and_no_charge() -> None:
    refused = make_receipt(attempt=0, side=Role.PROXY, peer=b"", status="key_not_allowed", prompt=0, cached=0, completion=0, size_bytes=0)
    summary = Summary(("status",))
    for charge in settle([Copy(receipt=refused, node_id=PROXY)]):
        summary.add(charge)
    assert summary.total.requests == summary.total.failed == 1
    assert (summary.total.prompt_tokens, summary.total.unconfirmed) == (0, 0)


# -- all nodes together


def fetcher(receipts: list[Receipt], *, page: int = 3, broken_after: int | None = None):  # type: ignore[no-untyped-def]
    """A node's receipts in small pages; ``broken_after`` so many pages it can no longer be asked."""
    ordered = sorted(receipts, key=lambda receipt: receipt.order)
    asked = 0

    async def fetch(query: Query) -> Page:
        nonlocal asked
        asked += 1
        if broken_after is not None and asked > broken_after:
            raise UpstreamTimeout("no receipts")
        left = [receipt for receipt in ordered if receipt.order > query.after]
        return Page(receipts=tuple(map(encode_receipt, left[:page])), more=len(left) > page)

    return fetch


def spread(rng: random.Random, count: int) -> dict[bytes, list[Receipt]]:
    """Requests over three workers and two proxies, some of them with two attempts."""
    nodes: dict[bytes, list[Receipt]] = {name * 32: [] for name in (b"1", b"2", b"3", b"p", b"q")}
    for number in range(count):
        proxy = rng.choice((b"p", b"q")) * 32
        for attempt in range(1, rng.choice((2, 2, 2, 3))):
            worker = rng.choice((b"1", b"2", b"3")) * 32
            receipt = random_receipt(rng, number, attempt=attempt, at=AT + number // 3, peer=proxy, size_bytes=10**6)
            nodes[worker].append(receipt)
            nodes[proxy].append(replace(receipt, side=Role.PROXY, peer=worker, digest=""))
    return nodes


async def total(
    nodes: Mapping[bytes, list[Receipt]], *, broken: dict[bytes, int] | None = None, price: Any = None
) -> tuple[Summary, Survey]:
    sources = {node: fetcher(receipts, broken_after=(broken or {}).get(node)) for node, receipts in nodes.items()}
    survey, summary = Survey(sources, Query()), Summary(("project", "model"), price=price or (lambda charge: 0))
    async for charge in survey.charges(now=0):
        summary.add(charge)
    return summary, survey


@pytest.mark.parametrize("lost", [None, b"1" * 32, b"3" * 32, b"p" * 32, b"q" * 32])
async def test_the_sums_are_right_with_any_one_node_lost(lost: bytes | None) -> None:
    nodes = spread(random.Random(7), 60)
    expected, _ = await total(nodes)
    found, survey = await total({node: receipts for node, receipts in nodes.items() if node != lost})
    for row in (*expected.rows.values(), *found.rows.values(), expected.total, found.total):
        row.unconfirmed = 0
    assert found.describe() == expected.describe()
    assert found.total.requests == 60
    assert survey.complete
    assert survey.away == ({lost} if lost else set())


async def test_two_lost_nodes_are_said_to_leave_gaps() -> None:
    nodes = spread(random.Random(7), 60)
    del nodes[b"1" * 32]
    _, survey = await total(nodes, broken={b"p" * 32: 1})
    assert not survey.complete
    assert set(survey.lost) == {b"p" * 32}


async def test_a_node_lost_half_way_costs_nothing() -> None:
    nodes = spread(random.Random(8), 60)
    expected, _ = await total(nodes)
    found, survey = await total(nodes, broken={b"2" * 32: 2})
    assert survey.complete
    assert found.total.completion_tokens == expected.total.completion_tokens
    assert found.total.prompt_tokens == expected.total.prompt_tokens
    assert found.total.flagged == expected.total.flagged


def test_there_is_no_sum_by_what_there_is_not() -> None:
    with pytest.raises(UsageError, match="cannot sum by 'colour'"):
        Summary(("colour",))


# -- prices and bills

PRICES = PriceList(
    currency="EUR",
    periods=(
        Period(
            since=0, models={"m": TokenPrice(input=200_001, cached=50_003, output=600_007), ANY: TokenPrice(input=7, cached=3, output=11)}
        ),
        Period(since=AT // 1000 + 3600, models={ANY: TokenPrice(input=1, cached=1, output=1)}, gpu_hour={ANY: 2_490_001}),
    ),
)


def test_a_price_list_comes_back_as_it_was() -> None:
    assert parse_prices(encode_prices(PRICES)) == PRICES


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"currency": "EUR", "periods": 3}', b'{"currency": "EU", "periods": []}']
    + [b'{"currency": "EUR", "periods": [{"from": 0, "models": {"m": {"input": %s}}}]}' % bad for bad in (b"-1", b"0.5", b"true", b'"1"')],
)
def test_what_is_no_price_list_is_refused(body: bytes) -> None:
    with pytest.raises(UsageError):
        parse_prices(body)


@given(st.integers(0, 10**15))
def test_amounts_come_back_to_the_last_digit(micro: int) -> None:
    assert parse_amount(show_micro(micro)) == micro


@pytest.mark.parametrize("text", ["-1", "0.0000001", "nan", "1e40", "ten", "", "1,5"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_amount(text)


def test_costs_are_shown_exactly_and_due_once_rounded() -> None:
    assert show_cost(1_234_567_890_123) == "1.234567890123"
    assert (due(1_235_000_000_000), due(1_234_999_999_999), due(999_999_999_999), due(1_500_000_000_000, 0)) == (
        "1.24",
        "1.23",
        "1.00",
        "2",
    )


def test_gpu_time_is_priced_by_the_hour_and_rounded_where_it_is_measured() -> None:
    uptime = make_receipt(kind=Kind.UPTIME, at=AT + 7_200_000, peer=b"", project="", gpus=8, took_ms=3_600_000)
    (charge,) = settle([Copy(receipt=uptime, node_id=WORKER)])
    assert PRICES.cost(charge) == 8 * 2_490_001 * 10**6
    assert PRICES.cost(replace(charge, at=AT)) is None
    assert PRICES.cost(replace(charge, took_ms=1, gpus=1)) == round(2_490_001 * 5 / 18)


def own_cost(receipt: Receipt) -> int:
    """What a completed receipt costs, worked out again by other means."""
    from fractions import Fraction

    late = receipt.at >= AT + 3_600_000
    rates = (1, 1, 1) if late else (200_001, 50_003, 600_007) if receipt.model == "m" else (7, 3, 11)
    amounts = (receipt.prompt - receipt.cached, receipt.cached, receipt.completion)
    exact = sum(Fraction(count, 10**6) * Fraction(rate, 10**6) for count, rate in zip(amounts, rates, strict=True))
    assert (exact * 10**12).denominator == 1
    return int(exact * 10**12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 80))
def test_a_bill_is_the_sum_of_its_receipts_in_any_order_of_delivery(seed: int, count: int) -> None:
    rng = random.Random(seed)
    requests = [
        random_receipt(rng, number, at=AT + rng.randrange(31 * 86_400_000), peer=PROXY, size_bytes=10**6) for number in range(count)
    ]
    delivered = [copy for receipt in requests for copy in _delivered(rng, receipt)]
    rng.shuffle(delivered)
    by_request: dict[str, list[Copy]] = {}
    for copy in delivered:
        by_request.setdefault(copy.receipt.id, []).append(copy)
    bill = Summary(("project", "day"), price=PRICES.cost)
    for request in by_request.values():
        for charge in settle(request):
            bill.add(charge)
    assert bill.total.cost == sum(map(own_cost, requests))
    assert sum(row.cost for row in bill.rows.values()) == bill.total.cost
    assert bill.total.requests == count
    assert bill.total.unpriced == 0


def _delivered(rng: random.Random, receipt: Receipt) -> list[Copy]:
    """One or both sides, each once or more."""
    proxy = replace(receipt, side=Role.PROXY, peer=WORKER, digest="")
    both = [Copy(receipt=receipt, node_id=WORKER), Copy(receipt=proxy, node_id=PROXY)]
    kept = rng.choice((both, both, both[:1], both[1:]))
    wired = [Copy(receipt=parse_receipt(encode_receipt(copy.receipt)), node_id=copy.node_id) for copy in kept]
    return wired * rng.choice((1, 1, 2))
