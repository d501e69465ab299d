"""Our index beside the one of vLLM's own CPU offloading, in one run: lookups, stores, stores that evict.

    python benches/vllm_manager.py [--repeats 15]

Both get the block hashes as vLLM has them, a list of 32-byte strings. vLLM's connector packs each with its group
before it asks the manager; that is part of its lookup and of its store, as deriving keys is of ours.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from lmcache_rs._core import Index, KeySpace

PREFIX = 8192
BATCH = 1024


def hashes(count: int) -> list[bytes]:
    """Block hashes that never occurred before."""
    noise = os.urandom(32 * count)
    return [noise[i : i + 32] for i in range(0, len(noise), 32)]


def median_us(work: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """(median, least, most) microseconds of a call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times), min(times), max(times)


class Ours:
    """lmcache_rs's index through the extension module."""

    name = "lmcache_rs"

    def __init__(self, rows: int) -> None:
        self.index, self.space = Index(rows), KeySpace("sha256")

    def match(self, chain: list[bytes]) -> int:
        """Blocks found."""
        return self.index.match(self.space, chain).blocks

    def store(self, chain: list[bytes]) -> None:
        """Reserve and commit."""
        self.index.reserve(self.space, chain).commit()


class Vllm:
    """vLLM's CPUOffloadingManager, called as its connector does."""

    name = "vLLM"

    def __init__(self, rows: int) -> None:
        from vllm.v1.kv_offload import base
        from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

        self.base = base
        self.manager = CPUOffloadingManager(rows)

    def _keys(self, chain: list[bytes]) -> list[Any]:
        return [self.base.make_offload_key(block_hash, 0) for block_hash in chain]

    def match(self, chain: list[bytes]) -> int:
        """Blocks found."""
        context, hit = self.base.ReqContext("r"), self.base.LookupResult.HIT
        found, keys = 0, self._keys(chain)
        for key in keys:
            if self.manager.lookup(key, context) is not hit:
                break
            found += 1
        self.manager.touch(keys[:found], context)
        return found

    def store(self, chain: list[bytes]) -> None:
        """Prepare and complete a store."""
        context, keys = self.base.ReqContext("r"), self._keys(chain)
        self.manager.prepare_store(keys, context)
        self.manager.complete_store(keys, context)


def measure(make: Callable[[int], Ours | Vllm], repeats: int) -> dict[str, tuple[float, float, float]]:
    """Microseconds by figure."""
    long_chain, miss = hashes(PREFIX), hashes(PREFIX)
    side = make(2 * PREFIX)
    side.store(long_chain)
    if side.match(long_chain) != PREFIX or side.match(miss) != 0:
        raise RuntimeError(f"{side.name} does not find what was stored")
    figures = {
        f"match of {PREFIX} blocks, all there (us)": median_us(lambda: side.match(long_chain), repeats),
        "match that finds nothing (us)": median_us(lambda: side.match(miss[:1]), repeats),
    }
    empty = make(BATCH * (repeats + 1))
    chains = iter([hashes(BATCH) for _ in range(2 * repeats)])
    fresh = median_us(lambda: empty.store(next(chains)), repeats)
    full = make(4 * BATCH)
    for _ in range(4):
        full.store(hashes(BATCH))
    evicting = median_us(lambda: full.store(next(chains)), repeats)
    for name, figure in (("store", fresh), ("store that evicts", evicting)):
        low, mid, high = figure[1], figure[0], figure[2]
        figures[f"{name}, batches of {BATCH} (us a block)"] = (mid / BATCH, low / BATCH, high / BATCH)
    return figures


def main() -> None:
    """Print a table with the ratio of medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    ours, theirs = measure(Ours, repeats), measure(Vllm, repeats)
    print(f"{'median (least to most)':46} {'lmcache_rs':>26} {'vLLM':>30} {'ratio':>7}")
    for name, a in ours.items():
        b = theirs[name]
        cells = [f"{m:.3f} ({low:.3f} to {high:.3f})" for m, low, high in (a, b)]
        print(f"{name:46} {cells[0]:>26} {cells[1]:>30} {b[0] / a[0]:>6.0f}x")


if __name__ == "__main__":
    main()
