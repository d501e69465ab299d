"""KV that survives a restart, on disk or in Redis. Run it twice: what the first run computes, the second one finds.

    python examples/restart.py --disk /mnt/nvme/kv --model Qwen/Qwen3-8B
    python examples/restart.py --redis redis://user:password@host:6379 --model Qwen/Qwen3-8B

With `vllm serve` the same variables are all it takes.
"""

from __future__ import annotations

import argparse
import os
import time

# GiB; read by vLLM's CPU build only, which would else take most of the machine's memory.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

from lmcache_rs.integration.vllm.utils import ENGINE_NAME
from lmcache_rs.v1.cache_engine import LMCacheEngineBuilder


def set_tiers(disk: str | None, redis: str | None) -> None:
    """Where KV goes beyond RAM; before vLLM starts, since its processes inherit these."""
    os.environ.setdefault("LMCACHE_MAX_LOCAL_CPU_SIZE", "5.0")  # GiB
    if disk is not None:
        os.environ["LMCACHE_LOCAL_DISK"] = disk
        os.environ.setdefault("LMCACHE_MAX_LOCAL_DISK_SIZE", "10")  # GiB
    if redis is not None:
        os.environ["LMCACHE_REMOTE_URL"] = redis
    # Write every chunk at once. By default a chunk is written when it is seen again or is about to leave RAM, which
    # spares a disk what nobody asks for twice; then this script, which asks once, would leave nothing behind.
    os.environ.setdefault("LMCACHE_WRITE_POLICY", "through")


def main() -> None:
    """Ask one question about a long text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tiers = parser.add_argument_group("tiers (one of them, or both)")
    tiers.add_argument("--disk", metavar="FOLDER", help="keep KV in this folder")
    tiers.add_argument("--redis", metavar="URL", help="keep KV in this Redis")
    parser.add_argument(
        "--model", default="Qwen/Qwen3-8B", help="name or folder of the model (Qwen/Qwen3-8B)"
    )
    parser.add_argument("--enforce-eager", action="store_true", help="start sooner: compile nothing")
    arguments = parser.parse_args()
    if arguments.disk is None and arguments.redis is None:
        parser.error("name a tier: --disk FOLDER or --redis URL")
    set_tiers(arguments.disk, arguments.redis)

    llm = LLM(
        model=arguments.model,
        kv_transfer_config=KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both"),
        max_model_len=8000,
        gpu_memory_utilization=0.8,
        enforce_eager=arguments.enforce_eager,
    )
    prompt = "The quick brown fox jumps over the lazy dog. " * 150 + "Who jumps?"
    sampling = SamplingParams(temperature=0, max_tokens=16)
    try:
        begin = time.perf_counter()
        (output,) = llm.generate([prompt], sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        found, total = output.num_cached_tokens, len(output.prompt_token_ids or ())
        print(f"{output.outputs[0].text!r} in {seconds:.2f} s ({found} of {total} tokens found)")
    finally:
        LMCacheEngineBuilder.destroy(ENGINE_NAME)


if __name__ == "__main__":
    main()
