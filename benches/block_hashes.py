"""Block hashes of prompts by vLLM and by us, and what the thread that plans steps waits for meanwhile.

    python benches/block_hashes.py [--tokens 10000] [--prompts 10] [--block-size 16] [--repeats 15]

"alone" is one prompt made into a request of vLLM. "beside" is a thread that works for 1 ms and gives Python's lock away
now and then, as vLLM's scheduler does, while another makes all prompts into requests. The floor of both is "none".
"""

import argparse
import statistics
import threading
import time
from typing import Any

import vllm
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

from lmcache_rs.connector.block_hashes import BlockHasher

BESIDE_S = 1e-3
LOCK_GIVEN_AWAY = 5
"""Times that the thread beside gives the lock away: lines that it logs, calls of torch."""


def hashers(block_size: int) -> dict[str, Any]:
    """By name; no hasher is what vLLM does without connector and prefix cache."""
    kv_cache_utils.init_none_hash(sha256)
    own: Any = kv_cache_utils.get_request_block_hasher(block_size, sha256)
    return {"none": None, "vLLM": own, "lmcache_rs": BlockHasher(own, block_size, kv_cache_utils)}


def request(tokens: list[int], hasher: Any) -> Any:
    """What vLLM's input thread makes of a prompt."""
    return Request("r", tokens, SamplingParams(max_tokens=1), None, block_hasher=hasher)


def alone(prompts: list[list[int]], hasher: Any) -> float:
    """Milliseconds for a prompt."""
    began = time.perf_counter()
    request(prompts[0], hasher)
    return (time.perf_counter() - began) * 1e3


def beside(prompts: list[list[int]], hasher: Any) -> float:
    """Milliseconds that a millisecond of work takes beside the thread that takes all prompts in."""
    start = threading.Event()

    def take_in() -> None:
        start.wait()
        for prompt in prompts:
            request(prompt, hasher)

    thread = threading.Thread(target=take_in)
    thread.start()
    start.set()
    began = time.perf_counter()
    for _ in range(LOCK_GIVEN_AWAY):
        until = time.thread_time() + BESIDE_S / LOCK_GIVEN_AWAY
        while time.thread_time() < until:
            pass
        time.sleep(0)
    took = time.perf_counter() - began
    thread.join()
    return took * 1e3


def main() -> None:
    """Measure in turns and print medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    prompts = [
        [1000 + (j * 7919 + i) % 100_000 for j in range(options.tokens)] for i in range(options.prompts)
    ]
    by_name = hashers(options.block_size)
    vllms, ours = (request(prompts[0], by_name[name]).block_hashes for name in ("vLLM", "lmcache_rs"))
    if vllms != ours:
        raise SystemExit("the hashes differ")
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.repeats):
        for name, hasher in by_name.items():
            for measure in (alone, beside):
                times.setdefault((measure.__name__, name), []).append(measure(prompts, hasher))
    print(f"vLLM {vllm.__version__}, {options.prompts} prompts of {options.tokens:,} tokens")
    print("ms: median (least, most)")
    for (what, name), values in sorted(times.items()):
        print(f"{what:8}{name:12}{statistics.median(values):8.2f} ({min(values):.2f}, {max(values):.2f})")


if __name__ == "__main__":
    main()
