"""What has been said: the ids of an answer so far, beside the text of it that its client has got.

The engine here is asked for the text of the ids, which shows more than a client is shown: half characters, what is held back for a stop
string, special tokens. All of that is accounted for, or the stream is not gone on with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain, combinations
from typing import Any

import msgspec

from mesh.errors import NotResumed
from worker.engine.base import Task, TokenIds
from worker.moving.movable import Asked
from worker.moving.trail import MAX_TOKEN_ID, Trail

CONTEXT_TOKENS = 8
"""So many tokens of the prompt stand before the answer's when their text is asked for: some tokenizers write the first of a text
differently. vLLM's own detokenizer takes 6."""
INCOMPLETE_TOKENS = 4
"""At most so many tokens at the end of an answer hold no complete character."""
HIDDEN_TOKENS, EVENT_TOKENS = 32, 12
"""With more different special tokens in an answer a stream is not gone on with, nor with more different tokens in an event that has one."""
_REPLACEMENT = "\ufffd"
_DIFFERENT = "The text of the answer so far comes out differently at this worker"

Ask = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
"""POST to a route of the engine; the answer's JSON. Raises `NotResumed` if the engine refuses."""


class Tokenizer:
    """An engine's own, over its HTTP routes."""

    def __init__(self, way: TokenIds, ask: Ask, *, model: str) -> None:
        self._way = way
        self._ask = ask
        self._model = model

    async def prompt(self, body: bytes | bytearray, task: Task) -> list[int]:
        """The ids of a request's prompt, as the engine would compute it."""
        fields: dict[str, Any] = msgspec.json.decode(body)
        prompt = fields.get("prompt")
        if task is Task.COMPLETIONS and isinstance(prompt, list):
            return _ids(prompt)
        if self._way is TokenIds.VLLM:
            return _ids((await self._ask("/tokenize", {**fields, "model": self._model})).get("tokens"))
        if task is Task.CHAT:
            prompt = (await self._ask("/apply-template", fields)).get("prompt")
        return await self._of_text(prompt, add_special=True)

    async def pieces(self, text: str) -> list[int]:
        """The ids of a piece out of the middle of a text."""
        if self._way is TokenIds.VLLM:
            fields = {"model": self._model, "prompt": text, "add_special_tokens": False}
            return _ids((await self._ask("/tokenize", fields)).get("tokens"))
        return await self._of_text(text, add_special=False)

    async def text(self, ids: list[int]) -> str:
        """The text of ids; special tokens are text, too."""
        fields = {"tokens": ids} | ({"model": self._model} if self._way is TokenIds.VLLM else {})
        answer = await self._ask("/detokenize", fields)
        text = answer.get("prompt" if self._way is TokenIds.VLLM else "content")
        if not isinstance(text, str):
            raise NotResumed("This worker's engine does not tell the text of tokens")
        return text

    async def _of_text(self, text: Any, *, add_special: bool) -> list[int]:
        return _ids((await self._ask("/tokenize", {"content": text, "add_special": add_special, "parse_special": True})).get("tokens"))


def _ids(found: Any) -> list[int]:
    if not isinstance(found, list) or not all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in found):
        raise NotResumed("This worker's engine does not tell the tokens of a text")
    return found


async def so_far(trail: Trail, prompt_ids: list[int], tokenizer: Tokenizer, asked: Asked) -> tuple[list[int], str]:
    """The ids to go on from, and what clients are shown of them, which may be more than this one has got. Raises `NotResumed` if that
    cannot be told exactly.

    Tokens that no text came of are left out: the client has seen nothing of them, and they are made again. Only where the engine may have
    held text back for a stop string do they count, since the client may have seen a part of one.
    """
    ids = list(trail.ids if asked.stops and trail.chars else trail.ids[: trail.settled])
    for gap in trail.gaps:
        if gap.at + gap.count > len(ids):
            break
        found = await tokenizer.pieces(gap.text)
        if len(found) != gap.count or found[-1] != trail.ids[gap.at + gap.count - 1]:
            raise NotResumed("The tokens of a piece of the answer cannot be told from its text")
        ids[gap.at : gap.at + gap.count] = found
    spoken = _Spoken(trail, ids, asked, tokenizer, prompt_ids[-CONTEXT_TOKENS:])
    return await spoken.matched()


class _Spoken:
    """Puts ``ids`` and the trail's count of characters side by side."""

    def __init__(self, trail: Trail, ids: list[int], asked: Asked, tokenizer: Tokenizer, context: list[int]) -> None:
        self._chars = trail.chars
        self._marks = [*trail.marks, (len(ids), trail.chars)]
        self._ids = ids
        self._stops = asked.stops
        self._most_held = 0 if asked.include_stop_str_in_output else max(map(len, asked.stops), default=1) - 1
        self._tokenizer = tokenizer
        self._context = context
        self._before: str | None = None
        self._hidden: set[int] = set()
        self._looked = 0
        """So many of the marks are known to fit."""

    async def matched(self) -> tuple[list[int], str]:
        incomplete = 0
        while True:
            text = await self._text(self._ids)
            if self._is_held(text[self._chars :], len(text)):
                return self._ids, text
            if text.endswith(_REPLACEMENT) and incomplete < INCOMPLETE_TOKENS:
                incomplete += 1
                self._ids.pop()
            elif len(self._hidden) >= HIDDEN_TOKENS or not await self._find_hidden():
                raise NotResumed(_DIFFERENT)

    def _is_held(self, tail: str, length: int) -> bool:
        """Whether an engine holds back just this: nothing without stop strings; vLLM as many characters as may belong to one, llama.cpp
        those that do."""
        if length < self._chars:
            return False
        return len(tail) == self._most_held or any(stop.startswith(tail) and stop != tail for stop in self._stops)

    async def _text(self, ids: Sequence[int]) -> str:
        """What the client would have been shown of ``ids``, as far as is known."""
        shown = [token for token in ids if token not in self._hidden]
        if not shown:
            return ""
        if self._before is None:
            self._before = await self._tokenizer.text(self._context)
        text = await self._tokenizer.text(self._context + shown)
        if not text.startswith(self._before):
            raise NotResumed(_DIFFERENT)
        return text[len(self._before) :]

    async def _excess(self, mark: int) -> int:
        """By how many characters the text up to a mark is longer than what the client had then."""
        count, chars = self._marks[mark]
        for missing in range(INCOMPLETE_TOKENS + 1):
            text = await self._text(self._ids[: max(0, count - missing)])
            excess = len(text) - chars - self._most_held
            if excess <= 0 or not text.endswith(_REPLACEMENT):
                break
        return excess

    async def _find_hidden(self) -> bool:
        """Learn of special tokens, which clients are not shown: find where the text becomes too long, and which of the tokens there it is
        too long by. If it may be several, any will do, as all text is out; but not where some of it is still to be told."""
        low, high = self._looked, len(self._marks) - 1
        excess = await self._excess(high)
        if excess <= 0:
            return False
        while low < high:
            middle = (low + high) // 2
            found = await self._excess(middle)
            if found > 0:
                high, excess = middle, found
            else:
                low = middle + 1
        self._looked = low
        begin = self._marks[low - 1][0] if low else 0
        counts = Counter(token for token in self._ids[begin : self._marks[low][0]] if token not in self._hidden)
        if len(counts) > EVENT_TOKENS:
            return False
        texts = {token: await self._tokenizer.text([token]) for token in counts}
        sizes = {token: len(text) * counts[token] for token, text in texts.items() if text and _REPLACEMENT not in text}
        choices = chain.from_iterable(combinations(sizes, count) for count in range(1, len(sizes) + 1))
        fitting = [chosen for chosen in choices if sum(sizes[token] for token in chosen) == excess]
        if not fitting or (len(fitting) > 1 and self._most_held):
            return False
        self._hidden.update(fitting[0])
        return True
