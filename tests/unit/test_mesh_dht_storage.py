"""What a node holds for the mesh: newest wins, nothing comes back, everything is bounded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.claims import CLOCK_SKEW_S
from mesh.dht.config import DirectoryConfig
from mesh.dht.keys import shard_of
from mesh.dht.patch import base_of
from mesh.dht.protocol import encode_found, parse_found, parse_tags
from mesh.dht.storage import Held, RecordStore, Verdict, covered, tag_of
from mesh.errors import MalformedEnvelope
from mesh.identity import Identity
from mesh.pulse import MAX_PULSE, Pulse, make_pulse
from mesh.records import MAX_LIFETIME_S, ModelEntry, Record, State, directory_key, model_key, role_key
from mesh.trust import Role
from tests.support.records import NOW, Scribe

WORKERS, SMOLLM, OTHER = role_key(Role.WORKER), model_key("smollm"), model_key("other")


class Bench:
    """A store, and time that the test moves."""

    def __init__(self, **settings: Any) -> None:
        self.scribe = Scribe()
        self.store = RecordStore(self.scribe.verifier(), DirectoryConfig(**settings))
        self.now = 1_000.0

    def offer(self, record: Record | bytes, *keys: bytes, source: Identity | None = None, remaining_s: float = 20.0) -> Verdict:
        data = record if isinstance(record, bytes) else record.signed
        owner = record.node_id if isinstance(record, Record) else b"?"
        by = source.node_id if source is not None else owner
        wall = NOW + self.now - 1_000.0
        verdicts = self.store.offer(data, keys or (WORKERS,), remaining_s=remaining_s, source=by, now=self.now, wall=wall)
        return verdicts[0]

    def live(self, key: bytes = WORKERS) -> list[tuple[bytes, int]]:
        return [(held.record.node_id, held.record.seq) for held in self.store.live(key, self.now)]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_many_owners_share_a_key(bench: Bench) -> None:
    nodes = [bench.scribe.node() for _ in range(5)]
    for node in nodes:
        assert bench.offer(bench.scribe.record(node)) is Verdict.ACCEPTED
    assert {node_id for node_id, _ in bench.live()} == {node.node_id for node in nodes}


def test_the_newest_wins_whatever_comes_last(bench: Bench) -> None:
    node = bench.scribe.node()
    older, newer = bench.scribe.record(node, seq=1), bench.scribe.record(node, seq=2)
    assert bench.offer(newer) is Verdict.ACCEPTED
    assert bench.offer(older) is Verdict.STALE
    assert bench.live() == [(node.node_id, 2)]


def test_a_new_boot_beats_any_seq(bench: Bench) -> None:
    node = bench.scribe.node()
    bench.offer(bench.scribe.record(node, seq=900))
    restarted = bench.scribe.record(node, seq=1, boot=int(NOW * 1000) + 1)
    assert bench.offer(restarted) is Verdict.ACCEPTED
    assert bench.live() == [(node.node_id, 1)]


def test_an_ended_record_is_gone_and_never_comes_back(bench: Bench) -> None:
    node = bench.scribe.node()
    older, record = bench.scribe.record(node, seq=1), bench.scribe.record(node, seq=2)
    bench.offer(record)
    bench.now += 20.5
    assert bench.live() == []
    assert bench.store.expire(bench.now) == 1
    assert bench.offer(record) is Verdict.EXPIRED
    assert bench.offer(older) is Verdict.STALE
    bench.now += CLOCK_SKEW_S + MAX_LIFETIME_S * 3
    assert bench.offer(record) is Verdict.EXPIRED


def test_memory_of_the_dead_outlives_every_copy_and_then_goes(bench: Bench) -> None:
    node = bench.scribe.node()
    stale = bench.scribe.record(node, seq=1, expires=NOW + MAX_LIFETIME_S)
    bench.offer(bench.scribe.record(node, seq=2))
    bench.now += 20.0 + CLOCK_SKEW_S + 35.0
    bench.store.expire(bench.now)
    assert bench.offer(stale, remaining_s=60.0) is Verdict.STALE, "within the skew allowed this copy could still pass"
    bench.now += MAX_LIFETIME_S + 2 * CLOCK_SKEW_S
    bench.store.expire(bench.now)
    assert len(bench.store._highest) == 0


def test_a_clock_half_a_minute_behind_is_believed_for_a_lifetime_and_no_longer(bench: Bench) -> None:
    node = bench.scribe.node()
    behind = bench.scribe.record(node, issued=NOW - 29.0, expires=NOW - 9.0)
    assert bench.offer(behind, remaining_s=20.0) is Verdict.ACCEPTED
    bench.now += 20.1
    assert bench.live() == []


def test_a_relay_cannot_stretch_a_life(bench: Bench) -> None:
    node, relay = bench.scribe.node(), bench.scribe.node()
    bench.offer(bench.scribe.record(node), remaining_s=60.0, source=relay)
    bench.now += 20.1
    assert bench.live() == []


def test_a_relay_cannot_cut_a_life_short_once_the_owner_speaks(bench: Bench) -> None:
    node, relay = bench.scribe.node(), bench.scribe.node()
    record = bench.scribe.record(node)
    bench.offer(record, source=relay, remaining_s=0.5)
    bench.offer(record)
    bench.now += 10.0
    assert bench.live() == [(node.node_id, 1)]
    bench.now += 10.5
    bench.store.expire(bench.now)
    assert len(bench.store) == 0


def test_what_no_longer_names_a_key_leaves_it(bench: Bench) -> None:
    node = bench.scribe.node()
    bench.offer(bench.scribe.record(node, seq=1), WORKERS, SMOLLM)
    draining = bench.scribe.record(node, seq=2, state=State.DRAINING)
    assert bench.offer(draining, SMOLLM) is Verdict.WITHDRAWN
    assert bench.live(SMOLLM) == []
    assert bench.live(WORKERS) == [(node.node_id, 2)]


def test_news_under_one_key_is_news_under_all(bench: Bench) -> None:
    node = bench.scribe.node()
    bench.offer(bench.scribe.record(node, seq=1), WORKERS, SMOLLM)
    bench.offer(bench.scribe.record(node, seq=2), WORKERS)
    assert bench.live(SMOLLM) == [(node.node_id, 2)]


def test_a_key_the_record_does_not_name_is_wrong(bench: Bench) -> None:
    node = bench.scribe.node()
    assert bench.offer(bench.scribe.record(node), OTHER) is Verdict.WRONG_KEY
    assert bench.store.count(OTHER) == 0
    assert len(bench.store) == 0


def test_forgeries_leave_nothing(bench: Bench) -> None:
    node, thief = bench.scribe.node(), bench.scribe.node()
    good = bench.scribe.record(node).signed
    stolen = bench.scribe.record(Identity(thief.key, thief.credentials, mesh_id=bench.scribe.mesh.mesh_id, now=NOW))
    assert bench.offer(stolen) is Verdict.ACCEPTED
    for bad in (good[:-1], good[:-1] + b"\x00", b"", b"\x01", good + b"\x00", bytes(1_001), Scribe(2).record(Scribe(2).node()).signed):
        assert bench.offer(bad, source=thief) in (Verdict.FORGED, Verdict.EXPIRED)
    assert len(bench.store) == 1


@given(st.binary(max_size=1_100))
@settings(max_examples=100, deadline=None)
def test_no_bytes_raise(data: bytes) -> None:
    assert _FUZZED.offer(data, source=None) in (Verdict.FORGED, Verdict.EXPIRED)


_FUZZED = Bench()


def test_a_full_key_keeps_the_lowest_ranks_and_sends_the_rest_down() -> None:
    bench = Bench(shard_size=10)
    nodes = [bench.scribe.node() for _ in range(40)]
    verdicts = {node.node_id: bench.offer(bench.scribe.record(node)) for node in nodes}
    assert bench.store.is_full(WORKERS, bench.now)
    lowest = sorted((node.node_id for node in nodes), key=lambda node_id: node_id[16:])[:10]
    listed = [node_id for node_id, _ in bench.live()]
    assert set(lowest) <= set(listed)
    assert len(listed) <= 15
    for node in nodes:
        if verdicts[node.node_id] is Verdict.FULL:
            below = directory_key("role", "worker", shard_of(node.node_id, 1))
            assert bench.offer(bench.scribe.record(node), below) is Verdict.ACCEPTED
            break
    else:
        pytest.fail("nobody was sent down")


def test_one_peer_cannot_fill_the_store() -> None:
    bench = Bench(max_stores_per_peer=3)
    flooder = bench.scribe.node()
    verdicts = [bench.offer(bench.scribe.record(bench.scribe.node()), source=flooder) for _ in range(5)]
    assert verdicts == [Verdict.ACCEPTED] * 3 + [Verdict.OVER_QUOTA] * 2
    assert bench.offer(bench.scribe.record(flooder), source=flooder) is Verdict.ACCEPTED
    bench.now += 30.0
    bench.store.expire(bench.now)
    bench.scribe.now += 30.0
    assert bench.offer(bench.scribe.record(bench.scribe.node()), source=flooder) is Verdict.ACCEPTED


def test_the_store_is_bounded() -> None:
    bench = Bench(max_records=4)
    verdicts = [bench.offer(bench.scribe.record(bench.scribe.node())) for _ in range(6)]
    assert verdicts.count(Verdict.ACCEPTED) == 4
    assert len(bench.store) == 4


def test_watchers_hear_of_news_and_not_of_mere_refreshes(bench: Bench) -> None:
    heard: list[tuple[int, bool]] = []

    def hear(held: Held, former: Held | None, material: bool) -> None:
        heard.append((held.record.seq, material))

    bench.store.on_change = hear
    node = bench.scribe.node()
    bench.offer(bench.scribe.record(node, seq=1))
    bench.offer(bench.scribe.record(node, seq=1))
    bench.offer(bench.scribe.record(node, seq=2))
    bench.offer(bench.scribe.record(node, seq=3, models=(ModelEntry(name="other"),)))
    bench.offer(bench.scribe.record(node, seq=4, models=(ModelEntry(name="other"),), expires=NOW + 1.0))
    assert heard == [(1, True), (2, False), (3, True), (4, True)]


def test_a_held_record_knows_its_formers_for_patches(bench: Bench) -> None:
    node = bench.scribe.node()
    records = [bench.scribe.record(node, seq=seq) for seq in range(1, 5)]
    for record in records:
        bench.offer(record)
    held = bench.store.held(node.node_id)
    assert held is not None
    assert held.base(base_of(records[3].signed)) == records[3].signed
    assert held.base(base_of(records[2].signed)) == records[2].signed
    assert held.base(base_of(records[0].signed)) is None
    patch = held.patch_for(parse_tags(tag_of(records[2])))
    assert patch is not None
    assert len(patch[1]) < 170


def test_a_tag_covers_itself_and_what_came_before_it_in_the_same_boot(bench: Bench) -> None:
    node = bench.scribe.node()
    tags = {seq: tag_of(bench.scribe.record(node, seq=seq)) for seq in (1, 2, 255, 256)}
    have = parse_tags(tags[2])
    assert covered(tags[1], have)
    assert covered(tags[2], have)
    assert not covered(tags[2][:-1] + b"\x05", have), "a later pulse is news"
    assert covered(tags[1][:-1] + b"\x05", have), "but not of an older record"
    assert covered(tags[255], parse_tags(tags[256])), "the byte wraps"
    assert not covered(tag_of(bench.scribe.record(node, seq=3)), have)
    assert not covered(tag_of(bench.scribe.record(node, seq=1, boot=int(NOW * 1000) + 1)), have)
    assert not covered(tag_of(bench.scribe.record(bench.scribe.node())), have)


# pulses


def pulse_of(node: Identity, record: Record, n: int) -> Pulse:
    return make_pulse(node.key, record.boot, record.seq, n)


def test_a_pulse_keeps_a_record_alive_and_nothing_else_does(bench: Bench) -> None:
    node, other = bench.scribe.node(), bench.scribe.node()
    record = bench.scribe.record(node)
    bench.offer(record)
    held = bench.store.held(node.node_id)
    assert held is not None

    def keep(pulse: Pulse, owner: Identity = node) -> Verdict:
        return bench.store.keep(owner.node_id, pulse, now=bench.now, wall=NOW + bench.now - 1_000.0)

    bench.now += 10.0
    assert keep(Pulse(10, bytes(16))) is Verdict.UNKNOWN_BASE
    assert keep(pulse_of(other, record, 10)) is Verdict.UNKNOWN_BASE
    assert keep(pulse_of(other, record, 10), other) is Verdict.UNKNOWN_BASE, "it has no record here"
    assert held.ends == 1_020.0
    assert keep(pulse_of(node, record, 10)) is Verdict.ACCEPTED
    assert held.ends == 1_030.0
    assert keep(pulse_of(node, record, 10)) is Verdict.ACCEPTED, "sent again"
    assert keep(pulse_of(node, record, 9)) is Verdict.STALE
    bench.now += 15.0
    assert bench.live() == [(node.node_id, 1)]
    assert keep(pulse_of(node, record, 25)) is Verdict.ACCEPTED
    bench.now += 20.0
    assert bench.live() == [], "with its owner's silence it ends as every record does"
    assert keep(pulse_of(node, record, 45)) is Verdict.UNKNOWN_BASE
    assert bench.offer(record) is Verdict.EXPIRED


def test_the_last_pulse_is_the_end_of_it(bench: Bench) -> None:
    node = bench.scribe.node()
    record = bench.scribe.record(node)
    bench.offer(record)
    for n in range(10, MAX_PULSE + 1, 10):
        bench.now = 1_000.0 + n
        assert bench.store.keep(node.node_id, pulse_of(node, record, n), now=bench.now, wall=NOW + n) is Verdict.ACCEPTED
    bench.now += 20.0
    assert bench.live() == []


def test_a_newer_record_ends_the_pulses_of_the_older(bench: Bench) -> None:
    node = bench.scribe.node()
    older, newer = bench.scribe.record(node, seq=1), bench.scribe.record(node, seq=2)
    bench.offer(older)
    assert bench.store.keep(node.node_id, pulse_of(node, older, 5), now=bench.now, wall=NOW + 5) is Verdict.ACCEPTED
    bench.offer(newer)
    held = bench.store.held(node.node_id)
    assert held is not None
    assert held.tag[-1] == 0
    assert bench.store.keep(node.node_id, pulse_of(node, older, 9), now=bench.now, wall=NOW + 9) is Verdict.UNKNOWN_BASE


def test_a_record_travels_in_terms_of_what_its_asker_has(bench: Bench) -> None:
    node = bench.scribe.node()
    records = [bench.scribe.record(node, seq=seq) for seq in (1, 2)]
    for record in records:
        bench.offer(record)
    held = bench.store.held(node.node_id)
    assert held is not None
    pulse = pulse_of(node, records[1], 7)
    bases = {tag_of(record)[:-1]: record.signed for record in records}
    for now_pulse in (Pulse(), pulse):
        held.pulse = now_pulse
        sizes = []
        for known in ({}, parse_tags(tag_of(records[0])), parse_tags(tag_of(records[1]))):
            item = encode_found(held, known, bench.now)
            assert parse_found(item, bases) == (20.0, records[1].signed, now_pulse)
            sizes.append(len(item))
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[2] <= 25
        with pytest.raises(MalformedEnvelope):
            parse_found(item, {})
    for cut in range(len(item)):
        with pytest.raises(MalformedEnvelope):
            parse_found(item[:cut], bases)
    for form in range(256):
        try:
            parse_found(item[:2] + bytes((form,)) + item[3:], bases)
        except MalformedEnvelope:
            continue
