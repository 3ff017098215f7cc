"""Which prompt prefixes this worker's engine should still hold. Pure.

An engine does not say what is in its KV cache, so it is followed here: what was served is held, and ages as vLLM's own cache does,
least recently used first and a prompt's tail before its head, within as many tokens as the engine has room for. Where the engine counts
cached tokens, that count says whether the room was judged right.
"""

from __future__ import annotations

from collections import OrderedDict

from mesh.prefix import HASH_BYTES, MAX_HELD, SIZES, Chain, text_bytes

UNKNOWN_CAPACITY_TOKENS = 200_000
"""Taken for an engine that does not tell: a model of 8 billion parameters has about that beside it on a GPU of 48 GB."""
TOKENS_PER_BYTE = 0.25
"""Until an engine has counted a prompt."""
_LEARN_OVER = 50
_LEAST_ROOM = 0.1
_SHRINK, _GROW = 0.97, 1.01


class HeldPrefixes:
    """The hashes held, least recently used first, each with its share of the cache in tokens.

    `take_changes` gives what was added and removed since it was last called, net. What an engine keeps without having a hash here (the
    rest of a prompt, the answer) takes room like everything else.
    """

    def __init__(self, *, capacity_tokens: int = UNKNOWN_CAPACITY_TOKENS) -> None:
        self.capacity_tokens = capacity_tokens
        self.tokens_per_byte = TOKENS_PER_BYTE
        self.total_tokens = 0.0
        self._room = 1.0
        self._samples = 0
        self._counts_cached = False
        self._held: OrderedDict[bytes, float] = OrderedDict()
        self._unnamed = 0
        self._changes: dict[bytes, bool] = {}

    def __len__(self) -> int:
        return len(self._held)

    def hashes(self) -> tuple[bytes, ...]:
        """What is held that has a hash, for a dump."""
        return tuple(key for key in self._held if len(key) == HASH_BYTES)

    def depth(self, chain: Chain) -> int:
        """How many blocks of a prompt are held, from its beginning."""
        held = self._held
        for at, key in enumerate(chain):
            if key not in held:
                return at
        return len(chain)

    def tokens(self, blocks: int) -> int:
        """What that many blocks are in tokens, as far as known."""
        return round(text_bytes(blocks) * self.tokens_per_byte)

    def add(self, chain: Chain, *, tokens_per_byte: float | None = None) -> None:
        """A prompt is being served: all of it is held from now on, its head used last."""
        rate = tokens_per_byte or self.tokens_per_byte
        for at in range(len(chain) - 1, -1, -1):
            self._put(chain[at], SIZES[at] * rate)
        self._evict()

    def drop(self, chain: Chain) -> None:
        """A prompt was not computed after all."""
        for key in chain:
            self._remove(key)

    def clear(self) -> None:
        """The engine has started anew."""
        for key in list(self._held):
            self._remove(key)

    def served(
        self, chain: Chain, *, size_bytes: int, prompt_tokens: int, completion_tokens: int, cached_tokens: int, expected: int
    ) -> None:
        """A prompt of ``size_bytes`` was served, and the engine has counted: ``expected`` blocks were thought to be held at its start."""
        if not prompt_tokens:
            return
        if size_bytes >= SIZES[0]:
            seen = min(2.0, max(1 / 64, prompt_tokens / size_bytes))
            self._samples = min(_LEARN_OVER, self._samples + 1)
            self.tokens_per_byte += (seen - self.tokens_per_byte) / self._samples
            self._judge(expected, cached_tokens, seen)
            self.add(chain, tokens_per_byte=seen)
            prompt_tokens = max(0, prompt_tokens - round(text_bytes(len(chain)) * seen))
        self._unnamed += 1
        self._put(self._unnamed.to_bytes(9), float(prompt_tokens + completion_tokens))
        self._evict()

    def take_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Added and removed hashes since the last call."""
        changes, self._changes = self._changes, {}
        added = [key for key, is_added in changes.items() if is_added]
        return added, [key for key, is_added in changes.items() if not is_added]

    def _judge(self, expected: int, cached_tokens: int, tokens_per_byte: float) -> None:
        """Less cached than expected: there is less room than was thought. As much: perhaps there is more."""
        self._counts_cached = self._counts_cached or cached_tokens > 0
        if not self._counts_cached or not expected:
            return
        block_tokens = SIZES[expected - 1] * tokens_per_byte
        short = cached_tokens + 2 * block_tokens < text_bytes(expected) * tokens_per_byte
        self._room = max(_LEAST_ROOM, self._room * _SHRINK) if short else min(1.0, self._room * _GROW)

    def _put(self, key: bytes, tokens: float) -> None:
        held = self._held
        before = held.pop(key, None)
        held[key] = tokens
        self.total_tokens += tokens - (before or 0.0)
        if before is None and len(key) == HASH_BYTES:
            self._note(key, True)

    def _remove(self, key: bytes) -> None:
        tokens = self._held.pop(key, None)
        if tokens is not None:
            self.total_tokens -= tokens
            if len(key) == HASH_BYTES:
                self._note(key, False)

    def _note(self, key: bytes, is_added: bool) -> None:
        if self._changes.pop(key, is_added) == is_added:
            self._changes[key] = is_added

    def _evict(self) -> None:
        most = self.capacity_tokens * self._room
        while self._held and (self.total_tokens > most or len(self._held) > MAX_HELD):
            self._remove(next(iter(self._held)))
