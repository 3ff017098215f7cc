"""Which holders are asked for what, when most of it is in hand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import msgpack
import pytest

from mesh.dht.address import Address
from mesh.dht.collect import Collector
from mesh.dht.config import DirectoryConfig
from mesh.dht.counts import Counts
from mesh.dht.peers import PeerMemory
from mesh.dht.protocol import MeshProtocol, encode_found, fingerprint, parse_tags
from mesh.dht.routing import Contact
from mesh.dht.rpc import OnReply, Reply
from mesh.dht.storage import Held, covered
from mesh.dht.verify import peek
from mesh.pulse import Pulse, make_pulse
from mesh.records import Record, role_key
from mesh.trust import Role
from tests.support.clocks import StoppedClock
from tests.support.records import NOW, Scribe

KEY = role_key(Role.WORKER)
LASTING_S = 8.0


class Bench:
    """Holders with what the test gives them, and a reader. ``asked`` says who was asked for records, in order; ``at_once`` how many at most
    at one moment."""

    def __init__(self, count: int = 6) -> None:
        self.scribe = Scribe()
        self.clock = StoppedClock(NOW)
        self.owners = [self.scribe.node() for _ in range(count)]
        self.records = [self.scribe.record(owner) for owner in self.owners]
        self.held: dict[Contact, dict[bytes, Held]] = {}
        self.lacks: dict[bytes, int] = {}
        self.far: set[Contact] = set()
        self.asked: list[Contact] = []
        self.at_once = self._open = 0
        self.counts = Counts()

    def holder(self, records: Iterable[Record]) -> Contact:
        number = len(self.held) + 1
        contact = Contact(bytes([number]) * 32, Address("203.0.113.7", 7400 + number))
        self.held[contact] = {
            record.node_id: Held(record=record, claim=peek(record.signed), ends=self.clock.now + 20.0, source=record.node_id, allowed={})
            for record in records
        }
        return contact

    def renew(self, *contacts: Contact, n: int) -> None:
        """Every owner's pulse reaches these holders."""
        for contact in contacts:
            for owner, record in zip(self.owners, self.records, strict=True):
                if owner.node_id in self.held[contact]:
                    held = self.held[contact][owner.node_id]
                    held.pulse, held.ends = make_pulse(owner.key, record.boot, record.seq, n), self.clock.now + 20.0

    def body(self, contact: Contact, have: bytes, *, items: bool) -> list[Any]:
        known = parse_tags(have)
        held = self.held[contact].values()
        new = [encode_found(one, known, self.clock.now) for one in held if not covered(one.tag, known)]
        return [b"", len(held), False, bool(new) and not items, new if items else [], fingerprint(one.name for one in held)]

    def ask(self, address: Address, kind: int, body: bytes, on_reply: OnReply, *, node_id: bytes) -> None:
        contact = next(contact for contact in self.held if contact.id == node_id)
        self.asked.append(contact)
        self._open += 1
        self.at_once = max(self.at_once, self._open)
        _, _, _, have, _ = msgpack.unpackb(body)

        def answer() -> None:
            self._open -= 1
            on_reply(Reply(node_id=node_id, address=address, bodies=[self.body(contact, have, items=True)], complete=True, rtt_s=0.0))

        asyncio.get_running_loop().call_soon(answer)

    async def read(self, known: Iterable[Record]) -> dict[bytes, Record]:
        """One look-up: every holder answers in the order it was made, then whoever should be is asked; returns all records in hand."""
        self.asked, self.at_once = [], 0
        got = {record.node_id: record for record in known}

        def accept(data: bytes, remaining_s: float, pulse: Pulse, source: bytes) -> Record:
            record = next(record for record in self.records if record.signed == data)
            got[record.node_id] = replace(record, expires=self.clock.now + remaining_s, pulse=pulse.n)
            return got[record.node_id]

        collector = Collector(
            cast(MeshProtocol, self),
            PeerMemory(DirectoryConfig(), self.scribe.rng),
            self.clock,
            key=KEY,
            accept=accept,
            known=list(got.values()),
            lasting_s=LASTING_S,
            is_near=lambda contact: contact not in self.far,
            lacks=self.lacks,
            on_change=lambda: None,
        )
        for contact in self.held:
            collector.first(contact, self.body(contact, b"", items=False))
        while collector.go_on():
            await asyncio.sleep(0)
        collector.stop()
        return got


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_a_holder_that_lacks_what_it_lacked_before_is_not_asked_again(bench: Bench) -> None:
    whole, poor = bench.holder(bench.records), bench.holder(bench.records[:4])
    first = await bench.read(bench.records[:1])
    assert first.keys() == {record.node_id for record in bench.records}
    assert bench.asked == [whole, poor], "it might have had news"
    bench.clock.now += 5.0
    await bench.read(first.values())
    assert not bench.asked
    bench.held[poor] |= bench.held[whole]
    await bench.read(first.values())
    assert not bench.asked, "it has what is in hand"
    del bench.held[poor][bench.records[1].node_id]
    await bench.read(first.values())
    assert bench.asked == [poor], "it lacks something else: that may be news"


async def test_a_holder_is_asked_again_once_it_has_something_new(bench: Bench) -> None:
    old = bench.records[:5]
    bench.holder(old)
    poor = bench.holder(old[:3])
    first = await bench.read(old)
    assert bench.asked == [poor]
    bench.held[poor] |= bench.held[bench.holder(bench.records[5:])]
    found = await bench.read(first.values())
    assert poor in bench.asked
    assert bench.records[5].node_id in found


async def test_pulses_are_fetched_from_one_holder_if_that_will_do(bench: Bench) -> None:
    holders = [bench.holder(bench.records) for _ in range(5)]
    known = (await bench.read(bench.records)).values()
    assert not bench.asked, "all is in hand, and lasts"
    bench.clock.now += 13.0
    bench.renew(*holders, n=13)
    found = await bench.read(known)
    assert bench.asked == holders[:1]
    assert all(record.pulse == 13 for record in found.values())


async def test_the_next_is_asked_while_a_record_will_not_last_and_no_two_at_once(bench: Bench) -> None:
    holders = [bench.holder(bench.records) for _ in range(5)]
    bench.clock.now += 13.0
    bench.renew(*holders[2:], n=13)
    found = await bench.read(bench.records)
    assert bench.asked == holders[:3]
    assert bench.at_once == 1
    assert all(record.pulse == 13 for record in found.values())


async def test_those_far_from_the_key_are_not_asked_even_if_they_answer_first(bench: Bench) -> None:
    far, near = bench.holder(bench.records[:2]), bench.holder(bench.records)
    bench.far.add(far)
    bench.clock.now += 13.0
    bench.renew(far, near, n=13)
    await bench.read(bench.records)
    assert bench.asked == [near]


async def test_with_nothing_in_hand_all_that_differ_are_asked(bench: Bench) -> None:
    whole, poor = bench.holder(bench.records), bench.holder(bench.records[:2])
    bench.far.add(poor)
    assert (await bench.read([])).keys() == {record.node_id for record in bench.records}
    assert bench.asked == [whole, poor]
