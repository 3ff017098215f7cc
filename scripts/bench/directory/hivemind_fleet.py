"""hivemind's DHT as a fleet, run by the interpreter of an environment that holds it: each node has its own libp2p daemon."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hivemind.dht.node import DHTNode

from bench.directory.workload import Note, Plan, drive, timed

LIFETIME_S = 600


class Hivemind:
    """A node is a `DHTNode` with its defaults (5 replicas); values expire, nothing is signed."""

    def __init__(self, plan: Plan) -> None:
        self.name = f"hivemind {importlib.metadata.version('hivemind')}"
        self._plan = plan
        self._nodes: list[DHTNode] = []
        self._values: dict[int, bytes] = {}

    async def up(self) -> None:
        entry: list[str] = []
        for _ in range(self._plan.nodes):
            node = await DHTNode.create(initial_peers=entry, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
            self._nodes.append(node)
            entry = entry or [str(address) for address in await node.get_visible_maddrs()]
        await asyncio.sleep(self._plan.settle_s)

    async def store(self, node: int, key: int) -> list[Note]:
        return await timed("store", self._store(node, key))

    async def get(self, node: int, key: int, owner: int) -> list[Note]:
        return await timed("get", self._get(node, key))

    async def _store(self, node: int, key: int) -> bool:
        self._values[key] = (f"{key} ".encode() * self._plan.value_bytes)[: self._plan.value_bytes]
        return bool(await self._nodes[node].store(f"key-{key}", self._values[key], time.time() + LIFETIME_S))

    async def _get(self, node: int, key: int) -> bool:
        found = await self._nodes[node].get(f"key-{key}")
        return found is not None and found.value == self._values[key]

    async def kill(self, nodes: list[int]) -> None:
        for number in nodes:
            with suppress(ProcessLookupError):
                self._nodes[number].p2p._child.kill()

    async def down(self) -> None:
        await self.kill(list(range(len(self._nodes))))

    def cpu_s(self) -> float:
        return time.process_time()


def main() -> None:
    logging.disable(logging.CRITICAL)
    plan = Plan(**json.loads(sys.argv[1]))
    print(json.dumps(asyncio.run(drive(Hivemind(plan), plan))), flush=True)


if __name__ == "__main__":
    main()
