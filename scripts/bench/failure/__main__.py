"""`scripts/bench/run failure`: how soon a sick worker gets its last new request, and a restart of everything under load."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from mesh.orders import Action  # noqa: E402
from tests.support import fake_engine  # noqa: E402
from tests.support.deployment import Deployment, Node  # noqa: E402
from tests.support.fake_engine import FakeEngine, Misbehaviour, Mode  # noqa: E402
from tests.support.load import Load  # noqa: E402
from tests.support.processes import command_line, descendants  # noqa: E402

WATCH_S = 0.02
AFTER_S = 12.0
"""How long is watched after the fault."""


@dataclass
class Bed:
    """A proxy and four workers. The victim's engine is a child of its worker, the others' are in this process."""

    mesh: Deployment
    proxy: Node
    victim: Node
    engine: FakeEngine
    key: str

    async def sent(self) -> int:
        """Requests the proxy has given the victim so far."""
        about = (await self.mesh.workers(self.proxy, self.key)).get(self.victim.id)
        return -1 if about is None or not about["linked"] else about["served"] + about["failed"] + about["in_flight"]


Fault = Callable[[Bed], Awaitable[None]]


async def kill(bed: Bed) -> None:
    bed.victim.process.kill()


async def blackhole(bed: Bed) -> None:
    bed.victim.process.send_signal(signal.SIGSTOP)


async def wedge(bed: Bed) -> None:
    bed.engine.misbehave(Misbehaviour(mode=Mode.HANG))


async def freeze(bed: Bed) -> None:
    os.kill(engine_of(bed.victim), signal.SIGSTOP)


async def slow(bed: Bed) -> None:
    bed.engine.tokens_per_s = 10


async def drain(bed: Bed) -> None:
    order = bed.mesh.authority.order(bytes.fromhex(bed.victim.id), Action.DRAIN, reason="bench", now=time.time())
    async with bed.mesh.http.post(f"{bed.proxy.root}/mesh/v1/orders", data=order.signed) as response:
        assert response.status == 200, await response.text()


async def stop(bed: Bed) -> None:
    bed.victim.process.terminate()


def engine_of(worker: Node) -> int:
    return next(pid for pid in descendants(worker.process.pid) if "fake_engine" in command_line(pid) and "launch" not in command_line(pid))


FAULTS: dict[str, tuple[Fault, str, float]] = {
    "kill": (kill, "kill -9 of the worker", 1.0),
    "blackhole": (blackhole, "the worker stopped (SIGSTOP): connected and silent", 3.0),
    "wedge": (wedge, "the engine answers /health and computes nothing", 5.0),
    "freeze": (freeze, "the engine stopped (SIGSTOP)", 5.0),
    "drain": (drain, "mesh drain", 0.25),
    "stop": (stop, "SIGTERM of the worker", 0.25),
    "slow": (slow, "the engine twenty times slower", 0.0),
}


async def measure(name: str, *, per_s: float) -> dict[str, Any]:
    """One fault in a fresh mesh."""
    fault = FAULTS[name][0]
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as home:
        async with AsyncExitStack() as stack:
            mesh = await stack.enter_async_context(Deployment(Path(home)))
            await mesh.bootstrap()
            proxy = await mesh.proxy()
            engines = [await stack.enter_async_context(FakeEngine(tokens_per_s=200)) for _ in range(4)]
            outside = [("--engine", "external", "--engine-url", engine.url) for engine in engines]
            vllm = (
                "--engine",
                "vllm",
                "--vllm-command",
                f"{sys.executable} {fake_engine.__file__}",
                "--model",
                "x/fake",
                "--served-name",
                "fake",
            )
            first = (*vllm, "--", "--tokens-per-s", "200") if name == "freeze" else outside[0]
            workers = [await mesh.worker(f"w{n}", *(first if n == 0 else outside[n])) for n in range(4)]
            await mesh.until_ready(proxy, *workers)
            bed = Bed(mesh, proxy, workers[0], engines[0], mesh.key())
            max_tokens = 40 if name == "slow" else 4
            async with Load(mesh, [proxy], per_s=per_s, max_tokens=max_tokens) as load:
                await load.until(round(3 * per_s))
                began, loop_began = time.monotonic(), asyncio.get_running_loop().time()
                await fault(bed)
                seen, last_s = await bed.sent(), 0.0
                while (now_s := time.monotonic() - began) < AFTER_S:
                    count = await bed.sent()
                    if count > seen:
                        seen, last_s = count, now_s
                    await asyncio.sleep(WATCH_S)
                if name == "blackhole":
                    bed.victim.process.send_signal(signal.SIGCONT)
                await load.stop()
            before = [outcome.took_s for outcome in load.outcomes if outcome.began < loop_began]
            after = [outcome.took_s for outcome in load.outcomes if outcome.began >= loop_began - 1]
            usual = sorted(before)[len(before) // 2]
            return {
                "last_request_s": last_s,
                "requests": len(load.outcomes),
                "problems": dict(load.problems),
                "worst_extra_s": max(after) - usual,
            }


async def rolling(requests: int, *, per_s: float, rounds: int) -> dict[str, Any]:
    """Restart every worker and every proxy, one after the other, again and again, until ``requests`` are over."""
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as home:
        async with AsyncExitStack() as stack:
            mesh = await stack.enter_async_context(Deployment(Path(home)))
            await mesh.bootstrap()
            ports = [("--port", str(port)) for port in mesh.free_ports(2)]
            proxies = [await mesh.proxy(f"p{n}", *port) for n, port in enumerate(ports)]
            engines = [await stack.enter_async_context(FakeEngine(tokens_per_s=100)) for _ in range(3)]
            outside = [("--engine", "external", "--engine-url", engine.url) for engine in engines]
            workers = [await mesh.worker(f"w{n}", *arguments) for n, arguments in enumerate(outside)]
            for proxy in proxies:
                await mesh.until_ready(proxy, *workers)
            restarts, codes = 0, []
            async with Load(mesh, list(proxies), per_s=per_s) as load:
                while restarts < rounds * 5 or len(load.outcomes) < requests:
                    number = restarts % 5
                    if number < 3:
                        codes.append(await workers[number].terminate())
                        workers[number] = await mesh.worker(f"w{number}", *outside[number], fresh=False)
                    else:
                        codes.append(await proxies[number - 3].terminate())
                        again = await mesh.proxy(f"p{number - 3}", *ports[number - 3], fresh=False)
                        load.proxies[number - 3] = proxies[number - 3] = again
                    for proxy in proxies:
                        await mesh.until_ready(proxy, *workers)
                    restarts += 1
                await load.stop()
            figures = {"requests": len(load.outcomes), "restarts": restarts, "problems": dict(load.problems)}
            return figures | {"exit_codes": sorted(set(codes)), "worst_s": max(outcome.took_s for outcome in load.outcomes)}


@click.command()
@click.option("--fault", "faults", multiple=True, type=click.Choice(list(FAULTS)), help="Only this one; repeat for more. [all]")
@click.option("--per-s", default=50.0, show_default=True, help="Requests a second.")
@click.option("--rolling", "requests", default=0, metavar="N", help="Restart everything under load instead, until N requests are over.")
@click.option("--rounds", default=1, show_default=True, help="With --rolling: how often everything is restarted at least.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures there.")
def main(faults: tuple[str, ...], per_s: float, requests: int, rounds: int, path: Path | None) -> None:
    """Hurt a mesh of real processes under load, on loopback, with stand-in engines."""
    figures: dict[str, Any] = {}
    if requests:
        figures["rolling"] = uvloop.run(rolling(requests, per_s=per_s, rounds=rounds))
        Console().print_json(data=figures)
    else:
        table = Table("fault", "last new request after", "target", "requests", "failed", "worst extra delay")
        for name in faults or FAULTS:
            figures[name] = found = uvloop.run(measure(name, per_s=per_s))
            target = FAULTS[name][2]
            table.add_row(
                FAULTS[name][1],
                f"{found['last_request_s']:.2f} s",
                f"≤ {target:g} s" if target else "",
                str(found["requests"]),
                str(sum(found["problems"].values())),
                f"{found['worst_extra_s']:.2f} s",
            )
        Console().print(table)
        for name, found in figures.items():
            for problem, count in found["problems"].items():
                print(f"{name}: {count} × {problem[:200]}")
    if path is not None:
        path.write_text(json.dumps(figures, indent=1))


main()
