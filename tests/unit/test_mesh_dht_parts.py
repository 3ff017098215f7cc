"""The small parts of the directory: addresses, keys, patches, limits, memory of peers, the mesh's time, the state file."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.claims import CLOCK_SKEW_S
from mesh.dht.address import Address, encode_address, is_dialable, normalise, parse_address, split_host_port, subnet_of
from mesh.dht.config import DirectoryConfig
from mesh.dht.keys import FANOUT, MAX_LEVEL, AllowedKeys, depth_of, first_shard, level_of, shard_of, sub_shards
from mesh.dht.limits import Bucket, Buckets
from mesh.dht.mesh_time import MAX_SHIFT_S, MeshTime
from mesh.dht.patch import apply_patch, base_of, encode_patch
from mesh.dht.peers import PeerMemory
from mesh.dht.state import KnownPeer, load_peers, save_peers
from mesh.dht.verify import lifetime_s, peek
from mesh.errors import BadSignature, ConfigError, Expired, MalformedEnvelope
from mesh.pulse import Pulse, make_pulse
from mesh.records import MAX_RECORD_BYTES, State, model_key, record_keys, role_key
from mesh.trust import Role
from tests.support.records import NOW, Scribe


class HandClock:
    """A clock that the test moves."""

    def __init__(self, wall: float = NOW) -> None:
        self.seconds = 0.0
        self.start = wall

    def monotonic(self) -> float:
        return self.seconds

    def wall(self) -> float:
        return self.start + self.seconds

    async def sleep(self, delay_s: float) -> None:
        self.seconds += delay_s


# addresses


@pytest.mark.parametrize("host", ["203.0.113.5", "2001:db8::1", "::1"])
def test_an_address_survives_the_wire(host: str) -> None:
    packed = encode_address(Address(host, 7400))
    assert parse_address(b"xx" + packed, 2) == (Address(host, 7400), 2 + len(packed))


def test_ipv4_inside_ipv6_is_ipv4() -> None:
    assert normalise("::ffff:203.0.113.5", 1) == Address("203.0.113.5", 1)
    assert normalise("fe80::1%eth0", 1) == Address("fe80::1", 1)


def test_subnets_count_public_addresses_only() -> None:
    assert subnet_of("203.0.112.77") == "203.0.112.0/24"
    assert subnet_of("2a00:1450:4001:81b::200e") == "2a00:1450:4001:800::/56"
    assert subnet_of("127.0.0.1") is None
    assert subnet_of("10.1.2.3") is None


@pytest.mark.parametrize(("host", "port"), [("0.0.0.0", 1), ("224.0.0.1", 1), ("::", 1), ("255.255.255.255", 9), ("203.0.113.5", 0)])
def test_what_is_no_nodes_address_is_not_dialled(host: str, port: int) -> None:
    assert not is_dialable(host, port)


def test_host_and_port_are_split_and_bad_ones_named() -> None:
    assert split_host_port("bootstrap.example:7400") == ("bootstrap.example", 7400)
    assert split_host_port("[2001:db8::1]:7400") == ("2001:db8::1", 7400)
    for bad in ("bootstrap.example", ":7400", "host:port", "host:0", "host:70000"):
        with pytest.raises(ConfigError):
            split_host_port(bad)


# keys and shards


@given(st.binary(min_size=32, max_size=32), st.integers(1, MAX_LEVEL))
@settings(deadline=None)
def test_a_nodes_shard_lies_under_its_shard_of_the_level_above(node_id: bytes, level: int) -> None:
    shard = shard_of(node_id, level)
    assert level_of(shard) == level
    assert shard in sub_shards(shard_of(node_id, level - 1))


def test_shards_are_numbered_without_gaps_and_fit_two_bytes() -> None:
    numbers = [0]
    level = [0]
    for _ in range(3):
        level = [child for parent in level for child in sub_shards(parent)]
        numbers += level
    assert sorted(numbers) == list(range(first_shard(4)))
    assert first_shard(MAX_LEVEL + 1) <= 0xFFFF
    assert len(sub_shards(0)) == FANOUT


@pytest.mark.parametrize(
    ("records", "depth"), [(0, 0), (160, 0), (161, 1), (160 * 9, 1), (160 * 9 + 1, 2), (10_000, 2), (1 << 40, MAX_LEVEL)]
)
def test_so_many_records_fill_keys_down_to_some_level(records: int, depth: int) -> None:
    assert depth_of(records, 160) == depth


def test_the_keys_a_record_may_stand_under_begin_with_those_it_is_published_under() -> None:
    scribe = Scribe()
    record = scribe.record(scribe.node())
    allowed = AllowedKeys(record)
    assert model_key("other") not in allowed, "and asked for one that is not among them, it knows all of them"
    assert all(key in allowed for key in record_keys(record))
    below = [shard_of(record.node_id, level) for level in range(MAX_LEVEL + 1)]
    assert all(key in AllowedKeys(record) for shard in below for key in (role_key(record.role, shard), model_key("smollm", shard)))
    assert role_key(Role.WORKER, below[1] % FANOUT + 1) not in allowed, "another's sub-key"
    loading = AllowedKeys(scribe.record(scribe.node(), state=State.LOADING))
    assert model_key("smollm") not in loading
    assert role_key(Role.WORKER) in loading


# patches


def test_a_refresh_is_a_small_patch() -> None:
    scribe = Scribe()
    node = scribe.node()
    former, fresh = (scribe.record(node, seq=seq, issued=NOW + seq, expires=NOW + seq + 20).signed for seq in (300, 301))
    patch = encode_patch(former, fresh)
    assert apply_patch(former, patch) == fresh
    assert len(patch) < 120 < len(fresh)
    assert base_of(former) != base_of(fresh)


def test_a_patch_to_something_else_never_yields_a_valid_record() -> None:
    scribe = Scribe()
    one, other = scribe.record(scribe.node()).signed, scribe.record(scribe.node()).signed
    patch = encode_patch(one, one)
    with contextlib.suppress(MalformedEnvelope):
        assert apply_patch(other, patch) != one


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_no_patch_raises_anything_else_or_yields_too_much(patch: bytes) -> None:
    with contextlib.suppress(MalformedEnvelope):
        assert len(apply_patch(b"former" * 20, patch)) <= MAX_RECORD_BYTES


def test_a_patch_that_swells_is_refused() -> None:
    with pytest.raises(MalformedEnvelope):
        apply_patch(b"", encode_patch(b"", bytes(1_000_000)))


# limits


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    bucket = Bucket(10.0, 5.0)
    assert [bucket.take(0.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert [bucket.take(0.2) for _ in range(3)] == [True, True, False]
    assert [bucket.take(100.0) for _ in range(6)] == [True] * 5 + [False]


def test_buckets_are_one_for_each_and_bounded() -> None:
    buckets = Buckets(1.0, 1.0, size=2)
    assert buckets.take("alice", 0.0)
    assert not buckets.take("alice", 0.0)
    assert buckets.take("bob", 0.0)
    assert buckets.take("carol", 0.0)
    assert buckets.take("alice", 0.0), "forgotten, and so fresh"


# memory of peers


def memory() -> PeerMemory:
    return PeerMemory(DirectoryConfig(), random.Random(1))


def test_patience_follows_what_a_peer_takes() -> None:
    peers = memory()
    assert peers.patience_s(b"a") == DirectoryConfig().initial_timeout_s
    for _ in range(30):
        peers.answered(b"near", 0.001)
        peers.answered(b"far", 0.2)
    assert peers.patience_s(b"near") == DirectoryConfig().min_timeout_s
    assert 0.2 < peers.patience_s(b"far") < 0.3
    assert peers.patience_s(b"far") < peers.deadline_s(b"far") <= DirectoryConfig().max_timeout_s
    assert peers.patience_s(b"unknown") > peers.patience_s(b"near")


def test_a_retransmission_is_no_sample() -> None:
    peers = memory()
    peers.answered(b"a", 0.1)
    before = peers.rtt_s(b"a")
    peers.answered(b"a", None)
    assert peers.rtt_s(b"a") == before


def test_a_silent_peer_is_shunned_longer_each_time_and_forgiven_at_once() -> None:
    peers = memory()
    assert peers.failed(b"a", 10.0, sent_at=9.0) == 1
    assert peers.shunned(b"a", 11.0)
    assert peers.failing(b"a")
    assert peers.failed(b"a", 10.1, sent_at=9.5) == 0, "sent before the first failure was known"
    assert peers.failed(b"a", 20.0, sent_at=19.0) == 2
    assert peers.shunned(b"a", 25.0)
    for count in range(3, 5_000):
        peers.failed(b"a", 100.0 * count, sent_at=100.0 * count - 1)
    assert not peers.shunned(b"a", 500_000.0 + 200.0)
    peers.failed(b"a", 600_000.0, sent_at=599_999.0)
    peers.answered(b"a", 0.1)
    assert not peers.shunned(b"a", 600_000.1)


# the mesh's time


def test_a_clock_that_is_off_is_put_right_by_the_median_of_many() -> None:
    clock = HandClock(NOW - 40.0)
    time = MeshTime(clock)
    right = MeshTime(HandClock(NOW))
    for number in range(64):
        liar = number % 5 == 0
        stamp = MeshTime(HandClock(NOW + 3_000.0)).stamp() if liar else right.stamp()
        time.observe(bytes((number,)), stamp, 0.05)
    assert time.now() == pytest.approx(NOW, abs=0.1)


def test_a_few_peers_move_nothing_and_small_differences_neither() -> None:
    time = MeshTime(HandClock(NOW))
    ahead = MeshTime(HandClock(NOW + 20.0)).stamp()
    for _ in range(100):
        time.observe(b"alone", ahead, 0.0)
    assert time.offset_s == 0.0
    time = MeshTime(HandClock(NOW))
    for number in range(64):
        time.observe(bytes((number,)), MeshTime(HandClock(NOW + 0.5)).stamp(), 0.0)
    assert time.offset_s == 0.0


def test_datagrams_of_another_time_are_not_fresh() -> None:
    time = MeshTime(HandClock(NOW))
    for away_s, fresh in ((0.0, True), (MAX_SHIFT_S - 1, True), (-MAX_SHIFT_S + 1, True), (MAX_SHIFT_S + 1, False), (-3_600.0, False)):
        assert time.is_fresh(MeshTime(HandClock(NOW + away_s)).stamp()) is fresh


def test_the_stamp_wraps_without_harm() -> None:
    wrap_s = (1 << 32) / 1000
    almost = NOW - NOW % wrap_s + wrap_s - 1.0
    time = MeshTime(HandClock(almost))
    assert time.shift(MeshTime(HandClock(almost + 2.0)).stamp()) == pytest.approx(2.0)
    assert time.shift(MeshTime(HandClock(almost - 2.0)).stamp()) == pytest.approx(-2.0)


# verdicts


def test_a_claim_is_read_without_verifying() -> None:
    scribe = Scribe()
    node = scribe.node()
    record = scribe.record(node, seq=7)
    claim = peek(record.signed[:-1] + b"\x00")
    assert (claim.node_id, claim.order) == (node.node_id, record.order)


def test_a_record_is_verified_once_and_refused_once_it_is_over() -> None:
    scribe = Scribe()
    verifier, record = scribe.verifier(), scribe.record(scribe.node())
    claim = peek(record.signed)
    for _ in range(3):
        assert verifier.record(record.signed, claim, now=NOW).signed == record.signed
    assert verifier.verified == 1
    assert verifier.record(record.signed, claim, now=NOW + 20.0 + CLOCK_SKEW_S - 1)
    with pytest.raises(Expired):
        verifier.record(record.signed, claim, now=NOW + 20.0 + CLOCK_SKEW_S)
    verifier.forget()
    verifier.record(record.signed, claim, now=NOW)
    assert verifier.verified == 2


def test_verdicts_go_with_the_records_they_are_about() -> None:
    """A node signs a record every five seconds for as long as the mesh runs, and memory must not tell for how long that has been."""
    scribe = Scribe()
    verifier, node = scribe.verifier(), scribe.node()
    for seq in range(1, 400):
        scribe.now = NOW + 5.0 * seq
        record = scribe.record(node, seq=seq)
        verifier.record(record.signed, peek(record.signed), now=scribe.now)
        assert len(verifier) <= (20.0 + CLOCK_SKEW_S) / 5.0 + 1
    assert verifier.verified == 399
    verifier.record(record.signed, peek(record.signed), now=scribe.now)
    assert verifier.verified == 399, "what is alive is known"


def test_with_a_pulse_a_record_is_judged_as_of_when_it_was_signed() -> None:
    scribe = Scribe()
    verifier, node = scribe.verifier(), scribe.node()
    record = scribe.record(node)
    claim = peek(record.signed)
    assert verifier.record(record.signed, claim, now=NOW + 90.0, pulse=make_pulse(node.key, record.boot, record.seq, 85))
    assert verifier.record(record.signed, claim, now=NOW + 90.0, pulse=make_pulse(node.key, record.boot, record.seq, 70))
    for bad in (Pulse(86, bytes(16)), Pulse(70, bytes(16)), make_pulse(scribe.node().key, record.boot, record.seq, 85)):
        with pytest.raises(BadSignature):
            verifier.record(record.signed, claim, now=NOW + 90.0, pulse=bad)
    with pytest.raises(Expired):
        verifier.record(record.signed, claim, now=NOW + 85 + 20.0 + CLOCK_SKEW_S, pulse=make_pulse(node.key, record.boot, record.seq, 85))
    assert verifier.verified == 1
    assert lifetime_s(claim, 500.0, now=NOW + 90.0, pulse_s=85) == 20.0
    assert lifetime_s(claim, 500.0, now=NOW + 90.0, pulse_s=50) == pytest.approx(10.0)


def test_no_pulse_outlives_a_membership() -> None:
    scribe = Scribe()
    verifier, node = scribe.verifier(), scribe.node()
    end = scribe.mesh.identity(Role.WORKER, now=NOW, key=node.key).membership.expires
    scribe.now = end - 10.0
    record = scribe.record(node)
    claim = peek(record.signed)
    verifier.record(record.signed, claim, now=end - 5.0, pulse=make_pulse(node.key, record.boot, record.seq, 5))
    with pytest.raises(Expired):
        verifier.record(
            record.signed, claim, now=end + CLOCK_SKEW_S, pulse=make_pulse(node.key, record.boot, record.seq, 10 + int(CLOCK_SKEW_S))
        )


def test_what_remains_of_a_life_is_bounded_by_what_was_signed() -> None:
    scribe = Scribe()
    claim = peek(scribe.record(scribe.node()).signed)
    assert lifetime_s(claim, 5.0, now=NOW) == 5.0
    assert lifetime_s(claim, 500.0, now=NOW) == 20.0
    assert lifetime_s(claim, 500.0, now=NOW + 45.0) == pytest.approx(5.0)
    assert lifetime_s(claim, 500.0, now=NOW + 55.0) < 0


# the state file


def known(number: int) -> KnownPeer:
    return KnownPeer(node_id=bytes((number,)) * 32, address=Address("203.0.113.5", 7000 + number), seen=NOW + number)


def test_peers_are_remembered_the_latest_first(tmp_path: Path) -> None:
    save_peers(tmp_path / "state", [known(1), known(2), known(3)])
    assert load_peers(tmp_path / "state", limit=2) == [known(3), known(2)]
    assert (tmp_path / "state" / "peers.json").stat().st_mode & 0o777 == 0o600


def test_no_file_is_no_peers(tmp_path: Path) -> None:
    assert load_peers(tmp_path, limit=10) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95",
        b"[]",
        b"{}",
        json.dumps({"version": 2, "peers": []}).encode(),
        json.dumps({"version": 1, "peers": [{"id": "zz", "host": "203.0.113.5", "port": 1, "seen": 1}]}).encode(),
        json.dumps({"version": 1, "peers": [{"id": "aa" * 32, "host": "0.0.0.0", "port": 1, "seen": 1}]}).encode(),
        json.dumps({"version": 1, "peers": [{"id": "aa" * 32, "host": "no address", "port": 1, "seen": 1}]}).encode(),
        json.dumps({"version": 1, "peers": [7]}).encode(),
    ],
)
def test_a_bad_file_is_no_peers_and_no_failure(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "peers.json").write_bytes(content)
    assert load_peers(tmp_path, limit=10) == []
