"""What this machine computes on, for the record's capability block."""

from __future__ import annotations

import asyncio
import contextlib
import shutil

from mesh.records import Capability

QUERY_DEADLINE_S = 10.0


async def detect(*, region: str, engine: str, max_concurrency: int) -> Capability:
    """Ask ``nvidia-smi`` what GPUs there are; a machine without it computes on its CPU."""
    gpus = _parse_gpus(await _query_gpus())
    return Capability(
        gpu=gpus[0][0] if gpus else "",
        gpu_count=len(gpus),
        memory_bytes=sum(memory for _, memory in gpus),
        region=region,
        engine=engine,
        max_concurrency=max_concurrency,
    )


async def _query_gpus() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(QUERY_DEADLINE_S):
            process = await asyncio.create_subprocess_exec(
                program,
                "--query-gpu=name,memory.total",
                "--format=csv,noheader,nounits",
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
            try:
                output, _ = await process.communicate()
            finally:
                if process.returncode is None:  # a driver in trouble: not waited for
                    process.kill()
            return output.decode(errors="replace") if process.returncode == 0 else ""
    return ""


def _parse_gpus(output: str) -> list[tuple[str, int]]:
    """``name, MiB`` lines to (name, bytes); a memory of ``[N/A]`` (unified memory) counts as 0."""
    found = []
    for line in output.splitlines()[:64]:
        name, _, memory = line.rpartition(",")
        if name.strip().isprintable() and name.strip():
            memory = memory.strip()
            found.append((name.strip()[:64], int(memory) << 20 if memory.isdecimal() and len(memory) < 10 else 0))
    return found
