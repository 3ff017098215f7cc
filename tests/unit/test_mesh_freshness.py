"""How old the news is: who confirms a revocation list, and when a proxy has waited too long."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any, cast

import pytest

from mesh.authority import KEYS_KID
from mesh.directory import Directory
from mesh.documents import next_version, seal_document
from mesh.freshness import CONFIRM_S, MEMORY_S, NEVER_STALE, Freshness, Watch, follow_revocations
from mesh.records import Record, State
from mesh.revocations import KIND, NAME, NONE, RevocationList, Revocations, encode_revocations
from mesh.trust import Role
from tests.support.authority import make_mesh
from tests.support.shelf import Shelf
from tests.support.virtual_time import WALL_START, VirtualClock, VirtualLoop, run_virtual

NOW = 1_800_000_000.0
HOUR_S = 3600.0
MESH = make_mesh(now=WALL_START)


def published(*, issued: float = NOW) -> RevocationList:
    revoked = RevocationList()
    revoked.newest = Revocations(seq=1, issued=issued)
    return revoked


def watched(**fields: Any) -> Freshness:
    return Freshness(stale_s=HOUR_S, looked=True, **fields)


def test_before_the_first_look_nothing_is_accepted() -> None:
    freshness = Freshness(stale_s=HOUR_S)
    freshness.settle(published(), now=NOW)
    assert freshness.fresh_until == 0.0


@pytest.mark.parametrize(("stale_s", "revoked"), [(HOUR_S, RevocationList()), (0.0, published(issued=1.0))])
def test_a_mesh_without_a_list_and_a_proxy_told_not_to_care_are_never_stale(stale_s: float, revoked: RevocationList) -> None:
    freshness = Freshness(stale_s=stale_s, looked=True, seen={b"other": NOW})
    freshness.settle(revoked, now=NOW)
    assert freshness.fresh_until == NEVER_STALE


def test_the_operators_signature_confirms_and_so_does_a_bootstrap_node() -> None:
    freshness = watched(seen={b"a": NOW, b"b": NOW})
    freshness.settle(published(issued=NOW - 10), now=NOW)
    assert freshness.fresh_until == NOW - 10 + HOUR_S
    freshness.settle(published(issued=NOW - 10), now=NOW, anchored=True)
    assert freshness.fresh_until == NOW + HOUR_S
    freshness.settle(published(issued=NOW - 10), now=NOW + 100)
    assert freshness.fresh_until == NOW + HOUR_S, "time passes and nobody says a word"


def test_a_list_signed_in_the_future_is_not_fresher_than_now() -> None:
    freshness = watched(seen={b"a": NOW, b"b": NOW})
    freshness.settle(published(issued=NOW + 1e6), now=NOW)
    assert freshness.fresh_until == NOW + HOUR_S


def test_a_proxy_that_is_alone_in_the_mesh_is_up_to_date_with_itself() -> None:
    freshness = watched()
    freshness.settle(published(issued=1.0), now=NOW)
    assert freshness.confirmed == NOW


@pytest.mark.parametrize(
    ("others", "said", "confirmed"), [(1, 1, True), (1, 0, False), (2, 1, True), (2, 0, False), (7, 4, True), (7, 3, False)]
)
def test_more_than_half_of_the_proxies_confirm(others: int, said: int, confirmed: bool) -> None:
    freshness = watched()
    for number in range(others):
        freshness.saw(bytes([number]), now=NOW)
    for number in range(said):
        freshness.agreed(bytes([number]), now=NOW)
    freshness.settle(published(issued=1.0), now=NOW)
    assert (freshness.confirmed >= NOW) == confirmed


def test_the_majority_is_as_old_as_its_oldest_word() -> None:
    freshness = watched(seen={bytes([number]): NOW for number in range(4)})
    for number, said in enumerate((NOW - 5, NOW - 50, NOW - 500)):
        freshness.agreed(bytes([number]), now=said)
        freshness.saw(bytes([number]), now=NOW)
    freshness.settle(published(issued=1.0), now=NOW)
    assert freshness.confirmed == NOW - 50


def test_who_left_with_a_good_bye_and_who_is_long_gone_do_not_count() -> None:
    freshness = watched(seen={b"a": NOW, b"b": NOW, b"c": NOW - MEMORY_S})
    freshness.left(b"a")
    freshness.settle(published(issued=1.0), now=NOW)
    assert set(freshness.seen) == {b"b"}
    assert freshness.confirmed < NOW
    freshness.left(b"b")
    freshness.settle(published(issued=1.0), now=NOW)
    assert freshness.confirmed == NOW


# -- the watch


class FakeDirectory(Shelf):
    """What `Watch` asks: a store, whom it sees, and whether a bootstrap node answers."""

    def __init__(self, clock: VirtualClock, folder: Path | None = None) -> None:
        super().__init__(MESH.trust(), clock, folder)
        self.proxies: list[Record] = []
        self.bootstrap = True
        self.reachable = True

    async def joined(self, *, timeout_s: float) -> bool:
        if not self.reachable:
            await self.clock.sleep(timeout_s)
        return self.reachable

    async def confirm_document(self, document: object) -> bool:
        return self.bootstrap

    def known(self, role: Role) -> list[Record]:
        return self.proxies


def other(name: bytes, state: State = State.READY) -> Record:
    return Record(node_id=name.ljust(32), role=Role.PROXY, boot=1, seq=1, issued=WALL_START, expires=WALL_START + 1e9, state=state)


def signed_list(clock: VirtualClock) -> bytes:
    body = encode_revocations(NONE.with_key(b"12345678", end=clock.wall() + 1e6))
    return seal_document(next_version(None, kind=KIND, name=NAME, body=body, now=clock.wall()), MESH.keys_issuer, KEYS_KID).signed


def make(directory: FakeDirectory, clock: VirtualClock, folder: Path) -> tuple[Watch, RevocationList]:
    revoked = RevocationList()
    watch = Watch(cast(Directory, directory), revoked, own=b"own".ljust(32), stale_s=HOUR_S, folder=folder, clock=clock)
    follow_revocations(cast(Directory, directory), revoked, watch.settle)
    return watch, revoked


def test_a_proxy_that_is_cut_off_stops_within_the_hour_and_comes_back_when_it_is_not(tmp_path: Path) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        clock = VirtualClock(loop)
        directory = FakeDirectory(clock)
        directory.proxies = [other(b"a"), other(b"b")]
        watch, revoked = make(directory, clock, tmp_path)
        await watch.look_first()
        assert watch.freshness.fresh_until == NEVER_STALE
        directory.accept_document(signed_list(clock))
        assert revoked.newest.seq == 1
        running = loop.create_task(watch.run(random.Random(1)))
        await asyncio.sleep(5 * HOUR_S)
        assert clock.wall() < watch.freshness.fresh_until
        directory.bootstrap = False
        await asyncio.sleep(HOUR_S - CONFIRM_S - 1)
        assert clock.wall() < watch.freshness.fresh_until
        await asyncio.sleep(CONFIRM_S + 2)
        assert clock.wall() >= watch.freshness.fresh_until
        watch.agreed(other(b"a").node_id)
        assert clock.wall() < watch.freshness.fresh_until, "with itself, two of three"
        running.cancel()

    run_virtual(scenario)


def test_what_was_confirmed_is_remembered_over_a_restart(tmp_path: Path) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        clock = VirtualClock(loop)
        directory = FakeDirectory(clock, tmp_path)
        directory.proxies = [other(b"a"), other(b"b")]
        watch, _ = make(directory, clock, tmp_path)
        await watch.look_first()
        directory.accept_document(signed_list(clock))
        running = loop.create_task(watch.run(random.Random(1)))
        await asyncio.sleep(2 * HOUR_S)
        running.cancel()
        again = FakeDirectory(clock, tmp_path)
        again.bootstrap = again.reachable = False
        watch, revoked = make(again, clock, tmp_path)
        assert revoked.newest.seq == 1, "the list itself is on disk"
        assert watch.freshness.fresh_until == 0.0
        await watch.look_first()
        assert clock.wall() < watch.freshness.fresh_until <= clock.wall() + HOUR_S
        await asyncio.sleep(HOUR_S + 1)
        watch.settle()
        assert clock.wall() >= watch.freshness.fresh_until, "the proxies of before still count"

    run_virtual(scenario)


def test_a_proxy_that_drains_is_no_longer_waited_for(tmp_path: Path) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        clock = VirtualClock(loop)
        directory = FakeDirectory(clock)
        directory.bootstrap = False
        directory.proxies = [other(b"a"), other(b"b")]
        watch, _ = make(directory, clock, tmp_path)
        await watch.look_first()
        assert len(watch.freshness.seen) == 2
        directory.proxies = [other(b"a", State.DRAINING), other(b"b", State.DRAINING)]
        running = loop.create_task(watch.run(random.Random(1)))
        await asyncio.sleep(1)
        assert watch.freshness.seen == {}
        running.cancel()

    run_virtual(scenario)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"confirmed": "x", "proxies": {}}', '{"confirmed": 1, "proxies": {"zz": 1}}'])
def test_a_broken_file_is_nothing_known(tmp_path: Path, text: str) -> None:
    (tmp_path / "revocations.json").write_text(text)

    async def scenario(loop: VirtualLoop) -> None:
        clock = VirtualClock(loop)
        watch, _ = make(FakeDirectory(clock), clock, tmp_path)
        assert (watch.freshness.confirmed, watch.freshness.seen) == (0.0, {})

    run_virtual(scenario)
