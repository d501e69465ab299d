"""Kinds of KV other than one group of full attention: they hit with the right tokens, or are declined."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_scenarios import (
    HITS,
    LIFE,
    WHOLE_LIFE,
    Run,
    Steps,
    check_whole_life,
    connector,
    generate,
    with_control,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

# Hits that end where a block leaves the window, and one token to each side of it.
EDGES = [[[70 + i, 322 + i]] for i in range(4)]
STEPS: Steps = [*WHOLE_LIFE, generate(*EDGES), generate(*EDGES)]
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "prefix caching, generated tokens": {
        "extra": {"save_decode_cache": True},
        "llm": {"enable_prefix_caching": True},
    },
    "a pool that is too small": {"extra": {"max_local_cpu_size": "{small_pool}"}},
}
MODELS: dict[str, dict[str, Any]] = {
    # Blocks that leave the window are free again, so nothing is preempted.
    "sliding": {"layers": 4, "preempts": False, "llm": {}},
    "hybrid": {"layers": 6, "preempts": True, "llm": {"kv_cache_memory_bytes": 330 * 2 * 32 * 1024}},
}
SMALL_POOL_SLOTS = 128
LAYER_BYTES = 32 * 1024
"""Of one block."""


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_windows_and_several_cache_groups(
    name: str,
    variant: str,
    other_model: Callable[[str], Path],
    run_scenario: Callable[..., Run],
    baseline: Callable[..., Run],
) -> None:
    model, options = other_model(name), VARIANTS[variant]
    llm = MODELS[name]["llm"]
    expected = baseline(STEPS, model=model, llm=llm)
    extra = dict(options.get("extra", {}))
    if "max_local_cpu_size" in extra:
        extra["max_local_cpu_size"] = f"{SMALL_POOL_SLOTS * MODELS[name]['layers'] * LAYER_BYTES}B"
    run = run_scenario(
        with_control(STEPS), connector=connector(**extra), model=model, llm=llm | options.get("llm", {})
    )
    # With a small pool there is less to load, and requests do not come in such crowds.
    preempts = MODELS[name]["preempts"] and "max_local_cpu_size" not in extra
    stats = check_whole_life(run, expected, STEPS, preempts)
    if variant == "default":
        assert {step: run.cached(step) for step in HITS} == HITS
        assert run.cached(len(STEPS) - 1) == [321, 322, 323, 324]
        assert stats["failed_loads"] == 2
        assert run.results[len(LIFE) + 2]["loading"] == 1, "loads are asynchronous: the abort met one"
