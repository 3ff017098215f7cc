"""The `mesh-worker` command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from mesh.options import node_command
from mesh.runtime import Stop
from worker.config import WorkerConfig


def _node(settings: WorkerConfig) -> Callable[[Stop], Awaitable[int]]:
    from worker.node import run  # here, so that --help need not load the node

    return lambda stop: run(settings, stop)


main = node_command(
    WorkerConfig,
    _node,
    help="Run a worker: one engine, served to the mesh. What follows -- goes to the engine.",
    example="mesh-worker --join imjoin_… --engine vllm --model Qwen/Qwen3-8B -- --max-model-len 8192",
)
