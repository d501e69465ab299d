"""What storing costs a short prompt that is computed alone: stored by layers, as a whole, and not at all.

    python benches/gpu/short_prompts.py [--rounds 30] [--tokens 1000 2000 4000]

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
"""Stored, and `BYTES_MIN` for it."""


def main() -> None:
    """For each size alternate the modes, then print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 2000, 4000])
    options = parser.parse_args()
    os.environ.update(LMCACHE_CHUNK_SIZE="256", LMCACHE_MAX_LOCAL_CPU_SIZE=str(POOL_GB))

    from lmcache_rs.connector.vllm_v1 import LMCacheConnectorV1

    clock = HookClock(LMCacheConnectorV1)
    engine = Engine("lmcache_rs", POOL_GB, 24)
    for i in range(4):  # fills the pool
        engine.generate([prompt(3000 + i)])
    for size, tokens in enumerate(options.tokens):
        seed = 5000 + size * options.rounds * len(MODES)
        print_size(tokens, compare(engine, clock, tokens, options.rounds, seed))


def compare(
    engine: Engine, clock: HookClock, tokens: int, rounds: int, seed: int
) -> dict[str, list[tuple[float, float, str]]]:
    """By mode, of each round: ms until the first token, ms in hooks, and the longest of them in words."""
    client: Any = engine.llm.llm_engine.engine_core
    side = client.engine_core.scheduler.connector._scheduler
    taken: dict[str, list[tuple[float, float, str]]] = {mode: [] for mode in MODES}
    for i in range(rounds):
        for number, (mode, bytes_min) in enumerate(MODES.items()):
            side.frozen = bytes_min is None
            stored_layers.BYTES_MIN = bytes_min or sys.maxsize
            clock.take()
            seconds, _ = engine.generate([prompt(seed + i * len(MODES) + number, tokens)])
            hooks, by_hook, calls = clock.take()
            longest = max(by_hook, key=by_hook.__getitem__)
            text = f"{longest} {by_hook[longest] * 1e3:.1f} ms in {calls[longest]} calls"
            taken[mode].append((seconds * 1e3, hooks * 1e3, text))
            time.sleep(SETTLE_S)
    return taken


def print_size(tokens: int, taken: dict[str, list[tuple[float, float, str]]]) -> None:
    """Medians, least and most, and the median of what a round took beyond its floor."""
    floor = [each[0] for each in taken["nothing"]]
    print(f"{tokens} tokens, ms until the first token, median (least to most) of {len(floor)}")
    for mode, rounds in taken.items():
        ms = [each[0] for each in rounds]
        hooks = statistics.median(each[1] for each in rounds)
        beyond = statistics.median(a - b for a, b in zip(ms, floor, strict=True))
        print(
            f"stored {mode}: {statistics.median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f}), beyond the floor "
            f"{beyond:+.1f}, in hooks {hooks:.1f}; at last {rounds[-1][2]}"
        )


if __name__ == "__main__":
    main()
