"""Somebody without a key: a socket, what they overheard, and what can be made of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

from mesh.trust import Role
from tests.support.network import Network
from tests.support.swarm import PORT, SimNode, Swarm

Overheard = list[tuple[str, bytes]]
"""Datagrams, each with the address it went to."""


class Outsider:
    """Sends what it likes, and counts the bytes it gets for it."""

    def __init__(self, network: Network, address: str = "66.6.6.6") -> None:
        self.received = 0
        network.host(address)
        self._transport = network.bind(self, address, 6_666)  # type: ignore[arg-type]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.received += len(data)

    def send(self, data: bytes, address: str) -> None:
        self._transport.sendto(data, (address, PORT))


async def overhear(swarm: Swarm, workers: int, *, for_s: float) -> Overheard:
    """Everything said while a bootstrap node and some workers come together."""
    overheard: Overheard = []
    swarm.network.tap = lambda source, target, data: overheard.append((target[0], data))
    await swarm.bootstrap(1)
    for worker in await swarm.grow(Role.WORKER, workers):
        worker.announce()
    await asyncio.sleep(for_s)
    swarm.network.tap = None
    return overheard


def hostile_datagrams(overheard: Overheard, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Without end, in turn: noise, one overheard sent again, one with a bit changed, one cut short; each with whom it is for."""
    while True:
        yield rng.choice(overheard)[0], rng.randbytes(rng.randrange(1_300))
        yield rng.choice(overheard)
        for change in (_flip, _cut):
            target, data = rng.choice(overheard)
            yield target, change(data, rng)


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


async def bombard(swarm: Swarm, overheard: Overheard, datagrams: int) -> Outsider:
    """A stranger sends so many of them, 2,500 a second, and waits for answers."""
    stranger, each = Outsider(swarm.network), hostile_datagrams(overheard, swarm.rng)
    for number in range(datagrams):
        target, data = next(each)
        stranger.send(data, target)
        if number % 500 == 499:
            await asyncio.sleep(0.2)
    await asyncio.sleep(5.0)
    return stranger


def refusals(nodes: list[SimNode]) -> dict[str, int]:
    """By reason, how much all of them refused."""
    found: dict[str, int] = {}
    for node in nodes:
        for name, count in node.running.stats().items():
            if name.startswith("refused_"):
                found[name] = found.get(name, 0) + int(count)
    return found
