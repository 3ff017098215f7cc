"""What a machine computes on, read from what nvidia-smi prints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.processes import gone
from worker import hardware
from worker.hardware import detect


def nvidia_smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


async def found() -> tuple[str, int, int]:
    capability = await detect(region="eu-1", engine="vllm", max_concurrency=500)
    assert (capability.region, capability.engine, capability.max_concurrency) == ("eu-1", "vllm", 500)
    return capability.gpu, capability.gpu_count, capability.memory_bytes


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("NVIDIA H200, 143771\n", ("NVIDIA H200", 1, 143771 << 20)),
        ("NVIDIA L4, 23034\nNVIDIA L4, 23034\n", ("NVIDIA L4", 2, 2 * 23034 << 20)),
        ("NVIDIA GB10, [N/A]\n", ("NVIDIA GB10", 1, 0)),
        ("Odd, Name, 10\n", ("Odd, Name", 1, 10 << 20)),
        ("", ("", 0, 0)),
        ("\n\n", ("", 0, 0)),
        ("no comma\n", ("", 0, 0)),
        ("X, -5\nY, 1e9\n", ("X", 2, 0)),
        ("X, 99999999999999999999\n", ("X", 1, 0)),
        (f"{'x' * 100}, 1\n", ("x" * 64, 1, 1 << 20)),
        ("A\tB, 1\nC, 2\n", ("C", 1, 2 << 20)),
        ("L4, 1\n" * 100, ("L4", 64, 64 << 20)),
    ],
)
async def test_gpus_are_read(on_path: Path, output: str, expected: tuple[str, int, int]) -> None:
    (on_path / "output").write_text(output)
    nvidia_smi(on_path, f"cat {on_path}/output\n")
    assert await found() == expected


@pytest.mark.parametrize("script", ["exit 9\n", "echo 'NVIDIA-SMI has failed'; exit 9\n", "printf '\\377\\376'\n", "kill -9 $$\n"])
async def test_driver_that_fails_means_no_gpu(on_path: Path, script: str) -> None:
    nvidia_smi(on_path, script)
    assert await found() == ("", 0, 0)


async def test_no_driver_means_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert await found() == ("", 0, 0)
    (tmp_path / "nvidia-smi").write_text("not a program")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert await found() == ("", 0, 0)


async def test_driver_that_hangs_is_not_waited_for_and_not_left_behind(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "QUERY_DEADLINE_S", 0.5)
    nvidia_smi(on_path, f"echo $$ > {on_path}/pid\nexec sleep 600\n")
    assert await found() == ("", 0, 0)
    pid = int((on_path / "pid").read_text())
    await gone(pid)
