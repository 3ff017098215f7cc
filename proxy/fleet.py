"""The workers this proxy can reach right now, as their links tell it.

Nothing here asks the directory: a request is routed over the links that are up, by what came over them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from mesh.claims import read_bool, read_int, read_number
from mesh.clock import Clock, SystemClock
from mesh.errors import MalformedEnvelope, ProtocolError, WorkerLost
from mesh.link.frames import Frame
from mesh.link.link import IncomingStream, Link
from mesh.link.peers import REPLACED
from mesh.prefix import Chain, parse_news, text_bytes
from mesh.records import Record, State
from proxy.health import Cause, Health, Standing, Watch
from proxy.prefixes import PrefixIndex

log = structlog.get_logger(__name__)

TOKENS_PER_BYTE = 0.25
"""Of a prompt's JSON, until an engine has counted one. English comes to about that."""
LEARN_OVER = 50
MAX_LEARNED = 4_096
SUSPECT_S = 1.5
"""A link silent for so long gets no new request while there are others; `mesh.link.peers` ends it a little later."""


STANDINGS = ("suspect", *Standing)
_TRUSTED, _TRIAL = Standing.TRUSTED, Standing.TRIAL


class Worker:
    """One linked worker: its newest record, the load it pushed, and what this proxy gave it.

    ``backlog`` is the prefill it said, at ``load_at``, that it had yet to do, in tokens, ``rate`` how many a second it does; `sent` is what
    this proxy has given it since, by stream. ``load_number`` names the LOAD that said so, 0 before the first.
    """

    __slots__ = (
        "_sent",
        "_sent_tokens",
        "backlog",
        "elsewhere",
        "failed",
        "halted",
        "health",
        "in_flight",
        "kv_use",
        "link",
        "listed",
        "load_at",
        "load_number",
        "max_concurrency",
        "node_id",
        "rank",
        "rate",
        "record",
        "served",
        "stuck",
        "suspect",
        "waiting",
    )

    def __init__(self, link: Link, record: Record, health: Health | None = None) -> None:
        self.link = link
        self.health = health or Health()
        self.suspect = ""
        """What speaks against it right now, by its link or its own word; empty if nothing does."""
        self.stuck = self.halted = False
        self.listed = True
        self.node_id = record.node_id
        self.rank = int.from_bytes(record.node_id[:8])
        self.backlog = self.rate = self.load_at = 0.0
        self.load_number = 0
        self._sent: dict[int, int] = {}
        self._sent_tokens = 0
        self.in_flight = 0
        self.elsewhere = record.load.running + record.load.waiting
        self.waiting = record.load.waiting
        self.kv_use = record.load.kv_use
        self.served = 0
        self.failed = 0
        self.take(record)

    def take(self, record: Record) -> None:
        self.record = record
        self.max_concurrency = record.capability.max_concurrency

    def queued_tokens(self, now: float) -> float:
        """Prefill it has yet to do: what it told, less what it has done since, and what this proxy sent that it may not have counted."""
        if not self.backlog:
            return float(self._sent_tokens)
        return max(0.0, self.backlog - self.rate * (now - self.load_at)) + self._sent_tokens

    def sent(self, stream: int, tokens: int) -> None:
        """This proxy gave it so much prefill to do."""
        self._sent[stream] = tokens
        self._sent_tokens += tokens

    def settled(self, stream: int) -> None:
        """That prefill is done, or nobody wants it any more."""
        self._sent_tokens -= self._sent.pop(stream, 0)

    def counted(self, last: int) -> None:
        """What it told includes everything up to this stream."""
        while self._sent and (stream := next(iter(self._sent))) <= last:
            self.settled(stream)

    @property
    def routable(self) -> bool:
        return self.record.state == State.READY and not self.link.draining and not self.link.closed

    @property
    def standing(self) -> str:
        """For people: ``trusted``, ``suspect``, ``trial`` or ``ejected``."""
        return "suspect" if self.suspect else str(self.health.standing)

    @property
    def standing_reason(self) -> str:
        return self.suspect or self.health.reason

    @property
    def in_service(self) -> bool:
        """Whether it gets requests while others do."""
        return not self.suspect and self.health.in_service


class Fleet:
    """Implements `mesh.link.peers.PeersOwner` for a proxy's workers."""

    def __init__(self, *, on_record: Callable[[Record], None], clock: Clock | None = None) -> None:
        self.workers: dict[bytes, Worker] = {}
        self.prefixes: PrefixIndex[Worker] = PrefixIndex()
        self.watch = Watch()
        self._clock = clock or SystemClock()
        self._tokens_per_byte: dict[str, tuple[float, int]] = {}
        self._by_model: dict[tuple[str, str], list[Worker]] = {}
        self._groups: dict[frozenset[str], list[Worker]] = {}
        self._ticks = deque([self._clock.monotonic()] * 2, maxlen=2)
        self._on_record = on_record

    def candidates(self, model: str, task: str) -> Sequence[Worker]:
        """The ready workers of a model that can do a task."""
        return self._by_model.get((model, task), ())

    def models(self) -> set[str]:
        """The models that some linked worker serves right now."""
        return {model for model, _ in self._by_model}

    def tasks(self, model: str) -> set[str]:
        return {task for name, task in self._by_model if name == model}

    # -- prompts

    def tokens(self, model: str, size_bytes: int) -> int:
        """How many tokens a prompt's text probably is."""
        return round(size_bytes * self._tokens_per_byte.get(model, (TOKENS_PER_BYTE, 0))[0])

    def holders(self, model: str, chain: Chain) -> dict[Worker, int]:
        """The workers that hold the beginning of a prompt, and how much of it, in tokens."""
        found = self.prefixes.find(chain)
        return {worker: self.tokens(model, text_bytes(depth)) for worker, depth in found.items() if worker.listed and worker.routable}

    def learn(self, model: str, size_bytes: int, tokens: int) -> None:
        """An engine counted a prompt's tokens."""
        rate, samples = self._tokens_per_byte.get(model, (TOKENS_PER_BYTE, 0))
        rate += (min(2.0, max(1 / 64, tokens / size_bytes)) - rate) / min(LEARN_OVER, samples + 1)
        if samples or len(self._tokens_per_byte) < MAX_LEARNED:
            self._tokens_per_byte[model] = (rate, samples + 1)

    # -- health

    def tick(self) -> None:
        """Draw conclusions, twice a second: whose link is silent, whose hold-off is over, who is slow.

        As in `mesh.link.peers`, a process that stood still blames nobody: silence only counts over ticks that were made.
        """
        now, before = self._clock.monotonic(), self._ticks[0]
        changed = False
        for worker in self.workers.values():
            heard = worker.link.last_heard
            silent = now - heard > SUSPECT_S and heard < before
            changed |= self._suspect(worker, silent_s=now - heard if silent else 0.0)
        self._ticks.append(now)
        changed |= self.watch.tick((worker.health for worker in self.workers.values()), now=now)
        for group in self._groups.values():
            changed |= self.watch.judge([worker.health for worker in group], now=now)
        if changed:
            self._index()

    def succeeded(self, worker: Worker) -> None:
        health = worker.health
        if (health.failures or health.standing is not _TRUSTED) and self.watch.succeeded(health, now=self._clock.monotonic()):
            log.info("worker.trusted", worker=worker.node_id.hex()[:12])
            self._index()

    def blame(self, failures: Sequence[tuple[Worker, str]], *, answered: bool) -> None:
        """Hold a request's failures, by their codes, against the workers. Where several failed and none ``answered``, it is the request.

        A lost worker is no failed one: its link tells. Nor is one that leaves and gives up what it could not finish.
        """
        if not answered and len({worker for worker, _ in failures}) > 1:
            return
        for worker, code in failures:
            if code != WorkerLost.code and worker.routable:
                group = [other.health for other in self._group(worker)]
                if self.watch.failed(worker.health, code, group, now=self._clock.monotonic()):
                    log.warning("worker.ejected", worker=worker.node_id.hex()[:12], reason=worker.health.reason)
                    self._index()

    def begin(self, worker: Worker) -> bool:
        """A request goes there; whether it is the one that a worker on trial gets."""
        if worker.health.standing is not _TRIAL:
            return False
        worker.health.trials += 1
        self._index()
        return True

    def end_trial(self, worker: Worker) -> None:
        worker.health.trials -= 1
        self._index()

    def _lost(self, worker: Worker) -> None:
        """It went away without having said so."""
        if self.watch.lost(worker.health, now=self._clock.monotonic()):
            log.warning("worker.ejected", worker=worker.node_id.hex()[:12], reason=worker.health.reason)

    def _suspect(self, worker: Worker, *, silent_s: float = 0.0) -> bool:
        """Whether what speaks against it is news."""
        why = f"silent for {silent_s:.1f} s" if silent_s else "its engine stands still" if worker.stuck else ""
        news = bool(why) != bool(worker.suspect)
        if news and why:
            self.watch.ejections[Cause.SILENT if silent_s else Cause.STUCK] += 1
            log.warning("worker.suspect", worker=worker.node_id.hex()[:12], reason=why)
        worker.suspect = why
        return news

    def _group(self, worker: Worker) -> Sequence[Worker]:
        """The ready workers that serve the same, itself among them."""
        return self._groups.get(_served(worker), (worker,))

    def link_of(self, node_id: bytes) -> Link | None:
        """The link to a worker, if there is one."""
        worker = self.workers.get(node_id)
        return worker.link if worker is not None else None

    # -- PeersOwner

    def on_up(self, link: Link, record: Record) -> None:
        self._forget(self.workers.get(record.node_id))
        worker = self.workers[record.node_id] = Worker(link, record, self.watch.of(record.node_id))
        self.prefixes.join(worker, now=self._clock.monotonic())
        self._index()
        self._on_record(record)

    def on_down(self, link: Link, reason: str) -> None:
        worker = self.workers.get(link.node_id)
        if worker is not None and worker.link is link:
            del self.workers[link.node_id]
            self._forget(worker)
            if not link.draining and worker.record.state != State.DRAINING and reason != REPLACED:
                self._lost(worker)
            self._index()

    def on_record(self, link: Link, record: Record) -> None:
        worker = self.workers.get(link.node_id)
        if worker is not None and record.order > worker.record.order:
            changed = (record.state, record.models) != (worker.record.state, worker.record.models)
            if worker.record.state == State.READY and record.state not in (State.READY, State.DRAINING):
                self._lost(worker)
            worker.take(record)
            if changed:
                log.info("worker.state", worker=record.node_id.hex()[:12], state=str(record.state), reason=record.reason)
                self._index()
        self._on_record(record)

    def on_load(self, link: Link, fields: dict[str, Any]) -> None:
        worker = self.workers.get(link.node_id)
        if worker is None:
            return
        try:
            running, waiting = read_int(fields, "run", high=10**6), read_int(fields, "wait", high=10**6)
            yours = read_int(fields, "yours", high=10**6)
            worker.kv_use = read_number(fields, "kv", default=0.0, high=1.0)
            number, last = read_int(fields, "n", default=0), read_int(fields, "last", default=0)
            worker.backlog = float(read_int(fields, "pre", default=0, high=10**12))
            worker.rate = float(read_int(fields, "rate", default=0, high=10**9))
            stuck, worker.halted = read_bool(fields, "stuck", default=False), read_bool(fields, "halted", default=False)
        except MalformedEnvelope as error:
            raise ProtocolError(f"bad LOAD: {error.message}") from None
        worker.elsewhere = max(0, running + waiting - yours)
        worker.waiting = waiting
        worker.load_number = number
        worker.load_at = self._clock.monotonic()
        worker.counted(last)
        if stuck != worker.stuck:
            worker.stuck = stuck
            if self._suspect(worker):
                self._index()

    def on_prefix(self, link: Link, fields: dict[str, Any]) -> None:
        worker = self.workers.get(link.node_id)
        if worker is not None:
            self.prefixes.take(worker, parse_news(fields), now=self._clock.monotonic())

    def on_drain(self, link: Link) -> None:
        self._index()

    def on_frame(self, link: Link, kind: Frame, fields: dict[str, Any]) -> None:
        pass  # said between proxies

    def on_open(self, stream: IncomingStream, head: dict[str, Any]) -> None:
        raise ProtocolError("a proxy serves no streams")

    def _forget(self, worker: Worker | None) -> None:
        if worker is not None:
            self.prefixes.leave(worker)

    def _index(self) -> None:
        index: dict[tuple[str, str], list[Worker]] = {}
        groups: dict[frozenset[str], list[Worker]] = {}
        for worker in self.workers.values():
            worker.listed = False
            if worker.routable:
                groups.setdefault(_served(worker), []).append(worker)
                for entry in worker.record.models:
                    for name in (entry.name, *entry.adapters):
                        for task in entry.tasks:
                            index.setdefault((name, task), []).append(worker)
        self._by_model = {key: _fit(workers) for key, workers in index.items()}
        self._groups = groups
        for workers in self._by_model.values():
            for worker in workers:
                worker.listed = True


def _fit(workers: list[Worker]) -> list[Worker]:
    """Those to be trusted; failing that, those that only did badly; failing that, all: better than to turn everybody away."""
    return [worker for worker in workers if worker.in_service] or [worker for worker in workers if not worker.suspect] or workers


def _served(worker: Worker) -> frozenset[str]:
    return frozenset(entry.name for entry in worker.record.models)
