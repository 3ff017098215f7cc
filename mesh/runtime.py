"""How every node process runs: uvloop, signals, a drain deadline, and a small file that says it is up.

The first SIGTERM or SIGINT sets ``stop``; the node then finishes what it is doing and returns. If it takes longer than its
drain deadline it is cancelled. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog
import uvloop

from mesh import log as logs
from mesh.config import NodeConfig
from mesh.errors import ConfigError, MeshError, UsageError
from mesh.identity import write_private
from mesh.preemption import until_noticed

log = structlog.get_logger(__name__)

Stop = asyncio.Event
Main = Callable[[Stop], Awaitable[int]]

SWITCH_S = 0.0005
"""A thread that computes may keep the event loop waiting for so long; Python's default is 5 ms, a quarter of a token's time."""
GC_YOUNG = 20_000
"""Container objects made and not freed before the collector looks at the young ones; Python's default is 700."""
TRIM_EVERY_S = 60.0
CLOSING_S = 5.0
"""On top of the drain deadline: for closing sockets and files once the work is done."""
NODE_FILE = "node.json"


def run(main: Main, config: NodeConfig) -> int:
    """Run one node until it ends or is told to. Returns its exit code: 0 done, 1 failed, 2 wrong settings."""
    logs.configure(level=config.log_level, json=config.log_format == "json")
    raise_file_limit()
    try:
        with sole_owner(config), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_supervise(main, config))
    except Exception as error:
        return _report(error)


def raise_file_limit() -> None:
    """As many open files as the system lets this process have: a node holds a connection for every peer and every client."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def file_limit() -> int:
    """How many files this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def settle_memory() -> None:
    """Keep the cycle collector off the request path.

    Reference counting frees what a request made; the collector is for the rare cycle. At Python's own thresholds it walks every
    module's objects several times a second under load, about a twelfth of a proxy's time (measured with `perf`, 2026-11-21).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_YOUNG, 20, 50)


def announce(config: NodeConfig, *, node_id: bytes, addresses: tuple[str, ...], **more: Any) -> None:
    """Write ``state_dir/node.json``: this node listens now. ``more`` is JSON-ready: a proxy's ``api``, for one."""
    about = {
        "role": str(config.role),
        "name": config.name,
        "id": node_id.hex(),
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "addresses": list(addresses),
        **more,
    }
    write_private(config.state_dir / NODE_FILE, json.dumps(about, indent=1).encode(), durable=False)


def read_announced(state_dir: Path) -> dict[str, Any] | None:
    """What the node of this folder wrote, if it is the one running now; else None."""
    try:
        about = json.loads((state_dir / NODE_FILE).read_bytes())
        alive = isinstance(about, dict) and process_start(about["pid"]) == about["started"] is not None
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return about if alive else None


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (field 22 of /proc/PID/stat), or None if there is no such process.

    A pid together with this names one process for as long as the machine is up.
    """
    try:
        stat = Path(f"/proc/{int(pid)}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in ("Z", "X") else int(fields[18])


def _report(error: BaseException) -> int:
    """Log what ended the node; returns the exit code. Of a group with one error in it, that error counts."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, MeshError):
        log.error("node.failed", code=error.code, reason=error.message)
        return 2 if isinstance(error, UsageError) else 1
    log.error("node.crashed", exc_info=(type(error), error, error.__traceback__))
    return 1


async def _supervise(main: Main, config: NodeConfig) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_unhandled)
    stop = Stop()
    settle_memory()
    sys.setswitchinterval(SWITCH_S)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, stop)
    work = asyncio.ensure_future(main(stop))
    stopping = asyncio.create_task(stop.wait())
    aside = (asyncio.create_task(_stop_when_preempted(config, stop)), asyncio.create_task(_trim()))
    deadline_s = config.drain_s + CLOSING_S
    try:
        await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            await asyncio.wait((work,), timeout=deadline_s)
        if work.done():
            return work.result()
        log.error("node.drain_deadline", after_s=deadline_s)
        return 1
    finally:
        for task in (stopping, *aside, work):
            task.cancel()
        await asyncio.wait((work,), timeout=CLOSING_S)


async def _trim() -> None:
    """Have the C library give back what was freed, now and then: by itself glibc keeps it for the thread that had it. Elsewhere nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while trim is not None:
        await asyncio.sleep(TRIM_EVERY_S)
        trim(0)


async def _stop_when_preempted(config: NodeConfig, stop: Stop) -> None:
    if config.preemption_command or config.preemption_file:
        told_by = await until_noticed(config.preemption_command, config.preemption_file)
        log.warning("node.preempted", told_by=told_by)
        stop.set()


def _on_signal(number: signal.Signals, stop: Stop) -> None:
    if stop.is_set():
        log.warning("node.killed", signal=number.name)
        os._exit(128 + number)
    log.info("node.stopping", signal=number.name)
    stop.set()


def _log_unhandled(_loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    error = context.get("exception")
    info = (type(error), error, error.__traceback__) if isinstance(error, BaseException) else None
    log.error("task.unhandled", what=context.get("message"), exc_info=info)


@contextlib.contextmanager
def sole_owner(config: NodeConfig) -> Iterator[None]:
    """Make the node's state folder (0700) and hold it: two nodes with one key would be one node in two minds."""
    try:
        config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (config.state_dir / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"--state-dir: {config.state_dir} cannot be used: {error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"--state-dir: another node runs in {config.state_dir}; give this one a --name or a --state-dir of its own"
            ) from None
        (config.state_dir / NODE_FILE).unlink(missing_ok=True)
        try:
            yield
        finally:
            (config.state_dir / NODE_FILE).unlink(missing_ok=True)
