"""docs/metrics.md is what the tables say, and /metrics has each of them from the start."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_rs.connector.metric_names import COUNTERS, GAUGES, LABELLED
from lmcache_rs.connector.metrics_docs import document

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text() == document(), (
        "run: python -m lmcache_rs.connector.metrics_docs > docs/metrics.md"
    )


def test_module_prints_the_page() -> None:
    command = [sys.executable, "-W", "error", "-m", "lmcache_rs.connector.metrics_docs"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == document()


@pytest.mark.vllm
def test_metrics_without_labels_are_there_before_anything_happened() -> None:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    from lmcache_rs.connector.metrics import LMCachePromMetrics

    registry = CollectorRegistry()
    types: Any = {kind: partial(kind, registry=registry) for kind in (Gauge, Counter, Histogram)}
    metrics = LMCachePromMetrics(SimpleNamespace(kv_transfer_config=None), types, ["engine"], {0: ["0"]})
    there = {sample.name for metric in registry.collect() for sample in metric.samples}
    assert {name for name, _ in GAUGES.values()} <= there
    assert {f"{name}_total" for name, _ in COUNTERS.values()} <= there
    metrics.observe(
        {"tier_refusals:redis:find:late": 2, "lookups": 3, "misses:not_found": 1, "unheard:of": 1}
    )
    name = LABELLED["tier_refusals"][0]
    labels = {"engine": "0", "tier": "redis", "operation": "find", "reason": "late"}
    assert registry.get_sample_value(f"{name}_total", labels) == 2
    assert registry.get_sample_value("lmcache:num_lookup_requests_total", {"engine": "0"}) == 3
