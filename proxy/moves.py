"""Streams that lose their worker in the middle: what is kept of them, and whether they go on at another.

A worker tells with each event what a successor would need (its trail, which is kept here and not looked into). When the worker is lost,
the request goes to another one of the same model, with the trail, and what that one says is passed on as if nothing had happened. What
cannot be gone on with exactly is not gone on with: its client is told why, in-band.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from mesh.claims import read_int, read_str
from mesh.errors import MalformedEnvelope, MeshError, NotMovable, NotResumed, NoWorker, Overloaded, ProtocolError, WorkerError
from mesh.link.link import MAX_TRAIL_BYTES
from proxy.fleet import Fleet, Worker
from proxy.openai import Call
from proxy.retry import RetryPolicy

log = structlog.get_logger(__name__)

FIXED = {
    "echo": "it repeats its prompt",
    "engine": "the worker's engine does not tell token ids, or is not asked for them",
    "guided": "its answer is held to a grammar",
    "large": "it has become too long",
    "logprobs": "it has log probabilities",
    "media": "it has images or audio",
    "n": "it has several answers in one",
    "parameter": "it has a parameter whose effect on the rest of an answer is not known",
    "penalty": "it has a penalty on what has been said",
    "prompts": "it has several prompts",
    "special": "it shows special tokens",
    "stop": "it has too many or too long stop strings",
    "suffix": "it has a suffix",
    "task": "it is neither a chat nor a text completion",
    "tools": "it has tools",
}
"""Why a stream cannot move, by the word that workers have for it. Words that are not here count as ``other``."""
OTHER = "other"
WAIT_S = 5.0
"""How long a stream waits for a worker that could go on with it: as long as one takes to come back from a restart."""
LOOK_S = 0.1
AGAIN_S = 0.5
"""After so long the worker that failed may have the stream back: its engine has been started again."""


class Passage:
    """One stream's way over workers. ``trail`` grows as the stream does; ``cause`` is what lost it its last worker."""

    __slots__ = (
        "_moves",
        "_request_id",
        "asked",
        "cause",
        "digest",
        "failed",
        "fixed",
        "lost_at",
        "refused",
        "tokens",
        "told",
        "trail",
        "worker",
    )

    def __init__(self, moves: Moves, request_id: str) -> None:
        self._moves = moves
        self._request_id = request_id
        self.trail = bytearray()
        self.fixed = ""
        self.told = 0
        self.asked: set[bytes] = set()
        self.failed = self.refused = 0
        self.tokens = 0
        self.cause: MeshError | None = None
        self.worker: Worker | None = None
        self.digest = ""
        self.lost_at = 0.0

    def begin(self, head: Mapping[str, Any]) -> None:
        """A worker's HEAD says why the stream cannot move, if it cannot."""
        try:
            word = read_str(head, "fixed", default="", max_len=64)
        except MalformedEnvelope:
            word = OTHER
        self.fixed = word if not word or word in FIXED else OTHER

    def resume(self, head: Mapping[str, Any], worker: Worker) -> None:
        """Another worker's HEAD: it goes on. Raises `ProtocolError` if it does not say so: it might begin anew."""
        try:
            self.tokens = read_int(head, "resumed", high=10**9)
        except MalformedEnvelope:
            raise ProtocolError("HEAD of a stream that does not say that it goes on") from None
        if head.get("status") != 200 or head.get("type") != "text/event-stream" or head.get("length") is not None:
            raise ProtocolError("HEAD of another answer than the one that was begun")
        self._moves.arrived(self, worker, self._request_id)


class Moves:
    """Decides where streams go that have lost their worker, and counts them: ``moved`` by what lost it, ``stuck`` by what kept it."""

    def __init__(self, fleet: Fleet, *, enabled: bool, policy: RetryPolicy | None = None) -> None:
        self.moved: Counter[str] = Counter()
        self.stuck: Counter[str] = Counter()
        self.tokens = 0
        self._fleet = fleet
        self._enabled = enabled
        self._policy = policy or RetryPolicy()

    def passage(self, call: Call, request_id: str) -> Passage | None:
        """For a request whose answer is to be followed."""
        return Passage(self, request_id) if self._enabled and call.stream else None

    async def lost(
        self, passage: Passage | None, call: Call, worker: Worker, error: MeshError, *, note: Callable[[], None]
    ) -> frozenset[bytes] | MeshError:
        """An answer that has begun lost its worker, or was not taken by one: whom to avoid from here on, or what to tell its client.

        ``note`` is called before another worker is looked for, which may take long: what was delivered is to be on disk by then.
        """
        if passage is None or not isinstance(error, WorkerError | NotResumed | Overloaded | NoWorker):
            return error
        self._count(passage, call, worker, error)
        stuck = self._obstacle(passage, error)
        if stuck is None:
            note()
            avoid = await self._others(passage, call, wait_s=0.0 if isinstance(error, NotResumed) else WAIT_S)
            if avoid is not None:
                return avoid
            if isinstance(error, NotResumed):
                return self._refused(passage, error)
            stuck = NoWorker(f"{_why(passage, error)}, and no other worker serves the same model", retry_after_s=1.0)
            self.stuck[NoWorker.code] += 1
        return stuck

    def arrived(self, passage: Passage, worker: Worker, request_id: str) -> None:
        """Another worker goes on."""
        code = passage.cause.code if passage.cause is not None else OTHER
        self.moved[code] += 1
        self.tokens += passage.tokens
        log.info(
            "stream.moved",
            request_id=request_id,
            worker=_name(passage.worker),
            to=_name(worker),
            code=code,
            tokens=passage.tokens,
            after_ms=round((asyncio.get_running_loop().time() - passage.lost_at) * 1000),
        )

    def counts(self) -> dict[str, int]:
        """For people."""
        return {"moved": self.moved.total(), "stuck": self.stuck.total(), "tokens": self.tokens}

    def _count(self, passage: Passage, call: Call, worker: Worker, error: MeshError) -> None:
        """A worker that brought the stream on at all begins the count of failures anew."""
        if len(passage.trail) > passage.told or passage.cause is None:
            passage.told = len(passage.trail)
            passage.failed = passage.refused = 0
            passage.asked.clear()
            passage.cause, passage.worker, passage.digest = error, worker, _digest(worker, call.model)
            passage.lost_at = asyncio.get_running_loop().time()
        else:
            passage.asked.add(worker.node_id)
            passage.refused += isinstance(error, Overloaded)
            passage.failed += not isinstance(error, Overloaded)

    def _obstacle(self, passage: Passage, error: MeshError) -> MeshError | None:
        fixed = passage.fixed or ("" if passage.trail else "engine") or ("large" if len(passage.trail) >= MAX_TRAIL_BYTES else "")
        if fixed:
            self.stuck[fixed] += 1
            why = FIXED.get(fixed, "its worker said so")
            return NotMovable(f"{_why(passage, error)}, and a stream like this cannot go on at another worker: {why}")
        if self._policy.moves_on(error, failed=passage.failed, refused=passage.refused):
            return None
        if isinstance(error, NotResumed):
            return self._refused(passage, error)
        self.stuck[error.code] += 1
        return error

    def _refused(self, passage: Passage, error: NotResumed) -> NotResumed:
        self.stuck[error.code] += 1
        return NotResumed(f"{_why(passage, error)}, and no other worker could go on with the stream: {error.message}")

    async def _others(self, passage: Passage, call: Call, *, wait_s: float) -> frozenset[bytes] | None:
        """Whom to avoid so that one of the same model is left; None if nobody comes in ``wait_s``."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            candidates = self._fleet.candidates(call.model, call.task)
            avoid = passage.asked | {worker.node_id for worker in candidates if _digest(worker, call.model) != passage.digest}
            waited = loop.time() - began
            if passage.worker is not None and waited < AGAIN_S:
                avoid.add(passage.worker.node_id)
            if any(worker.node_id not in avoid for worker in candidates):
                return frozenset(avoid)
            if waited >= wait_s:
                return None
            await asyncio.sleep(LOOK_S)


def _digest(worker: Worker, model: str) -> str:
    return next((entry.digest for entry in worker.record.models if model == entry.name or model in entry.adapters), "")


def _why(passage: Passage, error: MeshError) -> str:
    return (passage.cause or error).message.rstrip(".")


def _name(worker: Worker | None) -> str:
    return worker.node_id.hex()[:12] if worker is not None else ""
