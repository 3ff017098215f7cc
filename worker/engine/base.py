"""What an engine is, to everything around it.

An engine is a server on this machine's loopback (or, when external, anywhere) that speaks the OpenAI API for one
model. The classes behind the `Engine` protocol only know: how to start theirs, where it answers, what its answers
mean. They hold no state and start nothing; `supervise` does. So everything here is values and pure functions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from mesh.errors import EngineError
from worker.models import ResolvedModel

HISTORY = 64
MAX_NAME = 256
MAX_LISTED = 256
MAX_METRICS_LINES = 50_000
MAX_INFO_CHARS = 16_384


class EngineKind(StrEnum):
    VLLM = "vllm"
    LLAMACPP = "llamacpp"
    EXTERNAL = "external"


class Task(StrEnum):
    """What a model can be asked for; each has one route of the OpenAI API."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    EMBEDDINGS = "embeddings"

    @property
    def path(self) -> str:
        return _PATHS[self]


_PATHS: Mapping[Task, str] = {
    Task.CHAT: "/v1/chat/completions",
    Task.COMPLETIONS: "/v1/completions",
    Task.RESPONSES: "/v1/responses",
    Task.EMBEDDINGS: "/v1/embeddings",
}


class TokenIds(StrEnum):
    """How an engine tells the ids of the tokens it makes, and of a prompt's: the names are those of the servers that do it so."""

    VLLM = "vllm"
    LLAMACPP = "llamacpp"


# ------------------------------------------------------------------------------------------------- what is to be served


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What the operator asked for. Which fields count depends on `kind`; the rest are ignored.

    `source` is a model source as `worker.models` reads it (external: the engine's own name for the model, None for
    every model it lists). `served_name` is what the mesh calls the model. `tasks` None means: try them all and keep
    what works. `context_tokens` is per request. The embedded engine computes `parallel` requests at once on `threads`
    processors (None: half of them) and holds up to `max_connections`, the rest waiting. Without `token_ids` the engine is
    not asked for any.
    """

    kind: EngineKind
    source: str | None = None
    served_name: str | None = None
    tasks: tuple[Task, ...] | None = None
    cache_dir: Path = Path("~/.cache/infermesh/models")
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    context_tokens: int | None = None
    with_digest: bool = True
    token_ids: bool = True
    # vllm
    vllm_command: str | None = None
    # llamacpp
    parallel: int = 4
    threads: int | None = None
    max_connections: int = 512
    # external
    url: str | None = None
    api_key_env: str | None = None
    api_key_file: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model that is being served.

    `name` is what the mesh calls it and `engine_name` what to call it towards the engine (usually the same).
    `digest` is `sha256:HEX` of the weights where known, `context_tokens` prompt and answer together. `token_ids` None: the
    engine does not tell them, so its streams cannot go on elsewhere.
    """

    name: str
    engine_name: str
    tasks: frozenset[Task]
    context_tokens: int | None = None
    digest: str | None = None
    adapters: tuple[str, ...] = ()
    token_ids: TokenIds | None = None


@dataclass(frozen=True, kw_only=True)
class Command:
    """A program to start: its argument list, and what to add to this process's environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """One kind of engine with one spec. Implementations are frozen values; nothing here blocks or does IO, but
    `prepare`."""

    @property
    def spec(self) -> EngineSpec: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """To be sent with every request to the engine; may hold a secret."""
        ...

    @property
    def health_paths(self) -> tuple[str, ...]:
        """Asked in turn until one exists; 200 means loaded and alive."""
        ...

    @property
    def metrics_path(self) -> str | None: ...

    @property
    def keeps_connections(self) -> bool:
        """Whether a connection can be used again after an answer. False: open one for each request, since the server
        closes them without saying so, and a request sent into the closing is lost."""
        ...

    @property
    def needs_fetch(self) -> bool:
        """Whether `prepare` may have to download something."""
        ...

    async def prepare(self, on_progress: ProgressCallback) -> ResolvedModel | None:
        """Make the model's files ready on this machine; None when there are none to prepare. Raises EngineError."""
        ...

    def command(self, model: ResolvedModel | None, port: int) -> Command | None:
        """What to start so that the engine answers on `port` of the loopback; None when it runs by itself."""
        ...

    def base_url(self, port: int) -> str:
        """Without a path; `/v1/…` follows."""
        ...

    def models(self, model: ResolvedModel | None, listed: tuple[ListedModel, ...]) -> tuple[ModelSpec, ...]:
        """What it serves, given what `/v1/models` lists; tasks are those to be tried. Raises EngineError."""
        ...

    def parse_load(self, metrics: str) -> EngineLoad | None:
        """Its load from the text of `metrics_path`; None when the text says nothing about it."""
        ...


class ProgressCallback(Protocol):
    def __call__(self, done_bytes: int, total_bytes: int | None, /) -> None: ...


# ------------------------------------------------------------------------------------------------------------ readiness


class Stage(StrEnum):
    """How far an engine is. Only in `ready` does it take new requests."""

    STARTING = "starting"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """When a stage was entered (wall clock, seconds since 1970) and, where there is something to tell, why."""

    stage: Stage
    at_s: float
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """The stages an engine went through, oldest first, the last one current. At most HISTORY are kept."""

    history: tuple[StageEntry, ...]
    restarts: int = 0

    @classmethod
    def begin(cls, now_s: float) -> Readiness:
        return cls(history=(StageEntry(stage=Stage.STARTING, at_s=now_s),))

    @property
    def stage(self) -> Stage:
        return self.history[-1].stage

    @property
    def reason(self) -> str | None:
        """Why it is in this stage: set for `failed`, and for `starting` after a crash."""
        return self.history[-1].reason

    @property
    def since_s(self) -> float:
        return self.history[-1].at_s

    @property
    def is_ready(self) -> bool:
        return self.stage is Stage.READY

    def enter(self, stage: Stage, now_s: float, reason: str | None = None) -> Readiness:
        """The readiness after entering `stage`. Draining is final: what comes after it is not entered any more."""
        if self.stage is Stage.DRAINING or (stage is self.stage and reason == self.reason):
            return self
        entry = StageEntry(stage=stage, at_s=now_s, reason=reason)
        return replace(self, history=(*self.history, entry)[-HISTORY:])

    def restarted(self) -> Readiness:
        return replace(self, restarts=self.restarts + 1)

    def at_s(self, stage: Stage) -> float | None:
        """When `stage` was last entered."""
        return next((entry.at_s for entry in reversed(self.history) if entry.stage is stage), None)


# ----------------------------------------------------------------------------------------------------------------- load


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """What an engine says about its load: requests computed now, requests queued in it, share of the KV cache in use.

    It lags behind by up to seconds; whoever sends the requests knows their number better.
    """

    running: int
    waiting: int
    kv_use: float | None = None
    prefix_queries: int | None = None
    prefix_hits: int | None = None
    kv_tokens: int | None = None
    """What the KV cache holds when it is full."""
    steps: Hashable = None
    """Differs whenever the engine has made a step in between; None where it does not tell."""


_SAMPLE = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]{0,200})(?:\{[^\n]*\})?[ \t]+(\S{1,64})(?:[ \t]+\d+)?[ \t]*")


def parse_samples(text: str, names: Iterable[str]) -> dict[str, list[float]]:
    """The values of the named samples in Prometheus' text format, one for each label set.

    Lines that are not samples, and values that are not finite and positive or zero, are passed over: the text comes
    from an engine and is not to be trusted.
    """
    wanted = frozenset(names)
    found: dict[str, list[float]] = {}
    for line in text.splitlines()[:MAX_METRICS_LINES]:
        if not line.startswith("#") and (match := _SAMPLE.fullmatch(line)) and match[1] in wanted:
            try:
                value = float(match[2])
            except ValueError:
                continue
            if math.isfinite(value) and 0 <= value < 2**53:
                found.setdefault(match[1], []).append(value)
    return found


_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]{0,100})="([^"\\\n]{0,100})"')


def read_labels(text: str, name: str) -> list[dict[str, str]]:
    """The labels of each sample of that name: what an engine says in an "info" metric. Odd ones are passed over."""
    lines = [line for line in text.splitlines()[:MAX_METRICS_LINES] if line.startswith(name + "{") and len(line) <= MAX_INFO_CHARS]
    return [dict(_LABEL.findall(line)) for line in lines[:MAX_LISTED]]


def read_load(
    text: str,
    *,
    running: str,
    waiting: str,
    kv_use: tuple[str, ...] = (),
    prefix_queries: tuple[str, ...] = (),
    prefix_hits: tuple[str, ...] = (),
    steps: tuple[str, ...] = (),
) -> EngineLoad | None:
    """An engine's load by its samples' names; where several names are given the first one present counts.

    Counts of several label sets (vLLM: one for each data-parallel core) add up; of KV use the highest is taken, since
    a request goes to one core and waits there. `steps` are counters that a step moves.
    """
    samples = parse_samples(text, (running, waiting, *kv_use, *prefix_queries, *prefix_hits, *steps))
    if running not in samples and waiting not in samples:
        return None
    used = _first(samples, kv_use)
    return EngineLoad(
        running=int(sum(samples.get(running, ()))),
        waiting=int(sum(samples.get(waiting, ()))),
        kv_use=min(1.0, max(used)) if used else None,
        prefix_queries=_total(_first(samples, prefix_queries)),
        prefix_hits=_total(_first(samples, prefix_hits)),
        steps=_steps(samples, steps),
    )


def _steps(samples: Mapping[str, list[float]], names: tuple[str, ...]) -> Hashable:
    """None without a counter: a gauge alone may stand still while the engine does not."""
    found = [name for name in names if name in samples]
    counts = any(name.endswith(("_total", "_count")) for name in found)
    return tuple(sum(samples[name]) for name in found) if counts else None


def _first(samples: Mapping[str, list[float]], names: tuple[str, ...]) -> list[float]:
    return next((samples[name] for name in names if name in samples), [])


def _total(values: list[float]) -> int | None:
    return int(sum(values)) if values else None


# ----------------------------------------------------------------------------------------------------------- /v1/models


@dataclass(frozen=True, kw_only=True)
class ListedModel:
    """One entry of an engine's `/v1/models`; `parent` is set for an adapter."""

    id: str
    context_tokens: int | None = None
    parent: str | None = None


def parse_listing(raw: bytes) -> tuple[ListedModel, ...]:
    """Read an engine's `/v1/models`. Raises EngineError when it is not one; odd entries are passed over."""
    try:
        entries = json.loads(raw)["data"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EngineError("the engine's /v1/models is not a list of models") from error
    if not isinstance(entries, list):
        raise EngineError("the engine's /v1/models is not a list of models")
    return tuple(model for entry in entries[:MAX_LISTED] if (model := _listed(entry)) is not None)


def _listed(entry: Any) -> ListedModel | None:
    if not isinstance(entry, dict) or not is_model_name(entry.get("id")):
        return None
    meta = entry.get("meta")
    context = entry.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
    parent = entry.get("parent")
    return ListedModel(
        id=entry["id"],
        context_tokens=context if type(context) is int and 0 < context < 2**31 else None,
        parent=parent if is_model_name(parent) else None,
    )


def is_model_name(name: object) -> bool:
    """Whether it can be a model's name anywhere in the mesh: short, printable, no blank at its ends."""
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip()


def own_model(spec: EngineSpec, name: str, listed: tuple[ListedModel, ...], digest: str | None) -> tuple[ModelSpec, ...]:
    """What an engine that we started serves: the one model we named, and its adapters.

    Raises EngineError when the engine does not list it: then somebody else answers on that port.
    """
    mine = next((entry for entry in listed if entry.id == name), None)
    if mine is None:
        raise EngineError(f"what answers is not our engine: its /v1/models does not list {name!r}")
    model = ModelSpec(
        name=name,
        engine_name=name,
        tasks=frozenset(spec.tasks or Task),
        context_tokens=mine.context_tokens or spec.context_tokens,
        digest=digest,
        adapters=tuple(sorted(entry.id for entry in listed if entry.parent == name and entry.id != name)),
    )
    return (model,)


# -------------------------------------------------------------------------------------------------------------- warm-up


def warm_up_body(task: Task, engine_name: str) -> dict[str, Any]:
    """The smallest real request of its kind."""
    match task:
        case Task.CHAT:
            asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        case Task.COMPLETIONS:
            asked = {"prompt": "Hi", "max_tokens": 1}
        case Task.RESPONSES:
            asked = {"input": "Hi", "max_output_tokens": 16, "store": False}
        case Task.EMBEDDINGS:
            asked = {"input": "Hi"}
    return {"model": engine_name, **asked}


def is_answer(task: Task, raw: bytes) -> bool:
    """Whether `raw` is a real answer to the warm-up of `task`, not just anything with status 200."""
    field_name = {Task.EMBEDDINGS: "data", Task.RESPONSES: "output"}.get(task, "choices")
    try:
        found = json.loads(raw)[field_name]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return isinstance(found, list) and len(found) > 0


# ------------------------------------------------------------------------------------------------------------ token ids

TOKEN_IDS_ASKED: Mapping[TokenIds, Mapping[str, Any]] = {
    TokenIds.VLLM: {"return_token_ids": True},
    TokenIds.LLAMACPP: {"logprobs": 1, "post_sampling_probs": True, "timings_per_token": True},
}
"""What a completion must ask for."""

TOKENIZING: Mapping[TokenIds, tuple[tuple[str, Mapping[str, Any], str], ...]] = {
    TokenIds.VLLM: (("/tokenize", {"prompt": "Hi"}, "tokens"), ("/detokenize", {"tokens": [1]}, "prompt")),
    TokenIds.LLAMACPP: (("/tokenize", {"content": "Hi"}, "tokens"), ("/detokenize", {"tokens": [1]}, "content")),
}
"""The routes that go with it: what to ask, and what must be in the answer."""


def tells_token_ids(way: TokenIds, answer: Mapping[str, Any]) -> bool:
    """Whether a completion that asked for ids in this way has one."""
    try:
        choice = answer["choices"][0]
        found = choice["token_ids"] if way is TokenIds.VLLM else [choice["logprobs"]["content"][0]["id"]]
    except (KeyError, IndexError, TypeError):
        return False
    told = isinstance(found, list) and len(found) == 1 and type(found[0]) is int
    return told and (way is TokenIds.VLLM or isinstance(answer.get("timings"), dict))
