"""The routing table: the true nearest, limits per subnet, replacements."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.dht.address import Address
from mesh.dht.config import DirectoryConfig
from mesh.dht.node import DhtNode
from mesh.dht.routing import Contact, Table, distance, encode_contacts, parse_contacts
from mesh.errors import MalformedEnvelope
from tests.support.clocks import StoppedClock
from tests.support.records import Scribe

OWN = b"\x80" + bytes(31)


def address(number: int) -> Address:
    return Address(f"20.{number >> 8 & 255}.{number & 255}.1", 7400)


def filled(count: int, *, k: int = 20, seed: int = 1) -> Table:
    table, rng = Table(OWN, DirectoryConfig(k=k)), random.Random(seed)
    for number in range(count):
        table.seen(rng.randbytes(32), address(number), float(number))
    return table


@given(st.integers(0, 400), st.binary(min_size=32, max_size=32), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_nearest_are_truly_the_nearest_in_order(nodes: int, target: bytes, count: int) -> None:
    table = filled(nodes)
    expected = sorted((contact.id for contact in table), key=lambda node_id: distance(node_id, target))[:count]
    assert [contact.id for contact in table.nearest(target, count)] == expected


def test_buckets_hold_at_most_k_and_cover_all_ids() -> None:
    table = filled(2_000)
    assert all(len(bucket.nodes) <= 20 for bucket in table.buckets)
    assert table.buckets[0].range[0] == 0
    assert table.buckets[-1].range[1] == (1 << 256) - 1
    for one, two in zip(table.buckets, table.buckets[1:], strict=False):
        assert one.range[1] + 1 == two.range[0]


def test_a_half_of_a_bucket_with_hardly_anybody_in_it_counts_as_never_looked_up() -> None:
    table = Table(OWN, DirectoryConfig())
    table.touch(OWN, 100.0)
    for number in range(20):
        table.seen(bytes([0xC0 if number else 0x10, number]) + bytes(30), address(number), 100.0)
    assert not table.stale_ranges(101.0, 60.0)
    table.seen(b"\xc1" + bytes(31), address(20), 100.0)
    assert table.buckets[0].range in table.stale_ranges(101.0, 60.0), "there is one contact in that half of all ids"
    assert table.stale_ranges(101.0, 60.0) == [bucket.range for bucket in table.buckets if len(bucket.nodes) < 3]
    assert max(len(bucket.nodes) for bucket in table.buckets) == 20, "the others stay as they were"


def test_the_own_id_and_unknown_ids_are_not_in_it() -> None:
    table = filled(10)
    table.seen(OWN, address(99), 1.0)
    assert table.get(OWN) is None
    assert len(table) == 10


def test_a_full_bucket_offers_its_longest_silent_for_a_probe_and_keeps_the_newcomer_in_reserve() -> None:
    table = Table(OWN, DirectoryConfig(k=2))
    far = [bytes((0, 0, number)) + bytes(29) for number in range(40)]
    rivals = [table.seen(node_id, address(number), float(number)) for number, node_id in enumerate(far)]
    rival = next(contact for contact in rivals if contact is not None)
    assert rival.seen == min(contact.seen for contact in table.bucket_of(rival.long_id).nodes.values())
    before = len(table)
    table.remove(rival.id)
    assert table.get(rival.id) is None
    assert len(table) == before, "a replacement took its place"


def test_a_node_that_moved_is_known_at_its_new_address() -> None:
    table = filled(5)
    contact = next(iter(table))
    table.seen(contact.id, address(77), 9.0)
    moved = table.get(contact.id)
    assert moved is not None
    assert moved.address == address(77)
    assert len(table) == 5


def test_one_public_subnet_gets_only_its_share() -> None:
    table, rng = Table(OWN, DirectoryConfig(subnet_limit=8, subnet_bucket_limit=3)), random.Random(3)
    for number in range(200):
        table.seen(rng.randbytes(32), Address(f"20.1.1.{number + 1}", 7400), 0.0)
    assert 0 < len(table) <= 8
    assert all(len(bucket.nodes) <= 3 for bucket in table.buckets)
    for contact in list(table):
        table.remove(contact.id)
    assert len(table) == 0
    table.seen(rng.randbytes(32), Address("20.1.1.201", 7400), 0.0)
    assert len(table) == 1, "what leaves makes room"


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.5", "192.168.1.9", "::1", "fd00::1"])
def test_loopback_and_private_addresses_are_not_counted(host: str) -> None:
    table, rng = Table(OWN, DirectoryConfig(subnet_limit=4, subnet_bucket_limit=2)), random.Random(4)
    for number in range(20):
        table.seen(rng.randbytes(32), Address(host, 7000 + number), 0.0)
    assert len(table) == 20


def test_news_of_entries_is_told() -> None:
    table = Table(OWN, DirectoryConfig())
    told: list[tuple[str, bytes]] = []
    table.on_added = lambda contact: told.append(("added", contact.id))
    table.on_removed = lambda contact: told.append(("removed", contact.id))
    table.seen(b"a" * 32, address(1), 0.0)
    table.seen(b"a" * 32, address(1), 1.0)
    table.remove(b"a" * 32)
    table.remove(b"a" * 32)
    assert told == [("added", b"a" * 32), ("removed", b"a" * 32)]


def test_the_size_of_the_network_is_guessed_within_a_factor_of_two() -> None:
    for nodes in (10, 300, 3_000):
        guess = filled(nodes).estimate_nodes()
        assert nodes / 2 <= guess <= nodes * 2


def test_contacts_survive_the_wire_v4_and_v6() -> None:
    contacts = [Contact(b"a" * 32, Address("203.0.113.9", 7400)), Contact(b"b" * 32, Address("2001:db8::5", 1))]
    assert parse_contacts(encode_contacts(contacts, 1_000), limit=20) == contacts


def test_no_more_contacts_than_there_is_room_for() -> None:
    contacts = [Contact(bytes((number,)) * 32, Address("203.0.113.9", 7400)) for number in range(20)]
    assert len(encode_contacts(contacts, 100)) <= 100
    assert parse_contacts(encode_contacts(contacts, 100), limit=20) == contacts[:2]


@pytest.mark.parametrize("bad", [None, "text", 5, b"\x00", b"a" * 32, b"a" * 32 + b"\x05" + bytes(7)])
def test_bad_contacts_are_refused(bad: object) -> None:
    with pytest.raises(MalformedEnvelope):
        parse_contacts(bad, limit=20)


def test_too_many_contacts_are_refused() -> None:
    contacts = [Contact(bytes((number,)) * 32, Address("203.0.113.9", 7400)) for number in range(20)]
    with pytest.raises(MalformedEnvelope):
        parse_contacts(encode_contacts(contacts, 5_000), limit=19)


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_no_bytes_make_contacts_raise_anything_else(data: bytes) -> None:
    with contextlib.suppress(MalformedEnvelope):
        parse_contacts(data, limit=20)


def test_holders_are_guessed_only_from_a_table_that_knows_who_stands_near() -> None:
    rng, usual = random.Random(3), 5 * (1 << 256)
    node = DhtNode(Scribe().node(), bootstraps=[], state_dir=None, clock=StoppedClock(), rng=rng, serve=True, config=DirectoryConfig())
    for number in range(600):
        node.table.seen(rng.randbytes(32), address(number), 0.0)
    judged = set[bool]()
    for _ in range(200):
        key = rng.randbytes(32)
        farthest = distance(node.table.nearest(key, 5)[-1].id, key) * node.table.estimate_nodes() / usual
        for node.is_large, most in ((False, 3.0), (True, 1.5)):
            assert bool(node.guess(key, 5)) is (farthest <= most)
        judged.add(1.5 < farthest <= 3.0)
    assert judged == {False, True}
