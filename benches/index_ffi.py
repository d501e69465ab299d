"""What the index costs from Python: the figures of `rust/core/benches/index.rs`, through the extension.

Run with `python benches/index_ffi.py` on a release build. Prints the median and the extremes of the repeats.
"""

import hashlib
import statistics
import time
from collections.abc import Callable

from lmcache_rs import _core
from lmcache_rs._core import Index, KeySpace

ROWS = 1 << 18
PREFIX_BLOCKS = 8192
BATCH_BLOCKS = 1024
REPEATS = 15

SPACE = KeySpace("sha256")


def prompt(name: object, blocks: int) -> list[bytes]:
    """Block hashes of a prompt that has nothing in common with others."""
    return [hashlib.sha256(f"{name} {block}".encode()).digest() for block in range(blocks)]


def store(index: Index, hashes: list[bytes]) -> None:
    """Reserve and commit, as a store does."""
    index.reserve(SPACE, hashes).commit()


def measure(
    name: str, unit_ns: float, unit: str, calls: int, prepare: Callable[[], Callable[[], object]]
) -> None:
    """Time `calls` calls of what `prepare` returns, a few times over, and print one line."""
    times = []
    for _ in range(REPEATS):
        work = prepare()
        begin = time.perf_counter_ns()
        for _ in range(calls):
            work()
        times.append((time.perf_counter_ns() - begin) / calls / unit_ns)
    print(f"{name:44} {statistics.median(times):9.3f} {unit}  ({min(times):.3f} to {max(times):.3f})")


def main() -> None:
    """Measure all."""
    if _core.build_profile != "release":
        print("not a release build: these figures mean nothing")
    index = Index(ROWS)
    for number in range(ROWS // BATCH_BLOCKS):
        store(index, prompt(f"old {number}", BATCH_BLOCKS))
    held = prompt("held", PREFIX_BLOCKS)
    store(index, held)
    longer = prompt("held", PREFIX_BLOCKS + 100)
    other = prompt("other", PREFIX_BLOCKS)
    found = index.match(SPACE, held)
    assert found.blocks == PREFIX_BLOCKS

    def lease() -> None:
        guard = found.lease()
        assert guard is not None
        guard.rows()
        guard.release()

    measure("match, hit of 8192 blocks", 1e3, "us", 2000, lambda: lambda: index.match(SPACE, held))
    measure("match, hit of 8192 of 8292", 1e3, "us", 2000, lambda: lambda: index.match(SPACE, longer))
    measure("match, miss", 1e3, "us", 2000, lambda: lambda: index.match(SPACE, other))
    measure("lease of 8192 blocks with its rows", 1e3, "us", 200, lambda: lease)
    decoded = prompt("held", PREFIX_BLOCKS + 1)
    measure(
        "reserve + abort, 1 block after 8192",
        1e3,
        "us",
        500,
        lambda: lambda: index.reserve(SPACE, decoded).abort(),
    )

    def batches(target: Index) -> Callable[[], Callable[[], object]]:
        numbers = iter(range(1 << 30))

        def prepare() -> Callable[[], object]:
            prompts = iter([prompt(f"{next(numbers)}", BATCH_BLOCKS) for _ in range(8)])
            return lambda: store(target, next(prompts))

        return prepare

    measure("reserve + commit, a block, free rows", BATCH_BLOCKS, "ns", 8, batches(Index(ROWS)))
    measure("reserve + commit, a block, each evicts another", BATCH_BLOCKS, "ns", 8, batches(index))


if __name__ == "__main__":
    main()
