"""The directory's counters as Prometheus reads them."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mesh.dht.counts import Durations
from proxy.directory_metrics import COUNTERS, GAUGES, DirectoryCollector

STATS: dict[str, int | float] = {
    "table_size": 7,
    "records_held": 5,
    "clock_offset_s": -1.5,
    "bytes_in": 1200,
    "store_accepted": 4,
    "store_stale": 2,
    "refused_bad_signature": 3,
    "something_new": 9,
}


def read(lookups: Durations | None = None) -> tuple[dict[str, str], dict[tuple[str, ...], float]]:
    """Types by family, and values by sample name and label values."""
    registry = CollectorRegistry()
    registry.register(DirectoryCollector(lambda: STATS, lookups or Durations(), lambda: {"worker": [1.0, 2.0, 9.0], "proxy": []}))
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert all(family.documentation for family in families)
    samples = {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}
    return {family.name: family.type for family in families}, samples


def test_counters_are_counters_and_gauges_gauges() -> None:
    types, _ = read()
    for name in (*COUNTERS, "stores", "refused", "something_new"):
        assert types[f"infermesh_directory_{name}"] == "counter"
    for name in ("table_size", "clock_offset_seconds", "records_known", "record_age_seconds"):
        assert types[f"infermesh_directory_{name}"] == "gauge"
    assert types["infermesh_directory_lookup_seconds"] == "histogram"
    assert not GAUGES.keys() & COUNTERS.keys()


def test_what_the_readme_promises_is_there_with_that_type() -> None:
    section = (Path(__file__).parents[2] / "README.md").read_text().partition("### What the directory counts")[2].partition("\n## ")[0]
    types, _ = read()
    rows = [(re.findall(r"`([a-z_]+)`", cells[1]), cells[2].strip()) for row in section.splitlines() if (cells := row.split("|"))[1:]]
    named = [(name, kind) for names, kind in rows for name in names]
    assert len(named) > 10
    for name, kind in named:
        assert types[f"infermesh_directory_{name.removesuffix('_total')}"] == kind


def test_counters_that_never_counted_are_there_with_zero() -> None:
    _, samples = read()
    assert samples["infermesh_directory_bytes_out_total",] == 0
    assert samples["infermesh_directory_stores_total", "forged"] == 0


def test_stores_and_refusals_are_told_apart_by_reason() -> None:
    _, samples = read()
    assert samples["infermesh_directory_stores_total", "accepted"] == 4
    assert samples["infermesh_directory_stores_total", "stale"] == 2
    assert samples["infermesh_directory_refused_total", "bad_signature"] == 3
    assert samples["infermesh_directory_clock_offset_seconds",] == -1.5
    assert samples["infermesh_directory_something_new_total",] == 9


def test_look_ups_are_counted_by_how_long_they_took() -> None:
    lookups = Durations()
    for took_s in (0.001, 0.002, 0.3, 60.0):
        lookups.observe(took_s)
    _, samples = read(lookups)
    bucket = "infermesh_directory_lookup_seconds_bucket"
    assert [samples[bucket, bound] for bound in ("0.001", "0.0025", "0.25", "0.5", "2.5", "+Inf")] == [1, 2, 2, 3, 3, 4]
    assert samples["infermesh_directory_lookup_seconds_count",] == 4
    assert samples["infermesh_directory_lookup_seconds_sum",] == 60.303


def test_ages_of_records_are_told_by_role() -> None:
    _, samples = read()
    assert samples["infermesh_directory_records_known", "proxy"] == 0
    assert samples["infermesh_directory_record_age_seconds", "worker", "median"] == 2.0
    assert samples["infermesh_directory_record_age_seconds", "worker", "oldest"] == 9.0
    assert ("infermesh_directory_record_age_seconds", "proxy", "oldest") not in samples
