"""The directory's counters for Prometheus, each with its type and a word on what it means; read off at scrape time.

`Directory.stats` counts by name. Names with a reason in them become one family with a label; what has no entry here yet is still shown,
as a counter, so that nothing new stays hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from mesh.dht.counts import Durations
from mesh.dht.storage import Verdict

PREFIX = "infermesh_directory"

GAUGES = {
    "table_size": "Peers in the routing table.",
    "records_held": "Records this node holds for the mesh.",
    "sessions": "Peers that have proved who they are and are remembered.",
    "nodes_estimated": "Nodes in the mesh, judged by how near the nearest peers are.",
    "clock_offset_s": "Seconds that this machine's clock is corrected by, as most peers' clocks say.",
}
COUNTERS = {
    "bytes_in": "Bytes of datagrams received.",
    "bytes_out": "Bytes of datagrams sent.",
    "datagrams_in": "Datagrams received.",
    "datagrams_out": "Datagrams sent.",
    "lookups": "Look-ups made, also those for upkeep.",
    "lookups_cut_short": "Look-ups that ran into their deadline and went on with what they had.",
    "timeouts": "Requests that a peer never answered.",
    "retransmissions": "Requests sent a second time.",
    "late_replies": "Replies that nobody waited for any more.",
    "introductions": "Peers that proved who they are.",
    "resets": "Peers that had started again and were introduced to anew.",
    "reunions": "Times that peers long lost came back.",
    "notices": "Changed records pushed to whoever watches them.",
    "records_verified": "Records whose signature was checked.",
    "unsendable": "Datagrams that could not be sent.",
    "socket_errors": "Errors the UDP socket reported.",
}
STORES = "Records offered to this node, by what became of them."
REFUSED = "Datagrams, records and replies refused, by reason."
LATENCY = "How long look-ups of records took."
AGE = "How long ago the owners of the view's records last confirmed them, by role."


class DirectoryCollector(Collector):
    """``stats``: name → number. ``ages``: role → seconds since each known record of that role was signed."""

    def __init__(
        self,
        stats: Callable[[], Mapping[str, int | float]],
        lookups: Durations,
        ages: Callable[[], Mapping[str, Sequence[float]]],
    ) -> None:
        self._stats = stats
        self._lookups = lookups
        self._ages = ages

    def collect(self) -> Iterable[Metric]:
        stats = dict(self._stats())
        for name, text in GAUGES.items():
            if name in stats:
                yield GaugeMetricFamily(f"{PREFIX}_{_unit(name)}", text, value=stats.pop(name))
        yield self._stores(stats)
        yield self._refused(stats)
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, value=stats.pop(name, 0))
        for name, value in sorted(stats.items()):
            yield CounterMetricFamily(f"{PREFIX}_{name}", "Counted by the directory; see mesh/dht.", value=value)
        yield self._latency()
        yield from self._record_ages()

    def _stores(self, stats: dict[str, int | float]) -> Metric:
        family = CounterMetricFamily(f"{PREFIX}_stores", STORES, labels=("verdict",))
        for verdict in Verdict:
            name = verdict.name.lower()
            family.add_metric((name,), stats.pop(f"store_{name}", 0))
        return family

    def _refused(self, stats: dict[str, int | float]) -> Metric:
        family = CounterMetricFamily(f"{PREFIX}_refused", REFUSED, labels=("reason",))
        for name in sorted(name for name in stats if name.startswith("refused_")):
            family.add_metric((name.removeprefix("refused_"),), stats.pop(name))
        return family

    def _latency(self) -> Metric:
        counts, running = [], 0
        for bound, count in zip((*map(str, Durations.BOUNDS_S), "+Inf"), self._lookups.counts, strict=True):
            running += count
            counts.append((bound, running))
        return HistogramMetricFamily(f"{PREFIX}_lookup_seconds", LATENCY, buckets=counts, sum_value=self._lookups.total_s)

    def _record_ages(self) -> Iterable[Metric]:
        known = GaugeMetricFamily(f"{PREFIX}_records_known", "Live records of the view, by role.", labels=("role",))
        age = GaugeMetricFamily(f"{PREFIX}_record_age_seconds", AGE, labels=("role", "which"))
        for role, ages in sorted(self._ages().items()):
            known.add_metric((role,), len(ages))
            if ages:
                age.add_metric((role, "median"), median(ages))
                age.add_metric((role, "oldest"), max(ages))
        yield known
        yield age


def _unit(name: str) -> str:
    """Prometheus spells units out."""
    return f"{name.removesuffix('_s')}_seconds" if name.endswith("_s") else name
