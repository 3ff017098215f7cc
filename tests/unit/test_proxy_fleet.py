"""What the proxy knows of its workers, from their links alone; what it shows of it, and counts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from mesh.directory import Directory
from mesh.errors import ProtocolError
from mesh.link.link import IncomingStream, Link, LinkStats
from mesh.records import Capability, Load, ModelEntry, Record, State
from mesh.trust import Role
from proxy.fleet import Fleet
from proxy.health import Cause
from proxy.metrics import Metrics
from proxy.peers import Proxies
from proxy.views import Views
from tests.support.clocks import StoppedClock

NOW = 1_800_000_000.0


@dataclass(eq=False)
class StandInLink:
    """What the fleet asks of a link."""

    node_id: bytes
    draining: bool = False
    closed: bool = False
    last_heard: float = 0.0
    stats: LinkStats = field(default_factory=LinkStats)


def as_link(link: StandInLink) -> Link:
    return cast(Link, link)


def record(name: str = "a", *, role: Role = Role.WORKER, **fields: Any) -> Record:
    base = Record(
        node_id=name.encode() * 32,
        role=role,
        boot=1,
        seq=1,
        issued=NOW,
        expires=NOW + 20,
        state=State.READY,
        models=(ModelEntry(name="m", adapters=("m-legal",)),) if role == Role.WORKER else (),
        capability=Capability(max_concurrency=10),
    )
    return replace(base, **fields)


class KnownRecords:
    """What `Views` asks of the directory."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def known(self, role: Role) -> list[Record]:
        return [record for record in self.records if record.role == role]

    def stats(self) -> dict[str, int | float]:
        return {"table_size": 3, "clock_offset_s": 0.5}


@pytest.fixture
def heard() -> list[Record]:
    return []


@pytest.fixture
def fleet(heard: list[Record]) -> Fleet:
    return Fleet(on_record=heard.append)


def up(fleet: Fleet, about: Record) -> StandInLink:
    link = StandInLink(about.node_id)
    fleet.on_up(as_link(link), about)
    return link


def test_ready_worker_is_a_candidate_for_its_models_adapters_and_tasks(fleet: Fleet, heard: list[Record]) -> None:
    up(fleet, record())
    assert [worker.node_id for worker in fleet.candidates("m", "chat")] == [b"a" * 32]
    assert len(fleet.candidates("m-legal", "completions")) == 1
    assert fleet.candidates("m", "embeddings") == ()
    assert fleet.candidates("other", "chat") == ()
    assert fleet.models() == {"m", "m-legal"}
    assert fleet.tasks("m") == {"chat", "completions"}
    assert len(heard) == 1


@pytest.mark.parametrize("state", [state for state in State if state != State.READY])
def test_worker_that_is_not_ready_is_no_candidate_until_it_says_so(fleet: Fleet, state: State) -> None:
    link = up(fleet, record(state=state))
    assert fleet.candidates("m", "chat") == ()
    fleet.on_record(as_link(link), record(seq=2))
    assert len(fleet.candidates("m", "chat")) == 1
    fleet.on_record(as_link(link), record(seq=3, state=state))
    assert fleet.candidates("m", "chat") == ()


def test_older_record_changes_nothing(fleet: Fleet) -> None:
    link = up(fleet, record(seq=5))
    fleet.on_record(as_link(link), record(seq=4, state=State.FAILED))
    fleet.on_record(as_link(link), record(seq=5, state=State.FAILED))
    assert len(fleet.candidates("m", "chat")) == 1


def test_drained_and_lost_workers_are_no_candidates(fleet: Fleet) -> None:
    first, second = up(fleet, record("a")), up(fleet, record("b"))
    first.draining = True
    fleet.on_drain(as_link(first))
    assert [worker.node_id for worker in fleet.candidates("m", "chat")] == [b"b" * 32]
    fleet.on_down(as_link(second), "lost")
    assert fleet.candidates("m", "chat") == ()
    assert set(fleet.workers) == {b"a" * 32}


def test_end_of_a_replaced_link_does_not_take_the_new_one_with_it(fleet: Fleet) -> None:
    old = up(fleet, record())
    new = up(fleet, record(boot=2))
    fleet.on_down(as_link(old), "late")
    assert fleet.workers[b"a" * 32].link is as_link(new)
    fleet.on_load(as_link(StandInLink(b"z" * 32)), {"run": 1, "wait": 1, "yours": 1})


def test_load_pushed_by_a_worker_is_what_others_gave_it(fleet: Fleet) -> None:
    link = up(fleet, record(load=Load(running=7, waiting=2, kv_use=0.5)))
    worker = fleet.workers[link.node_id]
    assert (worker.elsewhere, worker.waiting, worker.kv_use) == (9, 2, 0.5)
    fleet.on_load(as_link(link), {"run": 5, "wait": 1, "yours": 2, "kv": 0.25})
    assert (worker.elsewhere, worker.waiting, worker.kv_use) == (4, 1, 0.25)
    fleet.on_load(as_link(link), {"run": 1, "wait": 0, "yours": 9})
    assert (worker.elsewhere, worker.kv_use) == (0, 0.0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"run": 1, "wait": 1},
        {"run": -1, "wait": 0, "yours": 0},
        {"run": 1.5, "wait": 0, "yours": 0},
        {"run": True, "wait": 0, "yours": 0},
        {"run": 10**9, "wait": 0, "yours": 0},
        {"run": "1", "wait": 0, "yours": 0},
        {"run": 1, "wait": 0, "yours": 0, "kv": 1.01},
        {"run": 1, "wait": 0, "yours": 0, "kv": float("nan")},
        {"run": 1, "wait": 0, "yours": 0, "kv": float("inf")},
        {"run": 1, "wait": 0, "yours": 0, "kv": None},
    ],
)
def test_load_of_odd_numbers_is_a_protocol_error(fleet: Fleet, fields: dict[str, Any]) -> None:
    link = up(fleet, record())
    with pytest.raises(ProtocolError):
        fleet.on_load(as_link(link), fields)


VALUES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=3) | st.just([])


@given(st.dictionaries(st.sampled_from(["run", "wait", "yours", "kv"]), VALUES))
def test_any_load_is_taken_or_a_protocol_error(fields: dict[str, Any]) -> None:
    fleet = Fleet(on_record=lambda record: None)
    link = up(fleet, record())
    try:
        fleet.on_load(as_link(link), fields)
    except ProtocolError:
        return
    worker = fleet.workers[link.node_id]
    assert worker.elsewhere >= 0
    assert 0 <= worker.kv_use <= 1


def test_worker_may_not_open_streams(fleet: Fleet) -> None:
    with pytest.raises(ProtocolError):
        fleet.on_open(cast(IncomingStream, None), {})


# -- what is shown


def views(fleet: Fleet, directory: KnownRecords) -> Views:
    own = record("p", role=Role.PROXY, api="http://127.0.0.1:8080/v1")
    return Views(
        fleet, Proxies(on_record=lambda record: None), cast(Directory, directory), own=lambda: own, mesh="test", clock=StoppedClock(NOW)
    )


def test_models_are_those_of_linked_workers_and_of_ready_records(fleet: Fleet) -> None:
    directory = KnownRecords()
    seen = views(fleet, directory)
    up(fleet, record("a"))
    directory.records = [
        record("b", models=(ModelEntry(name="far"),)),
        record("c", models=(ModelEntry(name="cold"),), state=State.LOADING),
        record("d", models=(ModelEntry(name="gone"),), expires=NOW - 1),
    ]
    assert seen.ready_models() == {"m", "m-legal", "far"}
    assert seen.knows("cold")
    assert not seen.knows("gone")
    assert not seen.knows("nothing")


def test_newest_record_of_a_worker_is_shown_once(fleet: Fleet) -> None:
    directory = KnownRecords()
    up(fleet, record("a", seq=5))
    directory.records = [record("a", seq=4, state=State.LOADING), record("b", boot=9, load=Load(running=3))]
    shown = views(fleet, directory).workers()
    assert [(item["id"], item["state"], item["linked"]) for item in shown] == [("61" * 32, "ready", True), ("62" * 32, "ready", False)]
    assert shown[1]["running"] == 3


def test_status_names_every_node(fleet: Fleet) -> None:
    directory = KnownRecords()
    up(fleet, record("a"))
    directory.records = [record("x", role=Role.PROXY), record("s", role=Role.BOOTSTRAP), record("p", role=Role.PROXY, seq=0)]
    fleet.watch.ejections[Cause.SLOW] = 2
    status = views(fleet, directory).status(
        in_flight=2, draining=False, moves={"moved": 1, "stuck": 0, "tokens": 7}, retries={"retried": 3, "refused": 1}
    )
    assert sorted(item["id"][:2] for item in status["proxies"]) == ["70", "78"]
    assert [item["id"][:2] for item in status["bootstraps"]] == ["73"]
    assert status["proxy"] == {
        "id": "70" * 32,
        "in_flight": 2,
        "draining": False,
        "streams": {"moved": 1, "stuck": 0, "tokens": 7},
        "retries": {"retried": 3, "refused": 1},
        "ejections": {"slow": 2},
        "models": ["m", "m-legal"],
    }


# -- what is counted


def test_metrics_are_read_by_prometheus(fleet: Fleet) -> None:
    metrics = Metrics(fleet, directory=KnownRecords().stats)
    up(fleet, record("a"))
    up(fleet, record("b", state=State.LOADING))
    metrics.requests('odd "model"\n\\', "chat", "ok").inc()
    metrics.tokens("m", "prompt").inc(5)
    metrics.retries("worker_lost").inc()
    metrics.first_byte("m").observe(0.2)
    metrics.duration("m").observe(1.2)
    text = metrics.render().decode()
    assert text.endswith("\n")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {(sample.name, *sorted(sample.labels.items())): sample.value for family in families.values() for sample in family.samples}
    assert samples["infermesh_requests_total", ("code", "ok"), ("model", 'odd "model"\n\\'), ("task", "chat")] == 1
    assert samples["infermesh_workers", ("state", "ready")] == 1
    assert samples["infermesh_workers", ("state", "loading")] == 1
    assert samples["infermesh_worker_in_flight", ("worker", "61" * 6)] == 0
    assert samples["infermesh_directory_table_size",] == 3
    assert families["infermesh_request_duration_seconds"].type == "histogram"
    for family in families.values():
        assert family.documentation


def test_metrics_of_two_proxies_in_one_process_do_not_mix(fleet: Fleet) -> None:
    one, other = (Metrics(fleet, directory=dict) for _ in range(2))
    one.retries("x").inc()
    assert b'infermesh_retries_total{code="x"}' in one.render()
    assert b'infermesh_retries_total{code="x"}' not in other.render()


# -- what is cached and queued


def chain(*names: int) -> bytes:
    return b"".join(name.to_bytes(8) for name in names)


def test_prefixes_told_over_a_link_are_found_and_gone_with_it(fleet: Fleet) -> None:
    link = up(fleet, record())
    fleet.on_prefix(as_link(link), {"new": True, "add": chain(1, 2)})
    fleet.on_prefix(as_link(link), {"del": chain(2), "add": chain(3)})
    (worker,) = fleet.workers.values()
    assert fleet.holders("m", (chain(1), chain(2))) == {worker: 128}
    link.draining = True
    assert fleet.holders("m", (chain(1),)) == {}, "it takes no requests"
    link.draining = False
    up(fleet, record(boot=2))
    assert fleet.holders("m", (chain(1),)) == {}, "a new link begins with nothing"
    fleet.on_prefix(as_link(StandInLink(b"z" * 32)), {"add": chain(1)})
    assert len(fleet.prefixes) == 0


@pytest.mark.parametrize("fields", [{"add": b"123"}, {"add": 7}, {"del": "x" * 8}, {"new": "yes"}])
def test_odd_prefixes_are_a_protocol_error(fleet: Fleet, fields: dict[str, Any]) -> None:
    link = up(fleet, record())
    with pytest.raises(ProtocolError):
        fleet.on_prefix(as_link(link), fields)


@pytest.mark.parametrize("odd", [{"pre": -1}, {"rate": 1.5}, {"n": "1"}, {"last": None}, {"pre": 10**13}, {"rate": 10**10}])
def test_odd_prefill_is_a_protocol_error(fleet: Fleet, odd: dict[str, Any]) -> None:
    link = up(fleet, record())
    with pytest.raises(ProtocolError):
        fleet.on_load(as_link(link), {"run": 0, "wait": 0, "yours": 0, **odd})


def test_backlog_that_was_told_flows_off_and_what_was_sent_since_comes_on_top() -> None:
    fleet = Fleet(on_record=lambda record: None, clock=StoppedClock(50.0))
    link = up(fleet, record())
    (worker,) = fleet.workers.values()
    worker.sent(1, 3_000)
    worker.sent(3, 500)
    assert worker.queued_tokens(50.0) == 3_500
    fleet.on_load(as_link(link), {"run": 1, "wait": 0, "yours": 1, "n": 4, "pre": 10_000, "rate": 2_000, "last": 1})
    assert (worker.load_number, worker.rate) == (4, 2_000)
    assert worker.queued_tokens(50.0) == 10_500
    assert worker.queued_tokens(52.0) == 6_500
    assert worker.queued_tokens(500.0) == 500
    worker.settled(1)
    worker.settled(3)
    worker.settled(3)
    assert worker.queued_tokens(500.0) == 0


def test_tokens_of_a_text_are_learned_for_each_model(fleet: Fleet) -> None:
    assert fleet.tokens("m", 4_000) == 1_000
    for _ in range(5):
        fleet.learn("m", 4_000, 2_000)
    assert fleet.tokens("m", 4_000) == 2_000
    assert fleet.tokens("n", 4_000) == 1_000
    fleet.learn("n", 1, 10**9)
    assert fleet.tokens("n", 100) == 200, "nonsense has bounds"


def test_choices_and_cached_tokens_are_counted(fleet: Fleet) -> None:
    metrics = Metrics(fleet, directory=dict)
    metrics.choices["prefix"] += 2
    metrics.cached_tokens["counted"] += 70
    metrics.rerouted += 3
    text = metrics.render().decode()
    for line in (
        'infermesh_choices_total{reason="prefix"} 2.0',
        'infermesh_cached_tokens_total{kind="counted"} 70.0',
        "infermesh_rerouted_total 3.0",
        "infermesh_prefix_hashes 0.0",
    ):
        assert line in text


# -- health: what is heard and seen of workers decides who is a candidate


class Timed:
    """A fleet on a clock of the test's own, ticking twice a second; ``names`` are its ready workers."""

    def __init__(self, names: str) -> None:
        self.clock = StoppedClock(1000.0)
        self.fleet = Fleet(on_record=lambda record: None, clock=self.clock)
        self.links = {name: up(self.fleet, record(name)) for name in names}
        self.workers = {name: self.fleet.workers[name.encode() * 32] for name in names}
        self.quiet = ""
        self.rates: dict[str, float] = {}

    def candidates(self) -> str:
        return "".join(chr(worker.node_id[0]) for worker in self.fleet.candidates("m", "chat"))

    def pass_s(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            self.clock.now += 0.5
            for name, link in self.links.items():
                if name not in self.quiet:
                    link.last_heard = self.clock.now - 0.1
            for name, rate in self.rates.items():
                self.workers[name].health.stream.add(rate / 2, 0.5)
            self.fleet.tick()

    def fail(self, name: str, times: int = 3) -> None:
        for _ in range(times):
            self.fleet.blame([(self.workers[name], "engine_unavailable")], answered=True)


def test_silent_worker_gets_no_request_after_a_second_and_a_half_and_is_back_once_heard() -> None:
    timed = Timed("abc")
    timed.pass_s(3)
    timed.quiet = "b"
    timed.pass_s(1)
    assert timed.candidates() == "abc"
    timed.pass_s(1)
    assert timed.candidates() == "ac"
    assert timed.workers["b"].standing == "suspect"
    assert timed.workers["b"].standing_reason.startswith("silent for")
    timed.quiet = ""
    timed.pass_s(0.5)
    assert timed.candidates() == "abc"


def test_where_all_are_silent_all_are_tried() -> None:
    timed = Timed("ab")
    timed.quiet = "ab"
    timed.pass_s(10)
    assert timed.candidates() == "ab"


def test_proxy_that_stood_still_suspects_nobody() -> None:
    timed = Timed("ab")
    timed.pass_s(3)
    timed.clock.now += 60
    timed.fleet.tick()
    assert timed.candidates() == "ab"
    timed.pass_s(0.5)
    assert timed.candidates() == "ab"


def test_worker_whose_engine_stands_still_says_so_and_gets_nothing_until_it_moves() -> None:
    timed = Timed("ab")
    load = {"run": 1, "wait": 0, "yours": 1}
    timed.fleet.on_load(as_link(timed.links["a"]), {**load, "stuck": True})
    assert timed.candidates() == "b"
    timed.pass_s(5)
    assert timed.candidates() == "b"
    assert timed.fleet.watch.ejections == {Cause.STUCK: 1}
    timed.fleet.on_load(as_link(timed.links["a"]), {**load, "stuck": True, "halted": True})
    assert [worker.halted for worker in timed.fleet.workers.values()].count(True) == 1
    timed.fleet.on_load(as_link(timed.links["a"]), load)
    assert not any(worker.halted for worker in timed.fleet.workers.values())
    assert timed.candidates() == "ab"
    with pytest.raises(ProtocolError):
        timed.fleet.on_load(as_link(timed.links["a"]), {**load, "stuck": 1})
    with pytest.raises(ProtocolError):
        timed.fleet.on_load(as_link(timed.links["a"]), {**load, "halted": "yes"})


def test_ejected_worker_is_no_candidate_nor_holder_and_gets_one_request_on_trial() -> None:
    timed = Timed("ab")
    timed.fleet.on_prefix(as_link(timed.links["a"]), {"new": True, "add": chain(1)})
    timed.fail("a")
    assert timed.candidates() == "b"
    assert timed.fleet.holders("m", (chain(1),)) == {}
    timed.pass_s(1)
    assert timed.candidates() == "ab", "on trial"
    assert timed.fleet.begin(timed.workers["a"])
    assert timed.candidates() == "b", "one request at a time"
    timed.fleet.end_trial(timed.workers["a"])
    assert timed.candidates() == "ab", "its client went away: that says nothing"
    assert timed.fleet.begin(timed.workers["a"])
    timed.fleet.end_trial(timed.workers["a"])
    timed.fleet.succeeded(timed.workers["a"])
    assert not timed.fleet.begin(timed.workers["a"])
    assert timed.candidates() == "ab"


def test_request_that_fails_everywhere_is_held_against_nobody_but_one_that_succeeds_elsewhere_is() -> None:
    timed = Timed("abcd")
    a, b = timed.workers["a"], timed.workers["b"]
    for _ in range(50):
        timed.fleet.blame([(a, "engine_unavailable"), (b, "engine_unavailable")], answered=False)
    assert timed.candidates() == "abcd"
    for _ in range(50):
        timed.fleet.blame([(a, "worker_lost")], answered=True)
    assert timed.candidates() == "abcd", "a lost link speaks for itself"
    for _ in range(3):
        timed.fleet.blame([(a, "engine_unavailable"), (b, "worker_lost")], answered=True)
    assert timed.candidates() == "bcd"


def test_bad_requests_cannot_take_the_fleet_away() -> None:
    timed = Timed("abcdef")
    for _ in range(20):
        for name in "abcdef":
            timed.fail(name)
    assert len(timed.candidates()) == 3


def test_slow_worker_is_taken_out_while_its_streams_run() -> None:
    timed = Timed("abc")
    timed.rates = {"a": 100, "b": 1000, "c": 1200}
    timed.pass_s(5)
    assert timed.candidates() == "bc"


def test_link_that_comes_and_goes_is_held_off_and_a_drained_or_replaced_one_is_not() -> None:
    timed = Timed("ab")
    for reason, draining in (("replaced", False), ("closed", True)) * 5:
        timed.links["a"].draining = draining
        timed.fleet.on_down(as_link(timed.links["a"]), reason)
        timed.links["a"] = up(timed.fleet, record("a"))
    assert timed.candidates() == "ba"
    for _ in range(4):
        timed.fleet.on_down(as_link(timed.links["a"]), "connection lost")
        timed.links["a"] = up(timed.fleet, record("a"))
    assert timed.candidates() == "b"
    timed.workers["a"] = timed.fleet.workers[b"a" * 32]
    timed.pass_s(3.5)
    assert timed.candidates() == "b"
    timed.pass_s(0.5)
    assert timed.candidates() == "ba", "four losses: a second, two, four"


def test_engine_that_keeps_crashing_is_held_off_but_one_restart_or_a_drain_is_not() -> None:
    timed = Timed("ab")
    seq = 1
    for state in (State.STARTING, State.READY, State.DRAINING, State.READY, State.DRAINING, State.READY):
        seq += 1
        timed.fleet.on_record(as_link(timed.links["a"]), record("a", seq=seq, state=state))
    assert timed.candidates() == "ab"
    for state in (State.STARTING, State.READY):
        seq += 1
        timed.fleet.on_record(as_link(timed.links["a"]), record("a", seq=seq, state=state))
    assert timed.candidates() == "b"
    assert timed.workers["a"].standing_reason == "went away 2 times within 120 s"
