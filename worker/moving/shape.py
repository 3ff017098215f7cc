"""What one stream's usual events look like, so that the next one need not be parsed. Pure, and nothing but speed.

One token of a stream looks like the next but for its text, its id and, with llama.cpp, its timings. A shape is the bytes around those. What
stands between them must itself be one JSON value, whole; so an event that fits is read as a parser reads it, or is not cut at all. That the
values are where they seem to be is proven on an event that no engine sent: an engine may say anything twice, or in odd places.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import msgspec

from worker.engine.base import TokenIds
from worker.moving.ids import Logprobs, Timings, Told, read_event

PREFIX = b"data: "
END = b"\n\n"
_QUOTE = 34
_PROBE, _PROBE_TEXT, _PROBE_ID = b'"\\u2713 or\\tnot"', "\u2713 or\tnot", 1234567
_decode_text = msgspec.json.Decoder(str).decode
_decode_id = msgspec.json.Decoder(int).decode
_decode_logprobs = msgspec.json.Decoder(Logprobs).decode
_decode_timings = msgspec.json.Decoder(Timings).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_choices = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode

Cut = tuple[int, int, bytes]
"""How many characters of text, the token's id, and the event as it would have been had nobody asked for ids."""


class Shape(Protocol):
    def cut(self, data: bytes, seen: int) -> Cut | None:
        """One event of this shape, its blank line with it, after ``seen`` tokens; None for anything else."""
        ...


class VllmShape(NamedTuple):
    """``before`` TEXT ``between`` ID ``after``; TEXT begins at ``skip``, ID ends ``end`` bytes from the right, and ``hidden`` is what the
    client sees after TEXT.
    """

    before: bytes
    skip: int
    between: bytes
    after: bytes
    end: int
    hidden: bytes

    def cut(self, data: bytes, seen: int) -> Cut | None:
        before, skip, between, after, end, hidden = self
        head, _, tail = data.rpartition(between)
        if not head.startswith(before) or not tail.endswith(after):
            return None
        try:
            return len(_decode_text(head[skip:])), _decode_id(tail[:end]), head + hidden
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None


class LlamaShape(NamedTuple):
    """``before`` TEXT ``between`` LOGPROBS ``middle`` TIMINGS ``after``, as in `VllmShape`."""

    before: bytes
    skip: int
    between: bytes
    middle: bytes
    after: bytes
    end: int
    hidden: bytes

    def cut(self, data: bytes, seen: int) -> Cut | None:
        before, skip, between, middle, after, end, hidden = self
        head, _, rest = data.partition(between)
        logprobs, _, timings = rest.rpartition(middle)
        if not head.startswith(before) or not timings.endswith(after) or head[-1] != _QUOTE or head[skip : skip + 1] != b'"':
            return None
        try:
            content = _decode_logprobs(logprobs).content
            if content is None or len(content) != 1 or _decode_timings(timings[:end]).predicted_n != seen + 1:
                return None
            return len(_decode_text(head[skip:])), content[0].id, head + hidden
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None


def learn_shape(way: TokenIds, event: bytes, told: Told, seen: int) -> Shape | None:
    """What an event looks like of which a parser said ``told`` after ``seen`` tokens; None if it is not a usual one."""
    text = told.text
    if not event.startswith(PREFIX) or b"\n" in event or told.count != 1 or len(told.ids) != 1 or told.finish or told.prompt_ids:
        return None
    if not text or not (text.isascii() and text.isprintable()) or '"' in text or "\\" in text:
        return None
    find = _find_vllm if way is TokenIds.VLLM else _find_llama
    found = find(event, b':"' + text.encode() + b'"', told, seen)
    if found is None:
        return None
    shape, probe = found
    try:
        proof = read_event(way, probe[len(PREFIX) : -len(END)], seen)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    begins, shown = shape.before + _PROBE, PREFIX + proof.shown + END
    same = (proof.text, list(proof.ids), proof.count, proof.odd) == (_PROBE_TEXT, [_PROBE_ID], 1, "")
    if not same or proof.finish or proof.prompt_ids or not shown.startswith(begins):
        return None
    shape = shape._replace(hidden=shown[len(begins) :])
    return shape if shape.cut(event + END, seen) == (len(text), told.ids[0], PREFIX + told.shown + END) else None


def _find_vllm(event: bytes, said: bytes, told: Told, seen: int) -> tuple[VllmShape, bytes] | None:
    """A shape, yet without what is shown of it, and an event of that shape."""
    before, found, rest = event.rpartition(said)
    between, listed, after = rest.partition(b'"token_ids":[%d]' % told.ids[0])
    if not found or not listed:
        return None
    before, between, after = before + b":", between + b'"token_ids":[', b"]" + after + END
    probe = b"".join((before, _PROBE, between, b"%d" % _PROBE_ID, after))
    return VllmShape(before, len(before), between, after, -len(after), b""), probe


def _find_llama(event: bytes, said: bytes, told: Told, seen: int) -> tuple[LlamaShape, bytes] | None:
    fields = _decode_fields(event[len(PREFIX) :])
    logprobs = b'"logprobs":' + bytes(_decode_choices(fields["choices"])[0].get("logprobs", b""))
    timings = b'"timings":' + bytes(fields.get("timings", b""))
    head, listed, rest = event.partition(logprobs)
    middle, timed, after = rest.partition(timings)
    before, found, between = head.rpartition(said)
    if not found or not listed or not timed:
        return None
    before, between, middle, after = before + b":", between + b'"logprobs":', middle + b'"timings":', after + END
    values = b'{"content":[{"id":%d}]}' % _PROBE_ID, b'{"predicted_n":%d}' % (seen + 1)
    probe = b"".join((before, _PROBE, between, values[0], middle, values[1], after))
    return LlamaShape(before, len(before), between, middle, after, -len(after), b""), probe
