"""How near the GPU's mover comes to the bus's own speed, what it costs the caller, and what it costs compute.

    python benches/gpu/copies.py [--stage-mib 32] [--blocks 625] [--layers 36] [--page-kib 64] [--repeats 7]

The ceiling is one pinned copy of 1 GiB by torch. A load or store is timed from its submission to the poll that tells
its end. "submit" is the time of the calling Python thread. GEMMs are timed alone and beside copies that last as long.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from lmcache_rs import _core
from lmcache_rs.copy.cuda import STAGE_BYTES, CudaMover

GIB = 1 << 30
KV_FACTOR = 2
"""The KV tensors have so many times the blocks that are moved."""


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stage-mib", type=float, default=STAGE_BYTES / (1 << 20))
    parser.add_argument("--blocks", type=int, default=625)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--page-kib", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--gemms", type=int, default=60)
    return parser.parse_args()


def seconds(work: Callable[[], object]) -> float:
    """Of some work of the GPU's, from idle to idle."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least, most."""
    return statistics.median(values), min(values), max(values)


def ceilings(repeats: int) -> dict[str, float]:
    """GB/s of one pinned copy each way."""
    device = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    ways: dict[str, Callable[[], object]] = {
        "load": lambda: device.copy_(host, non_blocking=True),
        "store": lambda: host.copy_(device, non_blocking=True),
    }
    result = {}
    for name, copy in ways.items():
        copy()
        result[name] = GIB / statistics.median(seconds(copy) for _ in range(repeats)) / 1e9
    return result


class Bench:
    """A pool, KV and a mover, and ways to move the same number of blocks."""

    def __init__(self, options: argparse.Namespace) -> None:
        page = options.page_kib << 10
        blocks = options.blocks * KV_FACTOR
        self.count = options.blocks
        self.row = page * options.layers
        kv = [torch.zeros(blocks, page, dtype=torch.uint8, device="cuda") for _ in range(options.layers)]
        start = time.perf_counter()
        self.pool = _core.HostPool(blocks * self.row, self.row)
        made = time.perf_counter() - start
        self.mover = CudaMover(self.pool, kv, blocks, stage_bytes=int(options.stage_mib * (1 << 20)))
        while self.pool.pinned_bytes < self.pool.size_bytes and self.pool.pin_error is None:
            time.sleep(0.001)
        pinned = time.perf_counter() - start
        print(
            f"pool of {self.pool.size_bytes / GIB:.2f} GiB: made in {made * 1e3:.1f} ms, all pinned after "
            f"{pinned:.2f} s, {self.pool.pin_error or 'no error'}"
        )
        rng = np.random.default_rng(1)
        run = np.arange(self.count, dtype=np.uint32)
        self.numbers = {
            "consecutive": (run, run),
            "scattered": (
                rng.permutation(blocks)[: self.count].astype(np.uint32),
                rng.permutation(blocks)[: self.count].astype(np.uint32),
            ),
        }
        self.job = 0

    def submit(self, what: str, how: str) -> float:
        """Submit one batch; seconds that the call took."""
        rows, blocks = self.numbers[how]
        self.job += 1
        start = time.perf_counter()
        if what == "store":
            self.mover.store(self.job, rows, blocks)
        elif what == "load":
            self.mover.submit_load(self.job, rows, blocks)
        else:
            self.mover.load_now(self.job, rows, blocks, by_layers=True)
            self.mover.join_load(self.job)
        return time.perf_counter() - start

    def wait(self) -> None:
        """Poll until the batch has ended."""
        while not self.mover.poll():
            pass

    def once(self, what: str, how: str) -> tuple[float, float]:
        """Seconds of a whole batch, and of its submission."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        submitted = self.submit(what, how)
        self.wait()
        return time.perf_counter() - start, submitted

    def beside(self, what: str, how: str, gemms: Callable[[], float]) -> float:
        """Milliseconds of GEMMs beside copies that take longer than they do."""
        batches = 1 + int(gemms() / 1e3 / self.once(what, how)[0])
        for _ in range(batches):
            self.submit(what, how)
        time.sleep(0.002)
        result = gemms()
        ended = 0
        while ended < batches:
            ended += len(self.mover.poll())
        return result


def gemm_timer(count: int) -> Callable[[], float]:
    """A call that runs matrix products and tells their milliseconds."""
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(left)

    def run() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(count):
            torch.mm(left, left, out=out)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    run()
    return run


def main() -> None:
    """Measure and print."""
    options = parse()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, stages of {options.stage_mib:g} MiB")
    ceiling = ceilings(options.repeats)
    print(f"one copy of 1 GiB: load {ceiling['load']:.1f}, store {ceiling['store']:.1f} GB/s")
    bench = Bench(options)
    gemms = gemm_timer(options.gemms)
    alone = statistics.median(gemms() for _ in range(options.repeats))
    gigabytes = bench.count * bench.row / 1e9
    print(f"{bench.count} blocks of {options.layers} x {options.page_kib} KiB; GEMMs alone {alone:.1f} ms")
    print("| what | rows and blocks | GB/s (min-max) | of the ceiling | submit ms (max) | GEMMs beside |")
    print("|---|---|---|---|---|---|")
    for what in ("store", "load", "load now"):
        for how in ("consecutive", "scattered"):
            bench.once(what, how)
            times, submits = zip(*(bench.once(what, how) for _ in range(options.repeats)), strict=True)
            middle, low, high = (gigabytes / value for value in spread(list(times)))
            share = middle / ceiling["store" if what == "store" else "load"]
            slower = "-"
            if what != "load now":
                beside = statistics.median(bench.beside(what, how, gemms) for _ in range(3))
                slower = f"x{beside / alone:.3f}"
            print(
                f"| {what} | {how} | {middle:.1f} ({high:.1f}-{low:.1f}) | {share:.3f} "
                f"| {statistics.median(submits) * 1e3:.3f} ({max(submits) * 1e3:.3f}) | {slower} |"
            )
    bench.mover.close()


if __name__ == "__main__":
    main()
