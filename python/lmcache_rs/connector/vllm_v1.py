"""LMCacheConnectorV1: vLLM's hooks, each behind the barrier, handed on to the scheduler or the worker side."""

from typing import Any

from lmcache_rs.config import load_config
from lmcache_rs.connector import vllm_api as api
from lmcache_rs.connector.barrier import Barrier, guard
from lmcache_rs.connector.metrics import LMCacheStats, Reporting
from lmcache_rs.connector.orders import PlanningError, StepOrders
from lmcache_rs.connector.quiet import unless_quiet
from lmcache_rs.connector.sides import Sides, build
from lmcache_rs.log import init_logger

logger = init_logger(__name__)


class LMCacheConnectorV1(Reporting, api.KVConnectorBase_V1, api.SupportsHMA):
    """KV cache offloading to host memory, in the engine's own process.

    vLLM makes one for its scheduler and one for each worker. A side that is not served (another role, or a model that
    is declined) answers every hook as if there were no cache.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._sides: Sides = build(vllm_config, role, kv_cache_config)
        self._barrier: Barrier = self._sides.barrier
        self._scheduler = self._sides.scheduler
        self._worker = self._sides.worker
        self._orders: StepOrders | None = None  # of the step that vLLM runs now
        self._work: StepOrders | None = None  # the same, where they order anything
        self._quiet = False  # the step orders nothing and there is nothing to tell, as in most steps

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache may lose what it was to store."""
        return False

    # ---- worker side -------------------------------------------------------------------------------------------------

    @guard(lambda: None)
    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Map the host memory and meet vLLM's KV tensors."""
        self._sides.register_kv_caches(kv_caches)

    @guard(lambda: None)
    def unregister_kv_caches(self) -> None:
        """VLLM since 0.33 is about to unmap its KV; it maps it at the same addresses again."""
        if self._worker is not None:
            self._worker.drain()

    @guard(lambda: None)
    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """A step begins on the worker."""
        super().bind_connector_metadata(connector_metadata)
        if isinstance(connector_metadata, api.ConnectorMetadata):
            orders = connector_metadata.orders
            is_quiet = self._worker is not None and self._worker.quiet is orders
            self._quiet = is_quiet and not self._sides.counters.changed
            self._orders, self._work = orders, None if is_quiet or orders.empty else orders

    def clear_connector_metadata(self) -> None:
        """It has ended."""
        super().clear_connector_metadata()
        self._orders, self._work, self._quiet = None, None, False

    @guard(lambda: None, repair=lambda self, metadata: self._worker.begin_step(metadata.orders))
    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """The first hook of every step that sees its orders: asynchronous loads start here."""
        if self._worker is not None and isinstance(kv_connector_metadata, api.ConnectorMetadata):
            self._worker.begin_step(kv_connector_metadata.orders)

    @unless_quiet(None)
    @guard(lambda: None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Called before the forward; since vLLM 0.29 after it when the step has no synchronous loads."""
        if self._worker is not None and (orders := self._work) is not None:
            self._worker.before_forward(orders, bool(orders.loads) and api.waits_for_layers(forward_context))

    @guard(lambda: False)
    def has_connector_metadata(self) -> bool:
        """Whether vLLM calls the hooks of layers: in steps that copy, and while it captures a CUDA graph."""
        if self._orders is None:
            return self._worker is not None and self._worker.is_captured()
        return self._work is not None and bool(self._work.loads or self._work.stores or self._work.joins)

    @guard(lambda: None)
    def wait_for_layer_load(self, layer_name: str) -> None:
        """The forward reads this layer next, or the one that is captured will: outside of steps."""
        if self._worker is not None:
            is_captured = self._orders is None
            (self._worker.capture_layer if is_captured else self._worker.before_layer)(layer_name)

    @guard(lambda: None)
    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """The forward has computed this layer's KV, or the one that is captured will: outside of steps."""
        if self._worker is not None and (orders := self._work) is not None and orders.stores:
            self._worker.after_layer(orders, layer_name)

    @unless_quiet(None)
    @guard(lambda: None)
    def wait_for_save(self) -> None:
        """The step's forward is submitted: store what it computed."""
        if self._worker is not None and (orders := self._work) is not None:
            self._worker.after_forward(orders)

    @unless_quiet((None, None))
    @guard(lambda: (None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """VLLM up to 0.29: (sent, received) request ids; a failed load is told by `get_block_ids_with_load_errors`."""
        if self._worker is None:
            return None, None
        self._end_step()
        received, _ = self._worker.take_received(failed_as_blocks=True)
        return None, received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """VLLM since 0.30: ended loads, and those of them that failed, by request id."""
        received: set[str] = set()
        failed: set[str] = set()
        try:
            if self._worker is not None and not self._quiet:
                self._end_step()
                received, failed = self._worker.take_received()
        except BaseException as error:
            self._barrier.report("get_transfer_results", error)
        return api.KVConnectorTransferResults(finished_recving=received, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that a load of this step left bad; when that is not known, all that it was to fill."""
        if self._worker is None or self._quiet:
            return set()
        try:
            self._end_step()
            return self._worker.take_bad_blocks()
        except BaseException as error:
            self._barrier.report("get_block_ids_with_load_errors", error)
            return self._doubtful_blocks()

    @guard(set)
    def _doubtful_blocks(self) -> set[int]:
        if self._worker is None:
            return set()
        bad = self._worker.answers.take_bad_blocks()
        return bad | (self._work or StepOrders()).blocks_of_synchronous_loads()

    @unless_quiet(None)
    @guard(lambda: None)
    def build_connector_worker_meta(self) -> Any:
        """The worker's answers to its orders."""
        if self._worker is None or (acks := self._worker.take_step_acks()) is None:
            return None
        return api.WorkerMetadata(acks)

    # ---- scheduler side ----------------------------------------------------------------------------------------------

    @guard(lambda: None)
    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """The pool whose blocks stores hold."""
        if self._scheduler is not None:
            self._scheduler.bind_block_pool(gpu_block_pool)

    @guard(lambda: None)
    def on_new_request(self, request: Any) -> None:
        """A request arrived."""
        if self._scheduler is not None:
            self._scheduler.add_request(request)
        else:
            self._sides.count_declined()

    @guard(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond those in vLLM's own cache (None: ask again); whether asynchronously."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    @guard(lambda: None, repair=lambda self, *alloc: self._break_promise(*alloc))
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Blocks are allocated for what was answered last."""
        if self._scheduler is not None:
            table = self._scheduler.groups.table(blocks.get_block_ids())
            self._scheduler.admit(request, table, num_external_tokens)

    def _break_promise(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            table = self._scheduler.groups.table(blocks.get_block_ids())
            self._scheduler.break_promise(request.request_id, table, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """The orders of this step; when planning fails, at least the promised loads."""
        try:
            scheduler = self._scheduler
            orders = StepOrders() if scheduler is None else scheduler.plan_step(scheduler_output)
        except PlanningError as failure:
            self._barrier.report("build_connector_meta", failure)
            orders = failure.orders
        except BaseException as error:
            self._barrier.report("build_connector_meta", error)
            orders = self._rescued_orders()
        return api.ConnectorMetadata(orders)

    @guard(StepOrders)
    def _rescued_orders(self) -> StepOrders:
        return self._scheduler.rescue_orders() if self._scheduler is not None else StepOrders()

    @guard(lambda: None, repair=lambda self, output: self._take_output(output, later=True))
    def update_connector_output(self, connector_output: Any) -> None:
        """The workers' answers of a step."""
        self._take_output(connector_output)

    def _take_output(self, output: Any, later: bool = False) -> None:
        if self._scheduler is None:
            return
        if output.invalid_block_ids:
            self._scheduler.spoiled(output.invalid_block_ids)
        if isinstance(answer := output.kv_connector_worker_meta, api.WorkerMetadata):
            (self._scheduler.acknowledge_later if later else self._scheduler.acknowledge)(answer.acks)
        if output.finished_recving:
            self._scheduler.received(output.finished_recving)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The request ended. Its blocks may be freed at once: those still to be stored are held in vLLM's pool."""
        return self.request_finished_all_groups(request, (block_ids,))

    def _drop_request(self, request: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.drop_request(request.request_id)

    @guard(lambda: (False, None), repair=lambda self, request, _: self._drop_request(request))
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`, with a block table for each cache group."""
        if self._scheduler is not None:
            self._scheduler.finish_request(request, self._scheduler.groups.table(block_ids))
        return False, None

    @guard(lambda: False)
    def has_pending_push_work(self) -> bool:
        """Whether an idle engine must go on stepping for our acknowledgements; bounded in time."""
        return self._scheduler is not None and self._scheduler.has_work()

    @guard(lambda: False)
    def has_pending_block_frees(self) -> bool:
        """Whether waiting frees blocks, so that no request need be preempted; bounded in time."""
        return self._scheduler is not None and self._scheduler.frees_blocks_soon()

    @guard(lambda: False, repair=lambda self: self._shut())
    def reset_cache(self) -> bool:
        """Forget everything that is stored: `reset_prefix_cache(reset_connector=True)`. A failure ends the cache.

        False also when a slower tier could not be told; it is not used until it was.
        """
        if self._scheduler is None:
            return True
        rows, complete = self._scheduler.clear()
        logger.info("Forgetting all stored KV: %d rows", rows)
        return complete

    def _shut(self) -> None:
        if self._scheduler is not None:
            self._scheduler.shut()

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Any) -> None:
        """Nothing is exchanged at start; the base class raises when there are pipeline stages."""

    # ---- both --------------------------------------------------------------------------------------------------------

    @unless_quiet(None)
    @guard(lambda: None)
    def get_kv_connector_stats(self) -> Any:
        """What was counted since the last report."""
        news = self._sides.take_stats()
        return LMCacheStats(data=news) if news else None

    @guard(lambda: None)
    def shutdown(self) -> None:
        """End copies in bounded time and give memory back."""
        self._sides.close()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """VLLM asks while it reads its own configuration, before any weights: a wrong value of ours ends the start."""
        load_config(extra_config)
        return False  # Graphs that are captured whole wait for layers by themselves.

    def _end_step(self) -> None:
        if self._worker is not None and self._orders is not None:
            self._worker.end_step(self._orders)


class LMCacheRsConnector(LMCacheConnectorV1):
    """The same connector under a name of its own."""


if api.CacheHitSource is not None:
    LMCacheConnectorV1._cache_hit_source = api.CacheHitSource.HOST
