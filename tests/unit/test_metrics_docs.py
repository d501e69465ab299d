"""docs/metrics.md is what the tables say, and /metrics has each of them from the start."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_rs.connector.metric_names import COUNTERS, GAUGES, LABELLED
from lmcache_rs.connector.metric_reasons import REASONS
from lmcache_rs.connector.metrics_docs import document

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text() == document(), (
        "run: python -m lmcache_rs.connector.metrics_docs > docs/metrics.md"
    )


def test_module_prints_the_page() -> None:
    command = [sys.executable, "-W", "error", "-m", "lmcache_rs.connector.metrics_docs"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == document()


def test_every_reason_is_explained() -> None:
    """As the code has them: after a counter's name, or where something is declined."""
    root = Path(__file__).parents[2]
    files = set((root / "python/lmcache_rs/connector").glob("*.py"))
    code = "".join(file.read_text() for file in files if file.name != "metric_reasons.py")
    counted = re.findall(r"(misses|dropped_[a-z]+):([a-z_]+)\"", code)
    named = re.findall(r"(Declined|UnnameableError)\(\s*\"([a-z_]+)\"", code)
    found = {(name, reason) for name, reason in counted}
    found |= {("misses", f"declined_{reason}" if kind == "Declined" else reason) for kind, reason in named}
    explained = {(name, reason) for name, known in REASONS.items() for reason in known}
    assert found <= explained
    refusals = (root / "rust/core/src/tier/refusal.rs").read_text()
    tiers = {
        ("tier_refusals", reason) for reason in re.findall(r'^    [A-Z]\w+ = "([a-z_]+)",', refusals, re.M)
    }
    assert {one for one in explained if one[0] == "tier_refusals"} == tiers
    for _, reason in explained - found - tiers:
        assert f'"{reason}"' in code


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
