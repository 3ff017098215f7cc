"""Time that passes only when nobody has anything left to do.

`VirtualLoop` is an ordinary asyncio loop whose selector, instead of waiting, moves the clock to the next timer. Hours pass in
seconds, in the same order every time. Datagram endpoints, name resolution and executors are the simulator's: see
`tests.support.network`.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar, cast

T = TypeVar("T")

WALL_START = 1_800_000_000.0
"""The wall clock at virtual second 0."""


class DatagramNetwork(Protocol):
    """Where the loop's datagram endpoints live."""

    def bind(self, protocol: asyncio.DatagramProtocol, host: str, port: int) -> asyncio.DatagramTransport: ...

    def resolve(self, name: str) -> list[str]: ...


class _Selector(selectors.BaseSelector):
    """Waits by moving the clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self._map: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = selectors.SelectorKey(fileobj, 0, events, data)
        self._map[fileobj] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._map.pop(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._map

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("the simulation stands still: no timer is set and nobody can be woken")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time. ``network`` must be set before the first datagram endpoint."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        self.network: DatagramNetwork | None = None

    def time(self) -> float:
        return self._virtual.now

    async def create_datagram_endpoint(  # type: ignore[override]
        self, protocol_factory: Callable[[], asyncio.DatagramProtocol], local_addr: tuple[str, int] | None = None, **_: Any
    ) -> tuple[asyncio.DatagramTransport, asyncio.DatagramProtocol]:
        assert self.network is not None
        assert local_addr is not None
        protocol = protocol_factory()
        transport = self.network.bind(protocol, *local_addr)
        protocol.connection_made(transport)
        return transport, protocol

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> list[Any]:  # type: ignore[override]
        assert self.network is not None
        return [(0, 0, 0, "", (address, port)) for address in self.network.resolve(host)]

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """At once, in place: a thread would bring real time in."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class VirtualClock:
    """One node's clocks: the loop's time, and a wall clock that may be wrong by ``skew_s``."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, skew_s: float = 0.0) -> None:
        self._loop = loop
        self.skew_s = skew_s

    def monotonic(self) -> float:
        return self._loop.time()

    def wall(self) -> float:
        return WALL_START + self._loop.time() + self.skew_s

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)


def run_virtual(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run ``main(loop)`` to its end on a fresh virtual loop, and end whatever it left running. A failed callback fails the run."""
    loop = VirtualLoop()
    failures: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: failures.append(context))
    try:
        result = loop.run_until_complete(main(loop))
        if failures:
            raise AssertionError(f"a callback failed: {failures[0]}") from failures[0].get("exception")
        return result
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()


def virtual(loop: asyncio.AbstractEventLoop) -> VirtualLoop:
    """The running loop, known to be virtual."""
    return cast(VirtualLoop, loop)
