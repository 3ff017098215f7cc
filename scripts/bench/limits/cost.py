"""What limits cost a request, in CPU time of this process: beside the same loop without them."""

from __future__ import annotations

import time
from typing import Any

from mesh.apikey import ApiKey
from mesh.documents import Document
from mesh.limits import Limit, Limits, encode_limits
from proxy.limits.limiter import Limiter
from tests.support.clocks import StoppedClock
from tests.support.limits import call_of, key_of

Json = dict[str, Any]
ROUNDS, REQUESTS = 9, 20_000
MOST_US = 4.0
NONE_US = 0.5


def measure() -> list[Json]:
    """Microseconds of CPU a request, the best of `ROUNDS`."""
    clock = StoppedClock()
    limiter = Limiter(b"m" * 32, 1, send=lambda peer, kind, fields: None, clock=clock)
    limiter.shares.looked = True
    for _ in range(600):
        clock.now += 0.1
        limiter.tick(clock.now)
    found = [_row("no limits", _cost(limiter, clock, key_of("none")), NONE_US)]
    found.append(_row("a key's requests", _cost(limiter, clock, key_of("one", rps=1e9)), MOST_US))
    found.append(_row("a key's requests and tokens", _cost(limiter, clock, key_of("two", rps=1e9, tps=1e12)), MOST_US))
    body = encode_limits(Limits(whole=Limit(rps=1e9, tps=1e12)))
    limiter.take_document(Document(kind="limits", name="default", seq=1, previous=b"", issued=0.0, body=body))
    found.append(_row("a key's and its project's requests and tokens", _cost(limiter, clock, key_of("four", rps=1e9, tps=1e12)), MOST_US))
    return found


def _row(name: str, cost_us: float, most_us: float) -> Json:
    return {"name": name, "us": round(cost_us, 2), "target": f"≤ {most_us:g} µs a request", "ok": cost_us <= most_us}


def _cost(limiter: Limiter, clock: StoppedClock, key: ApiKey) -> float:
    call, best = call_of(max_tokens=100), float("inf")
    for _ in range(ROUNDS):
        began = time.process_time_ns()
        for _ in range(REQUESTS):
            hold = limiter.enter(key, call)
            if hold is not None and not isinstance(hold, str):
                hold.headers()
                hold.seen(accepted=True, sent_bytes=100)
                hold.settle(50, 50)
                hold.end()
        best = min(best, (time.process_time_ns() - began) / REQUESTS / 1000)
        clock.now += 0.1
        limiter.tick(clock.now)
    return best
