"""Put on a node's PYTHONPATH: while the file named by BENCH_BLACKHOLE exists, its process neither sends nor receives a datagram.

The first datagram swallowed each way leaves a file beside it, so that whoever asked can see that it happened.
"""

import asyncio
import os
from pathlib import Path

SWITCH = os.environ.get("BENCH_BLACKHOLE", "")


def swallowed(way: str) -> bool:
    """Whether it is dark; says so the first time."""
    if not os.path.exists(SWITCH):
        return False
    Path(f"{SWITCH}.{os.getpid()}.{way}").touch()
    return True


class Outlet:
    """A datagram transport that swallows what is sent."""

    def __init__(self, transport: asyncio.DatagramTransport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)

    def sendto(self, data: bytes, addr: object = None) -> None:
        if not swallowed("out"):
            self._transport.sendto(data, addr)  # type: ignore[arg-type]


class Inlet(asyncio.DatagramProtocol):
    """A datagram protocol that swallows what arrives."""

    def __init__(self, protocol: asyncio.DatagramProtocol) -> None:
        self._protocol = protocol
        self.error_received = protocol.error_received
        self.connection_lost = protocol.connection_lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._protocol.connection_made(Outlet(transport))  # type: ignore[arg-type]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if not swallowed("in"):
            self._protocol.datagram_received(data, addr)


if SWITCH:
    import uvloop

    plain = uvloop.Loop.create_datagram_endpoint

    async def create_datagram_endpoint(self, protocol_factory, *args, **kwargs):
        return await plain(self, lambda: Inlet(protocol_factory()), *args, **kwargs)

    uvloop.Loop.create_datagram_endpoint = create_datagram_endpoint
