"""``--processes N``: N proxies on one port, for machines with many cores.

The kernel spreads connections over the processes (SO_REUSEPORT). Each is a node of its own, with its own identity, links and state folder
``STATE/N``; they share nothing but the port. Ports for peers that are given are those of the first process; the others take the ones
that follow. One that dies is started again.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time

import structlog

from mesh.errors import ConfigError
from mesh.runtime import announce, read_announced
from proxy.config import ProxyConfig

log = structlog.get_logger(__name__)

STABLE_S = 10.0
"""A process that ran for this long is started again at once; one that dies sooner, after a growing pause."""
FAILURES = 5


async def run_processes(config: ProxyConfig, stop: asyncio.Event) -> int:
    """Keep ``config.processes`` proxies running until ``stop``; returns 0 if all ended well."""
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET, socket.SOCK_STREAM) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            held.bind((config.host, config.port))  # bound, not listening: keeps the number, takes no connection
        except OSError as error:
            raise ConfigError(f"cannot use {config.host}:{config.port}: {error.strerror or error}", param="port") from None
        port = held.getsockname()[1]
        async with asyncio.TaskGroup() as tasks:
            children = [tasks.create_task(_keep(config, number, port, stop)) for number in range(config.processes)]
            tasks.create_task(_announce(config, children, stop))
        return max(child.result() for child in children)


async def _keep(config: ProxyConfig, number: int, port: int, stop: asyncio.Event) -> int:
    """One process, again and again; its last exit code once stopped, or after `FAILURES` quick deaths in a row."""
    deaths = 0
    while True:
        started = time.monotonic()
        process = await asyncio.create_subprocess_exec(*_command(config, number, port), env=_environment(config))
        code = await _until_exit(process, stop)
        if stop.is_set():
            return code
        deaths = 1 if time.monotonic() - started > STABLE_S else deaths + 1
        log.error("proxy.process_died", number=number, exit_code=code)
        if deaths > FAILURES:
            log.error("proxy.process_given_up", number=number)
            return code or 1
        try:
            async with asyncio.timeout(0.5 * 2**deaths):
                await stop.wait()
            return code
        except TimeoutError:
            continue


async def _until_exit(process: asyncio.subprocess.Process, stop: asyncio.Event) -> int:
    """Wait for the process; tell it to stop when this one is."""
    exited = asyncio.ensure_future(process.wait())
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((exited, stopping), return_when=asyncio.FIRST_COMPLETED)
        if process.returncode is None:
            process.terminate()
        return await exited
    finally:
        stopping.cancel()
        if process.returncode is None:
            process.kill()


async def _announce(config: ProxyConfig, children: list[asyncio.Task[int]], stop: asyncio.Event) -> None:
    """Once every process listens, say so for all of them."""
    while not stop.is_set() and not all(child.done() for child in children):
        found = [read_announced(config.state_dir / str(number)) for number in range(config.processes)]
        listening = [about for about in found if about is not None]
        if len(listening) == config.processes:
            first = listening[0]
            announce(
                config,
                node_id=bytes.fromhex(first["id"]),
                addresses=tuple(first["addresses"]),
                api=first["api"],
                processes=[{"id": about["id"], "pid": about["pid"]} for about in listening],
            )
            return
        await asyncio.sleep(0.1)


def _environment(config: ProxyConfig) -> dict[str, str]:
    """This process's own, with the join token that it took out when it had read it (`mesh.options`)."""
    return os.environ | ({"MESH_JOIN": config.join} if config.join else {})


def _command(config: ProxyConfig, number: int, port: int) -> list[str]:
    """This process's own command line, with what must differ put behind it: the last of two equal options wins."""
    own = ["--processes", "1", "--reuse-port", "--port", str(port)]
    for option, first in (("--link-port", config.link_port), ("--dht-port", config.dht_port)):
        own += [option, str(first + number if first else 0)]  # each a port of its own: peers mean one node
    own += ["--name", f"{config.name or 'proxy'}-{number}", "--state-dir", str(config.state_dir / str(number))]
    return [sys.executable, "-m", "proxy", *sys.argv[1:], *own]
