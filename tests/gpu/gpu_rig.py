"""What the GPU tests share: KV in every layout, and a pool with a mover for it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from lmcache_rs import _core

torch = pytest.importorskip("torch")

from lmcache_rs.copy.cuda import CudaMover  # noqa: E402

BLOCKS = 40
ROWS = 64


def separate(dtype: Any) -> list[Any]:
    return [torch.empty(BLOCKS, 16, 4, 128, dtype=dtype, device="cuda") for _ in range(5)]


def layer_outer(dtype: Any) -> list[Any]:
    return list(torch.empty(5, BLOCKS, 16, 4, 128, dtype=dtype, device="cuda"))


def block_outer(dtype: Any) -> list[Any]:
    backing = torch.empty(BLOCKS, 5, 4, 16, 128, dtype=dtype, device="cuda")
    return [backing[:, layer].transpose(1, 2) for layer in range(5)]


def latent(dtype: Any) -> list[Any]:
    return [torch.empty(BLOCKS, 64, 576, dtype=dtype, device="cuda") for _ in range(4)]


def padded(dtype: Any) -> list[Any]:
    return [torch.empty(BLOCKS, 20, 64, dtype=dtype, device="cuda")[:, :17] for _ in range(3)]


def odd(dtype: Any) -> list[Any]:
    return [torch.empty(BLOCKS, size, 4, dtype=dtype, device="cuda") for size in (1, 9, 333)]


def kernel_blocks(dtype: Any) -> list[Any]:
    return [torch.empty(BLOCKS * 4, 16, 64, dtype=dtype, device="cuda") for _ in range(2)]


def mixed(_: Any) -> list[Any]:
    return [*separate(torch.uint8)[:2], *latent(torch.bfloat16)[:1]]


LAYOUTS = [separate, layer_outer, block_outer, latent, padded, odd, kernel_blocks, mixed]
DTYPES = [torch.bfloat16, torch.uint8, torch.float8_e4m3fn]


def as_bytes(tensor: Any) -> Any:
    """A view [blocks, bytes...] of a tensor: fp8 cannot be compared, nor filled."""
    whole = tensor.view(torch.uint8)
    return whole if whole.shape[0] == BLOCKS else whole.unflatten(0, (BLOCKS, -1))


def fill(kv: list[Any]) -> None:
    for tensor in kv:
        as_bytes(tensor).random_(0, 256)


def block_bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() // BLOCKS for tensor in tensors)


def u32(numbers: Any) -> np.ndarray:
    return np.asarray(numbers, np.uint32)


class Rig:
    """A pool, KV and a mover; small stages, so that a job has several."""

    def __init__(self, kv: list[Any], stage_rows: int = 3, **options: Any) -> None:
        self.kv = kv
        row = block_bytes(kv)
        self.stride = -(-row // 4096) * 4096
        self.pool = _core.HostPool(ROWS * self.stride, row)
        fill(kv)
        self.mover = CudaMover(self.pool, kv, BLOCKS, stage_bytes=stage_rows * self.stride, **options)
        self.jobs = 0
        while options.get("pin") != "off" and self.pool.pinned_bytes < self.pool.size_bytes:
            assert self.pool.pin_error is None
            time.sleep(0.001)

    def content(self, blocks: np.ndarray) -> list[Any]:
        index = torch.from_numpy(blocks.astype(np.int64)).cuda()
        return [as_bytes(tensor)[index].clone() for tensor in self.kv]

    def wipe(self, blocks: np.ndarray) -> None:
        index = torch.from_numpy(blocks.astype(np.int64)).cuda()
        for tensor in self.kv:
            as_bytes(tensor)[index] = 0

    def wait(self, count: int) -> list[tuple[int, int, float]]:
        ended: list[tuple[int, int, float]] = []
        deadline = time.monotonic() + 30
        while len(ended) < count:
            assert time.monotonic() < deadline, ended
            ended += self.mover.poll()
        return ended

    def store(self, rows: np.ndarray, blocks: np.ndarray) -> None:
        self.jobs += 1
        self.mover.store(self.jobs, rows, blocks)

    def load_now(self, rows: np.ndarray, blocks: np.ndarray, by_layers: bool = False) -> None:
        """Load between what the stream was given before and what it is given from now on."""
        self.jobs += 1
        self.mover.load_now(self.jobs, rows, blocks, by_layers)
        if not by_layers:
            self.mover.join_load(self.jobs)

    def load(self, rows: np.ndarray, blocks: np.ndarray, by_layers: bool = False) -> None:
        self.jobs += 1
        self.mover.submit_load(self.jobs, rows, blocks, by_layers)
