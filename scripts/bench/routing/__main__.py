"""`scripts/bench/run routing`: the same trace through every router, and what the engines' caches made of its choices."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench import infermesh, native, peers, processes
from bench.frontdoor.target import running_peer

HERE = Path(__file__).resolve().parent
TRACE = HERE.parent / "data" / "mooncake_conversation_trace.jsonl.gz"
INSIDE = ("round-robin", "least-loaded", "oracle")
"""Choices made by the stand-in itself, in the order of its last ports."""
ROUTERS = ("sglang-router", "vllm-router", "smg")
FRONTS = (*INSIDE, "infermesh", *ROUTERS)
RUN_DEADLINE_S = 3600

Json = dict[str, Any]
console = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The engines: how many, how much faster than real time, blocks of 512 tokens in a cache, prefill tokens/s, step base in ms, added
    microseconds for each sequence decoding, tokens in a step."""

    engines: int
    speed: float
    blocks: int
    prefill: float
    step_ms: float
    decode_us: float
    budget: int

    def argv(self) -> list[str]:
        options = {
            "--engines": self.engines,
            "--speed": self.speed,
            "--blocks": self.blocks,
            "--prefill": self.prefill,
            "--step-ms": self.step_ms,
            "--decode-us": self.decode_us,
            "--budget": self.budget,
        }
        return [str(part) for pair in options.items() for part in pair]


def write_trace(path: Path, minutes: float) -> int:
    """The trace as the replay client reads it; returns how many requests."""
    count = 0
    with gzip.open(TRACE, "rt") as source, path.open("w") as out:
        for line in source:
            item = json.loads(line)
            if item["timestamp"] > minutes * 60_000:
                break
            fields = [item["timestamp"], item["input_length"], item["output_length"], *item["hash_ids"]]
            out.write(" ".join(map(str, fields)) + "\n")
            count += 1
    return count


@contextmanager
def engines(model: Model, cores: Sequence[int]) -> Iterator[list[int]]:
    """Fresh engines with empty caches; yields their ports, then those of the choices made inside."""
    binary = native.build(HERE / "engines.c")
    wanted = set(cores)
    argv = [str(binary), *model.argv()]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, wanted))
    try:
        assert process.stdout is not None
        yield [int(port) for port in process.stdout.readline().split()[1:]]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def fronts(
    name: str, proxies: int, ports: Sequence[int], model: Model, proxy_cores: Sequence[int], other_cores: Sequence[int], favoured: bool
) -> Iterator[tuple[list[int], str | None]]:
    """The ports to send to, and the key. Raises peers.Missing or infermesh.NotYet."""
    urls = [f"http://127.0.0.1:{port}" for port in ports[: model.engines]]
    if name in INSIDE:
        yield [ports[model.engines + INSIDE.index(name)]], None
    elif name == "infermesh":
        wish = infermesh.Wish(
            engine_urls=tuple(urls),
            proxy_cores=tuple(proxy_cores),
            other_cores=tuple(other_cores),
            proxies=proxies,
            favoured=favoured,
        )
        mesh = infermesh.start_infermesh(wish)
        try:
            yield mesh.ports, mesh.api_key
        finally:
            infermesh.stop_infermesh(mesh)
    else:
        with ExitStack() as stack:
            started = [stack.enter_context(running_peer(name, urls, proxy_cores)) for _ in range(proxies)]
            yield [target.port for target, _ in started], None


def replay(trace: Path, ports: Sequence[int], key: str | None, model: Model, block_chars: int, cores: Sequence[int]) -> Json:
    """What the clients saw."""
    wanted = set(cores)
    argv = [str(native.build(HERE / "replay.c")), "--trace", str(trace), "--ports", ",".join(map(str, ports))]
    argv += ["--speed", str(model.speed), "--block-chars", str(block_chars), *(("--auth", key) if key else ())]
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, text=True, check=True, timeout=RUN_DEADLINE_S, preexec_fn=lambda: os.sched_setaffinity(0, wanted)
    )
    seen: Json = json.loads(done.stdout)
    return seen


def engine_stats(port: int) -> Json:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats", timeout=10) as answer:
        stats: Json = json.load(answer)
    return stats


def summary(seen: Json, stats: Json) -> Json:
    """The figures that are compared. Seconds are virtual."""
    each = stats["engines"]
    prompt, cached = (sum(engine[field] for engine in each) for field in ("prompt_tokens", "cached_tokens"))
    work = [engine["prefilled_tokens"] for engine in each]
    return {
        "ok": seen["ok"],
        "failed": seen["failed"] + seen["unfinished"],
        "cached_tokens": cached,
        "cached_share": cached / prompt if prompt else 0.0,
        "ttft_mean_s": seen["ttft"].get("mean_us", 0) / 1e6,
        "ttft_p50_s": seen["ttft"].get("p50_us", 0) / 1e6,
        "ttft_p99_s": seen["ttft"].get("p99_us", 0) / 1e6,
        "inter_token_p99_ms": stats["inter_token"].get("p99_us", 0) / 1e3,
        "e2e_mean_s": seen["e2e"].get("mean_us", 0) / 1e6,
        "output_tokens_per_s": seen["output_tokens_per_s"],
        "imbalance": max(work) * len(work) / sum(work) if sum(work) else 0.0,
        "waiting_peak": max(engine["waiting_peak"] for engine in each),
        "engines_late_ms": stats["worst_late_ms"],
    }


def table(results: Json) -> Table:
    out = Table(title="Mooncake conversation trace; seconds of the trace's time")
    headings = ("router", "proxies", "cached", "of oracle's", "TTFT mean s", "p50", "p99", "inter-token p99 ms", "tokens/s", "imbalance")
    for heading in (*headings, "most waiting", "failed"):
        out.add_column(heading, justify="left" if heading == "router" else "right")
    best = results["runs"].get("oracle x1", {}).get("cached_tokens")
    for name, run in results["runs"].items():
        router, _, proxies = name.rpartition(" x")
        out.add_row(
            router,
            "-" if router in INSIDE else proxies,
            f"{run['cached_share']:.1%}",
            f"{run['cached_tokens'] / best:.0%}" if best else "-",
            f"{run['ttft_mean_s']:.2f}",
            f"{run['ttft_p50_s']:.2f}",
            f"{run['ttft_p99_s']:.2f}",
            f"{run['inter_token_p99_ms']:.0f}",
            f"{run['output_tokens_per_s']:.0f}",
            f"{run['imbalance']:.2f}",
            str(run["waiting_peak"]),
            str(run["failed"]),
        )
    return out


def targets(results: Json) -> list[tuple[str, float, float, bool]]:
    """(target, ours, limit, met) for what could be compared."""
    runs = results["runs"]
    ours = runs.get("infermesh x1")
    lines: list[tuple[str, float, float, bool]] = []
    if ours is None:
        return lines
    rivals = [runs[name] for name in (f"{router} x1" for router in ROUTERS) if name in runs]
    for field, word in (("ttft_mean_s", "mean"), ("ttft_p99_s", "p99")):
        if rivals:
            limit = 0.8 * min(rival[field] for rival in rivals)
            lines.append((f"TTFT {word} ≤ 0.8 x best peer, s", ours[field], limit, ours[field] <= limit))
        if "round-robin x1" in runs:
            limit = 0.5 * runs["round-robin x1"][field]
            lines.append((f"TTFT {word} ≤ 0.5 x round-robin, s", ours[field], limit, ours[field] <= limit))
    if "oracle x1" in runs:
        limit = 0.95 * runs["oracle x1"]["cached_share"]
        lines.append(("cached share ≥ 0.95 x oracle's", ours["cached_share"], limit, ours["cached_share"] >= limit))
    several = next((run for name, run in runs.items() if name.startswith("infermesh x") and name != "infermesh x1"), None)
    if several:
        limit = 1.05 * ours["ttft_mean_s"]
        lines.append(("TTFT mean with several proxies ≤ 1.05 x one, s", several["ttft_mean_s"], limit, several["ttft_mean_s"] <= limit))
    return lines


def show(results: Json) -> None:
    out = Console(width=max(150, Console().width))
    out.print(table(results))
    for name, reason in results["missing"].items():
        out.print(f"missing: {name}: {reason}", markup=False)
    for label, value, limit, met in targets(results):
        out.print(f"{'met ' if met else 'MISS'} {label}: {value:.3f} against {limit:.3f}", markup=False)


@click.command(help=__doc__)
@click.option("--routers", "names", help=f"Comma-separated, of: {', '.join(FRONTS)}. All by default.")
@click.option("--proxies", default="1,4", show_default=True, help="How many of each router share the traffic.")
@click.option("--minutes", default=60.0, show_default=True, help="How much of the trace.")
@click.option("--speed", default=10.0, show_default=True, help="Seconds of the trace in a second.")
@click.option("--engines", "engine_count", default=8, show_default=True)
@click.option("--blocks", default=3000, show_default=True, help="KV cache of an engine, blocks of 512 tokens.")
@click.option("--prefill", default=7000.0, show_default=True, help="Prefill tokens/s of an engine.")
@click.option("--step-ms", default=15.0, show_default=True, help="Base time of a step.")
@click.option("--decode-us", default=150.0, show_default=True, help="Added to a step by each sequence decoding.")
@click.option("--budget", default=2048, show_default=True, help="Tokens in a step (max_num_batched_tokens).")
@click.option("--block-chars", default=512, show_default=True, help="Characters of text for a block of 512 tokens.")
@click.option("--proxy-cores", default="0", show_default=True, help="Cores of the routers.")
@click.option("--other-cores", default="1", show_default=True, help="Cores of the engines, the client and our workers.")
@click.option("--favour", is_flag=True, help="On a busy machine: ahead of everybody else's processes (root).")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every figure here.")
def main(
    names: str | None,
    proxies: str,
    minutes: float,
    speed: float,
    engine_count: int,
    blocks: int,
    prefill: float,
    step_ms: float,
    decode_us: float,
    budget: int,
    block_chars: int,
    proxy_cores: str,
    other_cores: str,
    favour: bool,
    json_file: Path | None,
) -> None:
    wanted = [name.strip() for name in names.split(",")] if names else list(FRONTS)
    if unknown := [name for name in wanted if name not in FRONTS]:
        raise click.UsageError(f"unknown router {', '.join(unknown)}; known: {', '.join(FRONTS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if favour:
        processes.favour(os.getpid())
    model = Model(engines=engine_count, speed=speed, blocks=blocks, prefill=prefill, step_ms=step_ms, decode_us=decode_us, budget=budget)
    front_cores, rest_cores = (tuple(int(core) for core in text.split(",")) for text in (proxy_cores, other_cores))
    os.sched_setaffinity(0, set(rest_cores))
    results: Json = {"model": model.__dict__, "minutes": minutes, "block_chars": block_chars, "runs": {}, "missing": {}, "raw": {}}
    with tempfile.TemporaryDirectory(prefix="bench-routing-") as folder:
        trace = Path(folder) / "trace"
        results["requests"] = write_trace(trace, minutes)
        for name in (front for front in FRONTS if front in wanted):
            for count in [1] if name in INSIDE else [int(part) for part in proxies.split(",")]:
                label = f"{name} x{count}"
                try:
                    with (
                        engines(model, rest_cores) as ports,
                        fronts(name, count, ports, model, front_cores, rest_cores, favour) as (targets_at, key),
                    ):
                        seen = replay(trace, targets_at, key, model, block_chars, rest_cores)
                        stats = engine_stats(ports[0])
                except (peers.Missing, infermesh.NotYet) as error:
                    results["missing"][label] = str(error)
                    console.print(f"{label}: missing: {error}", markup=False)
                    continue
                run = results["runs"][label] = summary(seen, stats)
                results["raw"][label] = {"seen": seen, "engines": stats}
                console.print(
                    f"{label}: cached {run['cached_share']:.1%}, TTFT mean {run['ttft_mean_s']:.2f} s, p99 {run['ttft_p99_s']:.2f} s"
                )
                if json_file:
                    json_file.write_text(json.dumps(results, indent=1))
    show(results)


main()
