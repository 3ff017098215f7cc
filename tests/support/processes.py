"""Looking at processes from outside: who is in a process group, and when one is gone. Linux only."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path


async def gone(pid: int, deadline_s: float = 30.0) -> None:
    """Return when the process is gone; the kernel tells. Raises TimeoutError."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(handle, ended.set)
    try:
        async with asyncio.timeout(deadline_s):
            await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


def processes_of(group: int) -> dict[int, str]:
    """The living processes of a process group: pid and command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # pid (name) state ppid pgrp …; the name may hold blanks and parentheses
            state, _, process_group = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[:3]
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        except (OSError, ValueError):
            continue  # it ended while we looked
        if int(process_group) == group and state != "Z":
            found[int(entry.name)] = command
    return found
