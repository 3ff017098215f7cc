"""Keeps what an engine prints: all of it in a file that cannot fill the disk, the end of it for a failure's reason.

An engine's output is as untrusted as the model it loads: lines may be endless, hold terminal escapes or be no text at
all, and there may be gigabytes of them.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import structlog

log = structlog.get_logger(__name__)

MAX_LINE_BYTES = 8_192
TAIL_LINES = 50


def printable(line: bytes) -> str:
    """One line as text that is safe to show: bounded, no control characters, nothing undecodable."""
    text = line[:MAX_LINE_BYTES].decode("utf-8", "replace").rstrip()
    return "".join(char if char.isprintable() or char == "\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


class LineSplitter:
    """Cuts a stream of bytes into bounded lines; of a longer line only the beginning is kept."""

    def __init__(self) -> None:
        self._open = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes."""
        *complete, rest = chunk.split(b"\n")
        lines = []
        for part in complete:
            self._add(part)
            lines.append(bytes(self._open))
            self._open.clear()
        self._add(rest)
        return lines

    def finish(self) -> list[bytes]:
        """The last line, when it had no end."""
        rest = [bytes(self._open)] if self._open else []
        self._open.clear()
        return rest

    def _add(self, part: bytes) -> None:
        self._open += part[: MAX_LINE_BYTES - len(self._open)]


class EngineLog:
    """The engine's log file, rotated by size, and its last lines. A full disk costs the file, never the worker."""

    def __init__(self, path: Path, *, max_bytes: int = 10 << 20, files: int = 3) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._files = files
        self._file: BinaryIO | None = None
        self._size_bytes = 0
        self._is_broken = False
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)

    def write(self, lines: list[bytes]) -> None:
        """Keep `lines`; never raises."""
        texts = [printable(line) for line in lines]
        self.tail.extend(text for text in texts if text)
        data = "".join(text + "\n" for text in texts).encode("utf-8", "replace")
        try:
            self._append(data)
            self._is_broken = False
        except OSError as error:
            self.close()
            if not self._is_broken:
                log.warning("engine.log_not_written", path=str(self._path), error=str(error))
            self._is_broken = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _append(self, data: bytes) -> None:
        if self._file is not None and self._size_bytes + len(data) > self._max_bytes:
            self.close()
            self._rotate()
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            self._file = open(handle, "ab", buffering=0)  # noqa: SIM115 (kept open between writes)
            self._size_bytes = os.fstat(handle).st_size
        self._file.write(data)
        self._size_bytes += len(data)

    def _rotate(self) -> None:
        for number in range(self._files - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path if number == 1 else self._path.with_name(f"{self._path.name}.{number - 1}")
            if newer.exists():
                newer.replace(older)


_TELLING = re.compile(r"error|exception|fatal|cannot|failed|not supported|out of memory", re.IGNORECASE)


def telling(tail: Iterable[str], lines: int = 3, max_chars: int = 600) -> str:
    """What an engine's last lines say about its end: the last ones that sound like an error, else just the last."""
    said = [line.strip() for line in tail if line.strip()]
    chosen = [line for line in said if _TELLING.search(line)] or said
    return " | ".join(chosen[-lines:])[-max_chars:]
