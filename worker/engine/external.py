"""An engine that somebody else runs: any server with the OpenAI API, near or far.

Nothing is started and nothing restarted. It is ready while it answers, and comes back by itself when it does so again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from mesh.errors import ConfigError, EngineError
from worker.engine.base import (
    Command,
    EngineLoad,
    EngineSpec,
    ListedModel,
    ModelSpec,
    ProgressCallback,
    Task,
    read_load,
)
from worker.engine.llamacpp import parse_llamacpp_load
from worker.engine.secret import bearer
from worker.engine.vllm import parse_vllm_load
from worker.models import ResolvedModel

MAX_UNNAMED = 16
"""Models that are served without being named: each is tried before it counts as ready."""


def parse_base_url(url: str) -> str:
    """`http(s)://host[:port][/path]`, with or without a final `/v1`, as the base that `/v1/…` is added to.

    Raises ConfigError for anything else, also for a password in the URL: it would end up in logs.
    """
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ConfigError(f"--engine-url {url!r} is not a URL like http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise ConfigError("--engine-url must hold no name or password; give the key by environment variable or file")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"


@dataclass(frozen=True, kw_only=True)
class ExternalEngine:
    """See `Engine`. `key` is what the server wants, if anything."""

    spec: EngineSpec
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parse_base_url(self.spec.url or "")
        if self.spec.args:
            raise ConfigError("an external engine is already running; arguments after -- cannot reach it")

    @property
    def headers(self) -> Mapping[str, str]:
        return bearer(self.key)

    @property
    def health_paths(self) -> tuple[str, ...]:
        return ("/health", "/v1/models")

    @property
    def metrics_path(self) -> str | None:
        return "/metrics"

    @property
    def keeps_connections(self) -> bool:
        """It may be anything, llama.cpp's server among them, which keeps none that it says it keeps; the gateway asks again then."""
        return True

    @property
    def needs_fetch(self) -> bool:
        return False

    async def prepare(self, on_progress: ProgressCallback) -> ResolvedModel | None:
        return None

    def command(self, model: ResolvedModel | None, port: int) -> Command | None:
        return None

    def base_url(self, port: int) -> str:
        return parse_base_url(self.spec.url or "")

    def models(self, model: ResolvedModel | None, listed: tuple[ListedModel, ...]) -> tuple[ModelSpec, ...]:
        chosen = self._chosen(listed)
        names = {entry.id: entry.id for entry in chosen}
        if self.spec.served_name and len(chosen) == 1:
            names[chosen[0].id] = self.spec.served_name
        template = ModelSpec(name="", engine_name="", tasks=frozenset(self.spec.tasks or Task))
        return tuple(
            replace(
                template,
                name=names[entry.id],
                engine_name=entry.id,
                context_tokens=entry.context_tokens or self.spec.context_tokens,
            )
            for entry in chosen
        )

    def _chosen(self, listed: tuple[ListedModel, ...]) -> tuple[ListedModel, ...]:
        wanted = self.spec.source or self.spec.served_name
        if wanted is None:
            if not 0 < len(listed) <= MAX_UNNAMED:
                raise EngineError(f"the engine lists {len(listed)} models; name the one to serve with --model")
            return listed
        found = tuple(entry for entry in listed if entry.id == wanted)
        if found:
            return found
        if self.spec.source is None and len(listed) == 1:
            return listed  # one model under another name: what the mesh calls it is ours to say
        if not listed:
            return (ListedModel(id=wanted),)  # a server without a listing; the warm-up will tell
        raise EngineError(f"the engine does not serve {wanted!r}; it lists {', '.join(e.id for e in listed[:10])}")

    def parse_load(self, metrics: str) -> EngineLoad | None:
        """By the names of the servers people put behind this; None for others."""
        return (
            parse_vllm_load(metrics)
            or parse_llamacpp_load(metrics)
            or read_load(
                metrics,
                running="sglang:num_running_reqs",
                waiting="sglang:num_queue_reqs",
                kv_use=("sglang:token_usage",),
                steps=("sglang:generation_tokens_total", "sglang:prompt_tokens_total", "sglang:token_usage"),
            )
        )
