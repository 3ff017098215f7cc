"""One measurement at a time: the generator runs, and the CPU of everybody else is read around its window."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench import processes
from bench.frontdoor.target import TOKENS_PER_S, Target

GAP_LIMIT_MS = 30.0
DELIVERED_AT_LEAST = 0.98
FOREIGN_LIMIT = 0.05
TRIALS = 3
QUIET_WINDOW_S = 0.5
QUIET_SHARE = 0.15
MOST_FEWEST = 20

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Lab:
    """The bench's fixed parts: the stand-in, the generator's binary, who has which core, how long a window lasts."""

    load: str
    engine_pid: int
    engine_port: int
    proxy_cores: tuple[int, ...]
    other_cores: tuple[int, ...]
    window_s: float
    warm_s: float
    patience_s: float = 0.0


def engine_stats(lab: Lab) -> Json:
    """The stand-in's own counts."""
    with urllib.request.urlopen(f"http://127.0.0.1:{lab.engine_port}/stats", timeout=10) as answer:
        stats: Json = json.load(answer)
    return stats


@dataclass(frozen=True, kw_only=True)
class _Sample:
    at_s: float
    proxy_s: float
    worker_s: float
    engine_s: float
    busy_s: dict[int, float]


def _sample(lab: Lab, proxy: Sequence[int], worker: Sequence[int]) -> _Sample:
    return _Sample(
        at_s=time.monotonic(),
        proxy_s=processes.cpu_s(proxy),
        worker_s=processes.cpu_s(worker),
        engine_s=processes.cpu_s([lab.engine_pid]),
        busy_s=processes.core_busy_s(),
    )


def _once(lab: Lab, target: Target, arguments: Sequence[str]) -> Json:
    """Run the generator once. Its JSON, with the share of a core that each party used in its window and what one event cost.

    CPU is divided by its own interval and events by theirs, so that a late reading does not count."""
    cores = set(lab.other_cores)
    argv = [lab.load, *arguments, "--port", str(target.port), *(("--auth", target.auth) if target.auth else ())]
    proxy, worker = target.proxy_pids(), target.worker_pids()
    before = after = None
    result: Json = {}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, cores)) as generator:
        assert generator.stdout is not None
        for line in generator.stdout:
            if line.startswith("begin"):
                before = _sample(lab, proxy, worker)
            elif line.startswith("end"):
                after = _sample(lab, proxy, worker)
            else:
                result = json.loads(line)
    if before is None or after is None or not result:
        raise RuntimeError(f"the generator did not finish: {' '.join(argv[:2])}")
    took_s = after.at_s - before.at_s
    share = {
        "proxy": (after.proxy_s - before.proxy_s) / took_s,
        "worker": (after.worker_s - before.worker_s) / took_s,
        "engine": (after.engine_s - before.engine_s) / took_s,
        "generator": result["cpu_share"],
    }
    per_s = result["tokens_per_s"] if "streams" in arguments else result["requests_per_s"]
    busy = {core: (after.busy_s[core] - before.busy_s[core]) / took_s for core in after.busy_s}
    sides = (((lab.proxy_cores, ("proxy",)),) if proxy else ()) + ((lab.other_cores, ("worker", "engine", "generator")),)
    foreign = [sum(busy[core] for core in cores) - sum(share[name] for name in names) for cores, names in sides]
    result["core_share"] = {name: round(value, 4) for name, value in share.items()}
    result["core_busy"] = {str(core): round(value, 4) for core, value in busy.items()}
    result["foreign_share"] = round(max(0.0, *foreign), 4)
    result["us_each"] = {name: round(value / per_s * 1e6, 3) for name, value in share.items()} if per_s else {}
    result["rss_bytes"] = processes.rss_bytes(target.proxy_pids())
    return result


def run(lab: Lab, target: Target, arguments: Sequence[str], trials: int = TRIALS) -> Json:
    """Measure; again, at most so many times, while something that is not ours used the cores. The quietest counts."""
    best: Json | None = None
    for _ in range(trials):
        wait_for_quiet(lab)
        result = _once(lab, target, arguments)
        if best is None or result["foreign_share"] < best["foreign_share"]:
            best = result
        if best["foreign_share"] <= FOREIGN_LIMIT:
            break
    assert best is not None
    return best


def wait_for_quiet(lab: Lab) -> None:
    """Wait, at most the lab's patience, until the cores have been idle for half a second."""
    deadline = time.monotonic() + lab.patience_s
    cores = (*lab.proxy_cores, *lab.other_cores)
    while time.monotonic() < deadline:
        before = processes.core_busy_s()
        time.sleep(QUIET_WINDOW_S)
        after = processes.core_busy_s()
        if max(after[core] - before[core] for core in cores) < QUIET_SHARE * QUIET_WINDOW_S:
            return


def plain(lab: Lab, target: Target, concurrency: int) -> Json:
    """Plain requests in a closed loop."""
    return run(lab, target, ["plain", "-c", str(concurrency), "-t", str(lab.window_s), "--warm", str(lab.warm_s)])


def streams(lab: Lab, target: Target, count: int, sample: float = 1.0, probes: int = 0, ramp_s: float = 20, trials: int = TRIALS) -> Json:
    """Streams kept open, a token each 20 ms."""
    options = ["-s", str(count), "-t", str(lab.window_s), "--warm", str(lab.warm_s), "--sample", str(sample)]
    return run(lab, target, ["streams", *options, "--ramp", str(ramp_s), "--probes", str(probes)], trials)


def clean(result: Json) -> bool:
    """Whether tokens came one by one and on time; if not, something was overrun and the cost of a token says little."""
    gap_ms = result["gap"].get("p50_us", 0) / 1e3
    wanted = DELIVERED_AT_LEAST * TOKENS_PER_S * result["streams_wanted"]
    return bool(15 <= gap_ms <= 25 and result["tokens_per_s"] >= wanted and not result["errors"])


def holds(result: Json, count: int) -> bool:
    """Whether that many streams flowed as they should."""
    gap_ms = result["gap"].get("p99_us", 1e9) / 1e3
    whole = result["tokens_per_s"] >= DELIVERED_AT_LEAST * TOKENS_PER_S * count
    return bool(gap_ms < GAP_LIMIT_MS and whole and not result["errors"] and result["streams"] >= count)


def bracket(
    held: Callable[[int], bool], guess: int, *, trials: int = 8, ceiling: int = 6000, close: float = 0.06
) -> tuple[int, int | None]:
    """The largest count known to be held (0: none) and the smallest known not to be (None: none tried), at most `close` apart unless the
    trials ran out first: outwards from the guess by a third until both are known, then halving."""
    most, least_lost, count = 0, None, max(MOST_FEWEST, min(guess, ceiling))
    for _ in range(trials):
        if held(count):
            most = max(most, count)
        else:
            least_lost = count if least_lost is None else min(least_lost, count)
        if least_lost is None:
            count = min(ceiling, count * 4 // 3)
            if most == ceiling:
                break
        elif not most:
            count = least_lost * 2 // 3
            if count < MOST_FEWEST:
                break
        elif least_lost - most <= close * most:
            break
        else:
            count = (most + least_lost) // 2
    return most, least_lost


def most_streams(lab: Lab, target: Target, guess: int) -> Json:
    """The most streams held with a gap p99 under the limit; the truth lies between `held` and `not_held`."""
    tried: dict[str, Json] = {}

    def attempt(count: int) -> bool:
        result = streams(
            replace(lab, window_s=min(lab.window_s, 4.0)), target, count, sample=min(1.0, max(0.2, 200 / count)), ramp_s=8, trials=1
        )
        tried[str(count)] = {
            "gap_p99_ms": result["gap"].get("p99_us", 0) / 1e3,
            "held": holds(result, count),
            **{field: result[field] for field in ("tokens_per_s", "streams", "errors", "core_share", "core_busy")},
        }
        return bool(tried[str(count)]["held"])

    held, not_held = bracket(attempt, guess)
    return {"held": held, "not_held": not_held, "tried": tried}
