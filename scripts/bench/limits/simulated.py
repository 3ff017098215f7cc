"""Limits on virtual time: real `Limiter`s and their messages; what is modelled is the network, the clients and the clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mesh.documents import Document
from mesh.limits import Limit, Limits, encode_limits
from tests.support.limits import Floor, Seat, call_of, key_of, most_in_window, zipf
from tests.support.virtual_time import VirtualLoop, run_virtual

Json = dict[str, Any]
WINDOW_S = 60.0
OVERLOAD = 3.0
SLACK = 0.02
USED = 0.98
OVERSHOOT = 0.01
WARM_S = 20.0
USAGE = (60, 140)
"""Tokens of prompt and answer of each request; 400 are allowed for the answer."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """``seconds`` of load after `WARM_S`, on virtual time."""

    seed: int = 1
    proxies: tuple[int, ...] = (2, 4, 8, 16)
    seconds: float = 90.0
    rps: float = 100.0
    tps: float = 10_000.0
    budget: float = 500_000.0
    seeds: int = 10
    """How many each row about budgets is made of, from ``seed`` on."""


def row(name: str, figures: Json, *, target: str, ok: bool) -> Json:
    return {"name": name, **figures, "target": target, "ok": ok}


def windows(size: Size) -> list[Json]:
    """Requests and tokens at three times the limit, more of them at one proxy than at another."""
    found = []
    for count in size.proxies:
        found += [_rate(size, count), _tokens(size, count)]
    return found


def _rate(size: Size, count: int) -> Json:
    async def main(loop: VirtualLoop) -> Json:
        floor = Floor(loop, count, seed=size.seed)
        await floor.settled()
        began = loop.time()
        keys = [key_of(rps=size.rps)]
        await floor.load(keys, call_of(), rate=OVERLOAD * size.rps, seconds=WARM_S + size.seconds, weights=zipf(count))
        return _judged(f"{count} proxies, requests", floor, size.rps, burst=size.rps, began=began, size=size)

    return run_virtual(main)


def _tokens(size: Size, count: int) -> Json:
    async def main(loop: VirtualLoop) -> Json:
        floor = Floor(loop, count, seed=size.seed)
        await floor.settled()
        began = loop.time()
        await floor.load(
            [key_of(tps=size.tps)],
            call_of(max_tokens=400),
            rate=OVERLOAD * size.tps / sum(USAGE),
            seconds=WARM_S + size.seconds,
            weights=zipf(count),
            usage=USAGE,
            takes_s=2.0,
        )
        return _judged(f"{count} proxies, tokens", floor, size.tps, burst=10 * size.tps, began=began, size=size)

    return run_virtual(main)


def _judged(name: str, floor: Floor, limit: float, *, burst: float, began: float, size: Size) -> Json:
    """Most in any window, and how much was used once the load was steady."""
    events = floor.all_admitted()
    most = most_in_window(events, WINDOW_S) / (limit * WINDOW_S)
    allowed = 1 + burst / (limit * WINDOW_S) + SLACK
    used = sum(cost for at, cost in events if at >= began + WARM_S) / (limit * size.seconds)
    return row(
        name,
        {
            "most_in_60s": round(most, 4),
            "allowed": round(allowed, 4),
            "used": round(used, 4),
            "waited": round(_share_waited(floor), 4),
            "frames_per_s": round(floor.frames / floor.loop.time() / len(floor.seats), 1),
        },
        target=f"60 s ≤ limit + burst + {SLACK:.0%}, ≥ {USED:.0%} used",
        ok=most <= allowed and used >= USED,
    )


def _share_waited(floor: Floor) -> float:
    waits = [waited for seat in floor.seats for waited in seat.waited_s]
    return sum(waited > 0 for waited in waits) / max(1, len(waits))


def faults(size: Size) -> list[Json]:
    """What dies or is cut off while eight proxies have three times the limit to do."""
    return [_fault(size, name, cause, count) for name, (count, cause) in FAULTS.items()]


Cause = Callable[[Floor, Seat, Seat], Coroutine[Any, Any, None]]


async def _kill_owner(floor: Floor, owner: Seat, other: Seat) -> None:
    floor.kill(owner)


async def _kill_other(floor: Floor, owner: Seat, other: Seat) -> None:
    floor.kill(other)


async def _kill_and_restart(floor: Floor, owner: Seat, other: Seat) -> None:
    floor.kill(owner)
    await asyncio.sleep(3)
    floor.add(at=owner.index)


async def _stop_owner(floor: Floor, owner: Seat, other: Seat) -> None:
    await floor.stop(owner)


async def _cut(floor: Floor, owner: Seat, other: Seat) -> None:
    floor.cut(owner, other)
    await asyncio.sleep(40)
    floor.heal()


async def _isolate(floor: Floor, owner: Seat, other: Seat) -> None:
    floor.split([owner])
    await asyncio.sleep(40)
    floor.heal()


async def _halves(floor: Floor, owner: Seat, other: Seat) -> None:
    floor.split(floor.seats[: len(floor.seats) // 2])
    await asyncio.sleep(40)
    floor.heal()


async def _pause(floor: Floor, owner: Seat, other: Seat) -> None:
    await floor.pause(owner, 10.0)


async def _join(floor: Floor, owner: Seat, other: Seat) -> None:
    floor.add()


FAULTS: dict[str, tuple[int, Cause]] = {
    "owner killed": (8, _kill_owner),
    "another killed": (8, _kill_other),
    "owner killed, back after 3 s": (8, _kill_and_restart),
    "owner stopped": (8, _stop_owner),
    "link to the owner cut for 40 s": (8, _cut),
    "owner cut off for 40 s": (8, _isolate),
    "halves apart for 40 s": (8, _halves),
    "two apart for 40 s": (2, _halves),
    "owner stands still for 10 s": (8, _pause),
    "one more joins": (8, _join),
}


def _fault(size: Size, name: str, cause: Cause, count: int) -> Json:
    async def main(loop: VirtualLoop) -> Json:
        floor = Floor(loop, count, seed=size.seed)
        await floor.settled()
        began, key = loop.time(), key_of(rps=size.rps)
        seconds = WARM_S + 100.0
        loading = loop.create_task(floor.load([key], call_of(), rate=OVERLOAD * size.rps, seconds=seconds, weights=zipf(count)))
        await asyncio.sleep(WARM_S)
        owner, other = _owner(floor)
        await cause(floor, owner, other)
        await loading
        events = floor.all_admitted()
        most = most_in_window(events, WINDOW_S) / (size.rps * WINDOW_S)
        allowed = 1 + 1 / WINDOW_S + SLACK
        pace = [
            sum(1 for at, _ in events if began + second <= at < began + second + 10) / (10 * size.rps)
            for second in range(int(seconds) - 10)
        ]
        used = sum(cost for at, cost in events if at >= began + WARM_S) / (size.rps * 100)
        figures = {
            "most_in_60s": round(most, 4),
            "allowed": round(allowed, 4),
            "used": round(used, 4),
            "least_in_10s": round(min(pace[15:]), 2),
        }
        return row(name, figures, target="60 s ≤ limit + what is in hand", ok=most <= allowed)

    return run_virtual(main)


def _owner(floor: Floor) -> tuple[Seat, Seat]:
    """The owner of the one bucket there is, and another."""
    bucket = next(iter(floor.seats[0].limiter._stashes))
    first = floor.seats[0].limiter.shares.owner(bucket)
    owner = next(seat for seat in floor.seats if seat.node_id[:8] == first)
    return owner, next(seat for seat in floor.seats if seat is not owner)


def budgets(size: Size) -> list[Json]:
    """A day's tokens shared by eight proxies, used up in half a minute."""
    return [_budgets(size, name, cause) for name, cause in BUDGETS.items()]


async def _nothing(floor: Floor, owner: Seat, other: Seat) -> None:
    pass


async def _restart_all(floor: Floor, owner: Seat, other: Seat) -> None:
    for seat in list(floor.seats):
        await floor.stop(seat)
        floor.add(at=seat.index)
        await asyncio.sleep(1)


BUDGETS: dict[str, Cause] = {
    "budget": _nothing,
    "budget, owner killed": _kill_owner,
    "budget, another killed": _kill_other,
    "budget, owner killed, back after 3 s": _kill_and_restart,
    "budget, owner stopped": _stop_owner,
    "budget, owner stands still for 10 s": _pause,
    "budget, link to the owner cut for 40 s": _cut,
    "budget, owner cut off for 40 s": _isolate,
    "budget, halves apart for 40 s": _halves,
    "budget, all restarted in turn": _restart_all,
}


def _budgets(size: Size, name: str, cause: Cause) -> Json:
    """Over several seeds: the worst counts."""
    used = [_budget(replace(size, seed=size.seed + number), cause) for number in range(size.seeds)]
    figures = {
        "seeds": size.seeds,
        "least_used": round(min(used), 4),
        "most_used": round(max(used), 4),
        "overshoot": round(max(1.0, *used) - 1, 4),
    }
    return row(name, figures, target=f"overshoot ≤ {OVERSHOOT:.0%}", ok=max(used) <= 1 + OVERSHOOT)


def _budget(size: Size, cause: Cause) -> float:
    """How much of the budget was used."""

    async def main(loop: VirtualLoop) -> float:
        floor = Floor(loop, 8, seed=size.seed)
        limit = Limits(whole=Limit(tokens_per_day=size.budget))
        floor.document = Document(kind="limits", name="project:p", seq=1, previous=b"", issued=0.0, body=encode_limits(limit))
        for seat in floor.seats:
            seat.limiter.take_document(floor.document)
        await floor.settled()
        rate = size.budget / sum(USAGE) / 30
        load = floor.load([key_of()], call_of(max_tokens=400), rate=rate, seconds=90, weights=zipf(8), usage=USAGE, takes_s=2.0)
        loading = loop.create_task(load)
        await asyncio.sleep(floor.rng.uniform(2, 28))
        await cause(floor, *_owner(floor))
        await loading
        return sum(cost for _, cost in floor.all_admitted()) / size.budget

    return run_virtual(main)


def slots(size: Size) -> list[Json]:
    """Requests at once, over eight proxies."""

    async def main(loop: VirtualLoop) -> Json:
        floor = Floor(loop, 8, seed=size.seed)
        await floor.settled()
        limit = 40.0
        await floor.load([key_of(concurrency=limit)], call_of(), rate=OVERLOAD * limit, seconds=60, weights=zipf(8), takes_s=1.0)
        spans = sorted((moment, change) for seat in floor.seats for span in seat.spans for moment, change in ((span[0], 1), (span[1], -1)))
        most = now = 0
        area = last = 0.0
        for moment, change in spans:
            area, last = area + now * (moment - last), moment
            now += change
            most = max(most, now)
        used = area / (limit * 60)
        return row("8 proxies, at once", {"most": most, "limit": limit, "used": round(used, 4)}, target="never more", ok=most <= limit)

    return [run_virtual(main)]


ROWS: dict[str, Callable[[Size], Sequence[Json]]] = {"windows": windows, "faults": faults, "budgets": budgets, "slots": slots}
