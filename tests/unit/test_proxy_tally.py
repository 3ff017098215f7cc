"""Plain counters and histograms, as Prometheus reads them."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from proxy.tally import BOUNDS_S, Counts, Spreads


def samples(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_counts_add_up_by_their_labels() -> None:
    registry, counts = CollectorRegistry(), Counts("asked", "Asked.", "model", "code")
    registry.register(counts)
    counts.at("m", "ok").inc()
    counts.at("m", "ok").inc(2)
    counts.at("m", "lost").inc(0)
    assert samples(registry) == {("asked_total", "ok", "m"): 3, ("asked_total", "lost", "m"): 0}


def test_counts_want_every_label() -> None:
    with pytest.raises(AssertionError):
        Counts("asked", "Asked.", "model", "code").at("m")


def test_spread_is_a_histogram_whose_buckets_hold_all_below_them() -> None:
    registry, spreads = CollectorRegistry(), Spreads("took_seconds", "Took.")
    registry.register(spreads)
    for took_s in (0.001, 0.005, 0.006, 7.0, 1000.0):
        spreads.at("m").observe(took_s)
    found = samples(registry)
    assert [found["took_seconds_bucket", bound, "m"] for bound in ("0.005", "0.01", "5.0", "10.0", "300.0", "+Inf")] == [2, 3, 3, 4, 4, 5]
    assert len([name for name, *_ in found if name == "took_seconds_bucket"]) == len(BOUNDS_S) + 1
    assert found["took_seconds_count", "m"] == 5
    assert found["took_seconds_sum", "m"] == pytest.approx(1007.012)
