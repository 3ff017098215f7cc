"""Limits at one proxy: what requests are told, what is taken and given back, what survives a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mesh.documents import Document
from mesh.errors import ProtocolError, QuotaSpent, RateLimited
from mesh.limits import Limit, Limits, encode_limits
from mesh.link.frames import Frame
from mesh.prices import MICRO, Period, PriceList, TokenPrice, encode_prices
from proxy.limits.buckets import Ask, Kind
from proxy.limits.counters import Counters
from proxy.limits.limiter import MAX_ENTRIES_PER_S, WAIT, Limiter
from proxy.limits.messages import Count, encode_asks, encode_grants
from proxy.limits.stash import Hold
from proxy.limits.wills import Wills
from proxy.openai import parse_call
from tests.support.clocks import StoppedClock
from tests.support.limits import call_of, key_of

ME = b"m" * 32
OTHER = b"o" * 32
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp()


@pytest.fixture
def clock() -> StoppedClock:
    return StoppedClock(NOON)


def limiter(clock: StoppedClock, *, path: Path | None = None, boot: int = 1) -> Limiter:
    """A lone proxy that has had its share for long."""
    made = Limiter(ME, boot, send=lambda peer, kind, fields: None, clock=clock, counters=Counters(path))
    made.counters.load(wall=clock.wall())
    made.shares.looked = True
    pass_time(made, clock, 60)
    return made


def pass_time(made: Limiter, clock: StoppedClock, seconds: float) -> None:
    for _ in range(round(seconds / 0.1)):
        clock.now += 0.1
        made.tick(clock.monotonic())


def enter(made: Limiter, call: Any = None, **limits: Any) -> Hold:
    hold = made.enter(key_of(**limits), call or call_of())
    assert isinstance(hold, Hold)
    return hold


def refusal(made: Limiter, call: Any = None, **limits: Any) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        made.enter(key_of(**limits), call or call_of())
    return caught.value


def rule(name: str, limit: Limit, *, models: dict[str, Limit] | None = None, project: str = "", seq: int = 1) -> Document:
    body = encode_limits(Limits(whole=limit, models=models or {}))
    return Document(kind="limits", name=name, project=project, seq=seq, previous=b"", issued=0.0, body=body)


def test_key_without_limits_takes_nothing(clock: StoppedClock) -> None:
    assert limiter(clock).enter(key_of(), call_of()) is None


def test_burst_passes_and_then_the_rate_and_the_wait_that_is_told_is_enough(clock: StoppedClock) -> None:
    made = limiter(clock)
    for _ in range(5):
        enter(made, rps=5)
    error = refusal(made, rps=5)
    assert error.code == "rate_limit_exceeded"
    assert error.retry_after_s == pytest.approx(0.2)
    assert "5 requests per second for this API key" in error.message
    clock.now += error.retry_after_s - 0.01
    error = refusal(made, rps=5)
    clock.now += error.retry_after_s
    enter(made, rps=5)


def told_by(hold: Hold) -> dict[str, str]:
    return dict(line.split(": ") for line in hold.headers().splitlines())


def test_headers_tell_what_is_left(clock: StoppedClock) -> None:
    made = limiter(clock)
    told = told_by(enter(made, rps=5, tps=100))
    assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("5", "4")
    assert told["x-ratelimit-reset-requests"] == "200ms"
    assert told["x-ratelimit-limit-tokens"] == "1000"
    for left in (3, 2, 1, 0):
        assert told_by(enter(made, rps=5, tps=100))["x-ratelimit-remaining-requests"] == str(left)
    error = refusal(made, rps=5, tps=100)
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    assert error.headers["x-ratelimit-reset-requests"] == "1000ms"


def test_headers_are_those_of_the_tightest_limit(clock: StoppedClock) -> None:
    made = limiter(clock)
    made.take_document(rule("project:p", Limit(rps=2)))
    assert told_by(enter(made, rps=50))["x-ratelimit-limit-requests"] == "2"
    assert set(told_by(enter(made, rps=50))) == {f"x-ratelimit-{name}-requests" for name in ("limit", "remaining", "reset")}


def test_tokens_are_reserved_for_the_most_and_settled_on_what_was_used(clock: StoppedClock) -> None:
    made = limiter(clock)
    call = call_of(0, max_tokens=600)
    hold = enter(made, call, tps=100)
    assert "this request needs" in refusal(made, call, tps=100).message
    hold.settle(10, 90)
    hold.end()
    enter(made, call, tps=100).end()
    enter(made, call, tps=100)


def test_request_that_no_worker_took_costs_no_tokens_and_one_that_was_cut_off_what_was_sent(clock: StoppedClock) -> None:
    made = limiter(clock)
    call = call_of(0, max_tokens=600)

    def used(outcome: Callable[[Hold], None]) -> float:
        hold = enter(made, call, tps=100)
        before = hold._plan.tokens[0].balance + hold._tokens
        outcome(hold)
        hold.end()
        return before - hold._plan.tokens[0].balance

    assert used(lambda hold: None) == 0
    cut_off = used(lambda hold: hold.seen(accepted=True, sent_bytes=400))
    assert 90 <= cut_off <= 150, "the prompt, and about 100 tokens"


def test_concurrency_is_given_back_at_the_end(clock: StoppedClock) -> None:
    made = limiter(clock)
    first, _ = enter(made, concurrency=2), enter(made, concurrency=2)
    assert "At most 2 requests of this API key at once" in refusal(made, concurrency=2).message
    first.end()
    enter(made, concurrency=2)


def test_budget_that_is_spent_says_so_and_is_renewed_at_midnight(clock: StoppedClock) -> None:
    made = limiter(clock)
    made.take_document(rule("project:p", Limit(tokens_per_day=1000)))
    call = call_of(0, max_tokens=400)
    for _ in range(2):
        hold = enter(made, call)
        hold.settle(50, 350)
        hold.end()
    error = refusal(made, call)
    assert isinstance(error, QuotaSpent)
    assert (error.code, error.headers["x-should-retry"]) == ("insufficient_quota", "false")
    assert error.retry_after_s == pytest.approx(12 * 3600 - 60, abs=2)
    assert "2026-11-22 00:00 UTC" in error.message
    pass_time(made, clock, 2)
    clock.now = NOON + 12 * 3600 + 1
    pass_time(made, clock, 2)
    enter(made, call)


def test_budget_that_others_have_in_use_is_not_called_spent(clock: StoppedClock) -> None:
    made = limiter(clock)
    made.take_document(rule("project:p", Limit(tokens_per_day=1000)))
    call = call_of(0, max_tokens=600)
    hold = enter(made, call)
    error = refusal(made, call)
    assert (error.code, error.retry_after_s) == ("rate_limit_exceeded", 1.0)
    hold.settle(10, 10)
    hold.end()
    enter(made, call)


def test_budget_outlives_the_process(clock: StoppedClock, tmp_path: Path) -> None:
    path, call = tmp_path / "limits.db", call_of(0, max_tokens=400)
    for boot in (1, 2):
        made = limiter(clock, path=path, boot=boot)
        made.take_document(rule("project:p", Limit(tokens_per_day=1000)))
        hold = enter(made, call)
        hold.settle(50, 350)
        hold.end()
        pass_time(made, clock, 2)
        made.counters.save(made.counters.changes(), wall=clock.wall())
    made = limiter(clock, path=path, boot=3)
    made.take_document(rule("project:p", Limit(tokens_per_day=1000)))
    assert isinstance(refusal(made, call), QuotaSpent)


def test_counters_that_cannot_be_read_are_begun_anew(clock: StoppedClock, tmp_path: Path) -> None:
    path = tmp_path / "limits.db"
    path.write_bytes(b"this is not a database at all, not in the least" * 100)
    made = limiter(clock, path=path)
    made.counters.put(b"b" * 16, b"s" * 16, 1.0, ends=clock.wall() + 10)
    made.counters.save(made.counters.changes(), wall=clock.wall())
    again = Counters(path)
    again.load(wall=clock.wall())
    assert again.total(b"b" * 16) == 1.0


def test_money_is_limited_where_there_are_prices(clock: StoppedClock) -> None:
    made = limiter(clock)
    assert made.enter(key_of(budget=1.0), call_of()) is None, "no price, no limit"
    price = TokenPrice(input=1000 * MICRO, cached=0, output=1000 * MICRO)
    body = encode_prices(PriceList(currency="EUR", periods=(Period(since=0, models={"m": price}),)))
    made.take_document(Document(kind="prices", name="prices", seq=1, previous=b"", issued=0.0, body=body))
    assert made.enter(key_of(budget=1.0), call_of(model="n")) is None, "no price for this model"
    call = call_of(0, max_tokens=400)
    for _ in range(2):
        hold = enter(made, call, budget=1.0)
        hold.settle(250, 350, 200)
        hold.end()
    error = refusal(made, call, budget=1.0)
    assert isinstance(error, QuotaSpent)
    assert "1 per month of this API key" in error.message
    assert "2026-12-01 00:00 UTC" in error.message


def test_every_limit_that_applies_holds(clock: StoppedClock) -> None:
    made = limiter(clock)
    made.take_document(rule("default", Limit(rps=50)))
    made.take_document(rule("models", Limit(), models={"m": Limit(concurrency=3)}))
    made.take_document(rule("own", Limit(), models={"m": Limit(rps=4)}, project="p"))
    holds = [enter(made) for _ in range(3)]
    assert "of the model 'm'" in refusal(made).message
    holds[0].end()
    enter(made)
    for hold in holds[1:]:
        hold.end()
    assert "(its own) for the model 'm'" in refusal(made).message
    assert made.enter(key_of(project="q"), call_of(model="n")) is not None


def test_limits_that_change_are_in_force_at_once_and_what_cannot_be_read_changes_nothing(clock: StoppedClock) -> None:
    made = limiter(clock)
    made.take_document(rule("project:p", Limit(rps=1)))
    enter(made)
    refusal(made)
    made.take_document(Document(kind="limits", name="project:p", seq=2, previous=b"", issued=0.0, body=b"\xff"))
    refusal(made)
    made.take_document(rule("project:p", Limit(), seq=3))
    assert made.enter(key_of(), call_of()) is None


def test_requests_without_max_tokens_reserve_what_answers_usually_come_to(clock: StoppedClock) -> None:
    made = limiter(clock)
    call = call_of(0, max_tokens=None)
    for _ in range(200):
        hold = enter(made, call, tps=1000)
        hold.settle(20, 30)
        hold.end()
        pass_time(made, clock, 0.1)
    assert enter(made, call, tps=1000)._tokens < 150


def test_embeddings_reserve_their_prompt_alone(clock: StoppedClock) -> None:
    body = b'{"model":"m","input":"' + b"x" * 400 + b'"}'
    assert 90 < enter(limiter(clock), parse_call("/v1/embeddings", body), tps=1000)._tokens < 120


def test_sleeping_buckets_vanish(clock: StoppedClock) -> None:
    made = limiter(clock)
    enter(made, rps=5, tps=100).end()
    assert made._active == {}
    pass_time(made, clock, 0.3)
    assert len(made._active) == 2
    pass_time(made, clock, 30)
    assert (made._active, made._buckets) == ({}, {})


def test_proxy_without_a_share_grants_nothing(clock: StoppedClock) -> None:
    made = Limiter(ME, 1, send=lambda peer, kind, fields: None, clock=clock)
    refusal(made, rps=5)


def test_request_waits_only_where_another_owner_must_be_asked(clock: StoppedClock) -> None:
    made = limiter(clock)
    made.shares.members = (OTHER[:8],)
    made.shares._owners.clear()

    async def main() -> None:
        assert made.enter(key_of(rps=5), call_of()) is WAIT

    asyncio.run(main())


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Frame.SHARES, {}),
        (Frame.SHARES, {"t": -1, "echo": 0, "v": 1, "ack": 0, "want": True, "lend": True, "sure": True, "bye": False}),
        (Frame.ASK, {"ask": [{"b": b"short", "k": 0, "l": 1}]}),
        (Frame.ASK, {"ask": [{"b": b"b" * 16, "k": 3, "l": 1}]}),
        (Frame.ASK, {"ask": [{"b": b"b" * 16, "k": 0, "l": float("inf")}]}),
        (Frame.ASK, {"ask": [{"b": b"b" * 16, "k": 0, "l": 1, "w": -5}]}),
        (Frame.ASK, {"count": [{"b": b"b" * 16, "s": b"s", "u": 1}]}),
        (Frame.GRANT, {"give": [{"b": b"b" * 16, "g": "all"}]}),
        (Frame.GRANT, {"give": 7}),
    ],
)
def test_frames_that_make_no_sense_end_the_link(clock: StoppedClock, kind: Frame, fields: dict[str, Any]) -> None:
    made = limiter(clock)
    made.up(OTHER, 1, serving=True)
    with pytest.raises(ProtocolError):
        made.on_frame(OTHER, kind, fields)


def test_proxy_that_asks_too_much_ends_its_link(clock: StoppedClock) -> None:
    made = limiter(clock)
    made.up(OTHER, 1, serving=True)
    fields = encode_asks([]) | {"ask": [{"b": b"b" * 16, "k": 0, "l": 1.0}] * 400}
    for _ in range(MAX_ENTRIES_PER_S // 400):
        made.on_frame(OTHER, Frame.ASK, fields)
    with pytest.raises(ProtocolError):
        made.on_frame(OTHER, Frame.ASK, fields)


def test_grant_that_nobody_asked_for_is_nothing(clock: StoppedClock) -> None:
    made = limiter(clock)
    made.up(OTHER, 1, serving=True)
    hold = enter(made, rps=5)
    bucket = hold._plan.ones[0].bucket
    before = hold._plan.ones[0].balance
    made.on_frame(OTHER, Frame.GRANT, {"give": [{"b": bucket, "g": 1e6, "l": 0.0, "w": 0.0}]})
    assert hold._plan.ones[0].balance == before


def test_owner_tells_its_heir_what_it_may_use_before_it_does_and_the_heir_counts_it_when_it_is_gone(clock: StoppedClock) -> None:
    """``made`` is OTHER's heir: it has heard up to where OTHER may get."""
    made = limiter(clock)
    made.take_document(rule("project:p", Limit(tokens_per_day=1000)))
    bucket = made._plan(key_of(), call_of()).tokens[0].bucket
    ends = clock.wall() + 3600
    mine, others = (node_id[:8] + (1).to_bytes(8) for node_id in (ME, OTHER))

    def will(source: bytes, most: float) -> dict[str, Any]:
        return encode_asks([], [Count(bucket=bucket, source=source, used=100.0, ends=ends, most=most)])

    made.up(OTHER, 1, serving=True)
    for fields in (will(others, 500.0), will(others, 400.0), will(mine, 900.0)):
        made.on_frame(OTHER, Frame.ASK, fields)
    assert made.counters.total(bucket) == 200, "so much is used for certain"
    made.down(OTHER)
    assert made.counters.of(bucket, others) == 400, "the last word counts"
    assert made.counters.of(bucket, mine) == 100, "nobody says what another may use"
    made.up(OTHER, 2, serving=True)
    made.down(OTHER)
    assert made.counters.total(bucket) == 500


def test_owner_that_asks_like_others_again_is_counted_by_what_it_asked_for(clock: StoppedClock) -> None:
    made = limiter(clock)
    made.take_document(rule("project:p", Limit(tokens_per_day=1000)))
    bucket = made._plan(key_of(), call_of()).tokens[0].bucket
    made.up(OTHER, 1, serving=True)
    source, ends = OTHER[:8] + (1).to_bytes(8), clock.wall() + 3600
    made.on_frame(OTHER, Frame.ASK, encode_asks([], [Count(bucket=bucket, source=source, used=100.0, ends=ends, most=700.0)]))
    ask = Ask(bucket=bucket, kind=Kind.BUDGET, limit=1000, burst=0.0, used=150.0, held=20.0, ends=ends)
    made.on_frame(OTHER, Frame.ASK, encode_asks([ask]))
    made.down(OTHER)
    assert made.counters.total(bucket) == 170


def test_wills_are_told_ahead_and_anew_to_a_new_heir() -> None:
    wills = Wills()
    assert wills.make(b"b", b"heir", 100.0, spare=50.0) == 150.0
    assert wills.make(b"b", b"heir", 125.0, spare=50.0) == 0.0
    assert wills.make(b"b", b"heir", 126.0, spare=50.0) == 176.0
    assert wills.make(b"b", b"other", 120.0, spare=0.0) == 120.0
    wills.hear(b"owner", Count(bucket=b"b", source=b"s", used=1.0, ends=10.0, most=5.0))
    wills.hear(b"owner", Count(bucket=b"c", source=b"s", used=1.0, ends=20.0, most=7.0))
    wills.expire(15.0)
    assert wills.open(b"owner") == [(b"c", 7.0, 20.0)]
    assert wills.open(b"owner") == []


def test_a_will_counts_for_as_much_as_its_heir_has_heard() -> None:
    wills = Wills()
    assert wills.kept(b"b", b"heir") == 0.0
    wills.make(b"b", b"heir", 100.0, spare=50.0)
    wills.make(b"b", b"heir", 200.0, spare=50.0)
    assert not wills.keep(b"b", b"other", 150.0)
    assert not wills.keep(b"b", b"heir", 300.0), "it was told no such thing"
    assert wills.keep(b"b", b"heir", 250.0)
    assert not wills.keep(b"b", b"heir", 150.0), "an answer that came late"
    assert wills.kept(b"b", b"heir") == 250.0
    wills.lost(b"heir")
    assert wills.kept(b"b", b"heir") == 0.0
    assert wills.make(b"b", b"heir", 100.0, spare=50.0) == 150.0


async def test_owner_uses_no_more_of_a_budget_than_its_heir_knows(clock: StoppedClock) -> None:
    told: list[dict[str, Any]] = []
    made = limiter(clock)
    made._send = lambda peer, kind, fields: told.extend(fields.get("count", ()) if kind == Frame.ASK else ())
    made.take_document(rule("project:p", Limit(tokens_per_day=100_000)))
    made.up(OTHER, 1, serving=True)
    bucket = made._plan(key_of(), call_of()).tokens[0].bucket
    made.shares._owners[bucket] = made._me, OTHER[:8]
    assert made.enter(key_of(), call_of(0, max_tokens=1000)) is WAIT
    await asyncio.sleep(0)
    assert [count["m"] >= 1000 for count in told] == [True]
    waiting = asyncio.create_task(made.wait(key_of(), call_of(0, max_tokens=1000)))
    await asyncio.sleep(0)
    assert not waiting.done()
    made.on_frame(OTHER, Frame.GRANT, encode_grants([], [Count(bucket=bucket, source=b"", used=0.0, ends=0.0, most=told[-1]["m"])]))
    hold = await waiting
    hold.settle(10, 10)
    hold.end()
    used = 20
    while not isinstance(made.enter(key_of(), call_of(0, max_tokens=100)), str):
        used += 100
    assert used <= told[-1]["m"]


async def test_heir_says_what_it_has_heard(clock: StoppedClock) -> None:
    sent: list[dict[str, Any]] = []
    made = limiter(clock)
    made._send = lambda peer, kind, fields: sent.append(fields) if kind == Frame.GRANT else None
    made.up(OTHER, 1, serving=True)
    source = OTHER[:8] + (1).to_bytes(8)
    count = Count(bucket=b"b" * 16, source=source, used=1.0, ends=clock.wall() + 60, most=70.0)
    made.on_frame(OTHER, Frame.ASK, encode_asks([], [count, replace(count, bucket=b"c" * 16, most=0.0)]))
    assert sent == [{"give": [], "kept": [{"b": b"b" * 16, "m": 70.0}]}]


def test_key_has_a_day_of_tokens_of_its_own(clock: StoppedClock) -> None:
    made = limiter(clock)
    hold = enter(made, call_of(max_tokens=800), tokens_per_day=1000)
    hold.settle(100, 800)
    hold.end()
    assert isinstance(refusal(made, call_of(max_tokens=100), tokens_per_day=1000), QuotaSpent)
