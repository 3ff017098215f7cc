"""The engine's keeper: what engines there are, and the supervisor that keeps one running."""

from __future__ import annotations

import os
import secrets

from mesh.errors import ConfigError
from worker.engine.base import (
    Engine,
    EngineKind,
    EngineLoad,
    EngineSpec,
    ModelSpec,
    Readiness,
    Stage,
    StageEntry,
    Task,
    TokenIds,
)
from worker.engine.external import ExternalEngine
from worker.engine.llamacpp import LlamaCppEngine
from worker.engine.secret import read_key
from worker.engine.supervise import Supervisor, Timing
from worker.engine.vllm import VllmEngine

__all__ = [
    "Engine",
    "EngineKind",
    "EngineLoad",
    "EngineSpec",
    "ModelSpec",
    "Readiness",
    "Stage",
    "StageEntry",
    "Supervisor",
    "Task",
    "Timing",
    "TokenIds",
    "make_engine",
]


def make_engine(spec: EngineSpec) -> Engine:
    """The engine for a spec. Raises ConfigError when the spec cannot work on this machine, with what to do about it."""
    match spec.kind:
        case EngineKind.LLAMACPP:
            return LlamaCppEngine(spec=spec, key=secrets.token_urlsafe(24))
        case EngineKind.VLLM:
            return VllmEngine(spec=spec, key=secrets.token_urlsafe(24))
        case EngineKind.EXTERNAL:
            return ExternalEngine(spec=spec, key=read_key(os.environ, spec.api_key_env, spec.api_key_file))
    raise ConfigError(f"there is no engine {spec.kind!r}")
