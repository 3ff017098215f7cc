"""What a worker tells about itself: its record's content, and the load it pushes over its links."""

from __future__ import annotations

import asyncio

from mesh.link.frames import Frame
from mesh.link.peers import Peers
from mesh.node import About
from mesh.records import Capability, Load, ModelEntry, State
from worker.admission import Admission
from worker.config import WorkerConfig
from worker.engine import ModelSpec, Supervisor, Task

LOAD_EVERY_S = 0.05
"""Load changes within this time go out as one frame."""


def about(config: WorkerConfig, supervisor: Supervisor, admission: Admission, capability: Capability) -> About:
    """The worker's part of its record, from the engine's readiness and the gateway's counts."""
    readiness, load = supervisor.readiness, supervisor.load
    return About(
        state=State(str(readiness.stage)),
        models=model_entries(config, supervisor.models),
        capability=capability,
        load=Load(running=admission.running, waiting=admission.waiting, kv_use=kv_use(supervisor)) if load or admission.running else Load(),
        reason=_printable(readiness.reason or ""),
    )


def model_entries(config: WorkerConfig, models: tuple[ModelSpec, ...]) -> tuple[ModelEntry, ...]:
    """As records name them. Before the engine was first ready: what the settings promise."""
    if not models:
        return tuple(ModelEntry(name=name) for name in config.served_name)
    return tuple(
        ModelEntry(
            name=model.name,
            digest=model.digest or "",
            tasks=tuple(str(task) for task in Task if task in model.tasks),
            adapters=model.adapters,
            context_tokens=model.context_tokens or 0,
        )
        for model in models
    )


def kv_use(supervisor: Supervisor) -> float:
    """Share of the KV cache in use, 0 where the engine does not tell."""
    load = supervisor.load
    return load.kv_use if load is not None and load.kv_use is not None else 0.0


class LoadPusher:
    """Pushes LOAD frames on change, each link told how much of the work is its own."""

    def __init__(self, admission: Admission, supervisor: Supervisor) -> None:
        self._admission = admission
        self._supervisor = supervisor
        self._due: asyncio.TimerHandle | None = None
        self.peers: Peers | None = None

    def changed(self) -> None:
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(LOAD_EVERY_S, self._push)

    def _push(self) -> None:
        self._due = None
        if self.peers is None:
            return
        fields = {"run": self._admission.running, "wait": self._admission.waiting, "kv": kv_use(self._supervisor)}
        for link in list(self.peers.links.values()):
            link.send_control(Frame.LOAD, {**fields, "yours": link.streams})


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:120]
