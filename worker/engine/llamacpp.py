"""The embedded engine: llama.cpp's server out of the wheel `xllamacpp`, for machines without vLLM.

It runs as a child process like any other engine (`llamacpp_server`), since native code that crashes must not take the
worker with it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mesh.errors import ConfigError, ModelSourceError
from worker.engine.base import (
    Command,
    EngineLoad,
    EngineSpec,
    ListedModel,
    ModelSpec,
    ProgressCallback,
    Task,
    own_model,
    read_load,
)
from worker.engine.secret import bearer
from worker.models import ModelKind, ResolvedModel, needs_fetch, resolve

SERVER = Path(__file__).with_name("llamacpp_server.py")
DEFAULT_CONTEXT_TOKENS = 4_096


def default_threads(processors: int, quota: str) -> int:
    """Threads to compute with: half of the processors that may be used, so that a second engine, or the mesh itself,
    fits beside it. llama.cpp's threads wait for each other by spinning: two engines of two threads on two processors
    gave 3.5 tokens/s together, of one thread each 68.

    `quota` is the text of the control group's `cpu.max` ("max 100000" or "150000 100000", microseconds per period).
    """
    allowed, _, period = quota.strip().partition(" ")
    if allowed.isdecimal() and period.isdecimal() and int(period) > 0:
        processors = min(processors, int(allowed) // int(period))
    return max(1, processors // 2)


def _this_machines_threads() -> int:
    processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = ""
    with suppress(OSError):
        quota = Path("/sys/fs/cgroup/cpu.max").read_text("ascii")
    return default_threads(processors, quota)


@dataclass(frozen=True, kw_only=True)
class LlamaCppEngine:
    """See `Engine`. `key` protects the loopback port from other users of the machine."""

    spec: EngineSpec
    key: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.spec.source:
            raise ConfigError("the embedded engine needs a model: a .gguf file or pypi:NAME==VERSION")
        if self.spec.args:
            raise ConfigError("the embedded engine takes no arguments after --; they are for vLLM")
        if importlib.util.find_spec("xllamacpp") is None:
            raise ConfigError("the embedded engine is not installed: pip install 'infermesh[llamacpp]'")

    @property
    def headers(self) -> Mapping[str, str]:
        return bearer(self.key)

    @property
    def health_paths(self) -> tuple[str, ...]:
        return ("/health",)

    @property
    def metrics_path(self) -> str | None:
        return "/metrics"

    @property
    def keeps_connections(self) -> bool:
        """cpp-httplib ends the connection after each streamed answer, and says the opposite in its headers."""
        return False

    @property
    def needs_fetch(self) -> bool:
        return needs_fetch(self.spec.source or "")

    async def prepare(self, on_progress: ProgressCallback) -> ResolvedModel | None:
        model = await resolve(self.spec.source or "", self.spec.cache_dir, on_progress, with_digest=self.spec.with_digest)
        if model.kind is not ModelKind.GGUF:
            what = "a Hugging Face id" if model.kind is ModelKind.HUB else "a Hugging Face folder"
            raise ModelSourceError(
                f"{self.spec.source} is {what}, and the embedded engine reads GGUF files only: download a .gguf of the"
                " model and give its path, or use --engine vllm"
            )
        return model

    def command(self, model: ResolvedModel | None, port: int) -> Command | None:
        assert model is not None
        options = {
            "model": model.path,
            "alias": self.spec.served_name or model.name,
            "port": port,
            "context_tokens": self.spec.context_tokens or DEFAULT_CONTEXT_TOKENS,
            "parallel": self.spec.parallel,
            "threads": self.spec.threads or _this_machines_threads(),
            "connections": self.spec.max_connections,
            "embeddings": self.spec.tasks is None or Task.EMBEDDINGS in self.spec.tasks,
        }
        # -P: the script's own folder, with its llamacpp.py and vllm.py, must not be importable.
        return Command(
            argv=(sys.executable, "-P", "-u", str(SERVER), json.dumps(options)),
            env={"INFERMESH_ENGINE_KEY": self.key, **self.spec.env},
        )

    def base_url(self, port: int) -> str:
        return f"http://127.0.0.1:{port}"

    def models(self, model: ResolvedModel | None, listed: tuple[ListedModel, ...]) -> tuple[ModelSpec, ...]:
        assert model is not None
        return own_model(self.spec, self.spec.served_name or model.name, listed, model.digest)

    def parse_load(self, metrics: str) -> EngineLoad | None:
        return parse_llamacpp_load(metrics)


def parse_llamacpp_load(metrics: str) -> EngineLoad | None:
    return read_load(
        metrics,
        running="llamacpp:requests_processing",
        waiting="llamacpp:requests_deferred",
        kv_use=("llamacpp:kv_cache_usage_ratio",),
        steps=("llamacpp:n_decode_total", "llamacpp:tokens_predicted_total", "llamacpp:prompt_tokens_total"),
    )
