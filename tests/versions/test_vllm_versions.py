"""The real engine of other versions of vLLM: the tokens that the installed one gives without a cache.

vLLM's own tokens are the same in all of them (float32, the CPU build). VLLM_VERSIONS names the versions to run; those
that CI runs by default. scripts/vllm_versions.py installs them, and says how 0.33 runs, which has no CPU build.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest

import setup_env
import vllm_versions
from support import lack
from vllm_scenarios import HITS, LIFE, WHOLE_LIFE, Run, Steps, check_whole_life, connector, with_control

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

VERSIONS = os.environ.get("VLLM_VERSIONS", "").split() or vllm_versions.IN_CI
VARIANTS: dict[str, dict[str, Any]] = {
    "synchronous": {"extra": {"enable_async_loading": False}},
    "asynchronous": {"extra": {"sync_load_max_size": 0}},
    "asynchronous, prefix caching, generated tokens": {
        "extra": {"sync_load_max_size": 0, "save_decode_cache": True},
        "llm": {"enable_prefix_caching": True},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_life_of_requests_aborts_and_failures(
    version: str, variant: str, run_scenario: Callable[..., Run], baseline: Callable[..., Run]
) -> None:
    if setup_env.has_nvidia_driver():
        pytest.skip("only CPU builds are unpacked")
    if not vllm_versions.is_installed(version):
        lack(f"vLLM {version} is not installed (make versions VERSIONS={version} installs it)")
    expected = baseline(WHOLE_LIFE)
    options = dict(VARIANTS[variant])
    cache = connector(**options.pop("extra"))
    path = os.pathsep.join(map(str, vllm_versions.search_path(version)))
    steps: Steps = [*with_control(WHOLE_LIFE), ("version", {})]
    run = run_scenario(steps, connector=cache, env={"PYTHONPATH": path}, **options)
    assert run.results.pop().startswith(version)
    stats = check_whole_life(run, expected, WHOLE_LIFE)
    if variant == "asynchronous":
        assert run.results[len(LIFE) + 2]["loading"] == 1, "the abort met the load in flight"
        assert stats["failed_loads"] == 2
    if variant == "synchronous":
        assert {step: run.cached(step) for step in HITS} == HITS
