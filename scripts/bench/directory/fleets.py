"""Our directory and stock kademlia as fleets. Run as a program with a name and a plan in JSON, prints the figures in JSON."""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import json
import logging
import random
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import structlog  # noqa: E402
import uvloop  # noqa: E402
from kademlia.network import Server  # noqa: E402

from bench.directory.workload import First, Plan, drive  # noqa: E402
from mesh.clock import SystemClock  # noqa: E402
from mesh.directory import Directory, DirectoryConfig  # noqa: E402
from mesh.records import ModelEntry, Record, State, seal_record  # noqa: E402
from mesh.trust import Role  # noqa: E402
from tests.support.authority import make_mesh  # noqa: E402

HOST = "127.0.0.1"
JOIN_AT_ONCE = 8


class Ours:
    """Workers, each announcing itself and refreshing its record all the while as in a real mesh. A key is a model that one of them
    begins to serve: storing it is publishing, looking it up is `Directory.find_model`; its first answer is the first record that has been
    verified. Nothing is shared between nodes."""

    def __init__(self, plan: Plan) -> None:
        self.name = "infermesh"
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self._clock = SystemClock()
        self._config = DirectoryConfig.local()
        self._mesh = make_mesh(now=time.time() - 60)
        roles = [Role.BOOTSTRAP] + [Role.WORKER] * (plan.nodes - 1)  # the first is where the others enter, and stores as they do
        self._identities = [self._mesh.identity(role, now=time.time()) for role in roles]
        self._addresses = [""] * plan.nodes
        self._directories: list[Directory] = []
        self._models: list[list[str]] = [[] for _ in range(plan.nodes)]
        self._owners: dict[int, bytes] = {}
        self._seq = 0
        self._boot = int(time.time() * 1000)
        self._refreshing: list[asyncio.Task[None]] = []
        self._publishing = [asyncio.Lock() for _ in range(plan.nodes)]

    async def up(self) -> None:
        for number, identity in enumerate(self._identities):
            directory = Directory(
                identity,
                bootstraps=self._addresses[:1] if number else [],
                state_dir=None,
                clock=self._clock,
                rng=random.Random(self._rng.random()),
                config=self._config,
            )
            self._directories.append(directory)
            host, port = await directory.start(HOST, 0)
            self._addresses[number] = f"{host}:{port}"
            if number % JOIN_AT_ONCE == 0:
                await directory.joined(timeout_s=30)
        assert all(await asyncio.gather(*(directory.joined(timeout_s=30) for directory in self._directories)))
        self._refreshing = [asyncio.create_task(self._refresh(number)) for number in range(self._plan.nodes)]
        await asyncio.sleep(self._plan.settle_s)

    def _record(self, number: int) -> Record:
        self._seq += 1
        identity, now = self._identities[number], time.time()
        record = Record(
            node_id=identity.node_id,
            role=identity.role,
            boot=self._boot,
            seq=self._seq,
            issued=now,
            expires=now + self._config.record_ttl_s,
            state=State.READY,
            addresses=(self._addresses[number],),
            models=tuple(ModelEntry(name=name) for name in self._models[number]),
        )
        return seal_record(record, identity.key, identity.credentials.membership)

    async def _refresh(self, number: int) -> None:
        await asyncio.sleep(self._rng.random() * self._config.refresh_s)
        while True:
            async with self._publishing[number]:
                await self._directories[number].publish(self._record(number))
            await asyncio.sleep(self._config.refresh_s * self._rng.uniform(0.9, 1.1))

    async def store(self, node: int, key: int) -> bool:
        self._owners[key] = self._identities[node].node_id
        async with self._publishing[node]:
            self._models[node].append(f"model-{key}")
            return await self._directories[node].publish(self._record(node)) > 0

    async def get(self, node: int, key: int) -> First:
        owner, first = self._owners[key], First()
        records = await self._directories[node].find_model(f"model-{key}", on_record=lambda record: first.hear(record.node_id == owner))
        first.whole = [record.node_id for record in records] == [owner]
        return first

    async def kill(self, nodes: list[int]) -> None:
        for number in nodes:
            self._refreshing[number].cancel()
            self._directories[number].node.protocol.close()
        await asyncio.gather(*(self._directories[number].stop() for number in nodes))

    async def down(self) -> None:
        for task in self._refreshing:
            task.cancel()
        await asyncio.gather(*(directory.stop() for directory in self._directories))


class Stock:
    """kademlia.network.Server as it comes: nothing is signed, checked, sealed or refreshed."""

    def __init__(self, plan: Plan) -> None:
        self.name = f"kademlia {importlib.metadata.version('kademlia')}"
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self._servers = [Server() for _ in range(plan.nodes)]
        self._values: dict[int, bytes] = {}

    async def up(self) -> None:
        entry: list[tuple[str, int]] = []
        joining: set[asyncio.Task[object]] = set()
        for server in self._servers:
            await server.listen(0, interface=HOST)
            if not entry:
                entry = [server.transport.get_extra_info("sockname")[:2]]
                continue
            joining.add(asyncio.create_task(server.bootstrap(entry)))
            if len(joining) >= JOIN_AT_ONCE:
                _, joining = await asyncio.wait(joining, return_when=asyncio.FIRST_COMPLETED)
        if joining:
            await asyncio.wait(joining)
        await asyncio.sleep(self._plan.settle_s)

    async def store(self, node: int, key: int) -> bool:
        self._values[key] = self._rng.randbytes(self._plan.value_bytes)
        return bool(await self._servers[node].set(f"key-{key}", self._values[key]))

    async def get(self, node: int, key: int) -> bool:
        return bool(await self._servers[node].get(f"key-{key}") == self._values[key])

    async def kill(self, nodes: list[int]) -> None:
        for number in nodes:
            self._servers[number].stop()

    async def down(self) -> None:
        for server in self._servers:
            server.stop()


FLEETS = {"infermesh": Ours, "kademlia": Stock}


def main() -> None:
    name, plan = sys.argv[1], Plan(**json.loads(sys.argv[2]))
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    gc.set_threshold(100_000, 50, 50)
    print(json.dumps(uvloop.run(drive(FLEETS[name](plan), plan))))


if __name__ == "__main__":
    main()
