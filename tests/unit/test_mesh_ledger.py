"""The ledger: durable before it is told, once each, in order; a disk that fails loses nothing silently."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from mesh import ledger as module
from mesh.errors import ConfigError
from mesh.identity import Identity
from mesh.ledger import LEDGER_FILE, Ledger, Query
from mesh.receipts import Receipt, Row, check_chain, parse_batch, parse_receipt, verify_proof
from mesh.trust import Role
from tests.support.authority import TestMesh, make_mesh
from tests.support.clocks import StoppedClock
from tests.support.ledgers import AT, make_receipt, open_ledger, random_receipt

NOW = AT / 1000


@pytest.fixture(scope="module")
def mesh() -> TestMesh:
    return make_mesh(now=NOW - 60)


@pytest.fixture(scope="module")
def identity(mesh: TestMesh) -> Identity:
    return mesh.identity(Role.WORKER, now=NOW - 50)


@pytest.fixture
def clock() -> StoppedClock:
    return StoppedClock(NOW)


async def everything(ledger: Ledger, **wish: object) -> list[Receipt]:
    """All pages."""
    found: list[Receipt] = []
    while True:
        after = found[-1].order if found else module.START
        page = await ledger.page(Query(after=after, **wish))  # type: ignore[arg-type]
        found += [parse_receipt(body) for body in page.receipts]
        if not page.more:
            return found


async def test_what_was_written_is_read_in_order(tmp_path: Path, identity: Identity, clock: StoppedClock) -> None:
    ledger = open_ledger(tmp_path, identity, clock=clock)
    receipts = [make_receipt(number) for number in (3, 1, 2)]
    for receipt in receipts:
        ledger.add(receipt)
    await ledger.settled()
    assert await everything(ledger) == sorted(receipts, key=lambda receipt: receipt.order)
    assert ledger.written == 3
    await ledger.stop()


async def test_nothing_is_told_before_it_is_written(tmp_path: Path, identity: Identity, clock: StoppedClock) -> None:
    ledger = open_ledger(tmp_path, identity, clock=clock)
    ledger.add(make_receipt())
    assert await everything(ledger) == []
    assert ledger.waiting == 1
    await ledger.stop()


async def test_stopping_writes_and_signs_what_is_left(tmp_path: Path, mesh: TestMesh, identity: Identity, clock: StoppedClock) -> None:
    ledger = open_ledger(tmp_path, identity, clock=clock)
    ledger.add(make_receipt())
    await ledger.stop()
    again = open_ledger(tmp_path, identity, clock=clock)
    (proof,) = await again.prove(make_receipt().id)
    assert verify_proof(proof, mesh.trust(), now=NOW)[0] == make_receipt()
    await again.stop()


async def test_the_same_receipt_twice_is_there_once(tmp_path: Path, identity: Identity, clock: StoppedClock) -> None:
    ledger = open_ledger(tmp_path, identity, clock=clock)
    for _ in range(2):
        ledger.add(make_receipt())
        await ledger.settled()
    assert await everything(ledger) == [make_receipt()]
    await ledger.stop()


async def test_pages_join_without_gap_or_double(
    tmp_path: Path, identity: Identity, clock: StoppedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE_RECEIPTS", 7)
    ledger, rng = open_ledger(tmp_path, identity, clock=clock), random.Random(1)
    receipts = [random_receipt(rng, number, at=AT + number // 5) for number in range(100)]
    for receipt in receipts:
        ledger.add(receipt)
    await ledger.settled()
    assert await everything(ledger) == sorted(receipts, key=lambda receipt: receipt.order)
    mine = await everything(ledger, project="ads", since=AT + 3, until=AT + 17)
    assert mine == [receipt for receipt in receipts if receipt.project == "ads" and AT + 3 <= receipt.at < AT + 17]
    assert mine
    await ledger.stop()


async def test_a_page_is_bounded_in_bytes(tmp_path: Path, identity: Identity, clock: StoppedClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE_BYTES", 1000)
    ledger = open_ledger(tmp_path, identity, clock=clock)
    for number in range(20):
        ledger.add(make_receipt(number))
    await ledger.settled()
    page = await ledger.page(Query())
    assert page.more
    assert 0 < sum(map(len, page.receipts)) <= 1000
    await ledger.stop()


async def test_batches_form_a_chain_over_restarts_and_every_receipt_is_proven(
    tmp_path: Path, mesh: TestMesh, identity: Identity, clock: StoppedClock
) -> None:
    rng = random.Random(2)
    for life in range(3):
        ledger = open_ledger(tmp_path, identity, clock=clock)
        for number in range(life * 100, life * 100 + rng.randint(1, 40)):
            ledger.add(make_receipt(number))
        await ledger.settled()
        clock.now += 1.5
        ledger.add(make_receipt(life * 100 + 50))
        await ledger.stop()
    again = open_ledger(tmp_path, identity, clock=clock)
    with database(again) as db:
        signed = [row[0] for row in db.execute("SELECT signed FROM batches ORDER BY number")]
    check_chain([parse_batch(each, mesh.trust(), now=clock.wall()) for each in signed])
    for receipt in await everything(again):
        (proof,) = await again.prove(receipt.id, since=receipt.at)
        assert verify_proof(proof, mesh.trust(), now=clock.wall())[0] == receipt
    await again.stop()


async def test_a_full_disk_loses_nothing_and_says_so(
    tmp_path: Path, identity: Identity, clock: StoppedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    monkeypatch.setattr(module, "MAX_WAITING", 200)
    ledger = open_ledger(tmp_path, identity, clock=clock)
    with database(ledger) as db:
        db.execute("PRAGMA max_page_count = 10")
    for number in range(200):
        ledger.add(make_receipt(number))
    while not ledger.trouble:
        await asyncio.sleep(0.01)
    assert "full" in ledger.trouble
    assert ledger.full
    assert ledger.waiting == 200
    with database(ledger) as db:
        db.execute("PRAGMA max_page_count = 100000")
    await ledger.settled()
    assert not ledger.trouble
    assert not ledger.full
    assert len(await everything(ledger)) == 200
    await ledger.stop()


async def test_a_commit_whose_success_was_not_seen_counts_nothing_twice(
    tmp_path: Path, mesh: TestMesh, identity: Identity, clock: StoppedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    ledger = open_ledger(tmp_path, identity, clock=clock)
    store = ledger._store
    clock.now += 2  # so that a batch is signed as well
    commit = Commits(store._db)
    monkeypatch.setattr(store, "_db", commit)
    for number in range(5):
        ledger.add(make_receipt(number))
    await ledger.settled()
    assert commit.failed == 1
    assert len(await everything(ledger)) == 5
    await ledger.stop()
    again = open_ledger(tmp_path, identity, clock=clock)
    for receipt in await everything(again):
        assert len(await again.prove(receipt.id)) == 1
    await again.stop()


class Commits:
    """A connection whose first COMMIT happens, and reports a failure all the same."""

    def __init__(self, db) -> None:  # type: ignore[no-untyped-def]
        self._db = db
        self.failed = 0

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        return getattr(self._db, name)

    def execute(self, text: str, *values: object):  # type: ignore[no-untyped-def]
        result = self._db.execute(text, *values)
        if text == "COMMIT" and not self.failed:
            self.failed += 1
            raise module.sqlite3.OperationalError("disk I/O error")
        return result


async def test_one_receipt_that_cannot_be_written_down_does_not_hold_up_the_others(
    tmp_path: Path, identity: Identity, clock: StoppedClock
) -> None:
    class Broken:
        def row(self) -> Row:
            raise ValueError("a fault in the program")

    ledger = open_ledger(tmp_path, identity, clock=clock)
    ledger.add(Broken())
    ledger.add(make_receipt())
    await ledger.settled()
    assert await everything(ledger) == [make_receipt()]
    await ledger.stop()


async def test_old_receipts_are_forgotten_with_their_batches_and_the_chain_goes_on(
    tmp_path: Path, mesh: TestMesh, identity: Identity, clock: StoppedClock
) -> None:
    ledger = open_ledger(tmp_path, identity, clock=clock, keep_s=3600.0)
    for hour in range(4):
        ledger.add(make_receipt(hour, at=int(clock.wall() * 1000)))
        await ledger.settled()
        clock.now += 1800.0
        ledger.add(make_receipt(100 + hour, at=int(clock.wall() * 1000)))
        await ledger.settled()
    left = await everything(ledger)
    oldest = (clock.wall() - 3600.0) * 1000
    assert 0 < len(left) < 8
    assert all(receipt.at >= oldest - 1_800_000 for receipt in left)
    with database(ledger) as db:
        signed = [row[0] for row in db.execute("SELECT signed FROM batches ORDER BY number")]
    check_chain([parse_batch(each, mesh.trust(), now=clock.wall()) for each in signed])
    for receipt in left[:-1]:
        (proof,) = await ledger.prove(receipt.id)
        verify_proof(proof, mesh.trust(), now=clock.wall())
    await ledger.stop()


async def test_who_follows_what_is_written_gets_all_of_it_in_that_order_whatever_the_pages(
    tmp_path: Path, identity: Identity, clock: StoppedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE_RECEIPTS", 3)
    ledger, rng = open_ledger(tmp_path, identity, clock=clock), random.Random(3)
    written: list[Receipt] = []
    for commit in range(4):
        some = [random_receipt(rng, commit * 20 + number, at=AT + rng.randrange(3000)) for number in range(20)]
        slots = list(dict.fromkeys(receipt.at // module.SLOT_MS for receipt in some))  # those of a slot are written together
        some.sort(key=lambda receipt: slots.index(receipt.at // module.SLOT_MS))
        for receipt in some:
            ledger.add(receipt)
        await ledger.settled()
        written += some
    for project in (None, "ads"):
        found, place = [], 0
        while True:
            page = await ledger.page(Query(written=place, project=project))
            found += [parse_receipt(body) for body in page.receipts]
            place = page.last
            if not page.more:
                break
        assert found == [receipt for receipt in written if project in (None, receipt.project)]
    assert (await ledger.page(Query(written=place))).receipts == ()
    await ledger.stop()


async def test_a_name_inside_another_field_is_not_mistaken_for_the_project(tmp_path: Path, identity: Identity, clock: StoppedClock) -> None:
    ledger = open_ledger(tmp_path, identity, clock=clock)
    ledger.add(make_receipt(1, project="search", model="ads"))
    ledger.add(make_receipt(2, project="ads", model="search"))
    await ledger.settled()
    assert [receipt.project for receipt in await everything(ledger, project="ads")] == ["ads"]
    await ledger.stop()


def test_a_ledger_of_another_version_is_refused_and_left_alone(tmp_path: Path, identity: Identity, clock: StoppedClock) -> None:
    with closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as db:
        db.execute("CREATE TABLE receipts (n INTEGER PRIMARY KEY, body BLOB)")
    with pytest.raises(ConfigError, match="another version"):
        open_ledger(tmp_path, identity, clock=clock)
    with closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as db:
        assert db.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (1,)


def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path: Path, identity: Identity, clock: StoppedClock) -> None:
    (tmp_path / LEDGER_FILE).write_bytes(b"not a database, " * 500)
    with pytest.raises(ConfigError, match="move the file away"):
        open_ledger(tmp_path, identity, clock=clock)
    assert (tmp_path / LEDGER_FILE).read_bytes() == b"not a database, " * 500


@contextmanager
def database(ledger: Ledger) -> Iterator:  # type: ignore[type-arg]
    yield ledger._store._db
