"""Limits at one proxy: what each request needs, what is in hand, what is asked of the buckets' owners, what is granted to others.

On a request's path `enter` only subtracts from what is in hand. Everything else happens a few times a second beside it: asking owners
for what will be needed next, giving back what was not, beats, reports. Only where nothing is in hand and nobody has lately said no (a
bucket's first request, a sudden rush) does a request wait, one round trip to the owner and at most `WAIT_S`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import structlog

from mesh import prices
from mesh.apikey import ApiKey
from mesh.clock import Clock
from mesh.directory import Directory
from mesh.doctor import SharingFact
from mesh.documents import Document
from mesh.errors import MalformedEnvelope, ProtocolError, QuotaSpent, RateLimited, UsageError
from mesh.limits import KIND, REQUEST_BURST_S, TOKEN_BURST_S, Limit, Rules
from mesh.link.frames import Frame
from mesh.prices import PriceList, TokenPrice
from mesh.records import State
from mesh.trust import Role
from proxy.limits.buckets import WHOLE, Ask, Bucket, Grant, Kind
from proxy.limits.counters import Counters
from proxy.limits.messages import MAX_ENTRIES, Count, encode_asks, encode_grants, parse_asks, parse_grants
from proxy.limits.shares import BEAT_S, ID_BYTES, Shares
from proxy.limits.stash import Hold, Learned, Plan, Price, Stash, rate_headers
from proxy.limits.wills import Wills
from proxy.openai import Call

log = structlog.get_logger(__name__)

TICK_S = 0.1
SWEEP_S = 0.5
REPORT_S = 1.0
WAIT_S = 0.25
WILL_S = 0.5
"""What is used in so long is told to the heir ahead, so that it is not told with every grant, and has answered before that is needed."""
LOST_S = 1.0
"""An ask that has not been answered for so long is asked again."""
AGAIN_S = 0.5
"""Where an owner had less than was wanted, it is asked again when there should be more, but at the latest after so long."""
SUPPLY_S = 1.0
MOST_WAIT_S = 60.0
JOIN_S = 5.0
PUBLISHED_S = 1.0
MAX_ENTRIES_PER_S = 20_000
"""Asks and counters taken from one proxy; who sends more has broken the link."""
COST_UNIT = 10.0**-prices.COST_DIGITS
MAX_PLANS = 20_000
MAX_BUCKETS = 100_000
MAX_LEARNED = 1_024
MAX_COMPLETION = 1_000_000

WAIT: Final = "wait"
"""What `enter` says where the owner must be asked first."""

Send = Callable[[bytes, Frame, dict[str, Any]], None]
"""Send a control frame to a linked proxy, by the first 8 bytes of its node id."""


class Limiter:
    """``me`` is this node's id and ``boot`` when it started; ``send`` reaches linked proxies. `run` it."""

    def __init__(self, me: bytes, boot: int, *, send: Send, clock: Clock, counters: Counters | None = None) -> None:
        now = clock.monotonic()
        self.rules = Rules()
        self.shares = Shares(me[:ID_BYTES], now)
        self.counters = counters or Counters()
        self.prices: PriceList | None = None
        self.listed: Callable[[], Iterable[bytes]] = tuple
        """Node ids of the proxies that the directory lists and that count."""
        self.refused = {kind: 0 for kind in ("requests", "tokens", "concurrency", "budget")}
        self.waited = 0
        self._me = me[:ID_BYTES]
        self._sources = {self._me: _source(me, boot)}
        self._send = send
        self._clock = clock
        self._plans: dict[tuple[bytes, str, str, str], Plan] = {}
        self._stashes: dict[bytes, Stash] = {}
        self._touched: list[Plan] = []
        self._active: dict[bytes, Stash] = {}
        self._buckets: dict[bytes, Bucket] = {}
        self._learned: dict[str, Learned] = {}
        self._asks: dict[bytes, list[Ask]] = {}
        self._counts: dict[bytes, list[Count]] = {}
        self._wills = Wills()
        self._entries: dict[bytes, tuple[float, int]] = {}
        self._news = asyncio.Event()
        self._due = dict.fromkeys(("beat", "sweep", "report"), now)
        self._renew_at = self._next_day()

    # -- a request

    def enter(self, key: ApiKey, call: Call) -> Hold | Literal["wait"] | None:
        """Take what a request needs: None if nothing limits it, `WAIT` if `wait` must be called. Raises `RateLimited`, `QuotaSpent`."""
        plan = self._plans.get((key.id, key.kid, key.project, call.parsed.model))
        if plan is None:
            plan = self._plan(key, call)
        if not plan.limited:
            return None
        if not plan.listed:
            plan.listed = True
            self._touched.append(plan)
        plan.calls += 1
        tokens = prompt = 0
        money = 0.0
        short = False
        for stash in plan.ones:
            stash.balance = balance = stash.balance - 1.0
            if balance < 0.0:
                short = True
        if plan.tokens or plan.money:
            prompt, completion = _estimate(plan, call)
            plan.cost = tokens = prompt + completion
            plan.wanted += tokens
            for stash in plan.tokens:
                stash.balance = balance = stash.balance - tokens
                if balance < 0.0:
                    short = True
            if plan.money and plan.price is not None:
                plan.money_cost = money = plan.price(prompt, completion, 0)
                plan.money_wanted += money
                for stash in plan.money:
                    stash.balance = balance = stash.balance - money
                    if balance < 0.0:
                        short = True
        if short:
            self._put_back(plan, tokens, money)
            if not self._fetch(plan, tokens, money):
                return WAIT
            return self._take(plan, tokens, money, prompt, call)
        for stash in plan.slots:
            stash.reserved += 1.0
        for stash in plan.budgets:
            stash.reserved += tokens
        for stash in plan.money:
            stash.reserved += money
        return Hold(plan, tokens, money, prompt, len(call.body))

    async def wait(self, key: ApiKey, call: Call) -> Hold:
        """As `enter`, after asking the owners. Raises `RateLimited`, `QuotaSpent`."""
        plan = self._plan(key, call)
        prompt, completion = _estimate(plan, call)
        tokens = prompt + completion
        money = plan.price(prompt, completion, 0) if plan.price is not None else 0.0
        needs = _needs(plan, tokens, money)
        for stash, cost in needs:
            stash.pending += cost
        self.waited += 1
        try:
            async with asyncio.timeout(WAIT_S):
                while not self._fetch(plan, tokens, money):
                    await self._news.wait()
        except TimeoutError:
            short = next((stash for stash, cost in needs if stash.balance < cost), None)
            if short is not None:
                self.refused[_meter(short)] += 1
                raise RateLimited(f"The limit of {short.what} cannot be checked right now; try again shortly", retry_after_s=1.0) from None
        finally:
            for stash, cost in needs:
                stash.pending -= cost
        return self._take(plan, tokens, money, prompt, call)

    def _put_back(self, plan: Plan, tokens: int, money: float) -> None:
        """`enter` took it, and not everything was there."""
        for stash, cost in _needs(plan, tokens, money):
            stash.balance += cost
            stash.cost = cost

    def _take(self, plan: Plan, tokens: int, money: float, prompt: int, call: Call) -> Hold:
        for stash, cost in _needs(plan, tokens, money):
            stash.balance -= cost
            if stash.kind is not Kind.RATE:
                stash.reserved += cost
        return Hold(plan, tokens, money, prompt, len(call.body))

    def _fetch(self, plan: Plan, tokens: int, money: float) -> bool:
        """Ask for what is short. False if an answer is to be waited for; raises what a request is told that cannot have it."""
        now = self._clock.monotonic()
        waiting = False
        for stash, cost in _needs(plan, tokens, money):
            if stash.balance >= cost:
                continue
            if now < stash.ask_at + 2 * TICK_S and self.shares.owner(stash.bucket) != self._me:
                raise self._refusal(plan, stash, cost, now)
            if not stash.asking or now - stash.asking > LOST_S:
                self._ask(stash, now, cost)
            if stash.balance >= cost:
                continue
            if not stash.asking:
                raise self._refusal(plan, stash, cost, now)
            waiting = True
        return not waiting

    def _refusal(self, plan: Plan, stash: Stash, cost: float, now: float) -> RateLimited:
        self.refused[_meter(stash)] += 1
        headers = rate_headers(plan)
        if stash.kind is Kind.BUDGET and stash.wait_s:
            told = f"What is left of the budget of {stash.what} is in use or out of reach; try again shortly"
            return RateLimited(told, retry_after_s=stash.wait_s, headers=headers)
        if stash.kind is Kind.BUDGET:
            end = datetime.fromtimestamp(stash.ends, UTC).strftime("%Y-%m-%d %H:%M UTC")
            return QuotaSpent(
                f"The budget of {stash.what} is used up, or what is left of it is too little for this request; it is renewed at {end}",
                retry_after_s=max(1.0, stash.ends - self._clock.wall()),
                headers=headers | {"x-should-retry": "false"},
            )
        # When the owner could give so much, and when this proxy will have got it if it gets what it has been getting.
        wait_s = max(0.01, stash.answered_at + stash.wait_s - now)
        if stash.supply > 0:
            wait_s = max(wait_s, min(MOST_WAIT_S, (cost - stash.balance) / stash.supply))
        if stash.kind is Kind.SLOTS:
            return RateLimited(f"At most {stash.limit:g} {stash.what} at once; wait for one to end", retry_after_s=wait_s, headers=headers)
        more = "" if cost == 1 else f" (this request needs {cost:.0f}: its prompt and the most it may answer)"
        told = f"Rate limit reached: {stash.limit:g} {stash.what}{more}. Try again in {wait_s:.2f} s"
        return RateLimited(told, retry_after_s=wait_s, headers=headers)

    # -- what applies to whom

    def take_document(self, document: Document) -> None:
        """A document became known or changed."""
        try:
            if (document.kind, document.name, document.project) == (prices.KIND, prices.NAME, ""):
                self.prices = prices.parse_prices(document.body)
            elif not self.rules.take(document):
                return
            self._plans.clear()
        except (MalformedEnvelope, UsageError) as error:
            log.warning("limits.document_refused", document=document.title, seq=document.seq, reason=error.message)

    def renew(self) -> None:
        """What the endpoints say has changed."""
        self._plans.clear()

    def _plan(self, key: ApiKey, call: Call) -> Plan:
        index = (key.id, key.kid, key.project, call.parsed.model)  # as the client named it: what that means changes with `renew`
        plan = self._plans.get(index)
        if plan is None:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            plan = self._plans[index] = self._make_plan(key, call)
        return plan

    def _make_plan(self, key: ApiKey, call: Call) -> Plan:
        model, endpoint = call.model, call.endpoint
        of_key = Limit(rps=key.rps, tps=key.tps, concurrency=key.concurrency, tokens_per_day=key.tokens_per_day, money_per_month=key.budget)
        operators, own = self.rules.of_project(key.project)
        project, named = f"project:{key.project}", f"the project '{key.project}'"
        scopes = [
            (f"key:{key.kid}:{key.id.hex()}", "this API key", of_key),
            (project, named, operators.whole),
            (f"own:{project}", f"{named} (its own)", own.whole),
            (f"{project}:model:{model}", f"{named} for the model '{model}'", operators.models.get(model, Limit())),
            (f"own:{project}:model:{model}", f"{named} (its own) for the model '{model}'", own.models.get(model, Limit())),
            (f"model:{model}", f"the model '{model}'", self.rules.models.models.get(model, Limit())),
        ]
        if endpoint is not None:
            scopes.append((f"endpoint:{endpoint.name}:{key.project}", f"the endpoint '{endpoint.name}'", endpoint.limit))
        price = self._price(model)
        ones: list[Stash] = []
        tokens: list[Stash] = []
        money: list[Stash] = []
        day, month = self._windows()
        for scope, name, limit in scopes:
            burst_s = limit.burst_s
            if limit.rps is not None:
                burst = max(1.0, limit.rps * (burst_s or REQUEST_BURST_S))
                ones.append(self._stash(f"{scope}:rps", Kind.RATE, limit.rps, burst, f"requests per second for {name}"))
            if limit.concurrency is not None:
                ones.append(self._stash(f"{scope}:con", Kind.SLOTS, limit.concurrency, 0.0, f"requests of {name}"))
            if limit.tps is not None:
                burst = max(1.0, limit.tps * (burst_s or TOKEN_BURST_S))
                tokens.append(self._stash(f"{scope}:tps", Kind.RATE, limit.tps, burst, f"tokens per second for {name}"))
            if limit.tokens_per_day is not None:
                what = f"{limit.tokens_per_day:.0f} tokens per day of {name}"
                tokens.append(self._stash(f"{scope}:tpd:{day[0]}", Kind.BUDGET, limit.tokens_per_day, 0.0, what, ends=day[1]))
            if limit.money_per_month is not None and price is None:
                log.warning("limits.no_price", model=model, limit=name)
            elif limit.money_per_month is not None:
                what = f"{limit.money_per_month:g} per month of {name}"
                money.append(self._stash(f"{scope}:mpm:{month[0]}", Kind.BUDGET, limit.money_per_month, 0.0, what, ends=month[1]))
        learned = self._learned.get(model)
        if learned is None:
            learned = Learned()
            if len(self._learned) < MAX_LEARNED:
                self._learned[model] = learned
        return Plan(tuple(ones), tuple(tokens), tuple(money), learned=learned, price=price)

    def _price(self, model: str) -> Price | None:
        """What a model's tokens cost; None where there is no price, and so no limit on money."""
        listed = self.prices

        def now() -> TokenPrice | None:
            period = listed.at(int(self._clock.wall() * 1000)) if listed is not None else None
            return period.models.get(model, period.models.get(prices.ANY)) if period is not None else None

        def cost(prompt: int, completion: int, cached: int) -> float:
            price = now()
            if price is None:
                return 0.0
            micro = (prompt - cached) * price.input + cached * price.cached + completion * price.output
            return float(micro * COST_UNIT)

        return cost if now() is not None else None

    def _stash(self, name: str, kind: Kind, limit: float, burst: float, what: str, *, ends: float = 0.0) -> Stash:
        bucket = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=16).digest()
        stash = self._stashes.get(bucket)
        if stash is None:
            used = self.counters.of(bucket, self._sources[self._me])
            stash = self._stashes[bucket] = Stash(bucket, kind, ends=ends, used=used)
        stash.rule(limit=limit, burst=burst, what=what)
        return stash

    def _windows(self) -> tuple[tuple[str, float], tuple[str, float]]:
        """The day and the month that it is (UTC), each with its end."""
        now = datetime.fromtimestamp(self._clock.wall(), UTC)
        today = now.replace(hour=0, minute=0, second=0, microsecond=0)
        following = (today.replace(day=1) + timedelta(days=32)).replace(day=1)
        return (today.strftime("%Y-%m-%d"), (today + timedelta(days=1)).timestamp()), (today.strftime("%Y-%m"), following.timestamp())

    def _next_day(self) -> float:
        return self._windows()[0][1]

    # -- beside the requests

    async def run(self) -> None:
        """A task for the life of the process."""
        while True:
            await self._clock.sleep(TICK_S)
            self.tick(self._clock.monotonic())

    async def keep(self) -> None:
        """A task beside `run`: write down what has been used of budgets."""
        while True:
            await self._clock.sleep(REPORT_S)
            if rows := self.counters.changes():
                await asyncio.to_thread(self.counters.save, rows, wall=self._clock.wall())

    def follow(self, directory: Directory) -> None:
        """Hear of limits, and of who else is a proxy, from the directory. It has been started."""

        def listed() -> Iterable[bytes]:
            return (record.node_id for record in directory.known(Role.PROXY) if record.state != State.DRAINING)

        self.listed = listed
        self.counters.load(wall=self._clock.wall())
        for kind in (KIND, prices.KIND):
            for document in directory.held_documents(kind):
                self.take_document(document)
        directory.on_document(self.take_document)

    async def look(self, directory: Directory) -> None:
        """Find out who else there is before this proxy counts itself in. Its own record has been published by now."""
        await directory.joined(timeout_s=JOIN_S)
        await self._clock.sleep(PUBLISHED_S)
        await directory.find_role(Role.PROXY)
        self.shares.looked = True

    def tick(self, now: float) -> None:
        """Ask for what is running out; twice a second give back what is idle, and beat; once a second report what budgets were used."""
        plans, self._touched = self._touched, []
        touched: list[Stash] = []
        for plan in plans:
            plan.tell(touched)
        for stash in touched:
            self._active[stash.bucket] = stash
            stash.count(now)
            self._balance(stash, now)
        if now - self._due["beat"] >= BEAT_S:
            self._due["beat"] = now
            self.beat(now)
        if now - self._due["sweep"] >= SWEEP_S:
            self._due["sweep"] = now
            self._sweep(now)
        if now - self._due["report"] >= REPORT_S:
            self._due["report"] = now
            self._report(now)
        self._flush()

    def _balance(self, stash: Stash, now: float) -> None:
        """Keep what is in hand near what will be needed."""
        if stash.asking and now - stash.asking <= LOST_S:
            return
        if now < stash.ask_at:
            if stash.kind is Kind.BUDGET and 0 < stash.balance < stash.cost:
                self._ask(stash, now, 0.0, back=stash.balance)  # too little for anybody here; with what others have left, enough for one
            return
        target = stash.target
        if stash.balance < max(target / 2, stash.cost if stash.kind is not Kind.SLOTS else 1.0):
            self._ask(stash, now, 0.0)
        elif stash.balance > 2 * target + stash.cost:
            self._ask(stash, now, 0.0, back=float(int(stash.balance - target)))

    def _sweep(self, now: float) -> None:
        wall = self._clock.wall()
        if wall >= self._renew_at:
            self._renew_at = self._next_day()
            self._plans.clear()
        for stash in [stash for stash in self._active.values() if stash.idle(now)]:
            if stash.balance > 0:
                self._ask(stash, now, 0.0, back=stash.balance)
            elif stash.balance < 0 and stash.kind is Kind.RATE:
                self._ask(stash, now, 0.0)  # what was used beyond what had been granted
            elif not stash.reserved and (stash.kind is not Kind.BUDGET or stash.used == stash.reported):
                del self._active[stash.bucket]
        for bucket in [bucket for bucket, kept in self._buckets.items() if kept.idle(now, wall)]:
            del self._buckets[bucket]
        if len(self._stashes) > len(self._active) + MAX_PLANS:
            self._plans.clear()
            self._stashes = dict(self._active)
        self.counters.forget(wall)
        self._wills.expire(wall)

    def _report(self, now: float) -> None:
        """Tell owner and heir what has been used of budgets, so that it outlives this process."""
        counts: dict[bytes, list[Count]] = {}
        for stash in self._active.values():
            if stash.kind is Kind.BUDGET and stash.used != stash.reported:
                stash.reported = stash.used
                source = self._sources[self._me]
                self.counters.put(stash.bucket, source, stash.used, ends=stash.ends)
                count = Count(bucket=stash.bucket, source=source, used=stash.used, ends=stash.ends)
                counts.setdefault(self.shares.heir(stash.bucket), []).append(count)
                if not stash.asking:
                    self._ask(stash, now, 0.0, report=True)
        self._tell(counts)

    def _tell(self, counts: dict[bytes, list[Count]]) -> None:
        for peer, told in counts.items():
            if peer != self._me:
                for at in range(0, len(told), MAX_ENTRIES):
                    self._send(peer, Frame.ASK, encode_asks((), told[at : at + MAX_ENTRIES]))

    # -- asking

    def _ask(self, stash: Stash, now: float, cost: float, *, back: float = 0.0, report: bool = False) -> None:
        """Ask the owner for what a request needs (``cost``) or will soon; or give back, or only report."""
        owner = self.shares.owner(stash.bucket)
        held = None if owner == stash.owner else stash.balance + stash.reserved
        stash.owner = owner
        want = least = 0.0
        if not back and not report:
            least = max(0.0, (cost or min(stash.cost, stash.target)) - stash.balance)
            want = max(stash.target - stash.balance, stash.pending - stash.balance, least)
        if back:
            stash.balance -= back
            held = None if held is None else held - back
        ask = Ask(
            bucket=stash.bucket,
            kind=stash.kind,
            limit=stash.limit,
            burst=stash.burst,
            want=want,
            least=least,
            demand=stash.demand,
            back=back,
            used=stash.used if stash.kind is Kind.BUDGET else 0.0,
            held=held,
            ends=stash.ends,
        )
        if want:
            stash.asked = want
        if owner == self._me:
            if self._willed(ask, now):
                self._answer(stash, self._grant(self._me, ask, now), now, wanted=bool(want))
            else:
                stash.asking = now
            return
        if want:
            stash.asking = now
        if not self._asks:
            asyncio.get_running_loop().call_soon(self._flush)
        self._asks.setdefault(owner, []).append(ask)

    def _flush(self) -> None:
        counts, self._counts = self._counts, {}
        self._tell(counts)
        asks, self._asks = self._asks, {}
        for owner, listed in asks.items():
            for at in range(0, len(listed), MAX_ENTRIES):
                self._send(owner, Frame.ASK, encode_asks(listed[at : at + MAX_ENTRIES]))

    def _answer(self, stash: Stash, grant: Grant, now: float, *, wanted: bool) -> None:
        stash.left = grant.left
        if not wanted:
            return
        passed = max(TICK_S, now - stash.answered_at)
        stash.supply += (grant.given / passed - stash.supply) * passed / (SUPPLY_S + passed)
        stash.balance += grant.given
        stash.answered_at, stash.wait_s, stash.asking = now, grant.wait_s, 0.0
        stash.ask_at = float("-inf")
        if grant.given < stash.asked:
            more_s = max(grant.wait_s, stash.cost / stash.supply if stash.supply > 0 else 0.0)
            stash.ask_at = now + min(AGAIN_S, max(TICK_S, more_s))

    # -- owning

    def _grant(self, who: bytes, ask: Ask, now: float) -> Grant:
        bucket = self._buckets.get(ask.bucket)
        if bucket is None:
            if len(self._buckets) >= MAX_BUCKETS:
                return Grant(bucket=ask.bucket, given=0.0, left=0.0, wait_s=1.0)
            bucket = self._buckets[ask.bucket] = Bucket(ask.kind, now)
        used = 0.0
        if ask.kind is Kind.BUDGET:
            if ask.used and who in self._sources:
                self.counters.put(ask.bucket, self._sources[who], ask.used, ends=ask.ends)
            used = self.counters.total(ask.bucket)
        fraction = self.shares.fraction(ask.bucket, now)
        if ask.kind is Kind.BUDGET and who != self._me:
            self._wills.forget(ask.bucket, who)  # from here on its own asks tell
        return bucket.ask(who, ask, fraction=fraction, since=self.shares.since, used=used, own=self._me, now=now)

    def _willed(self, ask: Ask, now: float) -> bool:
        """Whether this proxy may take of a bucket of its own what it wants, or a part that is of use: of a budget, no more than its heir
        knows that it may. What the heir does not know yet, it is told."""
        if ask.kind is not Kind.BUDGET or not ask.want:
            return True
        heir = self.shares.heir(ask.bucket)
        if heir == self._me:  # nobody to tell: with its own share it does what it likes, with those of others nothing
            return len(self.shares.counted) <= 1 or self.shares.fraction(ask.bucket, now) < WHOLE
        bucket = self._buckets.get(ask.bucket)
        most = max(ask.used, bucket.most(self._me) if bucket is not None else 0.0)
        if ask.held is not None:
            most = max(most, ask.used + ask.held)
        if told := self._wills.make(ask.bucket, heir, most + ask.want, spare=ask.demand * WILL_S):
            if not self._counts:
                asyncio.get_running_loop().call_soon(self._flush)
            count = Count(bucket=ask.bucket, source=self._sources[self._me], used=ask.used, ends=ask.ends, most=told)
            self._counts.setdefault(heir, []).append(count)
        ask.want = min(ask.want, self._wills.kept(ask.bucket, heir) - most)
        return ask.want > 0 and ask.want >= ask.least

    # -- other proxies

    def up(self, node_id: bytes, boot: int, *, serving: bool) -> None:
        peer = node_id[:ID_BYTES]
        self._sources[peer] = _source(node_id, boot)
        self.shares.up(peer, self._clock.monotonic(), serving=serving)
        self._forget_owner(peer)
        self._beat_to(peer, self._clock.monotonic())

    def serves(self, node_id: bytes, serving: bool) -> None:
        self.shares.serves(node_id[:ID_BYTES], serving)

    def down(self, node_id: bytes) -> None:
        peer = node_id[:ID_BYTES]
        self.shares.down(peer)
        for bucket, kept in self._buckets.items():
            if (used := kept.lost(peer)) > 0:
                self.counters.put(bucket, self._sources[peer], used, ends=kept.ends)
        self._wills.lost(peer)
        for bucket, most, ends in self._wills.open(peer):
            self.counters.put(bucket, self._sources[peer], most, ends=ends)
        self._forget_owner(peer)
        self._due["beat"] = float("-inf")  # another owner is needed now
        self._wake()

    def on_frame(self, node_id: bytes, kind: Frame, fields: dict[str, Any]) -> None:
        """A frame from a linked proxy. Raises `ProtocolError`."""
        peer, now = node_id[:ID_BYTES], self._clock.monotonic()
        try:
            if kind == Frame.SHARES:
                self._beaten(peer, fields, now)
            elif kind == Frame.ASK:
                asks, counts = parse_asks(fields)
                for count in counts:
                    self.counters.put(count.bucket, count.source, count.used, ends=count.ends)
                wills = [count for count in counts if count.most and count.source == self._sources.get(peer)]
                kept = [count for count in wills if self._wills.hear(peer, count)]
                self._bound(peer, len(asks) + len(counts), now)
                grants = [grant for ask in asks if (grant := self._grant(peer, ask, now)) and ask.want]
                if grants or kept:
                    self._send(peer, Frame.GRANT, encode_grants(grants, kept))
            elif kind == Frame.GRANT:
                grants, told = parse_grants(fields)
                for bucket, most in told:
                    if self._wills.keep(bucket, peer, most) and (stash := self._stashes.get(bucket)) is not None:
                        stash.asking = 0.0 if stash.owner == self._me else stash.asking
                for grant in grants:
                    stash = self._stashes.get(grant.bucket)
                    if stash is not None and stash.asking and stash.owner == peer:
                        self._answer(stash, grant, now, wanted=True)
                self._wake()
        except MalformedEnvelope as error:
            raise ProtocolError(f"bad {kind.name}: {error.message}") from None

    def _beaten(self, peer: bytes, fields: dict[str, Any], now: float) -> None:
        """What changes who owns what is answered at once, so that buckets change hands in one round trip."""
        version = self.shares.version
        if self.shares.on_beat(peer, fields, now):
            self._beat_to(peer, now)
        if self.shares.version != version:
            self._due["beat"] = float("-inf")

    def _bound(self, peer: bytes, entries: int, now: float) -> None:
        since, counted = self._entries.get(peer, (now, 0))
        since, counted = (now, entries) if now - since >= 1.0 else (since, counted + entries)
        self._entries[peer] = since, counted
        if counted > MAX_ENTRIES_PER_S:
            raise ProtocolError("more questions about limits than make sense")

    def beat(self, now: float) -> None:
        """Let the shares see what time it is, and tell the others. What new owners must know goes before."""
        if not self.shares.entitled:
            self.shares.listed = frozenset(node_id[:ID_BYTES] for node_id in self.listed()) - {self._me}
        if self.shares.tick(now):
            self._moved(now)
        for peer, known in self.shares.peers.items():
            if known.linked:
                self._beat_to(peer, now)

    def _beat_to(self, peer: bytes, now: float) -> None:
        self._send(peer, Frame.SHARES, self.shares.beat(peer, now))

    def _moved(self, now: float) -> None:
        """Other owners from now on: tell them what is in hand and what is known of budgets, so that they grant only what is left."""
        counts: dict[bytes, list[Count]] = {}
        for bucket, ends, sources in self.counters:
            for peer in {self.shares.owner(bucket), self.shares.heir(bucket)}:
                told = (Count(bucket=bucket, source=source, used=used, ends=ends) for source, used in sources.items())
                counts.setdefault(peer, []).extend(told)
        self._tell(counts)
        for stash in self._active.values():
            if stash.asking and stash.owner != self.shares.owner(stash.bucket):
                stash.asking = 0.0
            if stash.kind is not Kind.RATE:
                self._ask(stash, now, 0.0, report=True)  # of buckets of its own this also tells a new heir
        self._flush()
        self._wake()

    def _forget_owner(self, peer: bytes) -> None:
        for stash in self._active.values():
            if stash.owner == peer:
                stash.owner, stash.asking = b"", 0.0

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def finish(self) -> None:
        """The last request is over: what it used is told before the links close."""
        self._report(self._clock.monotonic())
        self._flush()

    def sharing(self) -> SharingFact:
        """How limits are shared, for the doctor."""
        shares = self.shares
        missed = tuple(sorted(peer.hex()[:12] for peer in shares.missed))
        return SharingFact(has_share=shares.entitled, proxies=len(shares.counted), missed=missed)

    def leave(self) -> None:
        """This proxy is about to stop: give everything back."""
        now = self._clock.monotonic()
        for stash in self._active.values():
            if stash.balance > 0:
                self._ask(stash, now, 0.0, back=stash.balance)
        self._report(now)
        self._flush()
        self.shares.leave(now)
        self.beat(now)


def _needs(plan: Plan, tokens: int, money: float) -> list[tuple[Stash, float]]:
    return [
        *((stash, 1.0) for stash in plan.ones),
        *((stash, float(tokens)) for stash in plan.tokens),
        *((stash, money) for stash in plan.money),
    ]


def _estimate(plan: Plan, call: Call) -> tuple[int, int]:
    """Tokens of the prompt, by its size, and the most that may be answered: what the client allows, else twice what is usual."""
    parsed, learned = call.parsed, plan.learned
    prompt = int(len(call.body) * learned.tokens_per_byte) + 1
    if call.task == "embeddings":
        return prompt, 0
    most = parsed.max_completion_tokens or parsed.max_tokens or parsed.max_output_tokens
    if most is None:
        most = int(2 * learned.completion)
    if parsed.n:
        most *= parsed.n
    return prompt, most if most < MAX_COMPLETION else MAX_COMPLETION


def _meter(stash: Stash) -> str:
    if stash.kind is Kind.BUDGET:
        return "budget"
    if stash.kind is Kind.SLOTS:
        return "concurrency"
    return "requests" if stash.what.startswith("requests") else "tokens"


def _source(node_id: bytes, boot: int) -> bytes:
    return node_id[:ID_BYTES] + boot.to_bytes(8)
