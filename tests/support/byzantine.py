"""Members that lie. Each has a valid membership and breaks the rules from inside the real protocol.

A lie is counted where it is told, so a test can show that it was.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from mesh.dht.address import Address
from mesh.dht.protocol import Op
from mesh.dht.routing import Contact, encode_contacts
from mesh.dht.rpc import Request
from mesh.dht.storage import Verdict
from tests.support.swarm import PORT, SimNode

Reply = list[list[Any]]


class Liar:
    """A node turned Byzantine: it takes every record and keeps none, and what it answers is up to ``lie``."""

    def __init__(self, node: SimNode, friends: list[SimNode], lie: Lie, rng: random.Random) -> None:
        self.node = node
        self.friends = friends
        self.rng = rng
        self.told: Counter[str] = Counter()
        self.heard: list[bytes] = []
        self._lie = lie
        handlers = node.running.node.protocol.handlers
        self.honest = dict(handlers)
        handlers[Op.FIND_VALUE] = self.find_value
        handlers[Op.FIND_NODE] = lambda request: [[self.contacts()]]
        handlers[Op.STORE] = self.store

    def find_value(self, request: Request) -> Reply:
        return self._lie(self, request)

    def store(self, request: Request) -> Reply:
        keys, _, base, data = request.body
        if base:
            return [[[int(Verdict.UNKNOWN_BASE)] * len(keys), [0] * len(keys)]]
        self.heard = [*self.heard[-99:], data]
        self.told["stores dropped"] += 1
        return [[[int(Verdict.ACCEPTED)] * len(keys), [0] * len(keys)]]

    def contacts(self) -> bytes:
        """Sends the asker to liars only."""
        self.told["eclipsed"] += 1
        friends = self.rng.sample(self.friends, min(8, len(self.friends)))
        return encode_contacts([Contact(friend.node_id, Address(friend.address, PORT)) for friend in friends], 400)

    def answer(self, records: list[bytes], *, more: bool = False) -> Reply:
        return [[self.contacts(), len(records), False, more, records, b"\x00" * 5]]


Lie = Callable[[Liar, Request], Reply]


def withhold(liar: Liar, request: Request) -> Reply:
    """Knows of nothing."""
    liar.told["withheld"] += 1
    return liar.answer([])


def forge(liar: Liar, request: Request) -> Reply:
    """Hands out records whose bytes it has changed."""
    liar.told["forged"] += 1
    return liar.answer([_flip(data, liar.rng) for data in liar.heard[-2:]], more=True)


def replay(liar: Liar, request: Request) -> Reply:
    """Hands out the oldest records it ever heard, as if they had just come."""
    liar.told["replayed"] += 1
    return liar.answer([b"\xff\xff\x00" + data for data in liar.heard[:2]])


def fake_contacts(liar: Liar, request: Request) -> Reply:
    """Sends the asker to nodes that do not exist, right beside what it looks for."""
    liar.told["faked contacts"] += 1
    key = request.body[0]
    fakes = [Contact(key[:8] + liar.rng.randbytes(24), Address(f"20.200.{liar.rng.randrange(256)}.1", PORT)) for _ in range(8)]
    reply = liar.answer([])
    reply[0][0] = encode_contacts(fakes, 400)
    return reply


def babble(liar: Liar, request: Request) -> Reply:
    """Answers with anything at all."""
    liar.told["babbled"] += 1
    junk: list[Any] = [None, -1, 2**63, b"", liar.rng.randbytes(40), "text", [], [[]], {"a": 1}, True]
    return [[liar.rng.choice(junk) for _ in range(liar.rng.randrange(8))] for _ in range(liar.rng.randrange(1, 4))]


LIES: tuple[Lie, ...] = (withhold, forge, replay, fake_contacts, babble)


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return b"\xff\xff\x00" + data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :]
