"""`scripts/bench/run frontdoor`: every front on the same core, one after the other, in one run."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench import infermesh, native, peers, processes
from bench.frontdoor import handshake, measure, report
from bench.frontdoor.target import MESHES, Target, engine, running, running_peer

HERE = Path(__file__).resolve().parent
FRONTS = ("direct", *MESHES, *peers.PEERS)
SATURATED = 0.97
SAMPLED_FROM = 1500
CONCURRENCY = 32
PROBES = 4

Json = dict[str, Any]
console = Console(stderr=True)


def measure_front(lab: measure.Lab, target: Target, counts: Sequence[int], search: bool) -> Json:
    """All figures of one front."""
    out: Json = {"ready_s": round(target.ready_s, 2), "rss_idle_bytes": processes.rss_bytes(target.proxy_pids())}
    out["rss_worker_idle_bytes"] = processes.rss_bytes(target.worker_pids())
    out["plain"] = measure.plain(lab, target, CONCURRENCY)
    console.print(f"  plain: {report.us(out['plain'], 'proxy')} µs, {out['plain']['requests_per_s']:.0f}/s")
    out["single"] = measure.plain(lab, target, 1)
    out["streams"] = {}
    for count in counts:
        result = measure.streams(lab, target, count, sample=0.2 if count >= SAMPLED_FROM else 1.0)
        out["streams"][str(count)] = result
        gap = result["gap"].get("p99_us", 0) / 1e3
        console.print(f"  {count} streams: {report.us(result, 'proxy')} µs a token, gap p99 {gap:.1f} ms, {result['tokens_per_s']:.0f}/s")
        if result["core_share"]["proxy"] > SATURATED and count != counts[-1]:
            out["saturated_at"] = count
            break
    middle = str(counts[min(1, len(counts) - 1)])
    if middle in out["streams"]:
        out["probed"] = measure.streams(lab, target, int(middle), probes=PROBES)
    out["rss_after_bytes"] = processes.rss_bytes(target.proxy_pids())
    out["rss_worker_after_bytes"] = processes.rss_bytes(target.worker_pids())
    if search:
        out["most_streams"] = measure.most_streams(lab, target, guess_streams(out))
        console.print(f"  most streams: {out['most_streams']['held']}")
    return out


def guess_streams(out: Json) -> int:
    """Where to start looking: nine tenths of what the core could do at the cost measured."""
    costs = [result["us_each"].get("proxy", 0) for result in out["streams"].values()]
    cost_us = costs[-1] if costs else 0
    return int(0.9 * 1e6 / (cost_us * measure.TOKENS_PER_S)) if cost_us else 1800


def measure_tls(name: str, lab: measure.Lab, count: int) -> Json:
    """The cost of a TLS connection, or why there is no such figure."""
    engine_url = f"http://127.0.0.1:{lab.engine_port}"
    with tempfile.TemporaryDirectory(prefix="bench-tls-") as folder:
        tls = handshake.make_certificate(Path(folder))
        try:
            if name == "infermesh":
                env = {"MESH_PROXY_TLS_CERT": str(tls.cert), "MESH_PROXY_TLS_KEY": str(tls.key), "SSL_CERT_FILE": str(tls.cert)}
                wish = infermesh.Wish(
                    engine_urls=(engine_url,), proxy_cores=lab.proxy_cores, other_cores=lab.other_cores, env=tuple(env.items())
                )
                mesh = infermesh.start_infermesh(wish)
                try:
                    return handshake.handshakes(mesh.ports[0], lambda: mesh.tree("proxy"), count)
                finally:
                    infermesh.stop_infermesh(mesh)
            with running_peer(name, [engine_url], lab.proxy_cores, tls) as (target, _):
                return handshake.handshakes(target.port, target.proxy_pids, count)
        except (peers.Missing, infermesh.NotYet, OSError) as error:
            return {"missing": str(error)}


def machine() -> Json:
    """Where this was measured."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=native.ROOT, capture_output=True, text=True, check=False)
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def chosen(names: str | None) -> list[str]:
    wanted = [name.strip() for name in names.split(",")] if names else list(FRONTS)
    unknown = [name for name in wanted if name not in FRONTS]
    if unknown:
        raise click.UsageError(f"unknown front {', '.join(unknown)}; known: {', '.join(FRONTS)}")
    return [name for name in FRONTS if name in wanted]


def cores(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


@click.command(help=__doc__)
@click.option("--peers", "names", help=f"Comma-separated, of: {', '.join(FRONTS)}. All by default.")
@click.option("--streams", default="200,1000,2000", show_default=True, help="Numbers of streams of 50 tokens/s.")
@click.option("--window", "window_s", default=6.0, show_default=True, help="Seconds of one measurement.")
@click.option("--quick", is_flag=True, help="Short windows, no search for the most streams, no TLS.")
@click.option("--no-search", is_flag=True, help="Leave out the search for the most streams.")
@click.option("--spread", is_flag=True, help="Give every stream a phase of its own instead of one engine step for all.")
@click.option("--proxy-cores", default="0", show_default=True, help="Cores of the front under test.")
@click.option("--other-cores", default="1", show_default=True, help="Cores of everything else.")
@click.option("--favour", is_flag=True, help="On a busy machine: ahead of everybody else's processes (root).")
@click.option("--patience", "patience_s", default=0.0, show_default=True, help="Seconds to wait for idle cores, each time.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every figure here.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw the figures here (PNG).")
def main(
    names: str | None,
    streams: str,
    window_s: float,
    quick: bool,
    no_search: bool,
    spread: bool,
    proxy_cores: str,
    other_cores: str,
    favour: bool,
    patience_s: float,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if favour:
        processes.favour(os.getpid())
    counts = [int(part) for part in streams.split(",")]
    if (os.cpu_count() or 1) < 2:
        raise click.UsageError("two cores are needed: one for the front, one for the rest")
    load = native.build(HERE / "load.c")
    front_cores, rest_cores = cores(proxy_cores), cores(other_cores)
    os.sched_setaffinity(0, set(rest_cores))
    results: Json = {"machine": machine(), "streams": counts, "spread": spread, "fronts": {}, "missing": {}}
    with engine(rest_cores, spread) as (engine_pid, engine_port):
        lab = measure.Lab(
            load=str(load),
            engine_pid=engine_pid,
            engine_port=engine_port,
            proxy_cores=front_cores,
            other_cores=rest_cores,
            window_s=2.0 if quick else window_s,
            warm_s=0.5 if quick else 1.0,
            patience_s=patience_s,
        )
        for name in chosen(names):
            console.print(f"[bold]{name}[/bold]")
            try:
                with running(name, engine_port, front_cores, rest_cores, favour) as target:
                    results["fronts"][name] = measure_front(lab, target, counts, not quick and not no_search)
                if name not in ("direct", "infermesh-proxy") and not quick:
                    results["fronts"][name]["tls"] = measure_tls(name, lab, 200)
            except (peers.Missing, infermesh.NotYet) as error:
                results["missing"][name] = str(error)
                console.print(f"  missing: {error}", markup=False)
            if json_file:
                json_file.write_text(json.dumps(results, indent=1))
    report.show(results)
    if plot_file and json_file is None:
        json_file = plot_file.with_suffix(".json")
        json_file.write_text(json.dumps(results, indent=1))
    if plot_file and json_file:
        draw(json_file, plot_file)


def draw(json_file: Path, plot_file: Path) -> None:
    """The plot, by an environment that holds matplotlib for this alone."""
    try:
        python = peers.ensure_venv("plot", "matplotlib")
        subprocess.run([str(python), str(HERE / "plot.py"), str(json_file), str(plot_file)], check=True)
    except (peers.Missing, subprocess.CalledProcessError) as error:
        console.print(f"no plot: {error}")
        sys.exit(1)


main()
