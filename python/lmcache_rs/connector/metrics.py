"""The connector's counters as vLLM's statistics: on its log line, and on /metrics under LMCache's names."""

from typing import Any

from lmcache_rs.connector.metric_names import COUNTERS, GAUGES, LABELLED
from lmcache_rs.connector.vllm_api import KVConnectorPromMetrics, KVConnectorStats


class LMCacheStats(KVConnectorStats):
    """What was counted since the last report."""

    def reset(self) -> None:
        """Start an empty interval."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> "LMCacheStats":
        """Add another rank's or a later report."""
        for name, value in other.data.items():
            self.data[name] = value if name in GAUGES else self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """The interval in the words of vLLM's log line."""
        return {name: round(value, 4) for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        """Whether nothing but gauges is there to report."""
        return all(name in GAUGES for name in self.data)


class LMCachePromMetrics(KVConnectorPromMetrics):
    """Registers the metrics with vLLM's registry and adds what each report brings."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        # Any: vLLM hands over prometheus_client's classes or ones that only behave alike.
        gauge: Any = self._gauge_cls
        counter: Any = self._counter_cls
        self._gauges = {k: gauge(name, help_, labelnames=labelnames) for k, (name, help_) in GAUGES.items()}
        self._counters = {
            k: counter(name, help_, labelnames=labelnames) for k, (name, help_) in COUNTERS.items()
        }
        self._labelled = {
            k: counter(name, help_, labelnames=[*labelnames, *labels])
            for k, (name, help_, labels) in LABELLED.items()
        }
        # A series that is not there before its first event hides that event from `increase()`.
        for values in per_engine_labelvalues.values():
            for metric in (*self._gauges.values(), *self._counters.values()):
                metric.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one report."""
        values = self.per_engine_labelvalues[engine_idx]
        for name, amount in transfer_stats_data.items():
            kind, *labels = name.split(":")
            if name in self._gauges:
                self._gauges[name].labels(*values).set(amount)
            elif name in self._counters:
                self._counters[name].labels(*values).inc(amount)
            elif kind in self._labelled and len(labels) == len(LABELLED[kind][2]):
                self._labelled[kind].labels(*values, *labels).inc(amount)


class Reporting:
    """What a connector class makes of reports, for vLLM's loggers."""

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> LMCacheStats:
        """Statistics that crossed a process boundary."""
        return LMCacheStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> LMCachePromMetrics:
        """Our metrics in vLLM's registry, served on its /metrics."""
        return LMCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
