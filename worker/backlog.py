"""How much prefill an engine has yet to do before whoever comes now gets a first token. Pure.

An engine does not say how far it is with a prompt of a hundred thousand tokens; that takes it half a minute, and in that time its
queue is worth anything between all of it and nothing. So work flows off at the rate that was seen so far, and every first token sets
the account right: what is left is never more than the prompts without a first token, and never less than all of them but the oldest.
"""

from __future__ import annotations

from itertools import count

LEAST_SAMPLE_TOKENS = 512
"""Of shorter prompts the time to the first token says nothing about the rate."""
ASSUMED_RATE = 2_000.0
"""Until there is a sample."""
_KEEP = 0.9


class Backlog:
    """Times are monotonic seconds, work is tokens, ``rate`` tokens per second, 0 until it is known."""

    def __init__(self) -> None:
        self.rate = 0.0
        self.ever = 0
        """All the work that ever came."""
        self._tickets = count(1)
        self._streamed: dict[int, tuple[int, float]] = {}
        self._silent: dict[int, int] = {}
        self._streamed_sum = self._silent_sum = 0
        self._level = 0.0
        self._level_at = 0.0
        self._last_done = 0.0
        self._sampled_tokens = self._sampled_s = 0.0

    def add(self, tokens: int, *, now: float, streamed: bool = True) -> int:
        """A prompt came with so much to compute. Returns its ticket."""
        ticket = next(self._tickets)
        self._level = self.level(now=now) + tokens
        self._level_at = now
        if streamed:
            self._streamed[ticket] = (tokens, now)
            self._streamed_sum += tokens
        else:
            self._silent[ticket] = tokens
            self._silent_sum += tokens
        self.ever += tokens
        return ticket

    def done(self, ticket: int, *, now: float, computed: bool) -> None:
        """Its first token is there (``computed``), or nobody wants it any more. A ticket that is done already stays so."""
        if ticket in self._streamed:
            tokens, came = self._streamed.pop(ticket)
            self._streamed_sum -= tokens
            if computed:
                self._sample(tokens, now - max(came, self._last_done))
                self._last_done = now
        else:
            self._silent_sum -= self._silent.pop(ticket, 0)
        self._level = self.level(now=now)
        self._level_at = now

    def level(self, *, now: float) -> float:
        """What is left."""
        left = self._level - (self.rate or ASSUMED_RATE) * (now - self._level_at)
        least = self._streamed_sum - next(iter(self._streamed.values()))[0] if self._streamed else 0
        return min(float(self._streamed_sum + self._silent_sum), max(left, float(least)))

    def _sample(self, tokens: int, took_s: float) -> None:
        if tokens < LEAST_SAMPLE_TOKENS or took_s <= 0:
            return
        self._sampled_tokens = self._sampled_tokens * _KEEP + tokens
        self._sampled_s = self._sampled_s * _KEEP + took_s
        self.rate = self._sampled_tokens / self._sampled_s
