"""A worker's host memory and the mover between it and vLLM's KV tensors, as configured and as the machine allows."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmcache_rs._core import HostPool, pool_rows
from lmcache_rs.config import Config
from lmcache_rs.connector.geometry import Geometry
from lmcache_rs.connector.mover import Mover
from lmcache_rs.copy.cpu import CpuMover
from lmcache_rs.log import init_logger
from lmcache_rs.memory import clamp

logger = init_logger(__name__)

COPY_THREADS_MAX = 4
"""Beyond so many threads a copy gains nothing on the machines measured."""


def distinct(names: Iterable[str], kv_caches: Mapping[str, Any]) -> tuple[list[Any], dict[str, int]]:
    """The KV tensors, each once, and the number of each layer's; layers may share one."""
    numbers: dict[int, int] = {}
    tensors: list[Any] = []
    layers: dict[str, int] = {}
    for name in names:
        address = kv_caches[name].data_ptr()
        if address not in numbers:
            numbers[address] = len(tensors)
            tensors.append(kv_caches[name])
        layers[name] = numbers[address]
    return tensors, layers


def make_pool(config: Config, geometry: Geometry, tensors: Sequence[Any]) -> HostPool | None:
    """Map a rank's host memory, as large as configured and as this machine allows; None: not one block fits."""
    on_gpu = geometry.device == "cuda"
    kv_bytes = sum(t.numel() * t.element_size() for t in tensors)
    untouched = 0 if on_gpu else kv_bytes * geometry.ranks_on_host
    size = clamp(
        config.max_local_cpu_bytes, config.reserve_local_cpu_bytes, untouched, geometry.ranks_on_host
    )
    row_bytes = kv_bytes // geometry.gpu_blocks
    if pool_rows(size, row_bytes) == 0:
        logger.warning("max_local_cpu_size: %d bytes do not hold one block of %d bytes", size, row_bytes)
        return None
    # Pinning touches the pages itself, piece by piece.
    threads = 0 if on_gpu and config.pin != "off" else config.prefault_threads
    pool = HostPool(size, row_bytes, threads, config.local_cpu_use_hugepages)
    logger.info(
        "Host pool: %d rows of %.2f MiB, %.2f GiB",
        pool.rows,
        pool.row_stride / 2**20,
        pool.size_bytes / 2**30,
    )
    return pool


def make_mover(
    config: Config, geometry: Geometry, tensors: Sequence[Any], pool: HostPool, *, fence_loads: bool
) -> Mover:
    """The mover between `pool` and these tensors. `fence_loads`: vLLM gives blocks away that a running step writes."""
    if geometry.device == "cuda":
        # Imports torch's CUDA part, which a machine without one need not have.
        from lmcache_rs.copy.cuda import CudaMover

        return CudaMover(
            pool,
            tensors,
            geometry.gpu_blocks,
            pin=config.pin,
            fence_loads=fence_loads or geometry.drafts,
            stores_by_layers=not (geometry.drafts or geometry.micro_batches),
        )
    return CpuMover(pool, tensors, geometry.gpu_blocks, config.copy_threads or default_threads())


def default_threads() -> int:
    """Copy threads beside the calling one: memory bandwidth needs few, and the model wants the cores."""
    return max(1, min(COPY_THREADS_MAX, (os.cpu_count() or 1) // 2))
