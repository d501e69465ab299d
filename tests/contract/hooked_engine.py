"""The toy engine over the real connector's hooks."""

from collections import deque
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from toy_engine import Request, ToyEngine
from vllm_stand_in import load_connector

from lmcache_rs.connector.stats import Counters

VLLM_V1 = load_connector()
API = VLLM_V1.api


class HookedEngine(ToyEngine):
    """Each call of the toy engine goes through the hook that vLLM would call.

    `old`: as vLLM up to 0.29, which is told of failed asynchronous loads by their blocks.
    `nearby`: the scheduler side asks the worker itself, as in one process.
    `acks_late`: the workers' answers arrive so many steps later, as when vLLM's steps overlap.
    """

    def __init__(self, old: bool = False, acks_late: int = 0, nearby: bool = False, **options: Any) -> None:
        super().__init__(**options)
        side = self.scheduler
        self.scheduler: Any = SchedulerHooks(side)
        hooks = OldWorkerHooks if old else WorkerHooks
        self.workers: list[Any] = [hooks(worker, self) for worker in self.workers]
        if nearby:
            side.worker_nearby = self.workers[0].side
        self.on_the_way: deque[Any] = deque([None] * acks_late)

        self.tainted: dict[str, Request] = {}
        """Requests whose forward read wrong cells in this step: right if vLLM is told, since it discards the result."""

    def _forward(self, rank: int, layer: int, request: Request, count: int, garbage: bool) -> None:
        wrong = self.wrong
        super()._forward(rank, layer, request, count, garbage or request.request_id in self.tainted)
        if self.wrong > wrong:
            self.wrong = wrong
            self.tainted[request.request_id] = request
            super()._forward(rank, layer, request, count, garbage=True)

    def _update(self, output: Any, bad: set[int], acks: Any) -> None:
        self.wrong += sum(bad.isdisjoint(request.table) for request in self.tainted.values())
        self.tainted.clear()
        self.on_the_way.append(acks)
        super()._update(output, bad, self.on_the_way.popleft())

    def assert_idle(self) -> None:
        side = self.scheduler.side
        fetching, writing = side._tiering._fetches, side._tiering._writes
        for _ in range(50):
            if fetching._jobs or writing._jobs:
                self.step()
        super().assert_idle()
        assert not any([side._tiering._wanted, side._tiering._searches, fetching._jobs, fetching._rows])
        assert not any([fetching._waiting, fetching._begun, writing._jobs, writing._slots])
        left = [
            side._records,
            side._storing._records,
            side._storing._late,
            side._late_acks,
            side._ledger._loads,
        ]
        left += [side._ledger._stores, side._admission._offers, side._admission._loads]
        left += [side._turns._holders, side._turns._early, side._turns._due]
        assert not any(left), left
        assert (side._lookup._waiting_rows, side._held.orphans) == (0, 0)
        assert not any(worker.side.answers.asynchronous for worker in self.workers)

    def close(self) -> None:
        for side in (*self.workers, self.scheduler):
            side.hooks.shutdown()


class Hooks:
    def __init__(self, side: Any, role: str) -> None:
        self.side = side
        hooks = VLLM_V1.LMCacheConnectorV1.__new__(VLLM_V1.LMCacheConnectorV1)
        API.KVConnectorBase_V1.__init__(hooks, None, None, None)
        hooks._barrier = side._barrier
        hooks._scheduler = side if role == "scheduler" else None
        hooks._worker = side if role == "worker" else None
        hooks._orders, hooks._work, hooks._quiet = None, None, False
        counters = Counters()
        hooks._sides = SimpleNamespace(
            barrier=side._barrier,
            close=side.close,
            counters=counters,
            take_stats=getattr(side, "take_counters", counters.take),
        )
        self.hooks = hooks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.side, name)


class SchedulerHooks(Hooks):
    """The hooks of vLLM's scheduler."""

    def __init__(self, side: Any) -> None:
        super().__init__(side, "scheduler")

    def bind_block_pool(self, pool: Any) -> None:
        self.hooks.bind_gpu_block_pool(pool)

    def add_request(self, request: Any) -> None:
        self.hooks.on_new_request(request)

    def matched_tokens(self, request: Any, num_computed: int) -> Any:
        return self.hooks.get_num_new_matched_tokens(request, num_computed)

    def admit(self, request: Any, block_ids: list[int], tokens: int) -> None:
        blocks = SimpleNamespace(get_block_ids=lambda: (block_ids,))
        self.hooks.update_state_after_alloc(request, blocks, tokens)

    def plan_step(self, scheduled: Any) -> Any:
        return self.hooks.build_connector_meta(scheduled).orders

    def acknowledge(self, acks: Any) -> None:
        self.output(API.WorkerMetadata(acks), None)

    def received(self, request_ids: list[str]) -> None:
        self.output(None, set(request_ids))

    def spoiled(self, blocks: set[int]) -> None:
        self.output(None, None, blocks)

    def output(self, answer: Any, received: set[str] | None, bad: Iterable[int] = ()) -> None:
        output = SimpleNamespace(
            kv_connector_worker_meta=answer, finished_recving=received, invalid_block_ids=set(bad)
        )
        self.hooks.update_connector_output(output)

    def finish_request(self, request: Any, block_ids: list[int]) -> None:
        assert self.hooks.request_finished_all_groups(request, (block_ids,)) == (False, None)


class WorkerHooks(Hooks):
    """The hooks of vLLM's worker, with the orders bound from the first hook of a step to the last, as vLLM does."""

    def __init__(self, side: Any, engine: HookedEngine) -> None:
        super().__init__(side, "worker")
        self.engine = engine

    def begin_step(self, orders: Any) -> None:
        metadata = API.ConnectorMetadata(orders)
        self.hooks.handle_preemptions(metadata)
        self.hooks.bind_connector_metadata(metadata)

    def before_forward(self, orders: Any) -> None:
        self.hooks.start_load_kv(None)

    def after_layer(self, orders: Any, name: str) -> None:
        if self.hooks.has_connector_metadata():
            self.hooks.save_kv_layer(name, None, None)

    def after_forward(self, orders: Any) -> None:
        self.hooks.wait_for_save()

    def take_received(self) -> Any:
        results = self.hooks.get_transfer_results(set())
        return results.finished_recving, results.failed_recving

    def take_bad_blocks(self) -> set[int]:
        bad: set[int] = self.hooks.get_block_ids_with_load_errors()
        self.hooks.get_kv_connector_stats()
        self.hooks.clear_connector_metadata()
        return bad

    def take_step_acks(self) -> Any:
        answer = self.hooks.build_connector_worker_meta()
        return None if answer is None else answer.acks


class OldWorkerHooks(WorkerHooks):
    def take_received(self) -> Any:
        _, received = self.hooks.get_finished(set())
        self.bad = self.hooks.get_block_ids_with_load_errors()
        loading = {i: self.engine.loading[i] for i in received or ()}
        return set(loading), {i for i, request in loading.items() if not self.bad.isdisjoint(request.table)}

    def take_bad_blocks(self) -> set[int]:
        self.hooks.clear_connector_metadata()
        return self.bad


def configured(extra: dict[str, Any], role: Any) -> Any:
    """The connector of one process, as vLLM makes it for a small model."""
    transfer = SimpleNamespace(
        kv_connector_extra_config=extra, kv_role="kv_both", engine_id="e", kv_load_failure_policy="fail"
    )
    parallel = SimpleNamespace(world_size=1, rank=0)
    config = SimpleNamespace(
        kv_transfer_config=transfer,
        parallel_config=parallel,
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256"),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        speculative_config=None,
    )
    spec = type("FullAttentionSpec", (), {"block_size": 16, "page_size_bytes": 4096})()
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["a"])
    cache = SimpleNamespace(kv_cache_groups=[group], num_blocks=10, hash_block_size=None)
    return VLLM_V1.LMCacheConnectorV1(config, role, cache)
