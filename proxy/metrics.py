"""What the proxy counts, and how Prometheus gets it.

The request path adds to counters and histograms; gauges are read off the fleet at scrape time, so they cost nothing in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mesh.dht.counts import Durations
from proxy.choose import REASONS
from proxy.connections import Connections
from proxy.directory_metrics import DirectoryCollector
from proxy.fleet import STANDINGS, Fleet, Worker
from proxy.health import Cause
from proxy.moves import Moves
from proxy.retry import RetryBudget
from proxy.tally import Count, Counts, Spread, Spreads


class Metrics:
    """The proxy's metrics, each proxy process with a registry of its own. What the last three give: see `DirectoryCollector`."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        directory: Callable[[], Mapping[str, int | float]],
        lookups: Durations | None = None,
        record_ages: Callable[[], Mapping[str, Sequence[float]]] = dict,
    ) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("infermesh_requests", "Requests answered, by model, route and outcome.", "model", "task", "code")
        self.tokens = self._counter("infermesh_tokens", "Tokens of completed requests, by model and kind.", "model", "kind")
        self.retries = self._counter("infermesh_retries", "Attempts that failed and were tried elsewhere.", "code")
        self.first_byte = self._histogram("infermesh_time_to_first_byte_seconds", "From the request's end to its answer's first byte.")
        self.duration = self._histogram("infermesh_request_duration_seconds", "From the request's end to its answer's end.")
        self.choices = dict.fromkeys(REASONS, 0)
        self.cached_tokens = {"expected": 0, "counted": 0}
        self.rerouted = 0
        self.budget = RetryBudget(0.0)
        """The application's own, once it has one."""
        self.registry.register(_FleetCollector(fleet))
        self.registry.register(_RoutingCollector(self, fleet))
        self.registry.register(DirectoryCollector(directory, lookups or Durations(), record_ages))

    def follow(self, moves: Moves) -> None:
        """Show what becomes of streams that lose their worker, too."""
        self.registry.register(_MovesCollector(moves))

    def watch(self, connections: Connections) -> None:
        """Show who is connected, too."""
        self.registry.register(_ConnectionsCollector(connections))

    def _counter(self, name: str, text: str, *labels: str) -> Callable[..., Count]:
        """The counter's children by the values of its labels."""
        counts = Counts(name, text, *labels)
        self.registry.register(counts)
        return counts.at

    def _histogram(self, name: str, text: str) -> Callable[[str], Spread]:
        """The histogram's children by model."""
        spreads = Spreads(name, text)
        self.registry.register(spreads)
        return spreads.at

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)


class _RoutingCollector(Collector):
    def __init__(self, metrics: Metrics, fleet: Fleet) -> None:
        self._metrics = metrics
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        choices = CounterMetricFamily("infermesh_choices", "Workers chosen, by the reason that decided.", labels=("reason",))
        for reason, count in self._metrics.choices.items():
            choices.add_metric((reason,), count)
        yield choices
        text = "Prompt tokens thought to be cached where they were sent, and found there by the engines."
        cached = CounterMetricFamily("infermesh_cached_tokens", text, labels=("kind",))
        for kind, count in self._metrics.cached_tokens.items():
            cached.add_metric((kind,), count)
        yield cached
        rerouted = "Requests sent back by a worker that had more to do than was known."
        yield CounterMetricFamily("infermesh_rerouted", rerouted, value=self._metrics.rerouted)
        text = "Failed attempts that were not tried elsewhere, because too many were."
        yield CounterMetricFamily("infermesh_retries_refused", text, value=self._metrics.budget.refused)
        yield GaugeMetricFamily(
            "infermesh_prefix_hashes", "Different prefixes known to be held by workers.", value=len(self._fleet.prefixes)
        )


class _MovesCollector(Collector):
    def __init__(self, moves: Moves) -> None:
        self._moves = moves

    def collect(self) -> Iterable[Metric]:
        moved = CounterMetricFamily(
            "infermesh_streams_moved", "Streams that went on at another worker, by what lost them theirs.", labels=("code",)
        )
        for code, count in self._moves.moved.items():
            moved.add_metric((code,), count)
        yield moved
        stuck = CounterMetricFamily(
            "infermesh_streams_stuck", "Streams that lost their worker and could not go on at another, by why.", labels=("reason",)
        )
        for reason, count in self._moves.stuck.items():
            stuck.add_metric((reason,), count)
        yield stuck
        yield CounterMetricFamily(
            "infermesh_moved_tokens", "Tokens of answers that were carried to another worker.", value=self._moves.tokens
        )


class _FleetCollector(Collector):
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        workers = list(self._fleet.workers.values())
        linked = GaugeMetricFamily("infermesh_workers", "Linked workers, by state.", labels=("state",))
        for state in sorted({str(worker.record.state) for worker in workers}):
            linked.add_metric((state,), sum(str(worker.record.state) == state for worker in workers))
        yield linked
        standing = GaugeMetricFamily("infermesh_workers_standing", "Linked workers, by how far they are trusted.", labels=("standing",))
        for name in STANDINGS:
            standing.add_metric((name,), sum(worker.standing == name for worker in workers))
        yield standing
        ejections = CounterMetricFamily(
            "infermesh_ejections", "Workers that stopped getting requests for what they did.", labels=("cause",)
        )
        for cause in Cause:
            ejections.add_metric((str(cause),), self._fleet.watch.ejections[cause])
        yield ejections
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


class _ConnectionsCollector(Collector):
    """Clients' connections."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def collect(self) -> Iterable[Metric]:
        connections = self._connections
        yield GaugeMetricFamily("infermesh_connections", "Clients' connections that are open.", value=len(connections))
        ended = CounterMetricFamily("infermesh_connections_ended", "Connections that were not wanted, by why.", labels=("why",))
        for why in ("refused", "evicted", "slow"):
            ended.add_metric((why,), getattr(connections, why))
        yield ended
