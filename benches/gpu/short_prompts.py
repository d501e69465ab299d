"""What storing costs a prompt of 1,000 tokens that is computed alone: stored by layers, as a whole, and not at all.

    python benches/gpu/short_prompts.py [--rounds 30] [--tokens 1000]

One engine in this process, in turns, after its pool is full. The floor is a prompt of which nothing is stored. Beside
each latency what the connector's hooks took of it, and the longest of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("LMCACHE_LOG_LEVEL", "WARNING")
sys.path.append(str(Path(__file__).parent.parent))

from engine_run import Engine, prompt
from hooks import HookClock

from lmcache_rs.connector import stored_layers

POOL_GB = 4.0
SETTLE_S = 0.1
"""What was stored before has ended by then."""

MODES = {"nothing": None, "by layers": 1, "as a whole": sys.maxsize}
"""Stored, and `BLOCKS_MIN` for it."""


def main() -> None:
    """Alternate the modes, then print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1000)
    options = parser.parse_args()
    os.environ.update(LMCACHE_CHUNK_SIZE="256", LMCACHE_MAX_LOCAL_CPU_SIZE=str(POOL_GB))

    from lmcache_rs.connector.vllm_v1 import LMCacheConnectorV1

    clock = HookClock(LMCacheConnectorV1)
    engine = Engine("lmcache_rs", POOL_GB, 24)
    client: Any = engine.llm.llm_engine.engine_core
    side = client.engine_core.scheduler.connector._scheduler
    for i in range(4):  # fills the pool
        engine.generate([prompt(3000 + i)])
    taken: dict[str, list[tuple[float, float, str]]] = {mode: [] for mode in MODES}
    for i in range(options.rounds):
        for number, (mode, blocks_min) in enumerate(MODES.items()):
            side.frozen = blocks_min is None
            stored_layers.BLOCKS_MIN = blocks_min or sys.maxsize
            clock.take()
            seconds, _ = engine.generate([prompt(5000 + i * len(MODES) + number, options.tokens)])
            hooks, by_hook, calls = clock.take()
            longest = max(by_hook, key=by_hook.__getitem__)
            text = f"{longest} {by_hook[longest] * 1e3:.1f} ms in {calls[longest]} calls"
            taken[mode].append((seconds * 1e3, hooks * 1e3, text))
            time.sleep(SETTLE_S)
    print(f"{options.tokens} tokens, ms until the first token, median (least to most) of {options.rounds}")
    for mode, rounds in taken.items():
        ms = [each[0] for each in rounds]
        hooks = statistics.median(each[1] for each in rounds)
        print(
            f"stored {mode}: {statistics.median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f}), "
            f"in hooks {hooks:.1f}; at last {rounds[-1][2]}"
        )


if __name__ == "__main__":
    main()
