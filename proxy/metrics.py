"""What the proxy counts, and how Prometheus gets it.

The request path adds to plain integers and histograms; gauges are read off the fleet at scrape time, so they cost nothing in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.fleet import Fleet, Worker

_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The proxy's metrics, each proxy process with a registry of its own."""

    def __init__(self, fleet: Fleet, *, directory: Callable[[], dict[str, int | float]]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "infermesh_requests", "Requests answered, by model, route and outcome.", ("model", "task", "code"), registry=self.registry
        )
        self.tokens = Counter(
            "infermesh_tokens", "Tokens of completed requests, by model and kind.", ("model", "kind"), registry=self.registry
        )
        self.retries = Counter("infermesh_retries", "Attempts that failed and were tried elsewhere.", ("code",), registry=self.registry)
        self.first_byte = Histogram(
            "infermesh_time_to_first_byte_seconds",
            "From the end of the request to the first byte of its answer.",
            ("model",),
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "infermesh_request_duration_seconds",
            "From the end of the request to the end of its answer.",
            ("model",),
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_FleetCollector(fleet, directory))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)


class _FleetCollector(Collector):
    def __init__(self, fleet: Fleet, directory: Callable[[], dict[str, int | float]]) -> None:
        self._fleet = fleet
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        workers = list(self._fleet.workers.values())
        linked = GaugeMetricFamily("infermesh_workers", "Linked workers, by state.", labels=("state",))
        for state in sorted({str(worker.record.state) for worker in workers}):
            linked.add_metric((state,), sum(str(worker.record.state) == state for worker in workers))
        yield linked
        gauges: tuple[tuple[str, str, Callable[[Worker], float]], ...] = (
            ("infermesh_worker_in_flight", "Requests of this proxy at a worker.", lambda worker: worker.in_flight),
            ("infermesh_worker_waiting", "Requests waiting at a worker.", lambda worker: worker.waiting),
            ("infermesh_worker_kv_use", "Share of a worker's KV cache in use.", lambda worker: worker.kv_use),
            ("infermesh_worker_round_trip_seconds", "Last heartbeat's round trip.", lambda worker: worker.link.stats.round_trip_s),
        )
        for name, text, read in gauges:
            family = GaugeMetricFamily(name, text, labels=("worker",))
            for worker in workers:
                family.add_metric((worker.node_id.hex()[:12],), read(worker))
            yield family
        for name, value in sorted(self._directory().items()):
            yield GaugeMetricFamily(f"infermesh_directory_{name}", "Directory: see mesh/dht.", value=value)
