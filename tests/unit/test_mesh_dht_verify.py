"""Verdicts are remembered for as long as a record may come again, and for as many records as a proxy's view may have."""

from __future__ import annotations

from mesh.dht.verify import Verifier, peek
from mesh.membership import MembershipCache
from tests.support.records import NOW, Scribe

SCRIBE = Scribe(seed=5)
NODE = SCRIBE.node()
VIEW = 10_000


def signed(count: int, *, later_s: float = 0.0, first: int = 1) -> list[bytes]:
    issued = NOW + later_s
    return [SCRIBE.record(NODE, seq=first + n, issued=issued, expires=issued + 20.0).signed for n in range(count)]


def read(verifier: Verifier, records: list[bytes], *, at: float = NOW) -> int:
    """How many signatures it checked to judge all."""
    before = verifier.verified
    for data in records:
        assert verifier.record(data, peek(data), now=at).signed == data
    return verifier.verified - before


def test_a_view_of_ten_thousand_workers_is_verified_once_however_often_it_is_read() -> None:
    verifier, view = SCRIBE.verifier(), signed(VIEW)
    assert [read(verifier, view), read(verifier, view)] == [VIEW, 0]


def test_what_nobody_sends_any_more_is_forgotten_as_new_records_come() -> None:
    verifier, old = SCRIBE.verifier(), signed(20)
    read(verifier, old)
    read(verifier, signed(1, later_s=90.0, first=100), at=NOW + 90.0)
    assert len(verifier) == 1


def test_no_more_are_remembered_than_there_is_room_for() -> None:
    verifier, records = Verifier(MembershipCache(SCRIBE.mesh.trust()), size=10), signed(15)
    read(verifier, records)
    assert (len(verifier), read(verifier, records[5:])) == (10, 0)
    assert read(verifier, records[:5]) == 5


def test_a_keyset_that_has_changed_makes_every_verdict_anew() -> None:
    verifier, records = SCRIBE.verifier(), signed(5)
    read(verifier, records)
    verifier.forget()
    assert read(verifier, records) == 5
