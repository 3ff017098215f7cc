"""`scripts/bench/run metering`: what metering costs, and that kill -9 at any point loses and doubles nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from mesh.apikey import ApiKey  # noqa: E402
from mesh.ledger import START, Ledger, Query  # noqa: E402
from mesh.receipts import Receipt, check_chain, parse_batch, parse_receipt, verify_proof  # noqa: E402
from mesh.trust import Role  # noqa: E402
from proxy.metering import Meter  # noqa: E402
from tests.support.authority import TestMesh, make_mesh  # noqa: E402
from tests.support.crashes import PROBLEMS, CountingEngine, Findings, Ordeal  # noqa: E402
from tests.support.deployment import Deployment  # noqa: E402
from tests.support.ledgers import make_receipt, open_ledger  # noqa: E402
from tests.support.nursery import Nursery  # noqa: E402

ROUNDS = 7
REQUESTS = 20_000
RECEIPTS = 5_000
FLUSH = 12


# -- cost


class Kept:
    """In a ledger's place: keeps what is added."""

    full = False

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def add(self, entry: Any) -> None:
        self.entries.append(entry)


class Client:
    """In `proxy.downstream.Downstream`'s place."""

    bytes_sent = 0
    pieces = 0


def cost() -> dict[str, float]:
    """Microseconds of CPU: on the event loop for a request, for a piece of an answer, and in the ledger's thread for a receipt."""
    kept, downstream = Kept(), Client()
    meter = Meter(kept)  # type: ignore[arg-type]
    key = ApiKey(id=b"12345678", project="search", roles=frozenset({"invoker"}), not_before=0, expires=1)
    trailer = {"in": 100, "out": 20, "cached": 40, "queue_ms": 1, "engine_ms": 3}

    def request() -> None:
        noted = meter.open("req_0123456789abcdef01234567", "chat", 1.0)
        noted.key = key
        meter.check()
        noted.model = "m"
        attempt = noted.begin(b"w" * 32, downstream)  # type: ignore[arg-type]
        attempt.trailer, attempt.status = trailer, "ok"
        downstream.bytes_sent, downstream.pieces = 4000, 20
        attempt.end(2.0)
        downstream.bytes_sent = downstream.pieces = 0
        meter.close(noted, "ok", 3.0)

    def piece() -> None:
        downstream.pieces += 1

    def nothing() -> None:
        downstream.bytes_sent = 0

    gc.disable()
    figures = {"request_us": timed(request, REQUESTS), "piece_us": max(0.0, timed(piece, REQUESTS * 10) - timed(nothing, REQUESTS * 10))}
    gc.enable()
    figures["row_us"] = timed(kept.entries[-1].row, REQUESTS)
    mesh = make_mesh(now=time.time() - 60)
    with tempfile.TemporaryDirectory() as folder:
        ledger = open_ledger(Path(folder), mesh.identity(Role.PROXY, now=time.time()))
        receipts = [make_receipt(number).row() for number in range(RECEIPTS)]
        for batch in (10, 100, 1000):
            began = time.thread_time()
            for at in range(0, RECEIPTS, batch):
                ledger._store.write(receipts[at : at + batch], False)
            figures[f"write_{batch}_us"] = (time.thread_time() - began) / RECEIPTS * 1e6
            ledger._store._db.execute("DELETE FROM packs")
    return figures


def timed(step: Any, count: int) -> float:
    """The best of some rounds, in microseconds of CPU a step."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(count):
            step()
        best = min(best, (time.process_time() - began) / count)
    return best * 1e6


# -- kill -9 of a writer


def crash_points(points: int, rng: random.Random) -> dict[str, int]:
    """A process writes to one ledger, says what has become durable, and is killed; again and again, with the same file.

    After each death the next life begins with what it finds, as a node does. In the end every receipt that was acknowledged must be
    there once, in a batch that holds, in a chain without a gap.
    """
    mesh = make_mesh(now=time.time() - 60)
    identity = mesh.identity(Role.WORKER, now=time.time())
    acknowledged: set[str] = set()
    added = 0
    with tempfile.TemporaryDirectory() as folder:
        for point in range(points):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reading)
                try:
                    asyncio.run(write_on(Path(folder), identity, writing, added))
                finally:
                    os._exit(0)
            os.close(writing)
            time.sleep(rng.uniform(0.0, 0.12))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            told = b""
            while piece := os.read(reading, 1 << 16):
                told += piece
            os.close(reading)
            whole = told[: told.rfind(b"\n") + 1].split()
            acknowledged |= {f"req_{int(number):024x}" for number in whole}
            added += 100_000
            if point % 100 == 99:
                print(f"{point + 1} crash points, {len(acknowledged)} receipts acknowledged", file=sys.stderr)
        return audit(mesh, open_ledger(Path(folder), identity), acknowledged) | {"points": points}


async def write_on(folder: Path, identity: Any, writing: int, first: int) -> None:
    """Add receipts without end; write a number to the pipe once its receipt is durable."""
    from mesh import ledger as module

    module.COMMIT_EVERY_S = 0.001
    module.SIGN_EVERY_S = 0.02
    ledger = open_ledger(folder, identity)
    ledger.start()
    number = first
    while True:
        batch = range(number, number + FLUSH)
        for each in batch:
            ledger.add(make_receipt(each))
        number = batch.stop
        await ledger.settled()
        os.write(writing, "".join(f"{each}\n" for each in batch).encode())


def audit(mesh: TestMesh, ledger: Ledger, acknowledged: set[str]) -> dict[str, int]:
    store, now = ledger._store, time.time()
    store.write([], True)
    found: list[Receipt] = []
    after = START
    while True:
        page = store.page(Query(after=after))
        found += [parse_receipt(body) for body in page.receipts]
        if not page.more:
            break
        after = found[-1].order
    ids = [receipt.id for receipt in found]
    batches = [parse_batch(row[0], mesh.trust(), now=now) for row in store._db.execute("SELECT signed FROM batches ORDER BY number")]
    check_chain(batches)
    proven = 0
    for receipt in random.Random(1).sample(found, min(500, len(found))):
        for proof in store.prove(receipt.id, receipt.at):
            proven += verify_proof(proof, mesh.trust(), now=now)[0] == receipt
    return {
        "acknowledged": len(acknowledged),
        "kept": len(ids),
        "lost": len(acknowledged - set(ids)),
        "twice": len(ids) - len(set(ids)),
        "batches": len(batches),
        "in_batches": sum(batch.count for batch in batches),
        "proven_of_500": proven,
    }


async def mesh_kills(kills: int, meshes: int, rng: random.Random) -> dict[str, Any]:
    """kill -9 of real proxies and workers under load, in several small meshes at once: each has one node down at a time."""
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # engines whose worker has just been killed
    began = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(Nursery())
        ordeals = []
        for number in range(meshes):
            engines = {f"w{each}": await stack.enter_async_context(CountingEngine(tokens_per_s=40)) for each in range(2)}
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mesh-bench-")))
            mesh = await stack.enter_async_context(Deployment(home, nursery=nursery))
            ordeals.append(Ordeal(mesh, engines, rng=random.Random(rng.randrange(2**32)), clients=6))
            await ordeals[-1].start()
            print(f"mesh {number + 1} is up after {time.monotonic() - began:.0f} s", file=sys.stderr)
        share = [kills // meshes + (number < kills % meshes) for number in range(meshes)]
        telling = asyncio.create_task(tell(ordeals, began))
        all_findings = Findings()
        for findings in await asyncio.gather(*(ordeal.run(count) for ordeal, count in zip(ordeals, share, strict=True))):
            all_findings.add(findings)
        telling.cancel()
    for name, problems in all_findings.problems.items():
        for problem in problems[:5]:
            print(f"{name}: {problem}", file=sys.stderr)
    return {"meshes": meshes, **all_findings.describe(), "took_s": round(time.monotonic() - began)}


async def tell(ordeals: list[Ordeal], began: float) -> None:
    while True:
        await asyncio.sleep(15)
        done = sum(ordeal.findings.kills.total() for ordeal in ordeals)
        print(f"{done} kills after {time.monotonic() - began:.0f} s", file=sys.stderr)


@click.command()
@click.option("--points", default=1000, show_default=True, help="Times that a ledger's writer is killed.")
@click.option("--kills", default=20, show_default=True, help="Times that a node of a real mesh is killed under load.")
@click.option("--meshes", default=4, show_default=True, help="Real meshes, two proxies and two workers each, that are killed in at once.")
@click.option("--seed", type=int, help="For the moments of death. [random]")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures there.")
def main(points: int, kills: int, meshes: int, seed: int | None, path: Path | None) -> None:
    """What metering costs a request, and what kill -9 does to the books."""
    seed = seed if seed is not None else random.randrange(2**32)
    figures: dict[str, Any] = {"seed": seed, "cost": cost()}
    if points:
        figures["writer"] = crash_points(points, random.Random(seed))
    if kills:
        figures["mesh"] = asyncio.run(mesh_kills(kills, meshes, random.Random(seed)))
    for name, found in figures.items():
        if isinstance(found, dict):
            table = Table("figure", "value", title=name, title_justify="left")
            for figure, value in found.items():
                table.add_row(figure, f"{value:.3f}" if isinstance(value, float) else str(value))
            Console().print(table)
    print(f"seed {seed}")
    if path is not None:
        path.write_text(json.dumps(figures, indent=1))
    bad = sum(figures.get("writer", {}).get(name, 0) for name in ("lost", "twice"))
    bad += sum(figures.get("mesh", {}).get(name, 0) for name in PROBLEMS)
    sys.exit(1 if bad else 0)


main()
