"""Blocking work on large files, done in threads: hashing, with progress and a way to stop."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

from mesh.errors import ModelSourceError

T = TypeVar("T")

Progress = Callable[[int, int | None], None]
"""Called with (bytes done, bytes in all or None when unknown), a few times a second, in the caller's own thread."""

POLL_S = 0.2
CHUNK_BYTES = 4 << 20


@dataclass
class Meter:
    """How far a thread is, and the flag that tells it to stop. Written by one side each."""

    total_bytes: int | None = None
    done_bytes: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def advance(self, count_bytes: int) -> None:
        if self.stop.is_set():
            raise ModelSourceError("stopped while preparing the model")
        self.done_bytes += count_bytes


def ignore(done_bytes: int, total_bytes: int | None) -> None:
    """The progress of work too short to be told."""


async def in_thread(work: Callable[[Meter], T], report: Progress = ignore, total_bytes: int | None = None) -> T:
    """Run blocking `work` in a thread, reporting its meter; cancelling the caller stops the thread."""
    meter = Meter(total_bytes)
    running = asyncio.ensure_future(asyncio.to_thread(work, meter))
    try:
        while not (await asyncio.wait({running}, timeout=POLL_S))[0]:
            report(meter.done_bytes, meter.total_bytes)
        if meter.done_bytes:
            report(meter.done_bytes, meter.total_bytes)
        return running.result()
    except asyncio.CancelledError:
        meter.stop.set()
        await asyncio.wait({running})
        running.exception()
        raise


def cached_digest(root: Path, files: list[Path], cache_dir: Path, meter: Meter) -> str:
    """The digest of `files`, remembered under their paths, sizes and mtimes."""
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    note = cache_dir / "digests" / f"{key}.txt"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = note.read_text("ascii")
        if re.fullmatch(r"sha256:[0-9a-f]{64}", known):
            return known
    digest = _digest(root, files, meter)
    with contextlib.suppress(OSError):  # a read-only cache costs time, nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, digest.encode())
    return digest


def _digest(root: Path, files: list[Path], meter: Meter) -> str:
    if files == [root]:
        return "sha256:" + hash_file(root, meter)
    return folder_digest((file.relative_to(root).as_posix(), file.stat().st_size, hash_file(file, meter)) for file in files)


def folder_digest(files: Iterable[tuple[str, int, str]]) -> str:
    """`sha256:HEX` over a folder's files, given as (path within, size, sha256 in hex): over the lines
    `path NUL size NUL sha256 LF`, sorted by path."""
    whole = hashlib.sha256()
    for name, size_bytes, sha256 in sorted(files):
        whole.update(f"{name}\0{size_bytes}\0{sha256}\n".encode("utf-8", "surrogateescape"))
    return "sha256:" + whole.hexdigest()


def hash_file(path: Path, meter: Meter) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in chunks(file):
            hasher.update(chunk)
            meter.advance(len(chunk))
    return hasher.hexdigest()


def chunks(file: IO[bytes]) -> Iterable[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def write_atomically(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    with open(handle, "wb") as file:
        file.write(data)
    os.replace(name, path)
