"""What the kernel says of processes and cores: CPU time, memory, affinity. Linux only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
FAVOURED_NICE = -15
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """A loopback TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def tree(root: int) -> list[int]:
    """The process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue.extend(children.get(pid, ()))
    return found


def cpu_s(pids: Iterable[int]) -> float:
    """User and system CPU seconds that these processes have used so far (not their children's), by the scheduler's own count: the
    ticks of /proc, ten milliseconds each, are 3% of what a proxy uses for a window's tokens.
    """
    total = 0.0
    for pid in pids:
        with suppress(OSError):
            total += time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3)
    return total


def rss_bytes(pids: Iterable[int]) -> int:
    """Resident memory, shared pages counted in each process."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    return total


def pin(pid: int, cores: Iterable[int]) -> None:
    """Hold every thread of the process to these cores."""
    wanted = set(cores)
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                os.sched_setaffinity(int(thread), wanted)


def core_busy_s() -> dict[int, float]:
    """Seconds that each core has not been idle since boot."""
    busy = {}
    for line in Path("/proc/stat").read_text().splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and name != "cpu":
            ticks = [int(value) for value in values[:8]]
            busy[int(name[3:])] = (sum(ticks) - ticks[3] - ticks[4]) / TICKS_PER_S
    return busy


def favour(pid: int) -> None:
    """Put the process's session ahead of others on a busy machine. Needs root; without it, nothing changes.

    Linux shares the cores among sessions first (sched_autogroup), so that a process's own nice value says nothing to the others."""
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(FAVOURED_NICE))


CPU_GROUPS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
"""Where control groups that limit CPU time may be made: version 1, version 2."""
QUOTA_PERIOD_US = 10_000


@contextmanager
def core_share(pids: Iterable[int], share: float) -> Iterator[None]:
    """Give each process ``share`` of a core at most, all its threads together. Raises OSError where that cannot be had (it needs root)."""
    base = next((folder for folder in CPU_GROUPS if (folder / "cgroup.procs").exists()), CPU_GROUPS[-1])
    groups: list[Path] = []
    quota_us = round(share * QUOTA_PERIOD_US)
    try:
        for pid in pids:
            group = base / f"infermesh-bench-{pid}"
            group.mkdir()
            groups.append(group)
            if (group / "cpu.max").exists():
                (group / "cpu.max").write_text(f"{quota_us} {QUOTA_PERIOD_US}")
            else:
                (group / "cpu.cfs_period_us").write_text(str(QUOTA_PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(quota_us))
            (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for group in groups:
            for pid in (group / "cgroup.procs").read_text().split():
                with suppress(OSError):
                    (base / "cgroup.procs").write_text(pid)
            with suppress(OSError):
                group.rmdir()


def start(
    argv: list[str], cores: Iterable[int], log: Path, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a process held to these cores, its output in a file, in a process group of its own."""
    wanted = set(cores)
    with log.open("ab") as out:
        return subprocess.Popen(
            argv,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=lambda: os.sched_setaffinity(0, wanted),
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )


def stop(process: subprocess.Popen[bytes], patience_s: float = 5) -> None:
    """End a process and all that it started."""
    pids = tree(process.pid)
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        process.poll()
        if not any(_alive(pid) for pid in pids):
            break
        time.sleep(0.05)
    for pid in pids:
        if _alive(pid):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def _alive(pid: int) -> bool:
    fields = _stat(pid)
    return bool(fields) and fields[0] != "Z"
