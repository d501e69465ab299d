"""The real engine on the GPU: the same tokens with the cache as without, over graphs, runners and kinds of load."""

from collections.abc import Callable
from typing import Any

import pytest

from vllm_scenarios import HITS, LIFE, LONG, Run, Steps, connector, generate

# By this name even where a real LMCache is installed.
NAME = "LMCacheRsConnector"

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.timeout(900)]

# Small blocks and a pool of 8,640 tokens, as on the CPU, so that requests are preempted and blocks are reused at once.
BASE: dict[str, Any] = {
    "block_size": 16,
    "kv_cache_memory_bytes": 540 * 16 * 4096,
    "gpu_memory_utilization": 0.3,
}
# vLLM's own sampler: the other one is compiled at its first use.
ENV = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "LMCACHE_EXPERIMENTAL_CUDA": "1"}
GRAPHS = {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}

VARIANTS: dict[str, dict[str, Any]] = {
    "graphs": {"llm": GRAPHS},
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
    run = run_scenario([*LIFE, ("settle", {}), ("stats", {})], connector=cache, llm=llm, env=env)
    assert run.tokens() == baseline(LIFE, llm=llm, env=env).tokens()
    stats = run.results[-1]
    assert stats["leases"] == stats["reserved"] == stats["leaving"] == 0
    assert not [name for name in stats if name.startswith("errors")], stats
    assert stats["loads"] > 0
    assert not stats.get("failed_loads"), stats
    if variant == "graphs":
        assert {step: run.cached(step) for step in HITS} == HITS


def test_swapped_rows_change_the_tokens(run_scenario: Callable[..., Run]) -> None:
    steps: Steps = [generate(LONG), ("settle", {}), ("shift_rows", {}), generate(LONG), ("stats", {})]
    run = run_scenario(steps, connector=connector(name=NAME), llm=BASE, env=ENV)
    assert run.cached(3) == [2999]
    assert run.results[4]["loads"] == 1, run.results[4]
    first, second = run.tokens()
    assert first != second


def test_first_tokens_of_200_prompts_in_bfloat16(run_scenario: Callable[..., Run]) -> None:
    many = [[[100 + i, 150 + i]] for i in range(200)]
    llm = BASE | {"dtype": "bfloat16"} | GRAPHS
    steps: Steps = [generate(*many, max_tokens=1), ("settle", {}), generate(*many, max_tokens=1)]
    env = ENV | {"LMCACHE_MAX_LOCAL_CPU_SIZE": "512MiB"}
    run = run_scenario(steps, connector=connector(name=NAME), llm=llm, env=env)
    cold, warm = run.tokens()
    assert cold == warm
    assert sum(run.cached(2)) == sum(150 + i - 1 for i in range(200))
