"""A process that has everything imported and forks nodes: they are up in a tenth of the time, and real processes all the same.

For tests that kill and start nodes by the hundred. Give it to `Deployment`:

    async with Nursery() as nursery, Deployment(home, nursery=nursery) as mesh: …

The nursery has one thread and no event loop, so nothing is half done when it forks. When its owner goes away, it kills what it forked.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from mesh.trust import Role

NODES = ("bootstrap.node", "proxy.node", "worker.node")
COMMANDS = {role: f"{role}.cli" for role in Role}


class Child:
    """A node that was forked; of `asyncio.subprocess.Process` what tests use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._gone = asyncio.Event()

    def ended(self, code: int) -> None:
        self.returncode = code
        self._gone.set()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    async def wait(self) -> int:
        await self._gone.wait()
        assert self.returncode is not None
        return self.returncode


class Nursery:
    def __init__(self) -> None:
        self._children: dict[int, Child] = {}
        self._asked: list[asyncio.Future[Child]] = []

    async def __aenter__(self) -> Nursery:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __name__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._reading

    async def start(self, role: Role, arguments: list[str], environ: dict[str, str], log: Path) -> Child:
        """Fork a node; ``arguments`` as for its command."""
        assert self._process.stdin is not None
        asked: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        order = {"role": role, "arguments": arguments, "environ": environ, "log": str(log)}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        return await asked

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            told = json.loads(line)
            if "code" in told:
                self._children.pop(told["pid"]).ended(told["code"])
            else:
                child = self._children[told["pid"]] = Child(told["pid"])
                self._asked.pop(0).set_result(child)
        for asked in self._asked:
            asked.set_exception(RuntimeError("the nursery is gone"))


# -- in the process that forks


def main() -> None:
    modules = {role: importlib.import_module(name) for role, name in COMMANDS.items()}
    for name in NODES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is shared with the children stays shared
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    orders = sys.stdin.buffer.raw  # type: ignore[attr-defined]
    children: set[int] = set()
    rest = b""
    while True:
        ready, _, _ = select.select([orders, woken], [], [])
        if woken in ready:
            os.read(woken, 1 << 12)
            _bury(children)
        if orders in ready:
            piece = orders.read(1 << 16)
            if not piece:
                break
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                order = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    _become(modules[Role(order["role"])].main, order)
                children.add(pid)
                _tell(pid=pid)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    while children:
        children.discard(os.wait()[0])


def _bury(children: set[int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        children.discard(pid)
        _tell(pid=pid, code=os.waitstatus_to_exitcode(status))


def _tell(**fields: Any) -> None:
    os.write(sys.stdout.fileno(), json.dumps(fields).encode() + b"\n")


def _become(command: Any, order: dict[str, Any]) -> None:
    """What `Deployment` does by exec: a session, an environment and output of its own."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        output = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, source in enumerate((nothing, output, output)):
            os.dup2(source, number)
        os.closerange(3, 64)
        os.environ.clear()
        os.environ.update(order["environ"])
        command(order["arguments"], prog_name=f"mesh-{order['role']}")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
