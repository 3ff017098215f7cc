"""What a proxy has in hand of the buckets that its requests need, and what a request takes from them.

Taking is all that happens on a request's path: a few subtractions for each bucket. Asking owners for more happens beside it
(`proxy.limits.limiter`), early enough that in steady use nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from proxy.limits.buckets import Kind

HORIZON_S = 0.6
"""A proxy keeps what it expects to need for so long."""
SLOTS_HORIZON_S = 0.1
"""Slots come back when a request ends, so fewer need to be in hand."""
MEMORY_S = 0.5
IDLE_S = 1.0
"""What has not been used for so long goes back."""


class Stash:
    """One bucket's. ``what`` names the limit for people; times are monotonic seconds, ``ends`` wall-clock.

    ``balance`` may be given to requests; ``reserved`` has been given and may come back; ``used`` is what requests have really used of a
    budget. ``wanted`` is what requests asked for since ``counted_at``, ``returned`` what came back, ``demand`` the difference a second;
    ``supply`` is what the owner gives. ``ask_at``: it had less than was wanted, and is not asked again before then.
    """

    __slots__ = (
        "answered_at",
        "ask_at",
        "asked",
        "asking",
        "balance",
        "bucket",
        "burst",
        "cost",
        "counted_at",
        "demand",
        "ends",
        "kind",
        "left",
        "limit",
        "owner",
        "pending",
        "per_burst",
        "refill_ms",
        "reported",
        "reserved",
        "returned",
        "supply",
        "told_burst",
        "used",
        "wait_s",
        "wanted",
        "what",
    )

    def __init__(self, bucket: bytes, kind: Kind, *, ends: float, used: float = 0.0) -> None:
        self.bucket = bucket
        self.kind = kind
        self.ends = ends
        self.rule(limit=0.0, burst=0.0, what="")
        self.balance = self.reserved = self.returned = self.wanted = self.demand = self.pending = self.left = self.wait_s = self.supply = (
            0.0
        )
        self.used = self.reported = used
        self.cost = 1.0
        self.counted_at = self.answered_at = self.ask_at = float("-inf")
        self.asked: float = 0.0
        self.asking = 0.0
        self.owner = b""
        """Who has last been told what is in hand here."""

    def rule(self, *, limit: float, burst: float, what: str) -> None:
        """Take what the limit is now."""
        self.limit, self.burst, self.what = limit, burst, what
        self.told_burst = str(int(burst))
        self.per_burst = 1 / burst if burst else 0.0
        self.refill_ms = 1000 / limit if limit else 0.0

    def count(self, now: float) -> None:
        """Learn from what was wanted since the last time."""
        passed = min(1.0, max(0.1, now - self.counted_at))
        self.demand += (max(0.0, self.wanted - self.returned) / passed - self.demand) * passed / (MEMORY_S + passed)
        self.wanted = self.returned = 0.0
        self.counted_at = now

    @property
    def target(self) -> float:
        """What should be in hand."""
        if self.kind is Kind.SLOTS:
            return max(1.0, float(int(self.demand * SLOTS_HORIZON_S)))
        return max(self.cost, self.demand * HORIZON_S)

    def idle(self, now: float) -> bool:
        return not self.wanted and now - self.counted_at > IDLE_S


@dataclass(slots=True, eq=False)
class Learned:
    """What requests for one model have come to."""

    tokens_per_byte: float = 0.25
    completion: float = 256.0
    bytes_per_token: float = 4.0

    def see(self, size_bytes: int, prompt: int, completion: int, sent_bytes: int) -> None:
        """A request was counted by an engine: the sizes of its body and answer, and their tokens."""
        if size_bytes and prompt:
            per_byte = prompt / size_bytes
            self.tokens_per_byte += ((per_byte if per_byte < 2.0 else 2.0) - self.tokens_per_byte) / 20
        self.completion += (completion - self.completion) / 20
        if completion and sent_bytes:
            self.bytes_per_token += (sent_bytes / completion - self.bytes_per_token) / 20


Price = Callable[[int, int, int], float]
"""What so many prompt tokens, completion tokens and, of the prompt's, cached tokens cost at a model now, in the mesh's currency."""


class Plan:
    """The stashes that requests of one key for one model take from: one each, their tokens, their money.

    A request changes what is in hand of each stash; what it wanted is summed up here and told to the stashes ten times a second.
    """

    __slots__ = (
        "budgets",
        "calls",
        "cost",
        "learned",
        "limited",
        "listed",
        "money",
        "money_cost",
        "money_wanted",
        "ones",
        "price",
        "rates",
        "returned",
        "slots",
        "tokens",
        "wanted",
    )

    def __init__(
        self, ones: tuple[Stash, ...], tokens: tuple[Stash, ...], money: tuple[Stash, ...], *, learned: Learned, price: Price | None
    ) -> None:
        self.ones = ones
        self.tokens = tokens
        self.money = money
        self.limited = bool(ones or tokens or money)
        self.slots = tuple(stash for stash in ones if stash.kind is not Kind.RATE)
        self.budgets = tuple(stash for stash in tokens if stash.kind is not Kind.RATE)
        self.learned = learned
        self.price = price
        self.listed = False
        """Whether it will be asked to `tell`."""
        self.calls = self.wanted = self.returned = self.cost = 0
        self.money_wanted = self.money_cost = 0.0
        """Since it was last asked: requests, the tokens and the money they wanted, tokens that came back; what the last one wanted."""
        self.rates: list[tuple[str, str, str, Stash, tuple[Stash, ...]]] = []
        for name, listed in (("requests", ones), ("tokens", tokens)):
            limit, remaining, reset = (f"x-ratelimit-{word}-{name}: " for word in ("limit", "remaining", "reset"))
            if rates := tuple(one for one in listed if one.kind is Kind.RATE):
                self.rates.append((limit, f"\r\n{remaining}", f"\r\n{reset}", rates[0], rates[1:]))

    def tell(self, touched: list[Stash]) -> None:
        """Let the stashes know what was wanted of them; those of which anything was are put into ``touched``, once."""
        for stashes, wanted, cost in (
            (self.ones, self.calls, 1.0),
            (self.tokens, self.wanted, self.cost),
            (self.money, self.money_wanted, self.money_cost),
        ):
            for stash in stashes if wanted else ():
                if not stash.wanted:
                    touched.append(stash)
                stash.wanted += wanted
                stash.cost = cost
        for stash in self.tokens:
            stash.returned += self.returned
        self.calls = self.wanted = self.returned = 0
        self.money_wanted, self.listed = 0.0, False


class Hold:
    """What one request has taken. `settle` it with what it used, then `end` it, whatever became of it."""

    __slots__ = ("_cached", "_completion", "_money", "_plan", "_prompt", "_size_bytes", "_tokens", "accepted", "sent_bytes")

    def __init__(self, plan: Plan, tokens: int, money: float, prompt: int, size_bytes: int) -> None:
        self._plan = plan
        self._tokens = tokens
        self._money = money
        self._prompt = prompt
        self._completion = -1
        self._cached = 0
        self._size_bytes = size_bytes
        self.sent_bytes = 0
        """Bytes of the answer that went to the client."""
        self.accepted = False
        """A worker has begun to compute."""

    def seen(self, *, accepted: bool, sent_bytes: int) -> None:
        """What came of an attempt."""
        self.accepted |= accepted
        self.sent_bytes = sent_bytes

    def settle(self, prompt: int, completion: int, cached: int = 0) -> None:
        """The worker's own count."""
        self._prompt, self._completion, self._cached = prompt, completion, cached
        self._plan.learned.see(self._size_bytes, prompt, completion, self.sent_bytes)

    def end(self) -> None:
        """Give back what was not used. A request that was cut off has used what had been sent of its answer, by estimate."""
        plan, prompt, completion = self._plan, self._prompt, self._completion
        if completion < 0:
            completion = int(self.sent_bytes / plan.learned.bytes_per_token) if self.sent_bytes else 0
            if not self.accepted and not completion:
                prompt = 0
        for stash in plan.slots:
            stash.balance += 1.0
            stash.reserved -= 1.0
        used, reserved = prompt + completion, self._tokens
        back = reserved - used
        plan.returned += back
        for stash in plan.tokens:
            stash.balance += back
        for stash in plan.budgets:
            stash.reserved -= reserved
            stash.used += used
        if plan.money and plan.price is not None:
            cost = plan.price(prompt, completion, min(prompt, self._cached))
            for stash in plan.money:
                stash.balance += self._money - cost
                stash.reserved -= self._money
                stash.used += cost

    def headers(self) -> str:
        """``x-ratelimit-…`` of the tightest limits, as lines of a response's head."""
        return rate_lines(self._plan)


def rate_lines(plan: Plan) -> str:
    """OpenAI's six headers, as far as there are limits: how much fits, how much of it is left, and when all of it will be again."""
    told = ""
    for limit, remaining, reset, stash, others in plan.rates:
        for other in others:
            if (other.balance + other.left) * other.per_burst < (stash.balance + stash.left) * stash.per_burst:
                stash = other
        burst, left = stash.burst, stash.balance + stash.left
        left = burst if left > burst else left if left > 0.0 else 0.0
        told += f"{limit}{stash.told_burst}{remaining}{int(left)}{reset}{int((burst - left) * stash.refill_ms + 0.999)}ms\r\n"
    return told


def rate_headers(plan: Plan) -> dict[str, str]:
    """The same, one by one."""
    return {name: value for name, _, value in (line.partition(": ") for line in rate_lines(plan).splitlines())}
