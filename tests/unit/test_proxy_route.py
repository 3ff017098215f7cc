"""One request's way to a worker: what is sent along with it, what is said of it, and what it does when it is sent back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest

from mesh.errors import InvalidRequest
from mesh.prefix import split_chain
from proxy.fleet import Fleet, Worker
from proxy.metrics import Metrics
from proxy.openai import Call, parse_call
from proxy.route import MOST_REROUTES, Router
from tests.support.clocks import StoppedClock
from tests.unit.test_proxy_fleet import as_link, record, up

SHORT, LONG = "hi", "long " * 1_000


def header(**headers: str) -> Callable[[str], str | None]:
    return {name.replace("_", "-"): value for name, value in headers.items()}.get


def call(text: str = LONG, **more: object) -> Call:
    return parse_call("/v1/chat/completions", json.dumps({"model": "m", "messages": [{"role": "user", "content": text}], **more}).encode())


class Desk:
    """A router over a fleet of two idle workers."""

    def __init__(self, routing: str = "prefix") -> None:
        self.fleet = Fleet(on_record=lambda record: None, clock=StoppedClock(10.0))
        self.links = [up(self.fleet, record(name)) for name in ("a", "b")]
        self.workers = list(self.fleet.workers.values())
        self.metrics = Metrics(self.fleet, directory=dict)
        self.router = Router(routing, fleet=self.fleet, metrics=self.metrics, rng=random.Random(1), clock=lambda: 10.0)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_short_request_takes_nothing_along(desk: Desk) -> None:
    plan = desk.router.plan(call(SHORT), "p", header())
    assert desk.router.choose(plan, "r") is not None
    assert plan.head() == {}
    assert plan.explain(10.0).startswith("load; of=2; outstanding=0")
    assert len(desk.fleet.prefixes) == 0


def test_long_prompt_takes_its_chain_along_and_is_hoped_to_be_held(desk: Desk) -> None:
    plan = desk.router.plan(call(), "p", header(x_priority="batch"))
    choice = desk.router.choose(plan, "r")
    assert choice is not None
    head = plan.head()
    assert split_chain(head["pfx"]) == plan.chain
    assert (head["pri"], head["seen"], head["txt"]) == (2, 0, plan.size_bytes)
    again = desk.router.plan(call(), "p", header())
    second = desk.router.choose(again, "r")
    assert second is not None
    assert (second.worker, second.reason) == (choice.worker, "prefix")
    assert "cached=" in again.explain(10.0)
    assert desk.metrics.choices["prefix"] == 1


def test_worker_that_holds_a_prompt_is_told_by_its_news(desk: Desk) -> None:
    plan = desk.router.plan(call(), "p", header())
    desk.fleet.on_prefix(as_link(desk.links[1]), {"new": True, "add": b"".join(plan.chain)})
    for _ in range(5):
        choice = desk.router.choose(desk.router.plan(call(), "p", header()), "r")
        assert choice is not None
        assert choice.worker is desk.workers[1]


def test_request_sent_back_holds_nothing_there_and_asks_six_times_at_most(desk: Desk) -> None:
    plan = desk.router.plan(call(), "p", header())
    for _ in range(MOST_REROUTES):
        assert desk.router.choose(plan, "r") is not None
        assert "seen" in plan.head()
        assert desk.router.rerouted(plan)
        assert len(desk.fleet.prefixes) == 0
    assert desk.router.choose(plan, "r") is not None
    assert "seen" not in plan.head()
    assert not desk.router.rerouted(plan), "it was not asked to"
    assert desk.metrics.rerouted == MOST_REROUTES


def test_request_with_nowhere_else_to_go_is_to_stay(desk: Desk) -> None:
    desk.fleet.on_down(as_link(desk.links[0]), "gone")
    plan = desk.router.plan(call(), "p", header())
    assert desk.router.choose(plan, "r") is not None
    assert "seen" not in plan.head()


@pytest.mark.parametrize("routing", ["round-robin", "consistent-hash"])
def test_choice_that_does_not_look_at_load_is_not_to_be_sent_back(routing: str) -> None:
    desk = Desk(routing)
    plan = desk.router.plan(call(), "p", header())
    assert desk.router.choose(plan, "r") is not None
    assert "seen" not in plan.head()


def test_workers_that_failed_are_avoided_until_none_is_left(desk: Desk) -> None:
    plan, seen = desk.router.plan(call(SHORT), "p", header()), set[Worker]()
    for _ in range(2):
        choice = desk.router.choose(plan, "r")
        assert choice is not None
        seen.add(choice.worker)
        plan.avoid |= {choice.worker.node_id}
    assert seen == set(desk.workers)
    assert desk.router.choose(plan, "r") is None


def test_session_has_one_worker_and_another_projects_session_is_another(desk: Desk) -> None:
    def home(project: str, session: str) -> Worker:
        choice = desk.router.choose(desk.router.plan(call(SHORT), project, header(x_session_id=session)), "r")
        assert choice is not None
        assert choice.reason == "session"
        return choice.worker

    assert all(home("p", str(n)) is home("p", str(n)) for n in range(20))
    assert any(home("p", str(n)) is not home("q", str(n)) for n in range(20))
    with_key = desk.router.choose(desk.router.plan(call(SHORT, prompt_cache_key="7"), "p", header()), "r")
    assert with_key is not None
    assert with_key.worker is home("p", "7")


def test_consistent_hash_goes_by_the_prompt_where_there_is_no_session() -> None:
    desk = Desk("consistent-hash")
    homes = {}
    for n in range(20):
        for _ in range(3):
            choice = desk.router.choose(desk.router.plan(call(f"{n} {LONG}"), "p", header()), "r")
            assert choice is not None
            assert homes.setdefault(n, choice.worker) is choice.worker
    assert set(homes.values()) == set(desk.workers)


def test_counted_tokens_are_learned_from(desk: Desk) -> None:
    plan = desk.router.plan(call(), "p", header())
    desk.router.choose(plan, "r")
    desk.router.served(plan, prompt_tokens=plan.size_bytes // 2, cached_tokens=100)
    assert desk.router.plan(call(), "p", header()).tokens == pytest.approx(plan.size_bytes / 2, abs=1)
    assert desk.metrics.cached_tokens == {"expected": 0, "counted": 100}


def test_unknown_priority_is_refused(desk: Desk) -> None:
    with pytest.raises(InvalidRequest):
        desk.router.plan(call(SHORT), "p", header(x_priority="now"))
