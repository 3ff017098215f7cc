"""UDP addresses: one spelling each, eight or twenty bytes on the wire, and which subnet they belong to."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import NamedTuple

from mesh.errors import ConfigError, MalformedEnvelope


class Address(NamedTuple):
    """An IP address in canonical text and a UDP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def normalise(host: str, port: int) -> Address:
    """From what a socket reports: IPv4 in IPv6 becomes IPv4, a scope id goes."""
    return Address(_canonical(host), port)


@lru_cache(maxsize=65_536)
def _canonical(host: str) -> str:
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host.split("%")[0])
    return str(address.ipv4_mapped or address)


@lru_cache(maxsize=65_536)
def encode_address(address: Address) -> bytes:
    packed = ipaddress.ip_address(address.host).packed
    return bytes((len(packed),)) + packed + address.port.to_bytes(2)


def parse_address(data: bytes, at: int) -> tuple[Address, int]:
    """Read one address; returns it and where the next thing starts. Raises `MalformedEnvelope`."""
    size = data[at] if at < len(data) else 0
    end = at + 1 + size + 2
    if size not in (4, 16) or end > len(data):
        raise MalformedEnvelope("bad address")
    return _decode(data[at + 1 : end]), end


@lru_cache(maxsize=65_536)
def _decode(packed: bytes) -> Address:
    return normalise(str(ipaddress.ip_address(packed[:-2])), int.from_bytes(packed[-2:]))


@lru_cache(maxsize=65_536)
def subnet_of(host: str) -> str | None:
    """The subnet that counts against the table's limits; None for loopback and private ranges, which are free."""
    address = ipaddress.ip_address(host)
    if address.is_loopback or address.is_private or address.is_link_local:
        return None
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 56), strict=False))


@lru_cache(maxsize=65_536)
def is_dialable(host: str, port: int) -> bool:
    """Whether a datagram to it can mean one node: no wildcard, no multicast, no port 0."""
    address = ipaddress.ip_address(host)
    return port > 0 and not (address.is_unspecified or address.is_multicast or host == "255.255.255.255")


@lru_cache(maxsize=65_536)
def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def split_host_port(text: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port``. Raises `ConfigError`."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"'{text}' is not host:port", param="bootstraps")
    return host, int(port)
