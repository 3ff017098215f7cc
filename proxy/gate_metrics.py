"""Keys that did not hold and the list of revoked ones, for Prometheus: read off at scrape time."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.gate import Gate


class GateCollector(Collector):
    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def collect(self) -> Iterable[Metric]:
        gate, about = self._gate, self._gate.about()
        refused = CounterMetricFamily("infermesh_keys_refused", "API keys that did not hold, by why.", labels=("reason",))
        for reason, count in gate.refused.items():
            refused.add_metric((reason,), count)
        yield refused
        yield GaugeMetricFamily("infermesh_revocations_epoch", "Version of the list of revoked keys; 0 without one.", value=about["seq"])
        listed = GaugeMetricFamily("infermesh_revocations_listed", "What the list names, by kind.", labels=("kind",))
        for kind in ("keys", "projects", "issuers"):
            listed.add_metric((kind,), about[kind])
        yield listed
        text = "How long ago it was certain that there was no newer list; 0 without one."
        yield GaugeMetricFamily("infermesh_revocations_confirmed_seconds", text, value=gate.confirmed_ago_s)
        text = "1 while no key is accepted, since nobody has confirmed the list for --revocations-stale."
        yield GaugeMetricFamily("infermesh_revocations_stale", text, value=not gate.fresh)
