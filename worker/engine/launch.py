"""Stands between the worker and its engine, so that no engine outlives its worker.

A worker can be killed in ways it cannot react to. Its engine would then go on holding the GPU, and vLLM's own children
with it. This launcher is the worker's direct child, holds the reading end of a pipe that only the worker can write to,
and ends everything below it when the pipe closes, which the kernel does however the worker died.

    python -I -S launch.py [--grace-s S] -- ENGINE ARG…

The launcher leads a session and process group that the engine shares. On Linux it also adopts descendants that left the
group. Should the launcher itself be killed, even together with the worker (`pkill -9 -f` of a common path), a shell of
its own, which waits at another pipe for nothing else, kills the group.
Everything below gets SIGTERM when stdin closes, on SIGTERM, and when the engine exits; what is left after the grace
gets SIGKILL. Exit status: the engine's own, 128+N when signal N ended it, 127 when it could not be started.

Run by path and with the standard library only: it starts in a hundredth of a second and works in any environment.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
COULD_NOT_START = 127
ORPHANS_GRACE_S = 2.0
"""What an engine that is gone has left behind holds its memory and keeps its successor waiting."""
LINUX = sys.platform == "linux"


def main(argv: list[str]) -> int:
    grace_s, command = _parse(argv)
    if os.getpgrp() != os.getpid():
        os.setsid()  # or ending the group would end whoever started us
    wakeups, wake = os.pipe()
    os.set_blocking(wakeups, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)  # a handler, not SIG_IGN: the engine must not inherit deafness
    if LINUX:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
    guard = _post_guard()
    try:
        engine = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_launcher if LINUX else None)
    except OSError as error:
        print(f"cannot start {command[0]}: {error}", file=sys.stderr, flush=True)
        _dismiss(guard)
        return COULD_NOT_START
    status = _watch(engine.pid, wakeups)
    status = _end_all(engine.pid, guard.pid, wakeups, grace_s, status)
    engine.returncode = 0  # reaped here; Popen must not wait for it again
    _dismiss(guard)
    return _exit_code(status)


def _parse(argv: list[str]) -> tuple[float, list[str]]:
    grace_s = 10.0
    if argv[:1] == ["--grace-s"]:
        grace_s, argv = float(argv[1]), argv[2:]
    if argv[:1] != ["--"] or len(argv) < 2:
        raise SystemExit("usage: launch.py [--grace-s S] -- COMMAND ARG…")
    return grace_s, argv[1:]


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _die_with_launcher() -> None:
    """In the engine, before it is one: the kernel kills it should the launcher itself be killed."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _post_guard() -> subprocess.Popen[bytes]:
    """A shell outside of the group that kills the group when its stdin ends without a word."""
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _ || kill -KILL "-$0"', str(os.getpgrp())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _dismiss(guard: subprocess.Popen[bytes]) -> None:
    assert guard.stdin is not None
    with suppress(OSError):
        os.write(guard.stdin.fileno(), b"\n")
    with suppress(ChildProcessError):
        os.waitpid(guard.pid, 0)
    guard.returncode = 0  # reaped here, as the engine


def _watch(engine: int, wakeups: int) -> int | None:
    """Wait until the engine ends (its wait status) or is to be ended (None)."""
    while True:
        if (status := _reap(engine)) is not None:
            return status
        readable, _, _ = select.select([0, wakeups], [], [])
        if wakeups in readable and signal.SIGTERM in os.read(wakeups, 4096):
            return None
        if 0 in readable and not os.read(0, 4096):
            return None


def _end_all(engine: int, guard: int, wakeups: int, grace_s: float, status: int | None) -> int | None:
    """SIGTERM to the group, SIGKILL to what is left after the grace; returns the engine's wait status, told or found."""
    deadline, is_alone = time.monotonic() + grace_s, False
    with suppress(ProcessLookupError):
        os.killpg(0, signal.SIGTERM)
    while True:
        found = _reap(engine)
        status = status if found is None else found
        left = [pid for pid in _descendants() if pid != guard] if LINUX else [engine] * (status is None)
        if not left:
            return status
        if status is not None and not is_alone:
            is_alone, deadline = True, min(deadline, time.monotonic() + ORPHANS_GRACE_S)
        if time.monotonic() >= deadline:
            for pid in left:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        # A child that ignores SIGTERM is looked at again ten times a second; one that dies wakes us by SIGCHLD.
        select.select([wakeups], [], [], 0.1)
        with suppress(BlockingIOError):
            os.read(wakeups, 4096)


def _reap(engine: int) -> int | None:
    """Collect every ended child, adopted ones too; the engine's wait status when it is among them."""
    found = None
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if ended[0] == engine:
                found = ended[1]
    return found


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                # pid (name) state ppid …; the name may hold blanks and parentheses.
                parent = int((entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _exit_code(status: int | None) -> int:
    if status is None:
        return 128 + signal.SIGKILL
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
