"""Builds the side of the connector that a vLLM process needs, from vLLM's and our configuration."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lmcache_rs._core import tier_namespace
from lmcache_rs.config import Config, load_config
from lmcache_rs.connector import vllm_api as api
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.breaker import Breaker
from lmcache_rs.connector.geometry import Declined, Geometry, inspect
from lmcache_rs.connector.handle import EngineHandle
from lmcache_rs.connector.host_memory import distinct, make_mover, make_pool
from lmcache_rs.connector.mover import Mover
from lmcache_rs.connector.namespace import Unnamed, namespace_properties
from lmcache_rs.connector.pace import Pace
from lmcache_rs.connector.rules import Roles
from lmcache_rs.connector.scheduler import SchedulerSide
from lmcache_rs.connector.stats import Counters
from lmcache_rs.connector.tier_check import check_in_background
from lmcache_rs.connector.tier_worker import TierWorker
from lmcache_rs.connector.tiers import OpenTier, describe, open_tiers
from lmcache_rs.connector.worker import WorkerSide
from lmcache_rs.log import init_logger

logger = init_logger(__name__)


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
        self.open_worker_tiers: Callable[[bytes], Mapping[str, OpenTier]] = lambda _: {}
        """Opens this rank's slower tiers for a namespace."""
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
        tiers: TierWorker | None = None
        try:
            tensors, layers = distinct(self.geometry.layer_names, kv_caches)
            pool = make_pool(self.config, self.geometry, tensors)
            if pool is not None:
                # MultiConnector's own role may be that of a producer, whose blocks vLLM gives back at once.
                fence = api.inside_multi_connector()
                mover = make_mover(self.config, self.geometry, tensors, pool, fence_loads=fence)
                tiers = TierWorker(pool, self.open_worker_tiers, self.barrier)
        finally:
            self.worker.attach(mover, layers, tiers)

    def count_declined(self) -> None:
        """A request arrived at a side that serves none."""
        if isinstance(self.geometry, Declined):
            self.counters.add(f"misses:declined_{self.geometry.reason}")

    def take_stats(self) -> dict[str, float]:
        """Counts since the last call, if any; on the scheduler side with what the pool holds."""
        if self.worker is not None and not self.worker.tiers.absent:
            for name, total in self.worker.tiers.counters().items():
                self.counters.set(name, total)
        if not self.counters.changed:
            return {}
        return self.counters.take() if self.scheduler is None else self.scheduler.take_counters()

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
        # What comes from disk or Redis passes through RAM.
        needs_pool = config.local_cpu or config.disk or config.redis
        pool_bytes = config.max_local_cpu_bytes if needs_pool else 0
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
                sides.scheduler = _scheduler_side(vllm_config, kv_cache_config, geometry, sides)
                api.hash_blocks_in_rust()
            else:
                pace = Pace(api.steps_ahead(vllm_config))
                sides.worker = WorkerSide(sides.barrier, pace, api.leaves_steps_early(vllm_config))
                rank = vllm_config.parallel_config.rank
                sides.open_worker_tiers = partial(open_tiers, config, rank, geometry.ranks)
            sides.attach_handle()
            _introduce(sides, transfer.engine_id)
    except BaseException as error:
        sides = Sides(config, Declined("internal", "the connector could not be set up"), is_scheduler)
        sides.barrier.report("setup", error)
    return sides


def _scheduler_side(
    vllm_config: Any, kv_cache_config: Any, geometry: Geometry, sides: Sides
) -> SchedulerSide:
    transfer, hash_algorithm = (
        vllm_config.kv_transfer_config,
        vllm_config.cache_config.prefix_caching_hash_algo,
    )
    return SchedulerSide(
        sides.config,
        geometry,
        Roles(may_store=transfer.kv_role != "kv_consumer", may_load=transfer.kv_role != "kv_producer"),
        hash_algorithm,
        api.make_tail_hash(hash_algorithm, geometry.block_size),
        sides.counters,
        sides.barrier,
        *_open_tiers(vllm_config, kv_cache_config, geometry, sides),
        holders_go_first=api.holders_go_first(),
        others_load=api.inside_multi_connector(),
    )


def _open_tiers(
    vllm_config: Any, kv_cache_config: Any, geometry: Geometry, sides: Sides
) -> tuple[Mapping[str, OpenTier], bytes]:
    """Disk and Redis to be searched, as configured, and the namespace of what they hold.

    None, with a warning, where what they hold could be taken for other KV.
    """
    config = sides.config
    if config.disk is None and config.redis is None:
        return {}, b""
    try:
        chunk = geometry.chunk_blocks(config.chunk_size) * geometry.block_size
        properties = namespace_properties(vllm_config, kv_cache_config, geometry, chunk)
        if isinstance(properties, Unnamed):
            logger.warning("Nothing is kept on disk or in Redis: %s", properties.message)
            return {}, b""
        namespace = tier_namespace(properties)
        tiers = dict(open_tiers(config, 0, geometry.ranks, namespace, searching=True))
        if _spans_hosts(vllm_config.parallel_config) and tiers.pop("disk", None) is not None:
            logger.warning(
                "Nothing is kept on disk: its ranks may be on several hosts, which share no directory"
            )
        if tiers:
            logger.info(
                "Beside RAM, KV is kept on %s; written %s",
                describe(config, tiers),
                "at once" if config.write_policy == "through" else "when seen again or about to leave RAM",
            )
            check_in_background(config, tiers)
        return tiers, namespace
    except BaseException as error:
        sides.barrier.report("open_tiers", error)
        return {}, b""


def _spans_hosts(parallel: Any) -> bool:
    """Whether this engine's ranks are, or may be, on several hosts: Ray places them where it likes."""
    backend = getattr(parallel, "distributed_executor_backend", None)
    return getattr(parallel, "nnodes", 1) > 1 or (backend == "ray" and parallel.world_size > 1)


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
        geometry.chunk_blocks(config.chunk_size) * geometry.block_size,
        geometry.block_size,
        geometry.slot_bytes / 2**20,
        config.describe(),
    )
