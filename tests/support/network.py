"""A network in memory: datagrams with latency by place, and every way they can go wrong.

Each fault is counted where it happens, so a test can show that it did. Everything random comes from one seeded generator.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.support.virtual_time import VirtualLoop

Address = tuple[str, int]


@dataclass(slots=True)
class Conditions:
    """What the network does to datagrams. Rates are 0 to 1, times in seconds."""

    rtt_s: float = 0.05
    jitter: float = 0.1
    """One-way times vary by up to this share, so datagrams overtake each other."""
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    """This share of datagrams is held back by up to two round trips."""


@dataclass(slots=True)
class Host:
    """A machine with one address. ``region`` places it; ``slow_s`` delays what it receives."""

    address: str
    region: int = 0
    up: bool = True
    nat: bool = False
    slow_s: float = 0.0
    group: int = 0
    """Hosts of different groups cannot reach each other."""
    opened: dict[Address, float] = field(default_factory=dict)
    """Behind NAT: whom this host has written to, and when."""


_NAT_TIMEOUT_S = 60.0
_MAX_DATAGRAM_BYTES = 1_200


class _Socket(NamedTuple):
    """What an endpoint wants to know of its socket."""

    family: socket.AddressFamily


class Transport(asyncio.DatagramTransport):
    """One bound socket."""

    def __init__(self, network: Network, protocol: asyncio.DatagramProtocol, address: Address) -> None:
        super().__init__()
        self._network = network
        self.protocol = protocol
        self.address = address
        self._closed = False

    def sendto(self, data: Any, addr: Any = None) -> None:
        if not self._closed:
            self._network.send(self.address, (addr[0], addr[1]), bytes(data))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "socket":
            return _Socket(socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET)
        return self.address if name == "sockname" else default

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._network.unbind(self)

    def abort(self) -> None:
        self.close()


class Network:
    """All hosts and the paths between them.

    ``fired`` counts what happened: sent, delivered, bytes, and each fault by name. ``tap`` sees every datagram sent (source, target,
    bytes). ``trace`` is a running hash of all of it: same seed, same trace.
    """

    def __init__(self, loop: VirtualLoop, rng: random.Random, conditions: Conditions | None = None) -> None:
        self._loop = loop
        self._rng = rng
        self.conditions = conditions or Conditions()
        self.hosts: dict[str, Host] = {}
        self.names: dict[str, list[str]] = {}
        self.fired: Counter[str] = Counter()
        self.bytes_out: Counter[str] = Counter()
        self.bytes_in: Counter[str] = Counter()
        self.tap: Callable[[Address, Address, bytes], None] | None = None
        self._bound: dict[Address, Transport] = {}
        self._trace = hashlib.blake2s()
        loop.network = self

    @property
    def trace(self) -> str:
        return self._trace.hexdigest()

    def host(self, address: str, **about: Any) -> Host:
        """Add a machine, or find it."""
        if address not in self.hosts:
            self.hosts[address] = Host(address, **about)
        return self.hosts[address]

    def bind(self, protocol: asyncio.DatagramProtocol, host: str, port: int) -> Transport:
        self.host(host)
        while port == 0 or (host, port) in self._bound:
            port = self._rng.randint(1_024, 65_535)
        transport = Transport(self, protocol, (host, port))
        self._bound[host, port] = transport
        return transport

    def unbind(self, transport: Transport) -> None:
        self._bound.pop(transport.address, None)

    def rebind(self, address: Address) -> Address:
        """A NAT forgets its mapping: the socket is seen at another port from now on."""
        transport = self._bound.pop(address)
        transport.address = (address[0], self._rng.randint(1_024, 65_535))
        self._bound[transport.address] = transport
        self.fired["rebound"] += 1
        return transport.address

    def resolve(self, name: str) -> list[str]:
        if name in self.names:
            return self.names[name]
        if name.replace(".", "").isdigit() or ":" in name:
            return [name]
        raise OSError(f"unknown name {name}")

    def partition(self, groups: dict[str, int]) -> None:
        """Put hosts into groups; those not named go to group 0."""
        for host in self.hosts.values():
            host.group = groups.get(host.address, 0)

    def heal(self) -> None:
        self.partition({})

    def send(self, source: Address, target: Address, data: bytes) -> None:
        """What a socket calls. The faults are decided here, in a fixed order, from one generator."""
        self.fired["sent"] += 1
        self.fired["bytes"] += len(data)
        self.bytes_out[source[0]] += len(data)
        if len(data) > _MAX_DATAGRAM_BYTES:
            self.fired["oversized"] += 1
        self._trace.update(f"{self._loop.time():.9f}{source}{target}{len(data)}".encode())
        if self.tap is not None:
            self.tap(source, target, data)
        sender, receiver = self.hosts[source[0]], self.hosts.get(target[0])
        if sender.nat:
            sender.opened[target] = self._loop.time()
        if not sender.up or receiver is None:
            self.fired["undeliverable"] += 1
        elif sender.group != receiver.group:
            self.fired["partitioned"] += 1
        elif self._happens(self.conditions.loss):
            self.fired["lost"] += 1
        else:
            self._carry(sender, receiver, source, target, data)
            if self._happens(self.conditions.duplication):
                self.fired["duplicated"] += 1
                self._carry(sender, receiver, source, target, data)

    def _happens(self, rate: float) -> bool:
        return rate > 0 and self._rng.random() < rate

    def _carry(self, sender: Host, receiver: Host, source: Address, target: Address, data: bytes) -> None:
        delay_s = self.one_way_s(sender, receiver) * (1 + self._rng.random() * self.conditions.jitter)
        if self._happens(self.conditions.reordering):
            self.fired["reordered"] += 1
            delay_s += self._rng.random() * 2 * self.conditions.rtt_s
        if receiver.slow_s:
            self.fired["slowed"] += 1
            delay_s += receiver.slow_s
        self._loop.call_later(delay_s, self._deliver, receiver, source, target, data)

    def one_way_s(self, sender: Host, receiver: Host) -> float:
        """Half the round trip; across regions, half as much again for each region apart on a ring of six."""
        apart = abs(sender.region - receiver.region) % 6
        return self.conditions.rtt_s / 2 * (1 + min(apart, 6 - apart) / 2)

    def _deliver(self, receiver: Host, source: Address, target: Address, data: bytes) -> None:
        transport = self._bound.get(target)
        if not receiver.up or transport is None:
            self.fired["undeliverable"] += 1
        elif receiver.nat and self._loop.time() - receiver.opened.get(source, float("-inf")) > _NAT_TIMEOUT_S:
            self.fired["nat_refused"] += 1
        else:
            self.fired["delivered"] += 1
            self.bytes_in[target[0]] += len(data)
            transport.protocol.datagram_received(data, source)
