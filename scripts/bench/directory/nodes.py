"""One node of our directory and one of stock kademlia, as `fleets` runs many of them."""

from __future__ import annotations

import asyncio
import importlib.metadata
import random
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol

from kademlia.network import Server

from bench.directory.workload import First, Plan
from mesh.clock import SystemClock
from mesh.directory import Directory, DirectoryConfig
from mesh.identity import Identity
from mesh.records import ModelEntry, Record, State, seal_record
from mesh.trust import Role
from tests.support.authority import make_mesh

HOST = "127.0.0.1"


class Node(Protocol):
    async def start(self, entry: str) -> str:
        """Join at ``entry`` (empty: be the first) and return the own address."""
        ...

    async def store(self, key: int) -> bool: ...

    async def get(self, key: int, owner: int) -> bool | First: ...

    async def kill(self) -> None:
        """End without a word to anybody."""
        ...


class Ours:
    """A worker that announces itself and refreshes its record all the while as in a real mesh. A key is a model that it begins to serve:
    storing it is publishing, looking it up is `Directory.find_model`; its first answer is the first record that has been verified. It
    shares nothing with the others."""

    def __init__(self, number: int, plan: Plan, *, identities: list[Identity], config: DirectoryConfig) -> None:
        self._rng = random.Random(plan.seed << 32 | number)
        self._identities = identities
        self._identity = identities[number]
        self._config = config
        self._address = ""
        self._models: list[str] = []
        self._seq = 0
        self._boot = int(time.time() * 1000)
        self._publishing = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None

    async def start(self, entry: str) -> str:
        self._directory = Directory(
            self._identity,
            bootstraps=[entry] if entry else [],
            state_dir=None,
            clock=SystemClock(),
            rng=random.Random(self._rng.random()),
            config=self._config,
        )
        host, port = await self._directory.start(HOST, 0)
        self._address = f"{host}:{port}"
        if entry:
            assert await self._directory.joined(timeout_s=30)
        self._refreshing = asyncio.create_task(self._refresh())
        return self._address

    def _record(self) -> Record:
        self._seq += 1
        now = time.time()
        record = Record(
            node_id=self._identity.node_id,
            role=self._identity.role,
            boot=self._boot,
            seq=self._seq,
            issued=now,
            expires=now + self._config.record_ttl_s,
            state=State.READY,
            addresses=(self._address,),
            models=tuple(ModelEntry(name=name) for name in self._models),
        )
        return seal_record(record, self._identity.key, self._identity.credentials.membership)

    async def _refresh(self) -> None:
        await asyncio.sleep(self._rng.random() * self._config.refresh_s)
        while True:
            async with self._publishing:
                await self._directory.publish(self._record())
            await asyncio.sleep(self._config.refresh_s * self._rng.uniform(0.9, 1.1))

    async def store(self, key: int) -> bool:
        async with self._publishing:
            self._models.append(f"model-{key}")
            return await self._directory.publish(self._record()) > 0

    async def get(self, key: int, owner: int) -> bool | First:
        node_id, first = self._identities[owner].node_id, First()
        records = await self._directory.find_model(f"model-{key}", on_record=lambda record: first.hear(record.node_id == node_id))
        first.whole = [record.node_id for record in records] == [node_id]
        return first

    async def kill(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
        self._directory.node.protocol.close()
        await self._directory.stop()


class OursFirst(Ours):
    """As `Ours`, but whoever looks up leaves with the first verified record, and nobody is asked any more."""

    async def get(self, key: int, owner: int) -> bool:
        heard: list[Record] = []

        def leave(record: Record) -> None:
            heard.append(record)
            looking.cancel()

        looking = asyncio.create_task(self._directory.find_model(f"model-{key}", on_record=leave))
        with suppress(asyncio.CancelledError):
            await looking
        return bool(heard) and heard[0].node_id == self._identities[owner].node_id


class Stock:
    """kademlia.network.Server as it comes: nothing is signed, checked, sealed or refreshed."""

    def __init__(self, number: int, plan: Plan) -> None:
        self._plan = plan
        self._server = Server()

    async def start(self, entry: str) -> str:
        await self._server.listen(0, interface=HOST)
        if entry:
            host, _, port = entry.rpartition(":")
            await self._server.bootstrap([(host, int(port))])
        return "{}:{}".format(*self._server.transport.get_extra_info("sockname")[:2])

    def _value(self, key: int) -> bytes:
        return random.Random(key).randbytes(self._plan.value_bytes)

    async def store(self, key: int) -> bool:
        return bool(await self._server.set(f"key-{key}", self._value(key)))

    async def get(self, key: int, owner: int) -> bool:
        return bool(await self._server.get(f"key-{key}") == self._value(key))

    async def kill(self) -> None:
        self._server.stop()


def ours(plan: Plan, *, kind: type[Ours] = Ours, name: str = "infermesh") -> tuple[str, list[Callable[[], Node]]]:
    """Its name, and how each node is made."""
    mesh, config = make_mesh(now=time.time() - 60), DirectoryConfig.local()
    roles = [Role.BOOTSTRAP] + [Role.WORKER] * (plan.nodes - 1)  # the first is where the others enter, and stores as they do
    identities = [mesh.identity(role, now=time.time()) for role in roles]
    return name, [partial(kind, number, plan, identities=identities, config=config) for number in range(plan.nodes)]


def ours_first(plan: Plan) -> tuple[str, list[Callable[[], Node]]]:
    return ours(plan, kind=OursFirst, name="infermesh, first answer only")


def stock(plan: Plan) -> tuple[str, list[Callable[[], Node]]]:
    name = f"kademlia {importlib.metadata.version('kademlia')}"
    return name, [partial(Stock, number, plan) for number in range(plan.nodes)]
