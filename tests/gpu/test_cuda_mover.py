"""CudaMover on a real GPU: bytes over layouts, order beside compute, pinning, closing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lmcache_rs import _core
from lmcache_rs.errors import ClosedError, InvalidArgumentError

torch = pytest.importorskip("torch")

from gpu_rig import BLOCKS, DTYPES, LAYOUTS, ROWS, Rig, as_bytes, block_bytes, fill, separate, u32  # noqa: E402

from lmcache_rs.copy.cuda import STORE_PARTS, CudaMover  # noqa: E402

pytestmark = pytest.mark.gpu

SLOW_CYCLES = 20_000_000
"""About 10 ms of a GPU: much longer than any copy here, were it not to wait."""


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(separate(torch.bfloat16))
    yield made
    made.mover.close()


def same(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def some_pairs(rng: np.random.Generator, count: int, consecutive: bool) -> tuple[np.ndarray, np.ndarray]:
    first = rng.integers(0, ROWS - count + 1)
    rows = np.arange(first, first + count) if consecutive else rng.permutation(ROWS)[:count]
    return u32(rows), u32(rng.permutation(BLOCKS)[:count])


@pytest.mark.parametrize("consecutive", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trips_are_byte_exact(layout: Any, dtype: Any, consecutive: bool) -> None:
    rig = Rig(layout(dtype))
    rng = np.random.default_rng(1)
    every = u32(range(BLOCKS))
    for count in (1, 3, 10, BLOCKS):
        rows, blocks = some_pairs(rng, count, consecutive)
        before, expected = rig.content(every), rig.content(blocks)
        rig.store(rows, blocks)
        assert [moved for _, moved, _ in rig.wait(1)] == [count * block_bytes(rig.kv)]
        rig.wipe(blocks)
        targets = u32(rng.permutation(BLOCKS)[:count])
        untouched = np.setdiff1d(every, np.union1d(blocks, targets)).astype(np.uint32)
        torch.cuda.synchronize()
        if count % 2:
            rig.load(rows, targets)
            rig.wait(1)
        else:
            rig.load_now(rows, targets)
            rig.wait(1)
        assert same(rig.content(targets), expected)
        assert same(rig.content(untouched), [layer[untouched.astype(np.int64)] for layer in before])
    rig.mover.close()


def test_rows_hold_the_pages_one_after_the_other(rig: Rig) -> None:
    rig.store(u32([5]), u32([7]))
    rig.wait(1)
    expected = torch.cat([layer.flatten() for layer in rig.content(u32([7]))]).cpu()
    assert torch.equal(torch.from_dlpack(rig.pool)[5, : expected.numel()], expected)


def test_a_store_behind_a_slow_kernel_sees_what_it_writes(rig: Rig) -> None:
    rng = np.random.default_rng(2)
    view = torch.from_dlpack(rig.pool)
    for value in range(50):
        rows, blocks = some_pairs(rng, 8, bool(value % 2))
        index = torch.from_numpy(blocks.astype(np.int64)).cuda()
        torch.cuda.synchronize()
        torch.cuda._sleep(SLOW_CYCLES)
        for tensor in rig.kv:
            as_bytes(tensor)[index] = value
        rig.store(rows, blocks)
        rig.wait(1)
        assert (view[rows.astype(np.int64), : block_bytes(rig.kv)] == value).all(), value


def test_a_part_of_a_store_behind_a_slow_kernel_sees_what_it_writes(rig: Rig) -> None:
    rng = np.random.default_rng(12)
    view = torch.from_dlpack(rig.pool)
    firsts = rig.mover.store_parts
    assert firsts[0] == 0
    assert len(firsts) == min(len(STORE_PARTS), len(rig.kv))
    for value in range(1, 51):
        rows, blocks = some_pairs(rng, 8, bool(value % 2))
        index = torch.from_numpy(blocks.astype(np.int64)).cuda()
        torch.cuda.synchronize()
        for part, (first, end) in enumerate(itertools.pairwise([*firsts, len(rig.kv)])):
            torch.cuda._sleep(SLOW_CYCLES)
            for tensor in rig.kv[first:end]:
                as_bytes(tensor)[index] = value
            rig.jobs += 1
            rig.mover.store(rig.jobs, rows, blocks, part)
        ended = rig.wait(len(firsts))
        assert sum(moved for _, moved, _ in ended) == len(rows) * block_bytes(rig.kv)
        assert (view[rows.astype(np.int64), : block_bytes(rig.kv)] == value).all(), value


def test_a_load_now_is_between_what_the_stream_does_before_and_after(rig: Rig) -> None:
    rng = np.random.default_rng(3)
    for turn in range(50):
        rows, blocks = some_pairs(rng, 8, bool(turn % 2))
        fill(rig.kv)
        stored = rig.content(blocks)
        rig.store(rows, blocks)
        rig.wait(1)
        fill(rig.kv)
        old = [layer.cpu() for layer in rig.content(blocks)]
        index = torch.from_numpy(blocks.astype(np.int64)).cuda()
        torch.cuda.synchronize()
        torch.cuda._sleep(SLOW_CYCLES)
        seen_before = [as_bytes(tensor)[index] for tensor in rig.kv]
        rig.load_now(rows, blocks)
        seen_after = [as_bytes(tensor)[index] for tensor in rig.kv]
        assert same([layer.cpu() for layer in seen_before], old), turn
        assert same(seen_after, stored), turn
        rig.wait(1)


def test_a_forward_may_follow_a_load_layer_by_layer(rig: Rig) -> None:
    rng = np.random.default_rng(5)
    for turn in range(50):
        rows, blocks = some_pairs(rng, 8, bool(turn % 2))
        fill(rig.kv)
        stored = rig.content(blocks)
        rig.store(rows, blocks)
        rig.wait(1)
        fill(rig.kv)
        index = torch.from_numpy(blocks.astype(np.int64)).cuda()
        torch.cuda.synchronize()
        rig.load_now(rows, blocks, by_layers=True)
        seen = []
        for layer, tensor in enumerate(rig.kv):
            rig.mover.join_load(rig.jobs, layer)
            seen.append(as_bytes(tensor)[index])
        assert same(seen, stored), turn
        rig.wait(1)


def test_small_copies_of_others_take_their_turn() -> None:
    """The engine's own copies would wait for the end of a load that goes on one stream."""
    rig = Rig(separate(torch.bfloat16))
    small, there = torch.ones(64).pin_memory(), torch.zeros(64, device="cuda")
    rows = u32(range(BLOCKS))
    beside = 0
    for _ in range(20):
        torch.cuda.synchronize()
        for _ in range(20):
            rig.load(rows, rows)
        ended = 0
        while ended < 20:
            there.copy_(small, non_blocking=True)
            torch.cuda.current_stream().synchronize()
            ended += len(rig.mover.poll())
            beside += 1
    # Operation counts: with one stream there are one or two turns a batch of loads.
    assert beside > 20 * 5


def test_a_load_now_does_not_hold_the_caller(rig: Rig) -> None:
    torch.cuda.synchronize()
    torch.cuda._sleep(20 * SLOW_CYCLES)
    start = time.perf_counter()
    rig.load_now(u32(range(20)), u32(range(20)))
    submitted = time.perf_counter() - start
    torch.cuda.synchronize()
    assert submitted < (time.perf_counter() - start) / 4


@pytest.mark.parametrize("fence", [True, False])
def test_a_background_load_beside_compute(fence: bool) -> None:
    rig = Rig(separate(torch.bfloat16), fence_loads=fence)
    product = torch.randn(2048, 2048, device="cuda")
    rng = np.random.default_rng(4)
    for turn in range(20):
        rows, blocks = some_pairs(rng, 20, bool(turn % 2))
        expected = rig.content(blocks)
        rig.store(rows, blocks)
        rig.wait(1)
        rig.wipe(blocks)
        torch.cuda.synchronize()
        for _ in range(10):
            product = torch.nn.functional.normalize(product @ product)
        rig.load(rows, blocks)
        rig.wait(1)
        assert same(rig.content(blocks), expected), turn
    assert torch.isfinite(product).all()
    rig.mover.close()


def test_a_fenced_load_waits_for_what_still_reads_its_blocks() -> None:
    rig = Rig(separate(torch.bfloat16), fence_loads=True)
    rng = np.random.default_rng(5)
    for turn in range(50):
        rows, blocks = some_pairs(rng, 8, bool(turn % 2))
        old = [layer.cpu() for layer in rig.content(blocks)]
        index = torch.from_numpy(blocks.astype(np.int64)).cuda()
        torch.cuda.synchronize()
        torch.cuda._sleep(SLOW_CYCLES)
        seen = [as_bytes(tensor)[index] for tensor in rig.kv]
        rig.load(rows, blocks)
        rig.wait(1)
        assert same([layer.cpu() for layer in seen], old), turn
    rig.mover.close()


def test_many_jobs_at_once_each_move_their_own_bytes(rig: Rig) -> None:
    rng = np.random.default_rng(6)
    kept, free_rows = u32(range(16)), np.arange(16, ROWS)
    rig.store(kept, kept)
    rig.wait(1)
    expected = rig.content(kept)
    for _ in range(30):
        rig.wipe(kept)
        torch.cuda.synchronize()
        rows = u32(rng.permutation(free_rows)[:24])
        stores = {}
        loads = 0
        for part in range(4):
            mine, blocks = rows[part * 6 : part * 6 + 6], u32(range(16 + part * 6, 22 + part * 6))
            rig.store(mine, blocks)
            stores[rig.jobs] = (mine, rig.content(blocks))
            rig.load(kept[part * 4 : part * 4 + 4], kept[part * 4 : part * 4 + 4])
            loads += 1
        ended = rig.wait(len(stores) + loads)
        assert all(moved > 0 for _, moved, _ in ended)
        assert same(rig.content(kept), expected)
        view = torch.from_dlpack(rig.pool)
        for mine, layers in stores.values():
            as_rows = torch.cat([layer.reshape(len(mine), -1) for layer in layers], 1).cpu()
            assert torch.equal(view[mine.astype(np.int64), : as_rows.shape[1]], as_rows)


def test_the_pool_is_pinned_from_its_beginning() -> None:
    kv = separate(torch.bfloat16)
    row = block_bytes(kv)
    start = time.perf_counter()
    pool = _core.HostPool(2 << 30, row)
    assert time.perf_counter() - start < 0.5
    mover = CudaMover(pool, kv, BLOCKS, pin="require")
    assert pool.pinned_bytes > 0
    deadline = time.monotonic() + 120
    seen = [pool.pinned_bytes]
    while pool.pinned_bytes < pool.size_bytes:
        assert pool.pin_error is None
        assert time.monotonic() < deadline, pool.pinned_bytes
        seen.append(pool.pinned_bytes)
        time.sleep(0.001)
    assert seen == sorted(seen)
    view = torch.from_dlpack(pool)
    assert view[0].is_pinned()
    assert view[-1].is_pinned()
    mover.close()


def test_a_new_pool_takes_stores_at_once() -> None:
    rig = Rig(separate(torch.bfloat16))
    big = _core.HostPool(4 << 30, block_bytes(rig.kv))
    mover = CudaMover(big, rig.kv, BLOCKS)
    last = u32([big.rows - 1])
    mover.store(1, last, u32([3]))
    deadline = time.monotonic() + 120
    ended: list[Any] = []
    while not ended:
        assert time.monotonic() < deadline
        ended = mover.poll()
    assert ended[0][1] == block_bytes(rig.kv)
    assert torch.from_dlpack(big)[-1].is_pinned()
    mover.close()
    rig.mover.close()


def test_without_pinning_copies_are_right_too() -> None:
    rig = Rig(separate(torch.bfloat16), pin="off")
    rows, blocks = some_pairs(np.random.default_rng(7), 12, consecutive=False)
    expected = rig.content(blocks)
    rig.store(rows, blocks)
    rig.wait(1)
    rig.wipe(blocks)
    rig.load_now(rows, blocks)
    assert same(rig.content(blocks), expected)
    assert rig.pool.pinned_bytes == 0
    rig.mover.close()


def test_closing_in_flight_ends_everything_and_can_be_polled(rig: Rig) -> None:
    rows = u32(range(BLOCKS))
    for _ in range(5):
        rig.store(rows, rows)
        rig.load(rows, rows)
    rig.mover.close()
    rig.mover.close()
    assert sorted(job for job, moved, _ in rig.mover.poll() if moved > 0) == list(range(1, 11))
    with pytest.raises(ClosedError):
        rig.store(rows, rows)


def test_a_mover_dropped_in_flight_leaves_the_gpu_usable() -> None:
    for _ in range(5):
        rig = Rig(separate(torch.bfloat16))
        rows = u32(range(BLOCKS))
        rig.store(rows, rows)
        rig.load(rows, rows)
        del rig
        assert torch.ones(8, device="cuda").sum().item() == 8


def test_what_cannot_be_moved_is_refused() -> None:
    kv = [torch.empty(BLOCKS, 17, dtype=torch.bfloat16, device="cuda")]
    pool = _core.HostPool(ROWS * 4096, 34)
    with pytest.raises(InvalidArgumentError, match="multiples of 4"):
        CudaMover(pool, kv, BLOCKS)
    with pytest.raises(InvalidArgumentError, match="row_bytes="):
        CudaMover(pool, separate(torch.bfloat16), BLOCKS)
    with pytest.raises(ValueError, match="on one GPU"):
        CudaMover(pool, [torch.empty(BLOCKS, 8)], BLOCKS)
    pool = _core.HostPool(ROWS * 4096, 36)
    host = torch.from_dlpack(pool).data_ptr()
    with pytest.raises(InvalidArgumentError, match="not in the GPU's memory"):
        _core.GpuMover(
            pool, [(host, 36, 36)], 1, 0, ((0, 0), 0, 0, (0, 0)), [(host, 4096)], [(host, 4096)], [1], [1]
        )
