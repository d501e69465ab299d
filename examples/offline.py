"""The offline quickstart: vLLM with its KV cache kept in RAM, and found again.

python examples/offline.py --model Qwen/Qwen3-8B
"""

from __future__ import annotations

import argparse
import os

# Before vLLM starts: its processes inherit these.
os.environ.setdefault("LMCACHE_CHUNK_SIZE", "256")
os.environ.setdefault("LMCACHE_LOCAL_CPU", "True")
os.environ.setdefault("LMCACHE_MAX_LOCAL_CPU_SIZE", "5.0")  # GiB
# GiB; read by vLLM's CPU build only, which would else take most of the machine's memory.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

from lmcache_rs.integration.vllm.utils import ENGINE_NAME
from lmcache_rs.v1.cache_engine import LMCacheEngineBuilder


def main() -> None:
    """Ask two questions about one long text: the second finds the text's KV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="Qwen/Qwen3-8B", help="name or folder of the model (Qwen/Qwen3-8B)"
    )
    parser.add_argument("--enforce-eager", action="store_true", help="start sooner: compile nothing")
    arguments = parser.parse_args()

    llm = LLM(
        model=arguments.model,
        kv_transfer_config=KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both"),
        max_model_len=8000,
        gpu_memory_utilization=0.8,
        enforce_eager=arguments.enforce_eager,
    )
    text = "The quick brown fox jumps over the lazy dog. " * 150
    sampling = SamplingParams(temperature=0, max_tokens=16)
    try:
        for question in ("Who jumps?", "Who is lazy?"):
            (output,) = llm.generate([text + question], sampling, use_tqdm=False)
            found, total = output.num_cached_tokens, len(output.prompt_token_ids or ())
            print(f"{question} {output.outputs[0].text!r} ({found} of {total} tokens found)")
            # Other requests would in time push this KV out of vLLM's own prefix cache; here it is emptied.
            llm.reset_prefix_cache()
    finally:
        LMCacheEngineBuilder.destroy(ENGINE_NAME)


if __name__ == "__main__":
    main()
