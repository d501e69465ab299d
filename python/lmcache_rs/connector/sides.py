"""Builds the side of the connector that a vLLM process needs, from vLLM's and our configuration."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmcache_rs._core import HostPool, pool_rows
from lmcache_rs.config import Config, load_config
from lmcache_rs.connector import vllm_api as api
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.breaker import Breaker
from lmcache_rs.connector.geometry import Declined, Geometry, inspect
from lmcache_rs.connector.handle import EngineHandle
from lmcache_rs.connector.mover import Mover
from lmcache_rs.connector.pace import Pace
from lmcache_rs.connector.rules import Roles
from lmcache_rs.connector.scheduler import SchedulerSide
from lmcache_rs.connector.stats import Counters
from lmcache_rs.connector.worker import WorkerSide
from lmcache_rs.copy.cpu import CpuMover
from lmcache_rs.log import init_logger
from lmcache_rs.memory import clamp

logger = init_logger(__name__)

COPY_THREADS_MAX = 4
"""Beyond so many threads a copy gains nothing on the machines measured."""


class Sides:
    """One side of the connector, or none when the model is declined; owns its counters and its barrier."""

    def __init__(self, config: Config, geometry: Geometry | Declined, is_scheduler: bool) -> None:
        self.counters = Counters()
        # A worker's failures reach the scheduler side as failed loads and stores, and count there.
        self.barrier = Barrier(self.counters.add, Breaker(self.counters.add) if is_scheduler else None)
        self.config = config
        self.geometry = geometry
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        self._handle: EngineHandle | None = None

    def attach_handle(self) -> None:
        """Make this side reachable by `LMCacheEngineBuilder` in its own process."""
        self._handle = EngineHandle.join(self.scheduler, self.worker)

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """Map the pool and make the mover; without them the worker fails every job, and the scheduler side is told."""
        if self.worker is None or isinstance(self.geometry, Declined):
            return
        mover: Mover | None = None
        layers: dict[str, int] = {}
        try:
            tensors, layers = _distinct(self.geometry.layer_names, kv_caches)
            mover = _make_mover(self.config, self.geometry, tensors)
        finally:
            self.worker.attach(mover, layers)

    def count_declined(self) -> None:
        """A request arrived at a side that serves none."""
        if isinstance(self.geometry, Declined):
            self.counters.add(f"misses:declined_{self.geometry.reason}")

    def take_stats(self) -> dict[str, float]:
        """Counts since the last call; on the scheduler side with what the pool holds."""
        if self.scheduler is None:
            return self.counters.take()
        return self.scheduler.take_counters()

    def close(self) -> None:
        """End this side; safe twice."""
        if self._handle is not None:
            self._handle.leave(self.scheduler, self.worker)
        for side in (self.scheduler, self.worker):
            if side is not None:
                side.close()


def build(vllm_config: Any, role: Any, kv_cache_config: Any) -> Sides:
    """Read the configuration and build the side of `role`.

    A wrong configuration raises `ConfigError` and stops the start; anything else that fails leaves vLLM without cache.
    """
    transfer = vllm_config.kv_transfer_config
    config = load_config(transfer.kv_connector_extra_config)
    is_scheduler = role == api.KVConnectorRole.SCHEDULER
    try:
        pool_bytes = config.max_local_cpu_bytes if config.local_cpu else 0
        device = api.device_type()
        fails_requests = api.KVConnectorTransferResults is not None
        geometry = inspect(vllm_config, kv_cache_config, device, pool_bytes, fails_requests=fails_requests)
        sides = Sides(config, geometry, is_scheduler)
        if is_scheduler:
            api.make_block_hashes_repeatable()
            _set_failure_policy(transfer, config)
            _announce(config, geometry)
        if isinstance(geometry, Geometry):
            if is_scheduler:
                sides.scheduler = _scheduler_side(vllm_config, config, geometry, sides)
            else:
                sides.worker = WorkerSide(sides.barrier, Pace(api.steps_ahead(vllm_config)))
            sides.attach_handle()
            _introduce(sides, transfer.engine_id)
    except BaseException as error:
        sides = Sides(config, Declined("internal", "the connector could not be set up"), is_scheduler)
        sides.barrier.report("setup", error)
    return sides


def _scheduler_side(vllm_config: Any, config: Config, geometry: Geometry, sides: Sides) -> SchedulerSide:
    transfer, hash_algorithm = (
        vllm_config.kv_transfer_config,
        vllm_config.cache_config.prefix_caching_hash_algo,
    )
    return SchedulerSide(
        config,
        geometry,
        Roles(may_store=transfer.kv_role != "kv_consumer", may_load=transfer.kv_role != "kv_producer"),
        hash_algorithm,
        api.make_tail_hash(hash_algorithm, geometry.block_size),
        sides.counters,
        sides.barrier,
        api.holders_go_first(),
    )


_workers_nearby: dict[str, WorkerSide] = {}
"""Workers of this process by vLLM's engine id, until their engine's scheduler side has come."""


def _introduce(sides: Sides, engine_id: str) -> None:
    """Have a scheduler side ask its only worker directly, where both live in this process.

    Not under MultiConnector, whose children share an engine id: each must hear of its own jobs only.
    """
    if api.inside_multi_connector():
        return
    if sides.worker is not None:
        _workers_nearby[engine_id] = sides.worker
    elif sides.scheduler is not None and sides.scheduler.ranks == 1:
        worker = _workers_nearby.pop(engine_id, None)
        sides.scheduler.worker_nearby = worker


def _set_failure_policy(transfer: Any, config: Config) -> None:
    """Have vLLM compute what could not be loaded; its own default ends the request instead."""
    if config.kv_load_failure_policy == "keep":
        return
    transfer.kv_load_failure_policy = config.kv_load_failure_policy
    if api.inside_multi_connector():
        logger.warning(
            "Under MultiConnector vLLM takes kv_load_failure_policy from the outer --kv-transfer-config: set it to "
            '"recompute" there, or a failed load ends its request'
        )


def _announce(config: Config, geometry: Geometry | Declined) -> None:
    for notice in config.notices:
        notice.log(logger)
    if isinstance(geometry, Declined):
        logger.warning("The KV cache is not offloaded: %s", geometry.message)
        return
    logger.info(
        "Chunks of %d tokens, blocks of %d tokens and %.2f MiB a rank; configuration: %s",
        max(1, config.chunk_size // geometry.block_size) * geometry.block_size,
        geometry.block_size,
        geometry.slot_bytes / 2**20,
        config.describe(),
    )


def _distinct(names: Iterable[str], kv_caches: Mapping[str, Any]) -> tuple[list[Any], dict[str, int]]:
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


def _make_mover(config: Config, geometry: Geometry, tensors: Sequence[Any]) -> Mover | None:
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
    if on_gpu:
        # Imports torch's CUDA part, which a machine without one need not have.
        from lmcache_rs.copy.cuda import CudaMover

        return CudaMover(pool, tensors, geometry.gpu_blocks, pin=config.pin, fence_loads=geometry.drafts)
    return CpuMover(pool, tensors, geometry.gpu_blocks, config.copy_threads or default_threads())


def default_threads() -> int:
    """Copy threads beside the calling one: memory bandwidth needs few, and the model wants the cores."""
    return max(1, min(COPY_THREADS_MAX, (os.cpu_count() or 1) // 2))
