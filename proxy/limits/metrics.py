"""What limits have done, for Prometheus: read off at scrape time."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.limits.limiter import Limiter


class LimitsCollector(Collector):
    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter

    def collect(self) -> Iterable[Metric]:
        limiter, shares = self._limiter, self._limiter.shares
        refused = CounterMetricFamily("infermesh_limits_refused", "Requests refused, by the kind of limit that did.", labels=("limit",))
        for name, count in limiter.refused.items():
            refused.add_metric((name,), count)
        yield refused
        yield CounterMetricFamily("infermesh_limits_waited", "Requests that waited for another proxy's answer.", value=limiter.waited)
        text = "This proxy's share of every limit: 1 over the proxies that count, 0 until all of them count it."
        yield GaugeMetricFamily("infermesh_limits_share", text, value=shares.share)
        yield GaugeMetricFamily(
            "infermesh_limits_proxies", "Proxies that share limits, as this one counts them.", value=len(shares.counted)
        )
        text = "Of those, the ones that have not been heard of for 25 s and may still use their share."
        yield GaugeMetricFamily("infermesh_limits_proxies_missed", text, value=len(shares.missed))
