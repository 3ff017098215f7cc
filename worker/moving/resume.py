"""Going on with a stream that another worker began, so that the client reads one answer.

The engine here tokenizes the original request by itself, is given the prompt's ids and those of the answer so far as a completion's
prompt, and what it says is put into the shape that the client is reading. What cannot be exact is refused: the prompt must come out as it
was there, and the text of the ids so far as the client has got it (`worker.moving.spoken`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from mesh.errors import EngineUnavailable, MeshError, NotResumed, RequestError
from mesh.link.frames import MAX_TRAIL_PIECE_BYTES
from worker.engine.base import ModelSpec, Task, TokenIds
from worker.moving import trail as trails
from worker.moving.ids import WISHES, read_event
from worker.moving.movable import CARRIED, MAX_STOP_CHARS, Asked, read_asked
from worker.moving.spoken import Ask, Tokenizer, so_far
from worker.moving.tracked import Piece, join_pieces
from worker.moving.trail import MAX_GAP_BYTES, Trail, hash_prompt
from worker.usage import EventStream, Usage, read_answer


@dataclass(frozen=True, slots=True)
class Trailed:
    """A stream to go on with: its trail, and the body of its request."""

    trail: Trail
    body: bytes | bytearray


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What is still to be said. ``ids`` are the answer's so far, ``text`` what a client is shown of them, with the end that this one
    lacks; ``left`` is how many tokens the answer may still get, None as many as the context holds."""

    task: Task
    way: TokenIds
    engine_model: str
    trailed: Trailed
    asked: Asked
    prompt_ids: list[int]
    ids: list[int]
    text: str
    left: int | None

    @property
    def held(self) -> str:
        """The end of the text that the client has not got."""
        return self.text[self.trailed.trail.chars :]

    def request(self) -> bytes:
        """What the engine is asked: a completion of the ids so far."""
        given: Mapping[str, Any] = msgspec.json.decode(self.trailed.body, type=dict[str, msgspec.Raw])
        fields: dict[str, Any] = {name: given[name] for name in CARRIED if name in given}
        fields |= WISHES[self.way, Task.COMPLETIONS]
        if self.left is not None:
            fields["max_tokens"] = self.left
        fields |= {"model": self.engine_model, "prompt": self.prompt_ids + self.ids, "stream": True}
        return msgspec.json.encode({**fields, "stream_options": {"include_usage": True}})


async def continuation(trailed: Trailed, task: Task, model: ModelSpec, engine_model: str, ask: Ask) -> Continuation:
    """What is still to be said after a trail. Raises `NotResumed` if it cannot be said exactly."""
    way, trail, body = model.token_ids, trailed.trail, trailed.body
    asked = read_asked(body, task)
    reason = trail.fixed or (asked if isinstance(asked, str) else "" if way is not None else "engine")
    if reason or isinstance(asked, str) or way is None:
        raise NotResumed(f"The stream cannot go on at another worker ({reason})")
    going_on = Continuation(
        task=task, way=way, engine_model=engine_model, trailed=trailed, asked=asked, prompt_ids=[], ids=trail.ids, text="", left=0
    )
    if trail.finished:
        return going_on
    tokenizer = Tokenizer(way, ask, model=engine_model)
    prompt_ids = await tokenizer.prompt(body, task)
    begin = trail.begin
    if len(prompt_ids) != begin.prompt_tokens or (begin.prompt_hash and hash_prompt(prompt_ids) != begin.prompt_hash):
        raise NotResumed("The prompt has other tokens at this worker than at the one that was lost")
    ids, text = await so_far(trail, prompt_ids, tokenizer, asked)
    used = len(ids)
    bounds = (asked.limit(way), used), (model.context_tokens, len(prompt_ids) + used)
    limits = [most - so_far for most, so_far in bounds if most]
    if not limits and way is TokenIds.VLLM:
        raise NotResumed("This worker does not know how long its context is")
    return replace(going_on, prompt_ids=prompt_ids, ids=ids, text=text, left=min(limits, default=None))


def not_resumed(error: MeshError) -> MeshError:
    """An engine's refusal of what the client never asked for is no mistake of the client's."""
    return NotResumed(f"This worker's engine refused to go on: {error.message}") if isinstance(error, RequestError) else error


class StopFilter:
    """Finds stop strings in a text that comes in pieces, and holds back what may be the beginning of one.

    ``shown``: clients get the stop string as well. ``before`` is text that they have got already, in which one may have begun.
    """

    def __init__(self, stops: tuple[str, ...], *, shown: bool, before: str = "") -> None:
        self._stops = stops
        self._shown = shown
        self._held = before
        self._sent = len(before)
        """So many of the first characters held are only there to be compared."""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What may go out; nothing more after a stop string."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        found = min(((at, len(stop)) for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped = True
            self._held = ""
            return text[self._sent : found[0] + (found[1] if self._shown else 0)]
        keep = max(
            (size for stop in self._stops for size in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:size])), default=0
        )
        end, sent = len(text) - keep, self._sent
        self._held, self._sent = text[end:], max(0, sent - end)
        return text[sent:end]

    def flush(self) -> str:
        """The rest, once it is clear that no stop string will come of it."""
        rest, self._held = self._held[self._sent :], ""
        return rest


class ResumedEvents:
    """Implements `worker.moving.relay.Events`: an engine's completion as the rest of the answer that the client is reading.

    ``over``: everything has been said, even though the engine may have more to say.
    """

    def __init__(self, going_on: Continuation) -> None:
        asked, self._trail_before = going_on.asked, going_on.trailed.trail
        self.usage = Usage()
        self.complete = False
        self.over = False
        self.failure: bytes | None = None
        self._going_on = going_on
        self._cutter = EventStream(show_usage=True)
        shown = bool(asked.include_stop_str_in_output)
        before = going_on.text[: self._trail_before.chars] if shown else ""
        self._filter = StopFilter(asked.stops, shown=shown, before=before[-MAX_STOP_CHARS:])
        self._seen = 0
        self._cached = 0
        self._finish: str | None = None
        self._trail = b""
        begin = self._trail_before.begin
        kind = "chat.completion.chunk" if going_on.task is Task.CHAT else "text_completion"
        self._envelope = {"id": begin.id, "object": kind, "created": begin.created, "model": begin.model}

    def begin(self) -> list[Piece]:
        """What can be said before the engine is asked. If that is all, `over` is set."""
        going_on, trail = self._going_on, self._trail_before
        if trail.finished:
            return join_pieces(self._end(None))
        if len(going_on.ids) != len(trail.ids):
            self._trail = trails.encode_cut(len(going_on.ids))
        pieces = list(self._say(going_on.held, 0, ()))
        if self._filter.stopped:
            pieces += self._end("stop")
        elif going_on.left is not None and going_on.left <= 0:
            pieces += self._end("length")
        return join_pieces(pieces)

    @property
    def so_far(self) -> Usage:
        base = len(self._going_on.ids)
        return Usage(prompt=self._trail_before.begin.prompt_tokens + base, completion=self._seen, cached=self._cached, resumed=base)

    def usual(self, data: bytes) -> None:
        """Each event is written anew."""

    def feed(self, data: bytes) -> list[Piece]:
        """Raises `ValueError` if one event grows too large, `EngineUnavailable` if the engine's answer is none."""
        return join_pieces(self._pieces(self._cutter.cut(data)))

    def close(self) -> list[Piece]:
        return join_pieces(self._pieces(self._cutter.rest()))

    def _pieces(self, whole: bytes) -> Iterator[Piece]:
        for line in whole.split(b"\n"):
            if line.startswith(b"data:") and not self.over and self.failure is None:
                yield from self._event(line[5:].strip())

    def _event(self, data: bytes) -> Iterator[Piece]:
        if data == b"[DONE]":
            if self._finish is None:
                raise EngineUnavailable("The worker's engine ended its answer in the middle")
            yield from self._end(self._finish)
            return
        try:
            told = read_event(self._going_on.way, data, self._seen)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise EngineUnavailable("The worker's engine sent something that is no answer") from None
        if told.odd == "error":
            self.failure = data
            return
        if told.odd:
            raise EngineUnavailable("The worker's engine broke its answer off")
        if b'"usage"' in data:
            usage, _ = read_answer(data)
            if usage is not None:
                self._cached, self._seen = usage.cached, max(self._seen, usage.completion)
        if told.usage:
            return
        self._seen += told.count
        self._finish = told.finish or self._finish
        yield from self._say(told.text, told.count, told.ids)
        if self._filter.stopped:
            yield from self._end("stop")

    def _say(self, text: str, count: int, ids: Sequence[int]) -> Iterator[Piece]:
        out = self._filter.feed(text)
        if count == len(ids):
            self._trail += trails.encode_event(len(out), ids) if out or ids else b""
        elif len(ids) == 1 and 1 < count <= MAX_GAP_BYTES and 0 < len(text) <= MAX_TRAIL_PIECE_BYTES:
            self._trail += trails.encode_gap(len(out), count, ids[0], text)
        else:
            self._trail += trails.encode_fixed("shape")
        if out or len(self._trail) > MAX_TRAIL_PIECE_BYTES // 2:
            trail, self._trail = self._trail, b""
            yield trail, self._chunk(out) if out else b""

    def _end(self, finish: str | None) -> Iterator[Piece]:
        """All that comes after the text, at once: why it ended, usage if it is shown, and the stream's proper end. None: why has been
        said.
        """
        going_on, before, begin = self._going_on, self._trail_before, self._trail_before.begin
        base = len(going_on.ids)
        completion, cached = base + self._seen, min(begin.prompt_tokens, self._cached)
        self.usage = Usage(prompt=begin.prompt_tokens + base, completion=self._seen, cached=self._cached, resumed=base)
        self.complete = self.over = True
        if finish is not None:
            rest = self._filter.flush()
            yield self._trail + trails.encode_event(len(rest), ()) + trails.FINISH, self._chunk(rest, finish)
        if before.done:
            return
        if going_on.asked.show_usage and not before.usage_sent:
            counts: dict[str, Any] = {"prompt_tokens": begin.prompt_tokens, "total_tokens": begin.prompt_tokens + completion}
            counts["completion_tokens"] = completion
            if cached:
                counts["prompt_tokens_details"] = {"cached_tokens": cached}
            yield trails.USAGE, _event_bytes({**self._envelope, "choices": [], "usage": counts})
        yield trails.DONE, b"data: [DONE]\n\n"

    def _chunk(self, text: str, finish: str | None = None) -> bytes:
        choice: dict[str, Any] = {"index": 0}
        if self._going_on.task is Task.CHAT:
            choice["delta"] = {"content": text} if text or finish is None else {}
        else:
            choice["text"] = text
        return _event_bytes({**self._envelope, "choices": [{**choice, "logprobs": None, "finish_reason": finish}]})


def _event_bytes(fields: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"
