"""Members that lie. Each has a valid membership and breaks the rules from inside the real protocol.

A lie is counted where it is told, so a test can show that it was.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from mesh.dht.address import Address
from mesh.dht.documents import Answer
from mesh.dht.protocol import Op
from mesh.dht.routing import Contact, encode_contacts
from mesh.dht.rpc import Request
from mesh.dht.storage import Verdict
from mesh.documents import Document
from mesh.pulse import PULSE_BYTES
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
    """Hands out records whose bytes it has changed, and with pulses it has made up."""
    liar.told["forged"] += 1
    lie = _flip if liar.rng.random() < 0.5 else _revive
    return liar.answer([lie(data, liar.rng) for data in liar.heard[-2:]], more=True)


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


class FalseHolder:
    """A holder of documents that drops what it is offered, boasts of versions nobody signed, and sends old ones in their place."""

    def __init__(self, node: SimNode, old: Document, rng: random.Random) -> None:
        self.old = old
        self.rng = rng
        self.told: Counter[str] = Counter()
        handlers = node.running.node.protocol.handlers
        handlers[Op.DOC_OFFER] = self.offer
        handlers[Op.DOC_LIST] = self.list
        handlers[Op.DOC_GET] = self.get

    def offer(self, request: Request) -> Reply:
        self.told["dropped"] += 1
        return [[int(Answer.HAVE), request.body[1], request.body[2]]]

    def list(self, request: Request) -> Reply:
        self.told["boasted"] += 1
        return [[[seq, self.rng.randbytes(32), 0] for seq in (2**62, 2**40, 9, 3, 3, 3, 2, 2)]]

    def get(self, request: Request) -> Reply:
        _, seq, offset = request.body
        lie = self.rng.choice(("old", "garbage", "nothing", "no end"))
        self.told[lie] += 1
        digest = self.old.digest
        if lie == "garbage":
            return [[seq, digest, 900, offset, self.rng.randbytes(900)]]
        if lie == "no end":
            return [[seq, digest, 60_000, offset, b"\x00"]]
        return [[seq, digest, len(self.old.signed), 0, self.old.signed]] if lie == "old" else [[0, b"", 0, 0, b""]]


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return b"\xff\xff\x00" + data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :]


def _revive(data: bytes, rng: random.Random) -> bytes:
    return b"\xff\xff\x02" + bytes((rng.randrange(1, 256),)) + rng.randbytes(PULSE_BYTES) + data
