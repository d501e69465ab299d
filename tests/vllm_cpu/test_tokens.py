"""With the cache the engine gives the tokens that it gives without, whatever happens to its requests.

Float32, and weights whose output depends on the KV: see `test_wrong_kv_changes_the_tokens`.
"""

from collections.abc import Callable
from typing import Any

import pytest

from vllm_scenarios import ABORTS, BATCH, HITS, LIFE, LONG, Run, Steps, connector, generate

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "prefix caching": {"llm": {"enable_prefix_caching": True}},
    "synchronous": {"extra": {"enable_async_loading": False}},
    "asynchronous": {"extra": {"sync_load_max_size": 0}},
    "asynchronous, prefix caching": {
        "extra": {"sync_load_max_size": 0},
        "llm": {"enable_prefix_caching": True},
    },
    "generated tokens": {"extra": {"save_decode_cache": True}},
    "generated tokens, prefix caching": {
        "extra": {"save_decode_cache": True},
        "llm": {"enable_prefix_caching": True},
    },
    "by layers": {"before": [("load_by_layers", {})]},
    "told early": {"extra": {"sync_load_max_size": 0}, "before": [("tell_loads_early", {})]},
    "a pool that is too small": {"env": {"LMCACHE_MAX_LOCAL_CPU_SIZE": "8MiB"}},
    "large blocks": {"llm": {"block_size": 128, "kv_cache_memory_bytes": 68 * 128 * 4096}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_life_of_requests(
    variant: str, run_scenario: Callable[..., Run], baseline: Callable[..., Run]
) -> None:
    options = dict(VARIANTS[variant])
    cache = connector(**options.pop("extra", {}))
    before: Steps = options.pop("before", [])
    after: Steps = [("early_loads", {}), ("layer_joins", {}), ("preemptions", {}), ("stats", {})]
    run = run_scenario([*before, *LIFE, *after], connector=cache, **options)
    assert run.tokens() == baseline(LIFE).tokens()
    assert run.results[-2] > 0, "some requests were preempted and resumed"
    assert (run.results[-3] > 0) == (variant == "by layers")
    assert (run.results[-4] > 0) == (variant == "told early")
    stats = run.results[-1]
    assert stats["leases"] == stats["reserved"] == stats["leaving"] == 0
    assert stats["free"] + stats["visible"] == stats["rows"]
    assert not [name for name in stats if name.startswith("errors")], stats
    assert stats["loads"] > 0
    if variant in ("default", "synchronous", "large blocks"):
        assert {step: run.cached(step) for step in HITS} == HITS


def test_first_tokens_in_bfloat16(run_scenario: Callable[..., Run], baseline: Callable[..., Run]) -> None:
    """Only the first: a full hit computes its one token with other numerics, and bfloat16 shows it later."""
    many = [[[60 + i, 200 + 7 * i]] for i in range(20)]
    steps: Steps = [generate(*many, max_tokens=1), generate(*many, max_tokens=1)]
    options = {"llm": {"dtype": "bfloat16"}}
    run = run_scenario(steps, connector=connector(), **options)
    assert run.tokens() == baseline(steps, **options).tokens()
    assert sum(run.cached(1)) == sum(200 + 7 * i - 1 for i in range(20))


@pytest.mark.parametrize("extra", [{}, {"sync_load_max_size": 0}])
def test_loads_bring_the_bytes_that_were_stored(
    extra: dict[str, Any], run_scenario: Callable[..., Run]
) -> None:
    control: Steps = [("swap_prompts", {}), generate(LONG), ("byte_differences", {})]
    run = run_scenario(
        [("watch_bytes", {}), *LIFE, ("byte_differences", {}), *control], connector=connector(**extra)
    )
    right, wrong = run.results[-4], run.results[-1]
    assert right["compared"] > 800
    assert right["different"] == 0
    assert wrong["different"] > 80


@pytest.mark.parametrize("damage", ["swap_layers", "swap_prompts"])
def test_wrong_kv_changes_the_tokens(damage: str, run_scenario: Callable[..., Run]) -> None:
    """The negative control: if this passes with equal tokens, no other test here proves anything."""
    other = [[4, 3000]]
    steps: Steps = [generate(LONG), generate(other), (damage, {}), generate(LONG), generate(other)]
    run = run_scenario(steps, connector=connector())
    assert run.cached(3) == run.cached(4) == [2999]
    long, short, wrong_long, wrong_short = run.tokens()
    assert long != wrong_long
    assert short != wrong_short


@pytest.mark.parametrize(
    "extra", [{"enable_async_loading": False}, {"sync_load_max_size": 0, "force_async": True}]
)
def test_aborts_before_during_and_after_a_load(
    extra: dict[str, Any], run_scenario: Callable[..., Run], baseline: Callable[..., Run]
) -> None:
    asynchronous = extra.pop("force_async", False)
    run = run_scenario([*ABORTS, ("stats", {})], connector=connector(**extra))
    assert run.tokens() == baseline(ABORTS).tokens()
    assert run.results[2]["loading"] == int(asynchronous), "the abort met the load in flight"
    stats = run.results[-1]
    assert stats["leases"] == stats["reserved"] == 0


@pytest.mark.parametrize("extra", [{"enable_async_loading": False}, {"sync_load_max_size": 0}])
@pytest.mark.parametrize("caching", [False, True])
def test_failed_loads_are_computed(
    extra: dict[str, Any], caching: bool, run_scenario: Callable[..., Run], baseline: Callable[..., Run]
) -> None:
    steps: Steps = [
        generate(LONG),
        generate(*BATCH),
        ("fail_loads", {"count": 2}),
        generate(LONG, *BATCH),
        generate(LONG, *BATCH),
    ]
    run = run_scenario(
        [*steps, ("stats", {})], connector=connector(**extra), llm={"enable_prefix_caching": caching}
    )
    assert run.tokens() == baseline(steps).tokens()
    stats = run.results[-1]
    assert caching or stats["failed_loads"] == 2
    assert stats["leases"] == stats["reserved"] == 0


def test_multi_connector(run_scenario: Callable[..., Run], baseline: Callable[..., Run]) -> None:
    steps: Steps = [generate(LONG), generate(LONG), generate(*BATCH), generate(*BATCH)]
    multi = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "connectors": [connector(), connector(name="LMCacheRsConnector", max_local_cpu_size="4MiB")]
        },
    }
    run = run_scenario(steps, connector=multi)
    assert run.tokens() == baseline(steps).tokens()
    assert run.cached(1) == [2999]
    assert run.log.count("kv_load_failure_policy from the outer") == 2
