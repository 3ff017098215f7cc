"""An engine's events on their way to the client, and the trail that goes with them.

`feed` gives pieces of (trail, bytes): the bytes are what the client would have been sent had nobody asked for token ids, the trail what a
successor needs if they were the last bytes to arrive. Both travel in one frame, so a client never has one without its proxy having the
other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from mesh.errors import EngineUnavailable
from mesh.link.frames import MAX_TOKENS_DATA_BYTES, MAX_TRAIL_PIECE_BYTES
from worker.engine.base import TokenIds
from worker.moving import trail as trails
from worker.moving.ids import Told, read_event
from worker.moving.shape import END, PREFIX, Shape, learn_shape
from worker.moving.trail import MAX_GAP_BYTES, MAX_NAME, MAX_TOKEN_ID, Begin
from worker.usage import EventStream, Usage, read_answer

Piece = tuple[bytes, bytes]
_LINE_END = 10


class TrackedEvents:
    """Implements `worker.moving.relay.Events`. Takes the ids off a stream that may move. What cannot be gone on with any more is said in
    the trail, and passed on all the same.
    """

    def __init__(self, way: TokenIds, *, show_usage: bool) -> None:
        self.usage = Usage()
        self.complete = False
        self.over = False
        self.failure: bytes | None = None
        self._way = way
        self._show_usage = show_usage
        self._cutter = EventStream(show_usage=True)
        self._begun = False
        self._fixed = False
        self._seen = self._prompt = 0
        self._last: Piece | None = None
        self._shape: Shape | None = None
        self._quick: Shape | None = None
        """The shape, as long as nothing waits for what comes next."""

    @property
    def so_far(self) -> Usage:
        return Usage(prompt=self._prompt, completion=self._seen)

    def usual(self, data: bytes) -> Piece | None:
        """One event that looks like those before it, without a closer look; None for anything else, which is to be `feed`. Pure speed: the
        two give the same."""
        if self._quick is None or data.find(_LINE_END) != len(data) - len(END):
            return None  # more than one line: several events, or one of several lines
        cut = self._quick.cut(data, self._seen)
        if cut is None:
            return None
        chars, token, shown = cut
        if not 0 <= token <= MAX_TOKEN_ID or len(shown) > MAX_TOKENS_DATA_BYTES:
            return None
        self._seen += 1
        return trails.encode_token(chars, token), shown

    def feed(self, data: bytes) -> list[Piece]:
        """Raises `ValueError` if one event grows too large."""
        several = self._several(data) if self._quick is not None else None
        if several is not None:
            return [several]
        whole = self._cutter.cut(data)
        pieces = join_pieces(self._pieces(whole))
        self._quick = None if self._cutter.waiting or self._last is not None or self.failure is not None else self._shape
        return pieces

    def close(self) -> list[Piece]:
        """A last event whose closing blank line is missing, if it is the stream's proper end."""
        pieces = join_pieces(self._pieces(self._cutter.rest()))
        return pieces if self.complete else []

    def _several(self, data: bytes) -> Piece | None:
        """Several usual events in one read: they come so where the worker cannot keep up, and must not cost more each then."""
        *events, rest = data.split(END)
        if rest or len(events) < 2:
            return None
        seen, pieces = self._seen, [self.usual(event + END) for event in events]
        trail, whole = b"".join([piece[0] for piece in pieces if piece]), b"".join([piece[1] for piece in pieces if piece])
        if None in pieces or len(trail) > MAX_TRAIL_PIECE_BYTES or len(whole) > MAX_TOKENS_DATA_BYTES:
            self._seen = seen
            return None
        return trail, whole

    def _pieces(self, whole: bytes) -> Iterator[Piece]:
        if b"\r" in whole:
            whole = whole.replace(b"\r\n", b"\n")
        for event in whole.split(END):
            if self.failure is not None:
                return
            if not event:
                continue
            last, self._last = self._last, None
            if last is not None:
                yield last
            yield from self._piece(event)

    def _piece(self, event: bytes) -> Iterator[Piece]:
        data = event[len(PREFIX) :] if event.startswith(PREFIX) and b"\n" not in event else _data_of(event)
        if data == b"[DONE]":
            self.complete = True
            yield b"" if self._fixed else trails.DONE, event + END
            return
        try:
            if not data:
                event.decode()  # clients read comments as text, too
            told = read_event(self._way, data, self._seen) if data else Told(data)
        except (msgspec.ValidationError, RecursionError):
            told = Told(data, odd="shape")
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise EngineUnavailable("The worker's engine sent something that is no answer") from None
        if told.odd == "error":
            self.failure = data
            return
        if told.usage or b'"usage"' in data:
            usage, _ = read_answer(data)
            self.usage = usage or self.usage
            if told.usage and not self._show_usage:
                return
        self._seen += told.count
        shown = (event if told.shown is data else PREFIX + told.shown) + END
        if self._fixed:
            yield b"", shown
            return
        if not self._begun and (begin := self._begin(told)):
            yield begin, b""
        record = self._record(told) if len(shown) <= MAX_TOKENS_DATA_BYTES else None
        if record is None or len(record) > MAX_TRAIL_PIECE_BYTES:
            self._fixed = True
            self._shape = self._quick = None
            yield trails.encode_fixed(told.odd or "shape") if self._begun else b"", b""
            record = b""
        elif self._shape is None or self._shape.cut(event + END, self._seen - told.count) is None:
            self._shape = learn_shape(self._way, event, told, self._seen - told.count) or self._shape
        if told.finish and not self._fixed:
            # With what comes next: llama.cpp counts a last token that it tells nowhere, so usage must not be left to a successor.
            self._last = record, shown
        else:
            yield record, shown

    def _record(self, told: Told) -> bytes | None:
        """What the trail says of an event; None if it cannot be gone on with after this."""
        if told.usage:
            return trails.USAGE
        if not (told.text or told.count or told.odd or told.finish):
            return b""
        record = self._event(told) if self._begun else None
        return record + trails.FINISH if record is not None and told.finish else record

    def _begin(self, told: Told) -> bytes:
        """The stream itself: as soon as its prompt is known, which is with the first token at the latest."""
        count, ids = told.prompt_tokens, told.prompt_ids or ()
        if count is None or not 0 < count < 2**31 or not 0 <= told.created < 2**53:
            return b""
        if not all(name.isprintable() and len(name) <= MAX_NAME for name in (told.id, told.model)) or not _are_tokens(ids):
            return b""
        self._begun, self._prompt = True, count
        known = trails.hash_prompt(ids) if ids else b""
        return trails.encode_begin(Begin(id=told.id, model=told.model, created=told.created, prompt_tokens=count, prompt_hash=known))

    def _event(self, told: Told) -> bytes | None:
        if told.odd or not _are_tokens(told.ids):
            return None
        if told.count == len(told.ids):
            return trails.encode_event(len(told.text), told.ids)
        if 1 < told.count <= MAX_GAP_BYTES and len(told.ids) == 1 and 0 < len(told.text) <= MAX_TRAIL_PIECE_BYTES:
            return trails.encode_gap(len(told.text), told.count, told.ids[0], told.text)
        return None


def _are_tokens(ids: Sequence[int]) -> bool:
    return all(0 <= token <= MAX_TOKEN_ID for token in ids)


def join_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """As few as fit into frames. An event too long for one stays in a piece of its own, without trail.

    What begins a stream may be longer than one frame's trail, and goes ahead of its first event; nothing else ever does.
    """
    joined: list[Piece] = []
    for trail, data in pieces:
        if joined:
            before, already = joined[-1]
            if len(before) + len(trail) <= MAX_TRAIL_PIECE_BYTES and len(already) + len(data) <= MAX_TOKENS_DATA_BYTES:
                joined[-1] = before + trail, already + data
                continue
        while len(trail) > MAX_TRAIL_PIECE_BYTES:
            joined.append((trail[:MAX_TRAIL_PIECE_BYTES], b""))
            trail = trail[MAX_TRAIL_PIECE_BYTES:]
        joined.append((trail, data))
    return joined


def _data_of(event: bytes) -> bytes:
    return b"\n".join(line[5:].strip() for line in event.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data:"))
