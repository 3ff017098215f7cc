"""Many nodes of the real directory in one simulated world."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.dht.address import Address
from mesh.dht.verify import Verifier
from mesh.directory import Directory, DirectoryConfig
from mesh.identity import Identity
from mesh.membership import MembershipCache
from mesh.records import ModelEntry, Record, State, seal_record
from mesh.trust import Role
from tests.support.authority import TestMesh, make_mesh
from tests.support.network import Conditions, Host, Network
from tests.support.virtual_time import WALL_START, VirtualClock, VirtualLoop, run_virtual

PORT = 7400
MODEL = "smollm"


class SimNode:
    """A machine with a node on it. `boot` starts the node, `crash` ends it without a word, `boot` again starts it anew."""

    def __init__(
        self, swarm: Swarm, identity: Identity, address: str, *, serve: bool, skew_s: float, state_dir: Path | None, region: int
    ) -> None:
        self.swarm = swarm
        self.identity = identity
        self.address = address
        self.serve = serve
        self.state_dir = state_dir
        self.host: Host = swarm.network.host(address, region=region)
        self.clock = VirtualClock(swarm.loop, skew_s=skew_s)
        self.directory: Directory | None = None
        self.bootstraps: list[str] = swarm.bootstraps
        self.state = State.READY
        self.models: tuple[str, ...] = (MODEL,)
        self.boot_ms = 0
        self.seq = 0
        self._announcing: asyncio.Task[None] | None = None

    @property
    def node_id(self) -> bytes:
        return self.identity.node_id

    @property
    def alive(self) -> bool:
        return self.directory is not None

    @property
    def running(self) -> Directory:
        assert self.directory is not None
        return self.directory

    async def boot(self) -> Directory:
        self.host.up = True
        self.boot_ms = int(self.clock.wall() * 1000)
        self.seq = 0
        swarm = self.swarm
        self.directory = Directory(
            self.identity,
            bootstraps=self.bootstraps,
            state_dir=self.state_dir,
            clock=self.clock,
            rng=random.Random(swarm.rng.random()),
            serve=self.serve,
            config=swarm.config,
            verifier=swarm.verifier,
        )
        await self.directory.start(self.address, PORT)
        return self.directory

    def record(self) -> Record:
        """A fresh, signed record of this node."""
        self.seq += 1
        now = self.clock.wall()
        record = Record(
            node_id=self.node_id,
            role=self.identity.role,
            boot=self.boot_ms,
            seq=self.seq,
            issued=now,
            expires=now + self.swarm.config.record_ttl_s,
            state=self.state,
            addresses=(str(Address(self.address, PORT)),) if self.serve else (),
            models=tuple(ModelEntry(name=name) for name in self.models) if self.identity.role == Role.WORKER else (),
        )
        return seal_record(record, self.identity.key, self.identity.credentials.membership)

    async def publish(self) -> int:
        return await self.running.publish(self.record())

    def announce(self) -> None:
        """Publish now and every refresh from now on, as a worker does."""
        self._announcing = self.swarm.loop.create_task(self._announce())

    def announce_when_joined(self) -> None:
        """As `announce`, once the node has joined."""
        self._announcing = self.swarm.loop.create_task(self._join_and_announce())

    async def _join_and_announce(self) -> None:
        assert await self.running.joined(timeout_s=60.0)
        await self._announce()

    async def _announce(self) -> None:
        while True:
            await self.publish()
            await self.clock.sleep(self.swarm.config.refresh_s * self.swarm.rng.uniform(0.8, 1.0))

    async def crash(self) -> None:
        """The power goes: no farewell, no saving."""
        self.host.up = False
        await self._halt(save=False)

    async def shut_down(self) -> None:
        await self._halt(save=True)

    async def _halt(self, *, save: bool) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
            self._announcing = None
        directory, self.directory = self.directory, None
        if directory is not None:
            if not save:
                directory.node.forget_state_dir()
            await directory.stop()


class Swarm:
    """The world: loop, network, mesh, and the nodes so far. Verdicts on signatures are shared, to save the simulator's time only."""

    def __init__(
        self, loop: VirtualLoop, seed: int, *, config: DirectoryConfig | None = None, conditions: Conditions | None = None
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.loop = loop
        self.network = Network(loop, random.Random(self.rng.random()), conditions)
        self.config = config or DirectoryConfig()
        self.mesh: TestMesh = make_mesh(now=WALL_START, entropy=self.rng.randbytes)
        self.verifier = Verifier(MembershipCache(self.mesh.trust(), size=100_000), size=100_000)
        self.nodes: list[SimNode] = []
        self.bootstraps: list[str] = []

    def add(
        self,
        role: Role,
        *,
        serve: bool = True,
        skew_s: float = 0.0,
        state_dir: Path | None = None,
        address: str | None = None,
        region: int = 0,
        ipv6: bool = False,
    ) -> SimNode:
        """A new machine, not yet booted. Each has a /24 of its own (or, ``ipv6``, a /48) unless ``address`` says otherwise."""
        number = len(self.nodes)
        key = Ed25519PrivateKey.from_private_bytes(self.rng.randbytes(32))
        identity = self.mesh.identity(role, now=WALL_START + self.loop.time(), key=key)
        free = f"2001:db8:{number + 1:x}::1" if ipv6 else f"20.{number >> 8 & 255}.{number & 255}.{1 + (number >> 16)}"
        where = address or free
        node = SimNode(self, identity, where, serve=serve, skew_s=skew_s, state_dir=state_dir, region=region)
        self.nodes.append(node)
        return node

    async def bootstrap(self, count: int = 1, **about: Any) -> list[SimNode]:
        """Boot the first nodes; all later ones are given their addresses."""
        first = [self.add(Role.BOOTSTRAP, **about) for _ in range(count)]
        self.bootstraps += [str(Address(node.address, PORT)) for node in first]
        for node in first:
            await node.boot()
        return first

    async def grow(self, role: Role, count: int, *, over_s: float = 1.0, **about: Any) -> list[SimNode]:
        """Boot ``count`` nodes of a role, evenly over ``over_s``, and wait until each has joined."""
        nodes = [self.add(role, **about) for _ in range(count)]

        async def arrive(at: int, node: SimNode) -> None:
            await asyncio.sleep(over_s * at / max(1, count))
            await node.boot()
            assert await node.running.joined(timeout_s=30.0), f"node {at} could not join"

        await asyncio.gather(*(arrive(at, node) for at, node in enumerate(nodes)))
        return nodes

    def living(self, role: Role | None = None) -> list[SimNode]:
        return [node for node in self.nodes if node.alive and (role is None or node.identity.role == role)]

    async def crash(self, nodes: Iterable[SimNode]) -> None:
        for node in nodes:
            await node.crash()

    async def stop(self) -> None:
        for node in self.living():
            await node.crash()


Scenario = Callable[[Swarm], Coroutine[Any, Any, None]]


def simulate(scenario: Scenario, *, seed: int, config: DirectoryConfig | None = None, conditions: Conditions | None = None) -> Swarm:
    """Run a scenario to its end in virtual time. ``MESH_SIM_SEED`` overrides the seed; a failure names it."""
    seed = int(os.environ.get("MESH_SIM_SEED", seed))

    async def world(loop: VirtualLoop) -> Swarm:
        swarm = Swarm(loop, seed, config=config, conditions=conditions or Conditions())
        try:
            await scenario(swarm)
        finally:
            await swarm.stop()
        return swarm

    try:
        with structlog.testing.capture_logs():
            return run_virtual(world)
    except BaseException as error:
        error.add_note(f"simulation seed {seed}; replay with MESH_SIM_SEED={seed}")
        raise


def with_config(**changes: Any) -> DirectoryConfig:
    """The default settings with changes."""
    return replace(DirectoryConfig(), **changes)
