"""One run of an engine's process: started through the launcher, its output kept, its end certain."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from signal import SIGKILL, Signals

from mesh.errors import EngineError
from worker.engine.base import Command
from worker.engine.logfile import EngineLog, LineSplitter, telling

LAUNCHER = Path(__file__).with_name("launch.py")
READ_BYTES = 64 << 10
LAUNCHER_SLACK_S = 3.0
"""What the launcher may need beyond the grace before the whole group is killed over its head."""
COULD_NOT_START = 127


def reserve_port() -> socket.socket:
    """A bound, never listening socket on a free port of the loopback, to be held while the engine uses that port.

    The kernel gives the port to nobody who asks for any, while a server that sets SO_REUSEADDR or SO_REUSEPORT, as all
    do, can still listen on it. So two workers on one machine never pick the same.
    """
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    return held


def describe_exit(code: int, tail: Iterable[str]) -> str:
    """Why an engine ended, in words: its status (128+N is signal N, as in a shell) and what it said last."""
    number = code - 128 if code >= 0 else -code
    what = f"exited with status {code}"
    if code == COULD_NOT_START:
        what = "could not be started"
    with suppress(ValueError):
        what = f"was ended by {Signals(number).name}"
    said = telling(tail)
    return f"the engine {what}" + (f": {said}" if said else "")


def is_halted(group: int, proc: Path = Path("/proc")) -> bool:
    """Whether a process of that group has been stopped, by a signal or a debugger: it computes nothing until it is let go on. False
    wherever the kernel does not tell."""
    with suppress(OSError):
        return any(_is_stopped_in(entry, group) for entry in os.scandir(proc) if entry.name.isdigit())
    return False


def _is_stopped_in(process: os.DirEntry[str], group: int) -> bool:
    try:
        state, _, its_group = Path(process.path, "stat").read_bytes().rpartition(b")")[2].split()[:3]
    except (OSError, ValueError):
        return False
    return state in (b"T", b"t") and int(its_group) == group


class ChildExited(EngineError):
    """The engine's process is gone; `status` as `describe_exit` reads it."""

    def __init__(self, status: int) -> None:
        super().__init__("the engine exited")
        self.status = status


class Child:
    """A running launcher with the engine below it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """The launcher's process id, which is the id of the engine's process group, too."""
        return self._process.pid

    async def until_exit(self) -> None:
        """Wait until the engine and all below it are gone, then raise ChildExited."""
        raise ChildExited(await self._process.wait())


@asynccontextmanager
async def running(command: Command, log: EngineLog, grace_s: float) -> AsyncIterator[Child]:
    """The command, running; on leaving it is ended (SIGTERM, SIGKILL after the grace) and all its output was kept.

    Raises EngineError when the launcher cannot be started; an engine that cannot shows in `until_exit`.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(LAUNCHER), "--grace-s", str(grace_s), "--", *command.argv),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | dict(command.env),
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise EngineError(f"the engine's launcher cannot be started: {error}") from error
    output = asyncio.ensure_future(_keep_output(process, log))
    try:
        yield Child(process)
    finally:
        ending = asyncio.ensure_future(_end(process, output, grace_s))
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            # Whoever cancels wants it gone, too, and gone it is only when the launcher has finished.
            await asyncio.wait({ending})
            raise


async def _keep_output(process: asyncio.subprocess.Process, log: EngineLog) -> None:
    assert process.stdout is not None
    lines = LineSplitter()
    while chunk := await process.stdout.read(READ_BYTES):
        log.write(lines.feed(chunk))
    log.write(lines.finish())


async def _end(process: asyncio.subprocess.Process, output: asyncio.Future[None], grace_s: float) -> None:
    """Close the launcher's stdin, which makes it end everything, and wait for it; kill the group if it does not."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(grace_s + LAUNCHER_SLACK_S):
            code = await process.wait()
    except TimeoutError:
        _kill_group(process.pid)
        code = await process.wait()
    if code < 0:
        _kill_group(process.pid)  # the launcher itself was killed and could not clean up
    # The pipe is at its end once every process that holds it is gone.
    await asyncio.wait({output}, timeout=LAUNCHER_SLACK_S)
    output.cancel()
    await asyncio.wait({output})


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, SIGKILL)
