"""Nodes heard of and never met: who is worth meeting."""

from __future__ import annotations

import random

from mesh.dht.address import Address
from mesh.dht.config import DirectoryConfig
from mesh.dht.hearsay import Hearsay
from mesh.dht.peers import PeerMemory
from mesh.dht.routing import Contact, Table

OWN = b"\x80" + bytes(31)
NEAR, FAR = bytes((0x81,)) + bytes(31), bytes((1,)) + bytes(31)


def contact(node_id: bytes) -> Contact:
    return Contact(node_id, Address("127.0.0.1", 7400))


def made(k: int = 20) -> tuple[Table, PeerMemory, Hearsay]:
    config = DirectoryConfig(k=k)
    table, memory = Table(OWN, config), PeerMemory(config, random.Random(1))
    return table, memory, Hearsay(table, memory)


def test_who_was_heard_of_is_met_once() -> None:
    _, _, hearsay = made()
    hearsay.hear([contact(NEAR), contact(FAR), contact(NEAR)])
    assert len(hearsay) == 2
    met = [hearsay.take(0.0), hearsay.take(0.0)]
    assert {each.id for each in met if each is not None} == {NEAR, FAR}
    assert hearsay.take(0.0) is None


def test_nobody_meets_himself_or_whom_he_knows() -> None:
    table, _, hearsay = made()
    table.seen(NEAR, Address("127.0.0.1", 7400), 0.0)
    hearsay.hear([contact(OWN), contact(NEAR)])
    assert len(hearsay) == 0
    hearsay.hear([contact(FAR)])
    table.seen(FAR, Address("127.0.0.1", 7401), 0.0)
    assert hearsay.take(0.0) is None, "met meanwhile"


def test_one_that_kept_silent_is_left_alone() -> None:
    _, memory, hearsay = made()
    memory.failed(FAR, 0.0, sent_at=0.0)
    hearsay.hear([contact(FAR)])
    assert hearsay.take(1.0) is None
    hearsay.hear([contact(FAR)])
    assert hearsay.take(10.0) is not None, "long enough ago"


def test_one_the_table_has_no_room_for_is_left_alone() -> None:
    table, _, hearsay = made(k=1)
    rng = random.Random(2)
    while table.has_room(FAR):
        table.seen(bytes((1,)) + rng.randbytes(31), Address("127.0.0.1", 7400), 0.0)
    hearsay.hear([contact(FAR)])
    assert hearsay.take(0.0) is None
    assert table.has_room(NEAR), "its own neighbourhood always has"


def test_one_public_subnet_is_knocked_at_now_and_then() -> None:
    _, _, hearsay = made()
    rng = random.Random(4)
    invented = [Contact(rng.randbytes(32), Address(f"20.1.1.{number}", 7400)) for number in range(1, 50)]
    hearsay.hear(invented)
    assert hearsay.take(100.0) is not None
    assert hearsay.take(101.0) is None
    hearsay.hear(invented)
    assert hearsay.take(111.0) is not None


def test_it_is_bounded_and_keeps_the_latest() -> None:
    _, _, hearsay = made()
    rng = random.Random(3)
    hearsay.hear(contact(rng.randbytes(32)) for _ in range(2_000))
    assert len(hearsay) == 512
    hearsay.hear([contact(FAR)])
    latest = hearsay.take(0.0)
    assert latest is not None
    assert latest.id == FAR
