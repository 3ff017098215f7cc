"""The worker's own count: what the engine said, else what went through; and time in which a model was ready."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import pytest

from mesh.errors import EngineUnavailable
from mesh.ledger import Ledger
from mesh.receipts import Kind, Receipt
from tests.support.clocks import StoppedClock
from worker.engine import ModelSpec, Task
from worker.metering import AT_MOST_OFF_MS, UPTIME_EVERY_S, Meter, Tally, Uptime
from worker.usage import EventStream, Usage

MODEL = ModelSpec(name="m", engine_name="inner", tasks=frozenset(Task), digest="sha256:" + "ab" * 32, adapters=("legal",))
EVENT = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
DETAILS = b'"completion_tokens_details": {"reasoning_tokens": 5}'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 8, ' + DETAILS + b"}}\n\n"


@dataclass
class Notebook:
    """What a meter asks of a ledger."""

    receipts: list[Receipt] = field(default_factory=list)
    full: bool = False

    def add(self, entry: Receipt) -> None:
        self.receipts.append(entry)


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


@pytest.fixture
def clock() -> StoppedClock:
    return StoppedClock()


def tally(notebook: Notebook, clock: StoppedClock, **fields: Any) -> Tally:
    base: dict[str, Any] = {
        "request_id": "req_1",
        "attempt": 2,
        "at": int(clock.wall() * 1000) - 40,
        "proxy": b"p" * 32,
        "project": "search",
        "key": b"12345678",
        "task": "chat",
        "asked": "m",
        "model": MODEL,
        "queue_s": 0.25,
    }
    return Meter(cast(Ledger, notebook), clock=clock).tally(**(base | fields))


def test_a_complete_answer_has_the_engines_count_and_the_times(notebook: Notebook, clock: StoppedClock) -> None:
    with tally(notebook, clock, asked="legal") as at:
        at.stream = EventStream(show_usage=False)
        at.passed(at.stream.feed(EVENT + EVENT + USAGE))
        clock.now += 1.5
    (receipt,) = notebook.receipts
    assert (receipt.prompt, receipt.completion, receipt.reasoning, receipt.own_count) == (30, 8, 5, False)
    assert (receipt.queue_ms, receipt.took_ms, receipt.events, receipt.size_bytes) == (250, 1750, 2, 2 * len(EVENT))
    assert (receipt.attempt, receipt.adapter, receipt.digest, receipt.status) == (2, "legal", MODEL.digest, "ok")


def test_a_stream_that_broke_counts_what_went_through(notebook: Notebook, clock: StoppedClock) -> None:
    with suppress(EngineUnavailable), tally(notebook, clock) as at:
        at.stream = EventStream(show_usage=False)
        at.passed(at.stream.feed(EVENT * 4))
        raise EngineUnavailable("gone")
    (receipt,) = notebook.receipts
    assert (receipt.status, receipt.completion, receipt.own_count) == ("engine_unavailable", 3, True)


def test_an_answer_cut_while_it_was_sent_counts_its_share(notebook: Notebook, clock: StoppedClock) -> None:
    with suppress(asyncio.CancelledError), tally(notebook, clock) as at:
        at.usage, at.length, at.sent = Usage(prompt=30, completion=8), 1000, 500
        raise asyncio.CancelledError
    (receipt,) = notebook.receipts
    assert (receipt.status, receipt.prompt, receipt.completion, receipt.partial) == ("cancelled", 30, 4, True)


@pytest.mark.parametrize("off_ms", [AT_MOST_OFF_MS + 1000, -AT_MOST_OFF_MS - 1000])
def test_a_proxy_with_a_clock_far_off_is_not_believed(notebook: Notebook, clock: StoppedClock, off_ms: int) -> None:
    now = int(clock.wall() * 1000)
    with tally(notebook, clock, at=now + off_ms):
        pass
    assert notebook.receipts[0].at == now


async def test_readiness_is_metered_in_pieces_that_join(notebook: Notebook, clock: StoppedClock) -> None:
    uptime = Uptime(cast(Ledger, notebook), gpus=4, clock=clock, rng=random.Random(1))
    begun = int(clock.wall() * 1000)
    uptime.ready((MODEL,))
    running = asyncio.create_task(uptime.run())
    while len(notebook.receipts) < 3:
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    spans = [(receipt.at, receipt.at + receipt.took_ms) for receipt in notebook.receipts]
    assert spans[0] == (begun, begun + UPTIME_EVERY_S * 1000)
    assert all(former[1] == later[0] for former, later in pairwise(spans))
    assert {(receipt.kind, receipt.gpus, receipt.model) for receipt in notebook.receipts} == {(Kind.UPTIME, 4, "m")}
    assert len({receipt.id for receipt in notebook.receipts}) == len(spans)


def test_time_in_which_the_engine_was_not_ready_is_not_metered(notebook: Notebook, clock: StoppedClock) -> None:
    uptime = Uptime(cast(Ledger, notebook), gpus=1, clock=clock, rng=random.Random(1))
    uptime.ready((MODEL,))
    clock.now += 10
    uptime.ready(())
    clock.now += 100
    uptime.ready((MODEL,))
    clock.now += 5
    uptime.ready(())
    assert [receipt.took_ms for receipt in notebook.receipts] == [10_000, 5_000]
