"""What the doctor makes of the facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mesh.authority import EPOCH_S
from mesh.doctor import (
    Answer,
    BadRecord,
    DocumentFact,
    Facts,
    Finding,
    RecordFact,
    Severity,
    SharingFact,
    Unlinked,
    WorkerFact,
    diagnose,
    worst,
)

NOW = 20_000 * EPOCH_S + EPOCH_S / 2
HEALTHY = Facts(
    now=NOW,
    offsets={"a": 0.1, "b": -0.1, "c": 0.0},
    peers=tuple(Answer(name=name, address="192.0.2.1:1", rtt_s=0.01) for name in "abc"),
    lost=(),
    doors=(Answer(name="", address="boot:7600", rtt_s=0.02),),
    tcp_doors=(Answer(name="", address="boot:7600", rtt_s=0.001),),
    table_size=3,
    failing=0,
    reachable=3,
    records=(RecordFact(name="a", role="worker", life_s=20.0, left_s=16.0),),
    linked=1,
    ready=1,
    unlinked=(),
    others_share=0,
    documents_held=1,
    documents_unsaved=0,
    documents=(DocumentFact(title="endpoint/chat", seq=3, asked=8, same=6, newer=0, rival=0),),
    epochs=frozenset(range(19_999, 20_003)),
    member_issued=NOW - 3600,
    member_expires=NOW + 23 * 3600,
    lookup_s=0.05,
    lookup_complete=True,
    lookup_answered=3,
    bad=(),
    own_copies=3,
    wanted_copies=5,
    large=False,
    counts={"lookups": 100, "lookups_cut_short": 1},
)
SILENT = Answer(name="w", address="192.0.2.9:7", rtt_s=None)
GONE = Unlinked(name="w", state="ready", why="192.0.2.9:7: connection refused", up_s=60.0, stale=True)


def found(**facts: Any) -> dict[str, Finding]:
    """By check, what the doctor says of a healthy mesh but for these facts."""
    return {finding.check: finding for finding in diagnose(replace(HEALTHY, **facts))}


def test_healthy_mesh_has_nothing_but_good_findings() -> None:
    assert {finding.severity for finding in found().values()} == {Severity.OK}
    assert not any(finding.advice for finding in found().values())


def test_worst_comes_first_and_names_the_whole() -> None:
    findings = diagnose(replace(HEALTHY, doors=(SILENT,), unlinked=(GONE,)))
    assert [finding.severity for finding in findings[:3]] == [Severity.FAIL, Severity.WARN, Severity.OK]
    assert worst(findings) is Severity.FAIL
    assert worst([]) is Severity.OK


CASES: list[tuple[str, str, dict[str, Any], str]] = [
    ("workers", "warn", {"out": (WorkerFact(name="w", standing="ejected", reason="9 times slower than usual"),)}, "w (ejected): 9 times"),
    ("drained", "warn", {"out": (WorkerFact(name="w", standing="draining", reason="new driver"),)}, "w: new driver"),
    ("certificates", "warn", {"records": (replace(HEALTHY.records[0], member_left_s=5 * 3600.0),)}, "has not renewed its certificate"),
    ("certificates", "fail", {"records": (replace(HEALTHY.records[0], member_left_s=60.0),) * 2}, "have not renewed"),
    ("clock", "warn", {"offsets": {"a": 9.0, "b": 9.0, "c": 0.0}}, "9.0 s behind"),
    ("clock", "fail", {"offsets": {"a": -40.0}}, "40.0 s ahead"),
    ("clock", "warn", {"offsets": {"a": 0.0, "b": 0.0, "c": 12.0}}, "c +12.0 s"),
    ("clock", "fail", {"offsets": {"a": 0.0, "b": 0.0, "c": 31.0}}, "c +31.0 s"),
    ("clock", "ok", {"offsets": {}}, "no peer's clock"),
    ("peers", "fail", {"table_size": 0, "peers": ()}, "no peer in the directory"),
    ("peers", "warn", {"table_size": 1}, "only 1 peer"),
    ("peers", "warn", {"table_size": 4, "reachable": 15}, "only 4 peers"),
    ("peers", "ok", {"table_size": 11, "reachable": 900}, "11 peers"),
    ("unreachable", "warn", {"peers": (*HEALTHY.peers, SILENT)}, "w at 192.0.2.9:7"),
    ("unreachable", "fail", {"peers": (SILENT,)}, "no peer answers"),
    ("lost", "warn", {"lost": (replace(SILENT, gone_s=30.0),)}, "silent for 30 s"),
    ("bootstraps", "fail", {"doors": (SILENT,)}, "credentials end in 23 h"),
    ("bootstraps", "warn", {"doors": (SILENT, *HEALTHY.doors)}, "1 of 2"),
    ("bootstraps", "warn", {"doors": ()}, "--bootstrap"),
    ("records", "warn", {"records": (RecordFact(name="a", role="worker", life_s=20.0, left_s=5.0),)}, "ends in 5 s of 20 s"),
    ("records", "ok", {"records": (RecordFact(name="a", role="worker", life_s=20.0, left_s=5.0),), "large": True}, "fresh"),
    ("records", "ok", {"records": (RecordFact(name="a", role="worker", life_s=1.0, left_s=0.1),)}, "fresh"),
    ("records", "ok", {"records": ()}, "no records"),
    ("links", "warn", {"unlinked": (GONE,)}, "connection refused, and its record is not refreshed"),
    ("links", "fail", {"unlinked": (GONE,), "linked": 0, "ready": 0}, "connection refused"),
    ("links", "ok", {"unlinked": (replace(GONE, up_s=1.0),)}, "just started"),
    ("links", "warn", {"linked": 0, "ready": 0}, "no worker is known"),
    ("links", "warn", {"linked": 2, "ready": 0}, "2 workers linked, 0 ready"),
    ("links", "ok", {"linked": 1_000, "ready": 1_000, "others_share": 9_000}, "9000 more are other proxies' share"),
    ("enrolment", "ok", {}, "join and renew over TCP"),
    ("enrolment", "fail", {"tcp_doors": (replace(SILENT, error="connection refused"),)}, "connection refused"),
    ("enrolment", "warn", {"tcp_doors": (SILENT, *HEALTHY.tcp_doors)}, "1 of 2"),
    ("documents", "ok", {}, "endpoint/chat seq 3, 6 of 8 nodes"),
    ("documents", "ok", {"documents": (), "documents_held": 0}, "0 documents held"),
    ("documents", "warn", {"documents": (replace(HEALTHY.documents[0], newer=2),)}, "a newer one at 2"),
    ("documents", "warn", {"documents": (replace(HEALTHY.documents[0], rival=1),)}, "another at 1"),
    ("documents", "warn", {"documents": (replace(HEALTHY.documents[0], same=0),)}, "held by none"),
    ("documents", "fail", {"documents_unsaved": 2}, "make room"),
    ("epoch", "fail", {"epochs": frozenset({19_999, 20_001})}, "this epoch is missing"),
    ("epoch", "warn", {"epochs": frozenset({20_000})}, "next epoch is missing"),
    ("epoch", "fail", {"epochs": frozenset({20_000}), "now": NOW + 0.4 * EPOCH_S}, "next epoch is missing"),
    ("credentials", "warn", {"member_expires": NOW + 2 * 3600, "member_issued": NOW - 4 * 3600}, "end in 2 h"),
    ("credentials", "fail", {"member_expires": NOW + 1800, "member_issued": NOW - 23 * 3600}, "end in 30 min"),
    ("credentials", "fail", {"member_expires": NOW - 1}, "have ended"),
    ("lookup", "warn", {"lookup_complete": False}, "deadline"),
    ("lookup", "warn", {"counts": {"lookups": 100, "lookups_cut_short": 20}}, "20 of 100"),
    ("forged", "warn", {"bad": (BadRecord(node="w", verdict="bad_signature", holders=("h",)),)}, "bad_signature record of w from h"),
    ("copies", "fail", {"own_copies": 0}, "0 holders"),
    ("copies", "warn", {"own_copies": 1, "table_size": 40}, "1 holder"),
    ("refused", "ok", {"counts": {"refused_unsealed": 5}}, "unsealed 5"),
    ("refused", "warn", {"counts": {"refused_forged_record": 1}}, "forged_record 1"),
    ("limits", "ok", {}, "by itself"),
    ("limits", "ok", {"sharing": SharingFact(proxies=3)}, "shared by 3 proxies"),
    ("limits", "warn", {"sharing": SharingFact(proxies=3, missed=("a1b2",))}, "a1b2"),
    ("limits", "warn", {"sharing": SharingFact(proxies=3, missed=("a1b2",))}, "1 proxy of 3 gone"),
    ("limits", "warn", {"sharing": SharingFact(has_share=False, proxies=3)}, "no share of any limit"),
]


@pytest.mark.parametrize(("check", "severity", "facts", "said"), CASES, ids=[f"{case[0]} {case[1]}: {case[3]}" for case in CASES])
def test_fact_is_judged_and_explained(check: str, severity: str, facts: dict[str, Any], said: str) -> None:
    finding = found(**facts)[check]
    assert finding.severity == severity
    assert said in f"{finding.what} {finding.detail} {finding.advice}"
    assert bool(finding.advice) == (severity != "ok")


def test_peer_that_went_long_ago_or_came_back_is_no_news() -> None:
    back = Answer(name="b", address="192.0.2.8:7", rtt_s=0.01, gone_s=10.0)
    assert "lost" not in found(lost=(back, replace(SILENT, gone_s=4000.0)))


def test_long_lists_are_cut_and_say_so() -> None:
    many = tuple(replace(GONE, name=f"w{number}") for number in range(20))
    detail = found(unlinked=many)["links"].detail
    assert "w7" in detail
    assert "w8 " not in detail
    assert "12 more" in detail
