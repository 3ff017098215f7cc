"""vLLM, the engine for GPUs, started as its own server.

vLLM may live in an environment of its own (another Python, another torch): `vllm_command` says how to start it there.
Whatever the operator writes after `--` goes to vLLM as it is, and last, so that it wins.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mesh.errors import ConfigError, ModelSourceError
from worker.engine.base import (
    Command,
    EngineLoad,
    EngineSpec,
    ListedModel,
    ModelSpec,
    ProgressCallback,
    own_model,
    read_labels,
    read_load,
)
from worker.engine.secret import bearer
from worker.models import ModelKind, ResolvedModel, needs_fetch, resolve

DEFAULT_COMMAND = "vllm serve"
OURS = ("--host", "--port", "--served-model-name", "--model", "--uds", "--root-path", "--ssl-keyfile", "--ssl-certfile")
"""What the worker decides; an operator who sets one of these would only break the connection to the engine."""


STEPS = (
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:iteration_tokens_total_count",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
)
"""A step of nothing but a piece of a long prompt moves the last ones alone: it takes blocks of the cache."""


def split_command(command: str) -> tuple[str, ...]:
    """The program and its first arguments. Raises ConfigError."""
    try:
        parts = tuple(shlex.split(command))
    except ValueError as error:
        raise ConfigError(f"--vllm-command {command!r} is not a command line: {error}") from error
    if not parts:
        raise ConfigError("--vllm-command is empty")
    return parts


def takes_model_positionally(command: tuple[str, ...]) -> bool:
    """`vllm serve MODEL`, but `python -m vllm.entrypoints.openai.api_server --model MODEL`."""
    return command[-1] == "serve"


def key_in(args: tuple[str, ...]) -> str | None:
    """The value of an `--api-key` the operator gave to vLLM: then that is what it will ask for."""
    for index, arg in enumerate(args):
        if arg == "--api-key" and index + 1 < len(args):
            return args[index + 1]
        if arg.startswith("--api-key="):
            return arg.partition("=")[2]
    return None


@dataclass(frozen=True, kw_only=True)
class VllmEngine:
    """See `Engine`. `key` protects the loopback port from other users of the machine."""

    spec: EngineSpec
    key: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.spec.source:
            raise ConfigError("vLLM needs a model: a Hugging Face id or a folder")
        program = split_command(self.spec.vllm_command or DEFAULT_COMMAND)[0]
        if shutil.which(program) is None:
            raise ConfigError(
                f"{program!r} is not there to be run: install vLLM here, or say where it is, for example"
                " --vllm-command '/opt/vllm/bin/vllm serve'"
            )
        for arg in self.spec.args:
            if arg.partition("=")[0] in OURS:
                raise ConfigError(f"{arg} is the worker's to decide; leave it out of what comes after --")

    @property
    def headers(self) -> Mapping[str, str]:
        return bearer(key_in(self.spec.args) or self.key)

    @property
    def health_paths(self) -> tuple[str, ...]:
        return ("/health",)

    @property
    def metrics_path(self) -> str | None:
        return "/metrics"

    @property
    def keeps_connections(self) -> bool:
        return True

    @property
    def needs_fetch(self) -> bool:
        return needs_fetch(self.spec.source or "")

    async def prepare(self, on_progress: ProgressCallback) -> ResolvedModel | None:
        model = await resolve(self.spec.source or "", self.spec.cache_dir, on_progress, with_digest=self.spec.with_digest)
        if model.kind is ModelKind.GGUF:
            raise ModelSourceError(f"{self.spec.source} is a GGUF file; vLLM wants a Hugging Face id or folder, so use --engine llamacpp")
        return model

    def command(self, model: ResolvedModel | None, port: int) -> Command | None:
        assert model is not None
        base = split_command(self.spec.vllm_command or DEFAULT_COMMAND)
        length = ("--max-model-len", str(self.spec.context_tokens)) if self.spec.context_tokens else ()
        argv = (
            *base,
            *((model.path,) if takes_model_positionally(base) else ("--model", model.path)),
            *("--served-model-name", self.spec.served_name or model.name),
            *("--host", "127.0.0.1", "--port", str(port)),
            "--disable-uvicorn-access-log",
            *length,
            *self.spec.args,
        )
        # In the environment and not among the arguments, which every user of the machine can read.
        return Command(argv=argv, env={"VLLM_API_KEY": self.key, **self.spec.env})

    def base_url(self, port: int) -> str:
        return f"http://127.0.0.1:{port}"

    def models(self, model: ResolvedModel | None, listed: tuple[ListedModel, ...]) -> tuple[ModelSpec, ...]:
        assert model is not None
        return own_model(self.spec, self.spec.served_name or model.name, listed, model.digest)

    def parse_load(self, metrics: str) -> EngineLoad | None:
        return parse_vllm_load(metrics)


def parse_vllm_load(metrics: str) -> EngineLoad | None:
    """vLLM's names, new ones first."""
    load = read_load(
        metrics,
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        kv_use=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        prefix_queries=("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
        prefix_hits=("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
        steps=STEPS,
    )
    return load and replace(load, kv_tokens=_kv_tokens(metrics))


def _kv_tokens(metrics: str) -> int | None:
    """Blocks times their size; several data-parallel cores add up."""
    found = [
        int(labels["num_gpu_blocks"]) * int(labels["block_size"])
        for labels in read_labels(metrics, "vllm:cache_config_info")
        if all(0 < len(labels.get(name, "")) < 12 and labels[name].isdecimal() for name in ("num_gpu_blocks", "block_size"))
    ]
    return sum(found) or None
