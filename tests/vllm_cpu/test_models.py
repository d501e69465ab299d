"""Kinds of KV other than one group of full attention: they hit with the right tokens, or are declined."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

# Hits that end where a block leaves the window, and one token to each side of it.
EDGES = [[[70 + i, 322 + i]] for i in range(4)]
STEPS: Steps = [*WHOLE_LIFE, generate(*EDGES), generate(*EDGES)]
SMALL = "a pool that is too small"
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "prefix caching, generated tokens": {
        "extra": {"save_decode_cache": True},
        "llm": {"enable_prefix_caching": True},
    },
    SMALL: {},
}
MODELS: dict[str, dict[str, Any]] = {
    # Blocks that leave the window are free again, so nothing is preempted.
    "sliding": {"layers": 4, "preempts": False, "llm": {}},
    "hybrid": {"layers": 6, "preempts": True, "llm": {"kv_cache_memory_bytes": 330 * 2 * 32 * 1024}},
}
SMALL_POOL_SLOTS = 128
LAYER_BYTES = 32 * 1024
"""Of one block."""


@pytest.mark.parametrize(
    ("name", "variant"), [("hybrid", v) for v in VARIANTS] + [("sliding", "default"), ("sliding", SMALL)]
)
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
    if variant == SMALL:
        extra["max_local_cpu_size"] = f"{SMALL_POOL_SLOTS * MODELS[name]['layers'] * LAYER_BYTES}B"
    run = run_scenario(
        with_control(STEPS), connector=connector(**extra), model=model, llm=llm | options.get("llm", {})
    )
    # With a small pool there is less to load, and requests do not come in such crowds.
    preempts = MODELS[name]["preempts"] and variant != SMALL
    stats = check_whole_life(run, expected, STEPS, preempts)
    if variant == "default":
        assert {step: run.cached(step) for step in HITS} == HITS
        assert run.cached(len(STEPS) - 1) == [321, 322, 323, 324]
        assert stats["failed_loads"] == 2
        assert run.results[len(LIFE) + 2]["loading"] == 1, "loads are asynchronous: the abort met one"


def test_one_group_of_all_tokens_made_of_windows(
    other_model: Callable[[str], Path], run_scenario: Callable[..., Run], baseline: Callable[..., Run]
) -> None:
    """What is said to those whose groups are declined: vLLM drops nothing that leaves a window."""
    model = other_model("hybrid")
    llm = {"disable_hybrid_kv_cache_manager": True, "kv_cache_memory_bytes": 270 * 6 * LAYER_BYTES}
    run = run_scenario(with_control(STEPS), connector=connector(), model=model, llm=llm)
    check_whole_life(run, baseline(STEPS, model=model, llm=llm), STEPS)
    assert {step: run.cached(step) for step in HITS} == HITS
    assert run.cached(len(STEPS) - 1) == [321, 322, 323, 324]


def test_blocks_that_left_the_window_are_not_stored_late(
    other_model: Callable[[str], Path],
    run_scenario: Callable[..., Run],
    baseline: Callable[..., Run],
) -> None:
    """VLLM does not say which blocks it takes from a running request; others are written there by then."""
    prompts = [generate([[3, length]]) for length in (400, 1000, 1500)]
    model = other_model("hybrid")
    steps: Steps = [("lose_during", {"prompt": LONG, "after": 4}), *prompts, ("stats", {})]
    run = run_scenario(steps, connector=connector(), model=model)
    assert run.tokens() == baseline(prompts, model=model).tokens()
    assert run.cached(1) == [0]
    assert run.results[-1]["dropped_blocks:out_of_window"] > 0
    assert run.results[-1]["evictions"] == 0


# As many requests with a full window as fit into 40 blocks; a whole prompt, computed, then finds no room beside them.
CROWD = [[[20 + i, 900]] for i in range(8)]


def test_a_failed_load_lets_others_go_first(
    other_model: Callable[[str], Path], run_scenario: Callable[..., Run]
) -> None:
    """VLLM asks about it first, while requests behind it hold the blocks that it now needs."""
    steps: Steps = [*(generate(prompt) for prompt in CROWD), ("fail_loads", {"count": 1}), generate(*CROWD)]
    llm = {"kv_cache_memory_bytes": 40 * 4 * LAYER_BYTES, "max_model_len": 1024}
    run = run_scenario([*steps, ("stats", {})], connector=connector(), model=other_model("sliding"), llm=llm)
    *alone, together = run.tokens()
    assert [tokens for [tokens] in alone] == together
    assert run.cached(len(CROWD) + 1) == [0, *[899] * 7]
    assert run.results[-1]["waits_for_holders"] >= 1


def test_groups_of_different_size(
    other_model: Callable[[str], Path], run_scenario: Callable[..., Run]
) -> None:
    steps: Steps = [generate(LONG), generate(LONG), generate(*BATCH), generate(*BATCH)]
    damaged: Steps = [("swap_layers", {}), generate(LONG)]
    run = run_scenario([*steps, *damaged], connector=connector(), model=other_model("uneven"))
    long, long_again, batch, batch_again, wrong = run.tokens()
    assert (long, batch) == (long_again, batch_again)
    assert (run.cached(1), run.cached(3), run.cached(5)) == ([2999], [599] * 6, [2999])
    assert wrong != long


# Whole blocks and one token: vLLM's own prefix cache finds as much.
ALIGNED = [
    generate([[3, 2977]]),
    generate([[3, 2977]]),
    generate([[5, 289]]),
    generate([[5, 289]], [[3, 2977]]),
]


def test_kv_in_8_bits(run_scenario: Callable[..., Run], baseline: Callable[..., Run]) -> None:
    """Rounded KV gives other tokens than KV just computed: what is expected is what vLLM's own cache gives."""
    llm = {"kv_cache_dtype": "fp8"}
    own_cache = run_scenario(ALIGNED, llm=llm | {"enable_prefix_caching": True})
    damaged: Steps = [("stats", {}), ("swap_layers", {}), *ALIGNED[1::2]]
    run = run_scenario([*ALIGNED, *damaged], connector=connector(), llm=llm)
    *tokens, wrong_long, wrong_both = run.tokens()
    assert tokens == own_cache.tokens()
    assert [run.cached(i) for i in range(4)] == [own_cache.cached(i) for i in range(4)]
    assert run.results[4]["store_bytes"] == (94 + 10) * 4 * 32 * 2 * 2 * 64, "one byte a number"
    assert wrong_long != tokens[1]
    assert wrong_both != tokens[3]


def test_latent_attention_moves_the_right_bytes(
    other_model: Callable[[str], Path], run_scenario: Callable[..., Run]
) -> None:
    """On the CPU vLLM's own tokens depend on how a prompt is cut into steps, so bytes are compared instead."""
    damaged: Steps = [("copies", {}), ("swap_layers", {}), generate([[3, 2977]])]
    steps: Steps = [("watch_copies", {}), *ALIGNED, generate([[3, 2977]]), *damaged]
    llm = {"kv_cache_memory_bytes": 64 << 20}
    run = run_scenario(steps, connector=connector(), llm=llm, model=other_model("mla"))
    assert [run.cached(i) for i in (2, 4, 5)] == [[2976], [288, 2976], [2976]]
    stored, loaded = 187 + 19, 186 + 18 + 186 + 186
    assert run.results[6] == {"compared": stored + loaded, "unequal": 0}
    assert run.tokens(2) == run.tokens(5) != run.tokens(8)


def test_only_confirmed_tokens_are_stored_when_others_are_tried(
    run_scenario: Callable[..., Run], baseline: Callable[..., Run]
) -> None:
    """The second turn repeats the first one's answer, which ends with a block and was computed beside other tokens."""
    steps: Steps = [generate(LONG, *BATCH[:2], turns=2, max_tokens=40) for _ in range(2)]
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    run = run_scenario(
        [*steps, ("drafts", {}), ("stats", {})],
        connector=connector(save_decode_cache=True),
        llm={"speculative_config": drafts},
    )
    assert run.tokens() == baseline(steps).tokens()
    assert run.cached(0) == [3008, 608, 608], (
        "the last token of an answer has no KV, so its block is not stored"
    )
    assert run.cached(1) == [3046, 646, 646]
    assert run.results[2] > 100, "tokens were drafted"
    assert not [name for name in run.results[3] if name.startswith("errors")]


def test_recurrent_state_is_declined(
    other_model: Callable[[str], Path], run_scenario: Callable[..., Run]
) -> None:
    llm = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": 256 << 20,
        "block_size": None,
    }
    steps: Steps = [generate(LONG), generate(LONG), ("reset", {})]
    run = run_scenario(steps, connector=connector(), llm=llm, model=other_model("recurrent"))
    assert run.tokens(0) == run.tokens(1)
    assert run.cached(1) == [0]
    assert "The KV cache is not offloaded: KV of kind MambaSpec is not supported yet" in run.log
