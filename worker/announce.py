"""What a worker tells about itself: its record's content, and the load it pushes over its links."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from mesh.clock import SystemClock
from mesh.link.frames import Frame
from mesh.link.link import Link
from mesh.link.peers import Peers
from mesh.node import About
from mesh.prefix import encode_news, news_frames
from mesh.records import Capability, Load, ModelEntry, State
from worker.admission import Admission
from worker.config import WorkerConfig
from worker.engine import ModelSpec, Supervisor, Task
from worker.prefill import SURPRISE_TOKENS, Prefill
from worker.pulse import Pulse

LOAD_EVERY_S = 0.05
"""Load changes within this time go out as one frame, unless there is news enough to send requests elsewhere."""


def about(config: WorkerConfig, supervisor: Supervisor, admission: Admission, capability: Capability, cordoned: str = "") -> About:
    """The worker's part of its record, from the engine's readiness and the gateway's counts. ``cordoned``: why it takes nothing new."""
    readiness, load = supervisor.readiness, supervisor.load
    return About(
        state=State.DRAINING if cordoned and readiness.is_ready else State(str(readiness.stage)),
        models=model_entries(config, supervisor.models),
        capability=capability,
        load=Load(running=admission.running, waiting=admission.waiting, kv_use=kv_use(supervisor)) if load or admission.running else Load(),
        reason=_printable(cordoned or readiness.reason or ""),
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
    """Pushes LOAD frames on change, each link told how much of the work is its own, and PREFIX frames where what is cached has changed.

    The first change goes out at once and further ones `LOAD_EVERY_S` apart; `SURPRISE_TOKENS` of new prefill do not wait. A link that is
    new gets all that is held before any change.
    """

    def __init__(self, admission: Admission, supervisor: Supervisor, prefill: Prefill | None = None, pulse: Pulse | None = None) -> None:
        self._admission = admission
        self._supervisor = supervisor
        self._prefill = prefill or Prefill(SystemClock())
        self._prefill.tell = self.tell
        self._pulse = pulse or Pulse()
        self._due: asyncio.TimerHandle | None = None
        self._urgent = False
        self._pushed_at = float("-inf")
        self._pushed_ever = 0
        self._informed: set[Link] = set()
        self.peers: Peers | None = None

    def changed(self) -> None:
        urgent = self._prefill.backlog.ever - self._pushed_ever >= SURPRISE_TOKENS
        if self._due is not None:
            if not urgent or self._urgent:
                return
            self._due.cancel()
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._urgent = urgent
        self._due = loop.call_at(now if urgent else max(now, self._pushed_at + LOAD_EVERY_S), self._push)

    def tell(self, link: Link) -> None:
        """Send one link the load as it is now."""
        fields = {"run": self._admission.running, "wait": self._admission.waiting, "kv": kv_use(self._supervisor), "yours": link.streams}
        stuck = {"stuck": True} if self._pulse.stuck else {}
        if self._pulse.halted:
            stuck["halted"] = True
        link.send_control(Frame.LOAD, {**fields, **self._prefill.load_fields(link), **stuck})

    def _push(self) -> None:
        self._due = None
        self._pushed_at = asyncio.get_running_loop().time()
        self._pushed_ever = self._prefill.backlog.ever
        if self._supervisor.load is not None and self._supervisor.load.kv_tokens:
            self._prefill.held.capacity_tokens = self._supervisor.load.kv_tokens
        if self.peers is None:
            return
        links = list(self.peers.links.values())
        self._push_prefixes(links)
        for link in links:
            self.tell(link)

    def _push_prefixes(self, links: Sequence[Link]) -> None:
        held = self._prefill.held
        added, removed = held.take_changes()
        changes = [encode_news(news) for news in news_frames(added, removed)]
        new = [link for link in links if link not in self._informed]
        dump = [encode_news(news) for news in news_frames(held.hashes(), (), anew=True)] if new else []
        for link in links:
            for fields in dump if link in new else changes:
                link.send_control(Frame.PREFIX, fields)
        self._informed = set(links)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:120]
