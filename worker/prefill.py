"""What the engine has to compute before first tokens: which prompts it has cached, how much is queued, and what each proxy knows of that.

Proxies choose by what they were told last. When many requests come at one moment through several proxies, all of them see the same idle
worker. So a proxy says with a request which LOAD it went by, and where more work has come from others since than is worth a detour, the
request is sent back at once, the newest LOAD before it, to be placed by someone who knows. This is what keeps any number of
proxies choosing as well as one.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mesh.clock import Clock
from mesh.errors import Rerouted
from mesh.prefix import Chain
from worker.backlog import Backlog
from worker.prefixes import HeldPrefixes
from worker.usage import Usage

SURPRISE_TOKENS = 1_024
"""More prefill than this that the proxies do not know of, and a request goes back, and the load goes out at once: about an eighth of a
second of an 8B model on one GPU, a hundred times the detour."""
HISTORY = 64


class Teller(Protocol):
    """What is asked of a link."""

    @property
    def last_incoming(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What OPEN says of a prompt long enough to matter. ``seen``: the LOAD its proxy went by, None if it is to stay here in any case."""

    chain: Chain
    size_bytes: int
    streamed: bool
    seen: int | None = None


@dataclass(slots=True)
class Work:
    """One prompt while it is here. ``cached`` blocks of it are held, and so are ``sure`` ones: those that no other is still computing."""

    prompt: Prompt
    ticket: int
    cached: int
    sure: int
    computed: bool = False


class _View:
    """What one link has been told, and has brought."""

    __slots__ = ("brought", "history", "number")

    def __init__(self) -> None:
        self.brought = 0
        self.number = 0
        self.history: deque[tuple[int, int]] = deque(maxlen=HISTORY)


class Prefill:
    """``tell`` sends a link the newest LOAD; set by `worker.announce`."""

    def __init__(self, clock: Clock, *, held: HeldPrefixes | None = None) -> None:
        self.held = HeldPrefixes() if held is None else held
        self.backlog = Backlog()
        self.rerouted = 0
        self.tell: Callable[[Any], None] | None = None
        self._clock = clock
        self._computing: dict[bytes, int] = {}
        self._views: weakref.WeakKeyDictionary[Teller, _View] = weakref.WeakKeyDictionary()

    def arrive(self, link: Teller, prompt: Prompt) -> Work:
        """A request came. Raises `Rerouted` if its proxy should think again."""
        view = self._view(link)
        if prompt.seen is not None and self.tell is not None and self._surprise(view, prompt.seen) > SURPRISE_TOKENS:
            self.rerouted += 1
            self.tell(link)
            raise Rerouted
        chain = prompt.chain
        cached = self.held.depth(chain)
        total = round(prompt.size_bytes * self.held.tokens_per_byte)
        tokens = max(0, total - self.held.tokens(cached))
        self.held.add(chain)
        view.brought += tokens
        ticket = self.backlog.add(tokens, now=self._clock.monotonic(), streamed=prompt.streamed)
        sure = 0 if cached and chain[cached - 1] in self._computing else cached
        self._computing.update(dict.fromkeys(chain[cached:], ticket))
        return Work(prompt, ticket, cached, sure)

    def computed(self, work: Work) -> None:
        """Its first token is there."""
        work.computed = True
        self._computed(work)
        self.backlog.done(work.ticket, now=self._clock.monotonic(), computed=True)

    def leave(self, work: Work, usage: Usage | None) -> None:
        """It is over; ``usage`` None if it was not completed."""
        if not work.computed:
            self._computed(work)
            self.backlog.done(work.ticket, now=self._clock.monotonic(), computed=False)
            self.held.drop(work.prompt.chain[work.cached :])
        elif usage is not None:
            self.held.served(
                work.prompt.chain,
                size_bytes=work.prompt.size_bytes,
                prompt_tokens=usage.prompt,
                completion_tokens=usage.completion,
                cached_tokens=usage.cached,
                expected=work.sure,
            )

    def load_fields(self, link: Teller) -> dict[str, int]:
        """This part of a LOAD frame to a link; what it says counts as told."""
        view = self._view(link)
        view.number += 1
        view.history.append((view.number, self.backlog.ever - view.brought))
        backlog = round(self.backlog.level(now=self._clock.monotonic()))
        return {"n": view.number, "pre": backlog, "rate": round(self.backlog.rate), "last": link.last_incoming}

    def _computed(self, work: Work) -> None:
        for key in work.prompt.chain[work.cached :]:
            if self._computing.get(key) == work.ticket:
                del self._computing[key]

    def _surprise(self, view: _View, seen: int) -> float:
        """Prefill from others that came after LOAD number ``seen`` was sent, and is still to be done."""
        known = next((others for number, others in view.history if number >= seen), None)
        if known is None:
            return 0.0
        return min(self.backlog.level(now=self._clock.monotonic()), self.backlog.ever - view.brought - known)

    def _view(self, link: Teller) -> _View:
        view = self._views.get(link)
        if view is None:
            view = self._views[link] = _View()
        return view
