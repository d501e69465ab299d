"""The real engine of other versions of vLLM: the tokens that the installed one gives without a cache.

vLLM's own tokens are the same in all of them (float32, the CPU build). VLLM_VERSIONS names the versions to run, in
the longer form; by default those that CI runs. scripts/vllm_versions.py installs them, and says how 0.33 runs, which
has no CPU build.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import setup_env
import vllm_versions
from support import lack
from vllm_scenarios import (
    BATCH,
    HITS,
    LIFE,
    LONG,
    WHOLE_LIFE,
    Run,
    Steps,
    check_whole_life,
    connector,
    generate,
    with_control,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

NAMED = os.environ.get("VLLM_VERSIONS", "").split()
VERSIONS = NAMED or vllm_versions.IN_CI
LONGER = "asynchronous, prefix caching, generated tokens"
VARIANTS: dict[str, dict[str, Any]] = {
    "synchronous": {"extra": {"enable_async_loading": False}},
    "asynchronous": {"extra": {"sync_load_max_size": 0}},
    LONGER: {
        "extra": {"sync_load_max_size": 0, "save_decode_cache": True},
        "llm": {"enable_prefix_caching": True},
    },
}


REQUESTS_FAIL_SINCE = "0.30.0"
"""Older ones can be told of failed blocks only, which is not enough for several cache groups."""


def environment(version: str) -> dict[str, str]:
    """What a process needs to run this version, which must be installed."""
    if setup_env.has_nvidia_driver():
        pytest.skip("only CPU builds are unpacked")
    if not vllm_versions.is_installed(version):
        lack(f"vLLM {version} is not installed (make versions VERSIONS={version} installs it)")
    return {"PYTHONPATH": os.pathsep.join(map(str, vllm_versions.search_path(version)))}


CASES = [(v, variant) for v in VERSIONS for variant in VARIANTS if NAMED or variant != LONGER]


@pytest.mark.parametrize(("version", "variant"), CASES)
def test_a_life_of_requests_aborts_and_failures(
    version: str, variant: str, run_scenario: Callable[..., Run], baseline: Callable[..., Run]
) -> None:
    env = environment(version)
    expected = baseline(WHOLE_LIFE)
    options = dict(VARIANTS[variant])
    cache = connector(**options.pop("extra"))
    steps: Steps = [*with_control(WHOLE_LIFE), ("block_hasher", {}), ("version", {})]
    run = run_scenario(steps, connector=cache, env=env, **options)
    assert run.results.pop().startswith(version)
    assert run.results.pop() == ["BlockHasher", True]
    stats = check_whole_life(run, expected, WHOLE_LIFE)
    if variant == "asynchronous":
        assert run.results[len(LIFE) + 2]["loading"] == 1, "the abort met the load in flight"
        assert stats["failed_loads"] == 2
    if variant == "synchronous":
        assert {step: run.cached(step) for step in HITS} == HITS


MADE_ONE = {"disable_hybrid_kv_cache_manager": True, "kv_cache_memory_bytes": 64 << 20}
GROUPS = [(v, False) for v in VERSIONS] + [(v, True) for v in VERSIONS if v < REQUESTS_FAIL_SINCE]


@pytest.mark.parametrize(("version", "made_one"), GROUPS)
def test_several_cache_groups(
    version: str, made_one: bool, other_model: Callable[[str], Path], run_scenario: Callable[..., Run]
) -> None:
    """`made_one`: by the remedy that is named where they are declined."""
    steps: Steps = [generate(LONG), generate(LONG), generate(*BATCH), generate(*BATCH)]
    damaged: Steps = [("swap_layers", {}), generate(LONG)]
    served = made_one or version >= REQUESTS_FAIL_SINCE
    run = run_scenario(
        [*steps, *damaged] if served else steps,
        connector=connector(),
        model=other_model("hybrid"),
        llm=MADE_ONE if made_one else {},
        env=environment(version),
    )
    long, long_again, batch, batch_again, *wrong = run.tokens()
    assert (long, batch) == (long_again, batch_again)
    assert (run.cached(1), run.cached(3)) == (([2999], [599] * 6) if served else ([0], [0] * 6))
    assert long not in wrong
    remedy = "supported from vLLM 0.30 on; with --disable-hybrid-kv-cache-manager"
    assert (remedy in run.log) != served


HOLDERS_GO_FIRST_SINCE = "0.32.0"
"""Older ones keep a request that was told to ask again before requests that hold blocks."""


@pytest.mark.parametrize("version", [v for v in VERSIONS if NAMED or v < HOLDERS_GO_FIRST_SINCE][-1:])
def test_who_asks_again_lets_others_go_first(version: str, run_scenario: Callable[..., Run]) -> None:
    """The first of two gets no blocks until the second has run, which is behind it."""
    large, small = [[9, 900]], [[2, 600]]
    steps: Steps = [generate(small), ("ask_again", {"tokens": 900, "count": 1}), generate(large, small)]
    run = run_scenario(
        [*steps, generate(large), ("stats", {})],
        connector=connector(sync_load_max_size=0),
        llm={"kv_cache_memory_bytes": 40 * 32 * 4096, "max_model_len": 1024},
        env=environment(version),
    )
    (small_alone,), (large_first, small_beside), (large_again,) = run.tokens()
    assert (small_alone, large_first) == (small_beside, large_again)
    assert run.cached(2)[0] == 0
    assert run.cached(2)[1] >= 599
    assert (run.results[-1].get("waits_for_holders", 0) > 0) == (version < HOLDERS_GO_FIRST_SINCE)
