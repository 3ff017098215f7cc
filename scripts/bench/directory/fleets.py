"""Our directory and stock kademlia as fleets. Run as a program with a name and a plan in JSON, prints the figures in JSON."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import structlog  # noqa: E402
import uvloop  # noqa: E402

from bench import processes  # noqa: E402
from bench.directory import nodes  # noqa: E402
from bench.directory.workload import Fleet, Note, Plan, drive, timed  # noqa: E402

JOIN_AT_ONCE = 8
KINDS = {"infermesh": nodes.ours, "infermesh-first": nodes.ours_first, "kademlia": nodes.stock}


async def join(start: Callable[[int, str], Any], plan: Plan) -> None:
    """Node 0 first, then the others, so many at once; then all are left to themselves."""
    entry = await start(0, "")
    numbers = iter(range(1, plan.nodes))

    async def lane() -> None:
        for number in numbers:
            await start(number, entry)

    await asyncio.gather(*(lane() for _ in range(JOIN_AT_ONCE)))
    await asyncio.sleep(plan.settle_s)


class Together:
    """All nodes in this process."""

    def __init__(self, name: str, makers: list[Callable[[], nodes.Node]], plan: Plan) -> None:
        self.name = name
        self._makers = makers
        self._plan = plan
        self._nodes: dict[int, nodes.Node] = {}

    async def up(self) -> None:
        await join(self._start, self._plan)

    async def _start(self, number: int, entry: str) -> str:
        self._nodes[number] = self._makers[number]()
        return await self._nodes[number].start(entry)

    async def store(self, node: int, key: int) -> list[Note]:
        return await timed("store", self._nodes[node].store(key))

    async def get(self, node: int, key: int, owner: int) -> list[Note]:
        return await timed("get", self._nodes[node].get(key, owner))

    async def kill(self, numbers: list[int]) -> None:
        await asyncio.gather(*(self._nodes.pop(number).kill() for number in numbers))

    async def down(self) -> None:
        await self.kill(list(self._nodes))

    def cpu_s(self) -> float:
        return time.process_time()


class Apart:
    """A process for each node, forked before any loop runs; killed with SIGKILL. Orders and notes go over a socket of each; what is timed
    is timed in the node's own process."""

    def __init__(self, name: str, makers: list[Callable[[], nodes.Node]], plan: Plan) -> None:
        self.name = name
        self._plan = plan
        self._sockets: list[socket.socket] = []
        self._pids: list[int] = []
        self._links: dict[int, _Link] = {}
        gc.freeze()
        for make in makers:
            here, there = socket.socketpair()
            pid = os.fork()
            if not pid:
                for each in (here, *self._sockets):
                    each.close()
                _be(make, there)
            there.close()
            self._sockets.append(here)
            self._pids.append(pid)

    async def up(self) -> None:
        for number, each in enumerate(self._sockets):
            self._links[number] = _Link(*await asyncio.open_connection(sock=each))
        await join(self._start, self._plan)

    async def _start(self, number: int, entry: str) -> str:
        return str(await self._links[number].order("start", entry))

    async def store(self, node: int, key: int) -> list[Note]:
        return [Note(*note) for note in await self._links[node].order("store", key)]

    async def get(self, node: int, key: int, owner: int) -> list[Note]:
        return [Note(*note) for note in await self._links[node].order("get", key, owner)]

    async def kill(self, numbers: list[int]) -> None:
        for number in numbers:
            os.kill(self._pids[number], signal.SIGKILL)

    async def down(self) -> None:
        await self.kill(list(range(len(self._pids))))
        for pid in self._pids:
            await asyncio.to_thread(os.waitpid, pid, 0)

    def cpu_s(self) -> float:
        return processes.cpu_s(self._pids)


class _Link:
    """Orders to one node's process, answered in whatever order they are done."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._serial = 0
        self._reading = asyncio.create_task(self._read(reader))

    async def order(self, *words: object) -> Any:
        self._serial += 1
        answer = self._waiting[self._serial] = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps([self._serial, *words]).encode() + b"\n")
        return await answer

    async def _read(self, reader: asyncio.StreamReader) -> None:
        async for line in reader:
            serial, answer = json.loads(line)
            self._waiting.pop(serial).set_result(answer)
        for left in self._waiting.values():
            left.set_exception(ConnectionError("the node's process has ended"))


def _be(make: Callable[[], nodes.Node], link: socket.socket) -> None:
    """A child: be this node until killed. What fails is told on stderr, and the link ends."""
    try:
        uvloop.run(_serve(make, link))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


async def _serve(make: Callable[[], nodes.Node], link: socket.socket) -> None:
    node = make()
    reader, writer = await asyncio.open_connection(sock=link)

    async def do(serial: int, what: str, *words: Any) -> None:
        if what == "start":
            answer: Any = await node.start(*words)
        else:
            answer = [astuple(note) for note in await timed(what, getattr(node, what)(*words))]
        writer.write(json.dumps([serial, answer]).encode() + b"\n")

    async with asyncio.TaskGroup() as doing:
        async for line in reader:
            doing.create_task(do(*json.loads(line)))
        os._exit(0)  # whoever gave the orders is gone, and waits for no answer


def main() -> None:
    plan = Plan(**json.loads(sys.argv[2]))
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    gc.set_threshold(100_000, 50, 50)
    name, makers = KINDS[sys.argv[1]](plan)
    fleet: Fleet = Apart(name, makers, plan) if plan.apart else Together(name, makers, plan)
    print(json.dumps(uvloop.run(drive(fleet, plan))))


if __name__ == "__main__":
    main()
