"""The real engine on the GPU: the same tokens with the cache as without, over graphs, runners and kinds of load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_scenarios import (
    HITS,
    LIFE,
    LONG,
    SHORT,
    WHOLE_LIFE,
    Run,
    Steps,
    check_whole_life,
    connector,
    generate,
    with_control,
)

# By this name even where a real LMCache is installed.
NAME = "LMCacheRsConnector"

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.timeout(900)]

# Small blocks and a pool of 8,640 tokens, as on the CPU, so that requests are preempted and blocks are reused at once.
BASE: dict[str, Any] = {
    "block_size": 16,
    "kv_cache_memory_bytes": 540 * 16 * 4096,
    "gpu_memory_utilization": 0.1,
}
# vLLM's own sampler: the other one is compiled at its first use.
ENV = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
GRAPHS = {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}

BY_LAYERS: Steps = [("load_by_layers", {}), ("store_by_layers", {})]

VARIANTS: dict[str, dict[str, Any]] = {
    "graphs": {"llm": GRAPHS},
    "by layers": {"llm": GRAPHS, "before": BY_LAYERS},
    "by layers, eager": {"before": BY_LAYERS},
    "by layers, first model runner": {
        "llm": GRAPHS,
        "before": BY_LAYERS,
        "env": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    },
    "by layers, told early": {
        "extra": {"sync_load_max_size": 0},
        "llm": GRAPHS,
        "before": [*BY_LAYERS, ("tell_loads_early", {})],
    },
    "told early": {"extra": {"sync_load_max_size": 0}, "llm": GRAPHS, "before": [("tell_loads_early", {})]},
    "eager, asynchronous": {"extra": {"sync_load_max_size": 0}},
    "prefix caching, generated tokens": {
        "llm": {"enable_prefix_caching": True},
        "extra": {"save_decode_cache": True},
    },
    "first model runner": {"env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}},
    "a pool that is too small": {"env": {"LMCACHE_MAX_LOCAL_CPU_SIZE": "8MiB"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_life_of_requests(
    variant: str, run_scenario: Callable[..., Run], baseline: Callable[..., Run]
) -> None:
    options = dict(VARIANTS[variant])
    cache = connector(name=NAME, **options.pop("extra", {}))
    llm, env = BASE | options.pop("llm", {}), ENV | options.pop("env", {})
    before: Steps = options.pop("before", [])
    after: Steps = [
        ("stored_parts", {}),
        ("gated_loads", {}),
        ("early_loads", {}),
        ("layer_joins", {}),
        ("settle", {}),
        ("stats", {}),
    ]
    run = run_scenario([*before, *LIFE, *after], connector=cache, llm=llm, env=env)
    assert run.tokens() == baseline(LIFE, llm=llm, env=env).tokens()
    stats = run.results[-1]
    assert stats["leases"] == stats["reserved"] == stats["leaving"] == 0
    assert not [name for name in stats if name.startswith("errors")], stats
    assert stats["loads"] > 0
    assert not stats.get("failed_loads"), stats
    assert (run.results[-3] > 0) == variant.startswith("by layers")
    assert (run.results[-6] > 0) == variant.startswith("by layers")
    assert (run.results[-5] > 0) == (variant.startswith("by layers") and "eager" not in variant)
    assert (run.results[-4] > 0) == ("told early" in variant)
    if variant == "graphs":
        assert {step: run.cached(step) for step in HITS} == HITS


@pytest.mark.parametrize("extra", [{}, {"sync_load_max_size": 0}])
@pytest.mark.parametrize("llm", [GRAPHS, {}])
def test_a_life_with_aborts_and_failed_loads(
    llm: dict[str, Any],
    extra: dict[str, Any],
    run_scenario: Callable[..., Run],
    baseline: Callable[..., Run],
) -> None:
    """With overlapping steps, so that a failed load that holds the step must be made up for before its forward."""
    options: dict[str, Any] = {"llm": BASE | llm, "env": ENV}
    run = run_scenario(with_control(WHOLE_LIFE), connector=connector(name=NAME, **extra), **options)
    check_whole_life(run, baseline(WHOLE_LIFE, **options), WHOLE_LIFE)


def test_a_model_with_several_cache_groups_is_declined(
    run_scenario: Callable[..., Run], baseline: Callable[..., Run], other_model: Callable[[str], Path]
) -> None:
    options: dict[str, Any] = {"llm": BASE | GRAPHS, "env": ENV, "model": other_model("hybrid")}
    run = run_scenario(LIFE, connector=connector(name=NAME), **options)
    assert run.tokens() == baseline(LIFE, **options).tokens()
    # By the version up to 0.29, by the device since.
    assert "windows of [100, 100, 0] tokens, are " in run.log


def test_sleeping_ends_copies_in_flight(run_scenario: Callable[..., Run]) -> None:
    """VLLM takes the memory of its KV away while the prompt is still being stored."""
    steps: Steps = [
        generate(LONG),
        ("sleep", {}),
        ("wake", {}),
        generate(LONG),
        ("settle", {}),
        generate(LONG),
        ("stats", {}),
    ]
    llm = BASE | GRAPHS | {"enable_sleep_mode": True}
    run = run_scenario(steps, connector=connector(name=NAME), llm=llm, env=ENV)
    first, second, third = run.tokens()
    assert first == second == third
    assert [run.cached(i) for i in (0, 3, 5)] == [[0], [0], [2999]]
    assert not [name for name in run.results[-1] if name.startswith("errors")], run.results[-1]


def test_disk_after_a_restart(
    run_scenario: Callable[..., Run], baseline: Callable[..., Run], tmp_path: Path
) -> None:
    """From the GPU to disk, and back into another engine; the control is what was damaged before it was written."""
    prompts: Steps = [generate(LONG), generate(SHORT)]
    options: dict[str, Any] = {"llm": BASE | GRAPHS, "env": ENV}
    disk = {"local_disk": str(tmp_path), "max_local_disk_size": "200MiB"}
    steps: Steps = [generate(LONG), generate(LONG), ("written", {}), generate(SHORT)]
    steps += [("settle", {}), ("swap_layers", {}), generate(SHORT), ("written", {})]
    first = run_scenario(steps, connector=connector(name=NAME, **disk), **options)
    second = run_scenario(
        [("trickle", {}), *prompts, ("stats", {})], connector=connector(name=NAME, **disk), **options
    )
    right_long, right_short = baseline(prompts, **options).tokens()
    assert first.tokens()[:3] == [right_long, right_long, right_short]
    long, short = second.tokens()
    assert [second.cached(i) for i in (1, 2)] == [[2999], [299]]
    assert second.results[-1]["loads_as_fetched"] > 0
    assert long == right_long
    assert short == first.tokens()[3] != right_short, "the control"
    assert second.results[-1]["fetched_chunks:disk"] == 12 + 2


@pytest.mark.parametrize("damage", ["swap_layers", "swap_prompts"])
def test_wrong_kv_changes_the_tokens(damage: str, run_scenario: Callable[..., Run]) -> None:
    other = [[4, 3000]]
    steps: Steps = [
        generate(LONG),
        generate(other),
        ("settle", {}),
        (damage, {}),
        generate(LONG),
        generate(other),
    ]
    run = run_scenario([*steps, ("stats", {})], connector=connector(name=NAME), llm=BASE, env=ENV)
    assert run.cached(4) == run.cached(5) == [2999]
    assert run.results[-1]["loads"] == 2, run.results[-1]
    long, short, wrong_long, wrong_short = run.tokens()
    assert long != wrong_long
    assert short != wrong_short


KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "fp8": {"kv_cache_dtype": "fp8"},
    "mla": {"block_size": 64},
}


@pytest.mark.parametrize("kind", KINDS)
def test_first_tokens_of_200_prompts(
    kind: str, run_scenario: Callable[..., Run], other_model: Callable[[str], Path]
) -> None:
    """The KV byte by byte, and the tokens where one leads clearly: a hit computes its one token with other numerics."""
    model = other_model("mla") if kind == "mla" else None
    many = [[[100 + i, 150 + i]] for i in range(200)]
    llm = BASE | {"dtype": "bfloat16"} | GRAPHS | KINDS[kind]
    ask: Steps = [("first_tokens", {"prompts": many})]
    steps: Steps = [("watch_bytes", {}), *ask, ("settle", {}), *ask, ("byte_differences", {})]
    env = ENV | {"LMCACHE_MAX_LOCAL_CPU_SIZE": "512MiB"}
    run = run_scenario(
        [*steps, ("swap_prompts", {}), *ask, ("byte_differences", {})],
        connector=connector(name=NAME),
        llm=llm,
        env=env,
        model=model,
    )
    _, cold, _, warm, same_bytes, _, wrong, wrong_bytes = run.results
    clear = [i for i, lead in enumerate(cold["leads"]) if lead > 0.1]
    assert len(clear) > 100
    same = sum(cold["first"][i] == warm["first"][i] for i in clear)
    # A prefill reads its own keys and values before they are rounded to 8 bits, a hit reads them after.
    assert same >= len(clear) * (0.95 if kind == "fp8" else 1)
    assert same_bytes["compared"] > 800
    assert same_bytes["different"] == 0
    assert wrong_bytes["different"] > 800
    assert sum(warm["cached"]) == sum(wrong["cached"]) == sum(150 + i - 1 for i in range(200))
    assert sum(cold["first"][i] != wrong["first"][i] for i in clear) > len(clear) // 2, "the control"
