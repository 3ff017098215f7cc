"""The benchmarks' own reckoning: what is not checked here decides what the project believes about itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from bench import peers
from bench.frontdoor import measure, report


@pytest.mark.parametrize(("truth", "guess"), [(431, 1035), (1935, 1700), (700, 700), (150, 900), (2600, 300)])
def test_the_search_for_the_most_streams_ends_close_below_the_truth(truth: int, guess: int) -> None:
    held, not_held = measure.bracket(lambda count: count <= truth, guess, trials=12)
    assert held <= truth
    assert not_held is not None
    assert truth < not_held <= held * 1.07 + 1


def test_the_search_gives_up_where_nothing_is_held() -> None:
    held, not_held = measure.bracket(lambda _count: False, 500, trials=20)
    assert held == 0
    assert not_held is not None


def test_the_search_stops_at_its_ceiling() -> None:
    assert measure.bracket(lambda _count: True, 500, trials=20, ceiling=2000) == (2000, None)


def result(
    *, gap_p50_ms: float = 20, gap_p99_ms: float = 22, rate: float = 10_000, streams: int = 200, errors: int = 0
) -> dict[str, object]:
    return {
        "gap": {"p50_us": gap_p50_ms * 1e3, "p99_us": gap_p99_ms * 1e3},
        "tokens_per_s": rate,
        "streams": streams,
        "streams_wanted": 200,
        "errors": errors,
        "us_each": {"proxy": 10.0},
    }


def test_streams_are_held_only_when_all_flow_on_time_and_whole() -> None:
    assert measure.holds(result(), 200)
    assert not measure.holds(result(gap_p99_ms=31), 200)
    assert not measure.holds(result(rate=9_000), 200)
    assert not measure.holds(result(streams=199), 200)
    assert not measure.holds(result(errors=1), 200)


def test_tokens_that_come_in_bunches_do_not_count_as_cheap() -> None:
    assert measure.clean(result())
    assert not measure.clean(result(gap_p50_ms=0.1))


def front(request_us: float, token_us: float, gap_p50_ms: float = 20) -> dict[str, object]:
    streams = {"200": {**result(gap_p50_ms=gap_p50_ms), "us_each": {"proxy": token_us}}}
    return {"plain": {"us_each": {"proxy": request_us}}, "streams": streams, "single": {"latency": {}}}


def test_targets_compare_with_the_cheapest_rust_router_and_leave_overrun_figures_out() -> None:
    fronts = {"infermesh": front(60, 8), "sglang-router": front(90, 15), "smg": front(170, 14), "vllm-router": front(120, 3, gap_p50_ms=0)}
    met = {label: (figures, fine) for label, figures, fine in report.targets({"streams": [200], "fronts": fronts})}
    assert met["CPU per request ≤ 0.7 x cheapest Rust router, µs"] == ("60.00 against 63.00", True)
    assert met["CPU per token at 200 ≤ 0.6 x cheapest Rust router, µs"] == ("8.00 against 8.40", True)
    assert met["CPU per token at 200 ≤ 1.0 x nginx, µs"] == ("not measured", None)


def test_a_router_is_started_with_all_engines_and_on_loopback(tmp_path: Path) -> None:
    site = peers.Site(port=1, spare_port=2, engine_urls=("http://127.0.0.1:3", "http://127.0.0.1:4"), folder=tmp_path)
    for peer in peers.PEERS.values():
        launch = peer.command(site)
        written = " ".join([*launch.argv, *(path.read_text() for path in tmp_path.iterdir())])
        assert "127.0.0.1:3" in written
        assert "127.0.0.1:4" in written
        assert "0.0.0.0" not in written
