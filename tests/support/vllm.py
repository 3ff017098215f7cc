"""A mesh over two real vLLM engines that share this machine's CPU. Needs `eval "$(scripts/real-vllm --export)"`."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.local_up import LocalUp, mesh_up

PYTHON, MODEL = os.environ.get("INFERMESH_VLLM_PYTHON"), os.environ.get("INFERMESH_VLLM_MODEL")
NAME = "smollm2"
CONTEXT_TOKENS = 1024
ENVIRON = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    # Left alone, each engine binds a thread to every core, and threads that wait for each other there stand still for seconds.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}

MARKS = [
    pytest.mark.real_vllm,
    pytest.mark.skipif(not (PYTHON and MODEL), reason="real vLLM is not prepared: scripts/real-vllm --export"),
    pytest.mark.timeout(600),
]


def vllm_command() -> str:
    assert PYTHON
    return shlex.join([PYTHON, "-m", "vllm.entrypoints.openai.api_server"])


def vllm_arguments(dtype: str) -> tuple[str, ...]:
    """For vLLM itself. Eager, because compiling takes longer than any test."""
    return "--enforce-eager", "--dtype", dtype, "--max-model-len", str(CONTEXT_TOKENS)


@contextmanager
def vllm_mesh(home: Path, *, dtype: str) -> Iterator[LocalUp]:
    assert MODEL
    arguments = ["--workers", "2", "--engine", "vllm", "--vllm-command", vllm_command(), "--model", MODEL, "--served-name", NAME]
    with mesh_up(home, *arguments, "--", *vllm_arguments(dtype), timeout_s=550, **ENVIRON) as up:
        yield up


def moved(up: LocalUp) -> dict[str, int]:
    """Counts of streams that lost their worker."""
    return dict(json.loads(up.mesh("status", "--json").stdout)["proxy"]["streams"])
