"""The work every DHT is given, and how it is timed. Only the standard library: it also runs in other programs' environments.

A fleet is N nodes on loopback UDP, in one process or in one each. First all are alive: so many new keys are stored, then looked up from
other nodes. Then a share of the nodes dies at once, without a word, and from that moment look-ups of keys whose owners live and stores of
new keys come mixed, at the same concurrency. `hyperdht.js` does the same in JavaScript.

A look-up is timed as `get` when its caller has a first answer, and as `whole` when every holder has been heard. A DHT that knows only one
of the two is timed as that one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``ops`` of each kind in each phase, ``concurrency`` at once; a phase begins nothing more after ``budget_s``, and an operation
    that takes ``limit_s`` has failed. ``dead`` is the share of nodes that die. ``settle_s``: how long a fleet is left to itself once all
    have joined. ``apart``: a process for each node, where the fleet can (ours and stock kademlia)."""

    nodes: int = 200
    ops: int = 200
    concurrency: int = 8
    dead: float = 0.3
    settle_s: float = 60.0
    value_bytes: int = 300
    budget_s: float = 60.0
    limit_s: float = 60.0
    seed: int = 1
    apart: bool = False


class First:
    """The first answer of a look-up that goes on after it: whether it is what was stored, and when its caller had it. ``whole``: whether
    that is what the look-up came to."""

    def __init__(self) -> None:
        self.right = False
        self.whole = False
        self.at: tuple[float, float] | None = None
        """Seconds, and of CPU time."""

    def hear(self, right: bool) -> None:
        if self.at is None:
            self.at = now()
            self.right = right


@dataclass(frozen=True, slots=True)
class Note:
    """An operation as its caller saw it: whether the answer is right, after how long, after how much CPU time of the caller's process."""

    kind: str
    right: bool
    ms: float
    cpu_ms: float


async def timed(kind: str, operation: Awaitable[bool | First]) -> list[Note]:
    """Each answer counts as of the moment its caller has it."""
    began = now()

    def note(kind: str, right: bool, at: tuple[float, float]) -> Note:
        return Note(kind, right, (at[0] - began[0]) * 1e3, (at[1] - began[1]) * 1e3)

    done: bool | First = False
    try:
        done = await operation
    except Exception:  # of whatever DHT: it has failed
        done = False
    ended = now()
    if isinstance(done, First):
        return [note(kind, done.right, done.at or ended), note("whole", done.whole, ended)]
    return [note(kind, done, ended)]


class Fleet(Protocol):
    """N nodes of one kind, numbered; number 0 is where the others entered and never dies."""

    name: str

    async def up(self) -> None: ...

    async def store(self, node: int, key: int) -> list[Note]:
        """Store a value under a new key from ``node``. Right if the DHT says it did."""
        ...

    async def get(self, node: int, key: int, owner: int) -> list[Note]:
        """Look up from ``node`` the ``key`` that ``owner`` stored. Right if exactly that came back. A look-up that goes on after its first
        answer is noted twice."""
        ...

    async def kill(self, nodes: list[int]) -> None: ...

    async def down(self) -> None: ...

    def cpu_s(self) -> float:
        """CPU time of all nodes so far."""
        ...


@dataclass(slots=True)
class Samples:
    """Every operation of a kind: its time in ms, failed ones too, and the CPU time of the caller's process in between; how many
    succeeded; with nothing else going on, the CPU time of the whole fleet for each (background included)."""

    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    ok: int = 0
    cpu_ms_each: float | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    kind: str
    run: Callable[[], Awaitable[list[Note]]]


def now() -> tuple[float, float]:
    """The time, and the CPU time of this process, in seconds."""
    return time.perf_counter(), time.process_time()


async def run_all(operations: Iterable[Operation], plan: Plan) -> dict[str, Samples]:
    """Keep ``plan.concurrency`` operations in flight until there are no more or the budget is spent."""
    found: dict[str, Samples] = {}
    left: Iterator[Operation] = iter(operations)
    until = time.perf_counter() + plan.budget_s

    async def lane() -> None:
        for operation in left:
            if time.perf_counter() > until:
                return
            # not cancelled when late: kademlia's own timers fail on a cancelled future
            done, late = await asyncio.wait({asyncio.ensure_future(operation.run())}, timeout=plan.limit_s)
            if late:
                found.setdefault(operation.kind, Samples()).ms.append(plan.limit_s * 1e3)
            for note in (note for task in done for note in task.result()):
                samples = found.setdefault(note.kind, Samples())
                samples.ms.append(note.ms)
                samples.cpu_ms.append(note.cpu_ms)
                samples.ok += note.right

    await asyncio.gather(*(lane() for _ in range(plan.concurrency)))
    return found


async def run_one_kind(fleet: Fleet, operations: list[Operation], plan: Plan) -> dict[str, Samples]:
    """As `run_all`, with the CPU time."""
    began = fleet.cpu_s()
    found = await run_all(operations, plan)
    for samples in found.values():
        samples.cpu_ms_each = (fleet.cpu_s() - began) * 1e3 / len(samples.ms)
    return found


async def drive(fleet: Fleet, plan: Plan) -> dict[str, Any]:
    """Both phases. Returns what `report` reads."""
    rng = random.Random(plan.seed)
    began = time.perf_counter()
    await fleet.up()
    up_s = time.perf_counter() - began
    nodes = list(range(plan.nodes))
    owners: dict[int, int] = {}

    def stores(alive: list[int], first: int) -> list[Operation]:
        turns = rng.sample(alive, len(alive))
        made = []
        for key in range(first, first + plan.ops):
            owners[key] = turns[key % len(turns)]
            made.append(Operation("store", partial(fleet.store, owners[key], key)))
        return made

    def gets(alive: list[int], keys: list[int]) -> list[Operation]:
        made = []
        for _ in range(plan.ops):
            key = rng.choice(keys)
            asker = rng.choice([node for node in alive if node != owners[key]])
            made.append(Operation("get", partial(fleet.get, asker, key, owners[key])))
        return made

    healthy = await run_one_kind(fleet, stores(nodes, 0), plan)
    stored = list(range(len(healthy["store"].ms)))
    healthy |= await run_one_kind(fleet, gets(nodes, stored), plan)

    victims = rng.sample(nodes[1:], round(plan.dead * plan.nodes))
    gone = set(victims)
    alive = [node for node in nodes if node not in gone]
    lasting = [key for key in stored if owners[key] not in gone]
    mixed = gets(alive, lasting) + stores(alive, plan.ops)
    rng.shuffle(mixed)
    await fleet.kill(victims)
    dead = await run_all(mixed, plan)
    await fleet.down()
    return {
        "name": fleet.name,
        "nodes": plan.nodes,
        "up_s": up_s,
        "healthy": {kind: asdict(samples) for kind, samples in healthy.items()},
        "dead": {kind: asdict(samples) for kind, samples in dead.items()},
    }
