"""Notices that this machine is about to be taken away: rented GPUs often say so a minute or two before."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

FILE_EVERY_S = 0.5
COMMAND_EVERY_S = 2.0
COMMAND_PATIENCE_S = 10.0


async def until_noticed(command: str, file: Path | None) -> str:
    """Return what told it: ``file`` has come to exist, or ``command`` has ended with exit code 0. At least one must be given."""
    jobs = [asyncio.ensure_future(job) for job in ([_until_exists(file)] if file else []) + ([_until_succeeds(command)] if command else [])]
    try:
        done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)


async def _until_exists(file: Path) -> str:
    while True:
        if await asyncio.to_thread(file.exists):
            return str(file)
        await asyncio.sleep(FILE_EVERY_S)


async def _until_succeeds(command: str) -> str:
    argv = shlex.split(command)
    while True:
        if await _succeeds(argv):
            return argv[0]
        await asyncio.sleep(COMMAND_EVERY_S)


async def _succeeds(argv: list[str]) -> bool:
    null = asyncio.subprocess.DEVNULL
    try:
        process = await asyncio.create_subprocess_exec(*argv, stdin=null, stdout=null, stderr=null)
    except OSError as error:
        log.warning("preemption.command_failed", program=argv[0], error=str(error))
        return False
    try:
        async with asyncio.timeout(COMMAND_PATIENCE_S):
            return await process.wait() == 0
    except TimeoutError:
        return False
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
