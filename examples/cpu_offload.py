"""What KV-cache offloading brings: the same prompts twice, and how much quicker they are the second time.

    python examples/cpu_offload.py --enable-lmcache --num-prompts 10 --num-tokens 10000

Without --enable-lmcache the second run is as slow as the first: vLLM's own prefix cache is off, so that only lmcache_rs
can bring KV back. With it the second run loads the KV from RAM.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.platforms import current_platform

from lmcache_rs.integration.vllm.utils import ENGINE_NAME
from lmcache_rs.v1.cache_engine import LMCacheEngineBuilder

GPU_MEMORY_GB = 24.0
CPU_BLOCK_TOKENS = 128


def parse_arguments() -> argparse.Namespace:
    """LMCache's options, and a few that a smaller machine needs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-prompts", type=int, default=10, help="prompts a run (10)")
    parser.add_argument("--num-tokens", type=int, default=10000, help="tokens a prompt, about (10000)")
    parser.add_argument("--enable-lmcache", action="store_true", help="keep KV in RAM with lmcache_rs")
    parser.add_argument(
        "--model", default="Qwen/Qwen3-8B", help="name or folder of the model (Qwen/Qwen3-8B)"
    )
    parser.add_argument("--max-model-len", type=int, default=16384, help="longest prompt (16384)")
    parser.add_argument("--dtype", default="auto", help="type of weights and KV (the model's own)")
    parser.add_argument("--enforce-eager", action="store_true", help="start sooner: compile nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write times, words and hits to FILE")
    return parser.parse_args()


def set_cache_size(num_prompts: int, num_tokens: int) -> None:
    """Room for the KV of all prompts: 1.5 GiB for each 10,000 tokens, which is what Qwen3-8B needs."""
    os.environ.setdefault("LMCACHE_CHUNK_SIZE", "256")
    os.environ.setdefault("LMCACHE_LOCAL_CPU", "True")
    os.environ.setdefault("LMCACHE_MAX_LOCAL_CPU_SIZE", str(num_prompts * num_tokens * 1.5 / 10000))


def device_memory(model: str, max_model_len: int, dtype: str) -> dict[str, Any]:
    """How much memory vLLM may take: 24 GB of a GPU; on a CPU the KV of one prompt of the greatest length."""
    if not current_platform.is_cpu():
        total_gb = current_platform.get_device_total_memory() / 2**30
        return {"gpu_memory_utilization": min(GPU_MEMORY_GB / total_gb, 0.95)}
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    value_bytes = 4 if dtype in ("float32", "float") else 2
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * value_bytes
    # One block more than the prompt needs is vLLM's own, and one prompt must not fill the last.
    blocks = -(-max_model_len // CPU_BLOCK_TOKENS) + 2
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # It would win over the number returned here.
    return {"kv_cache_memory_bytes": blocks * CPU_BLOCK_TOKENS * token_bytes, "block_size": CPU_BLOCK_TOKENS}


def timed_run(name: str, llm: LLM, prompts: list[str]) -> dict[str, Any]:
    """Generate one token for each prompt."""
    print(f"{name} run: {len(prompts)} prompts", flush=True)
    sampling = SamplingParams(temperature=0, max_tokens=1)
    begin = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    print(f"{name} run time: {seconds:.2f} seconds", flush=True)
    return {
        "seconds": seconds,
        "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
        "prompt_tokens": [len(output.prompt_token_ids or ()) for output in outputs],
        "cached_tokens": [output.num_cached_tokens or 0 for output in outputs],
    }


def main() -> None:
    """Run the prompts twice and compare."""
    arguments = parse_arguments()
    set_cache_size(arguments.num_prompts, arguments.num_tokens)
    text = "Hi " * arguments.num_tokens
    prompts = [f"[Prompt {i}] {text} how are you?" for i in range(arguments.num_prompts)]
    connector = KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both")

    print(f"Starting vLLM with {arguments.model}", flush=True)
    llm = LLM(
        model=arguments.model,
        kv_transfer_config=connector if arguments.enable_lmcache else None,
        max_model_len=arguments.max_model_len,
        dtype=arguments.dtype,
        enforce_eager=arguments.enforce_eager,
        enable_prefix_caching=False,
        **device_memory(arguments.model, arguments.max_model_len, arguments.dtype),
    )
    # What vLLM does once only, on its first prompt, is no part of the comparison.
    llm.generate("Hello", SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    try:
        first = timed_run("First", llm, prompts)
        second = timed_run("Second", llm, prompts)
    finally:
        if arguments.enable_lmcache:
            LMCacheEngineBuilder.destroy(ENGINE_NAME)
    print(f"Speedup (first run / second run): {first['seconds'] / second['seconds']:.2f}x", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"first": first, "second": second}) + "\n")


if __name__ == "__main__":
    main()
