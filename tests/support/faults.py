"""Faults, to be put in on purpose: a TCP and a UDP proxy between two nodes, a disk that is full, a clock that jumps, processes that stop.

Each says how often it did what it was told (``fired``), so that a test can prove that its fault happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

PIECE_BYTES = 64 * 1024
SHIM = Path(__file__).with_name("clock_shift.c")


@dataclass
class Faults:
    """What happens to what passes. May be changed at any time. ``loss`` is of datagrams; of a TCP connection, that a piece is its last."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    blackhole: bool = False
    bytes_per_s: float = 0.0
    fired: Counter[str] = field(default_factory=Counter)


class TcpProxy:
    """Passes connections on to ``target`` through faults. ``async with`` it; ``address`` is where to connect instead."""

    def __init__(self, target: tuple[str, int], *, faults: Faults | None = None, rng: random.Random | None = None) -> None:
        self.target = target
        self.faults = faults or Faults()
        self._rng = rng or random.Random(0)
        self._server: asyncio.Server | None = None
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._clear = asyncio.Event()
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        return len(self._pairs)

    async def __aenter__(self) -> TcpProxy:
        self._server = await asyncio.start_server(self._take, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._server is not None
        self._server.close()
        self.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def blackhole(self, on: bool = True) -> None:
        """Nothing passes any more, in either direction, and nobody is told. ``on`` False: what was held passes."""
        self.faults.blackhole = on
        self._clear.set()
        self._clear = asyncio.Event()

    def reset(self) -> None:
        """Both ends of every connection get a RST."""
        for pair in list(self._pairs):
            self.faults.fired["reset"] += 1
            for writer in pair:
                _abort_with_reset(writer)

    def half_close(self) -> None:
        """The target's side of every connection says that it will send no more, while the other way stays open."""
        for client, _ in list(self._pairs):
            if client.can_write_eof():
                self.faults.fired["half_close"] += 1
                client.write_eof()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await self._open_up()
        try:
            other_reader, other_writer = await asyncio.open_connection(*self.target)
        except OSError:
            _abort_with_reset(writer)
            return
        pair = (writer, other_writer)
        self._pairs.add(pair)
        try:
            await asyncio.gather(self._pass(reader, other_writer), self._pass(other_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass  # cancelled only when the proxy ends, and then there is nobody to tell
        finally:
            self._pairs.discard(pair)
            for end in pair:
                end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        faults = self.faults
        while True:
            piece = await reader.read(PIECE_BYTES)
            await self._open_up()
            if faults.latency_s or faults.jitter_s:
                faults.fired["latency"] += 1
                await asyncio.sleep(faults.latency_s + faults.jitter_s * self._rng.random())
                await self._open_up()
            if faults.loss and self._rng.random() < faults.loss:
                faults.fired["loss"] += 1
                raise ConnectionResetError("lost")
            if not piece:
                if writer.can_write_eof() and not writer.is_closing():
                    writer.write_eof()
                return
            if faults.bytes_per_s:
                faults.fired["throttle"] += 1
                await asyncio.sleep(len(piece) / faults.bytes_per_s)
            writer.write(piece)
            await writer.drain()

    async def _open_up(self) -> None:
        while self.faults.blackhole:
            self.faults.fired["blackhole"] += 1
            await self._clear.wait()


class UdpProxy(asyncio.DatagramProtocol):
    """Passes datagrams on to ``target`` and its replies back, each client through a socket of its own."""

    def __init__(self, target: tuple[str, int], *, faults: Faults | None = None, rng: random.Random | None = None) -> None:
        self.target = target
        self.faults = faults or Faults()
        self._rng = rng or random.Random(0)
        self._transport: asyncio.DatagramTransport | None = None
        self._clients: dict[Any, asyncio.DatagramTransport] = {}
        self._waiting: dict[Any, list[bytes]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def __aenter__(self) -> UdpProxy:
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", self.port))
        self.port = self._transport.get_extra_info("sockname")[1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in list(self._tasks):
            task.cancel()
        for transport in (self._transport, *self._clients.values()):
            if transport is not None:
                transport.close()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        waiting = self._waiting.get(addr)
        if waiting is not None:
            waiting.append(data)
        elif addr in self._clients:
            self._later(self._clients[addr].sendto, data)
        else:
            self._waiting[addr] = [data]
            task = asyncio.get_running_loop().create_task(self._meet(addr))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _meet(self, addr: Any) -> None:
        back = _Back(lambda data: self._later(self._answer, data, addr))
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: back, remote_addr=self.target)
        self._clients[addr] = transport
        for data in self._waiting.pop(addr):
            self._later(transport.sendto, data)

    def _answer(self, data: bytes, addr: Any) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.sendto(data, addr)

    def _later(self, send: Any, *arguments: Any) -> None:
        faults = self.faults
        if faults.blackhole or (faults.loss and self._rng.random() < faults.loss):
            faults.fired["blackhole" if faults.blackhole else "loss"] += 1
            return
        delay_s = faults.latency_s + faults.jitter_s * self._rng.random()
        if delay_s:
            faults.fired["latency"] += 1
            asyncio.get_running_loop().call_later(delay_s, send, *arguments)
        else:
            send(*arguments)


class _Back(asyncio.DatagramProtocol):
    def __init__(self, on_data: Any) -> None:
        self._on_data = on_data

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._on_data(data)


def _abort_with_reset(writer: asyncio.StreamWriter) -> None:
    found = writer.get_extra_info("socket")
    if found is not None:
        with contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# -- processes


def freeze(pid: int) -> None:
    """SIGSTOP: the machine stands still, its connections stay up."""
    os.kill(pid, signal.SIGSTOP)


def thaw(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)


@contextmanager
def full_disk(pid: int) -> Iterator[None]:
    """No file of this process can grow: every write to one fails, as on a full disk (EFBIG instead of ENOSPC), its log included."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


# -- clocks


class ClockShift:
    """A wall clock that can be moved for other processes: those started inside `environment` have it. Needs a C compiler."""

    def __init__(self, folder: Path) -> None:
        self._offset = folder / "clock-offset"
        self._library = folder / "clock_shift.so"
        self._offset.write_bytes(struct.pack("<d", 0.0))
        compiler = shutil.which("cc") or shutil.which("gcc")
        assert compiler is not None, "a C compiler is needed"
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(self._library), str(SHIM), "-ldl"], check=True)

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Processes started in here tell the time by this clock."""
        before = os.environ.get("LD_PRELOAD")
        os.environ["LD_PRELOAD"], os.environ["CLOCK_OFFSET_FILE"] = str(self._library), str(self._offset)
        try:
            yield
        finally:
            del os.environ["CLOCK_OFFSET_FILE"]
            if before is None:
                del os.environ["LD_PRELOAD"]
            else:
                os.environ["LD_PRELOAD"] = before

    def jump(self, seconds: float) -> None:
        """From now on the clock is so far off the machine's own."""
        with self._offset.open("r+b") as opened:
            opened.write(struct.pack("<d", seconds))


@asynccontextmanager
async def tcp_proxy(host: str, port: int, **settings: Any) -> AsyncIterator[TcpProxy]:
    async with TcpProxy((host, port), **settings) as proxy:
        yield proxy
