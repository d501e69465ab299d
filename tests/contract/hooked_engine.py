"""The toy engine over the real connector's hooks, and faults that can be put anywhere behind them."""

import inspect
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from toy_engine import Request, ToyEngine
from vllm_stand_in import load_connector

from lmcache_rs._core import Index, Lease, Match, Reservation
from lmcache_rs.connector import admission, holds, ledger, lookup, scheduler, stores, turns, worker

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

    def _forward(self, rank: int, request: Request, count: int, garbage: bool = False) -> None:
        wrong = self.wrong
        super()._forward(rank, request, count, garbage)
        if self.wrong > wrong:
            self.wrong = wrong
            self.tainted[request.request_id] = request
            super()._forward(rank, request, count, garbage=True)

    def _update(self, output: Any, bad: set[int], acks: Any) -> None:
        self.wrong += sum(bad.isdisjoint(request.table) for request in self.tainted.values())
        self.tainted.clear()
        self.on_the_way.append(acks)
        super()._update(output, bad, self.on_the_way.popleft())

    def assert_idle(self) -> None:
        super().assert_idle()
        side = self.scheduler.side
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
        assert not any(worker.side.loading for worker in self.workers)

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
        hooks._sides = SimpleNamespace(
            barrier=side._barrier, close=side.close, take_stats=getattr(side, "take_counters", dict)
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
        self._output(API.WorkerMetadata(acks), None)

    def received(self, request_ids: list[str]) -> None:
        self._output(None, set(request_ids))

    def _output(self, answer: Any, received: set[str] | None) -> None:
        output = SimpleNamespace(kv_connector_worker_meta=answer, finished_recving=received)
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

    def take_acks(self) -> Any:
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


@dataclass
class Fault:
    """Raises `make()` in `times` calls of `place` from the nth on; a name that ends in "." is all of a class."""

    place: str
    nth: int
    times: int
    make: Callable[[], BaseException]

    def hit(self, name: str) -> None:
        if name != self.place and not (self.place[-1] == "." and name.startswith(self.place)):
            return
        self.nth -= 1
        if self.nth < 0 and self.times > 0:
            self.times -= 1
            raise self.make()


class Faults:
    """Counts calls and raises where it is told to, while it is on."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.on = False
        self._armed: list[Fault] = []

    def arm(self, place: str, nth: int, times: int, make: Callable[[], BaseException]) -> None:
        """See `Fault`."""
        self._armed.append(Fault(place, nth, times, make))

    def hit(self, name: str) -> None:
        if self.on:
            self.calls[name] += 1
            for fault in self._armed:
                fault.hit(name)


class Faulty:
    """A stand-in for an object of the Rust core, or a mover, whose calls can fail."""

    def __init__(self, real: Any, faults: Faults) -> None:
        self._real, self._faults = real, faults

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            self._faults.hit(f"{type(self._real).__name__}.{name}")
            result = value(*arguments, **options)
            return Faulty(result, self._faults) if isinstance(result, (Match, Lease, Reservation)) else result

        return call

    def __len__(self) -> int:
        return len(self._real)


CLASSES = [
    admission.Admission,
    holds.HeldBlocks,
    ledger.Ledger,
    lookup.Lookup,
    scheduler.SchedulerSide,
    stores.StorePlanner,
    turns.Turns,
    worker.WorkerSide,
]
UNTOUCHED = {
    "__init__",
    # vLLM's own pool: what it may have taken back must not be given back again.
    "_release",
    "release",
    # The loops that keep one job's end from another's.
    "_end_loads",
    "_end_stores",
    "_survives",
    "_close_load",
    "_close_store",
    "_void_above",
    # What is called when something has failed: a second fault at once is not looked at.
    "break_promise",
    "open_broken",
    "take_orders",
    "rescue_orders",
    "acknowledge_later",
    "drop_request",
    "withdraw",
    "shut",
    "_fail_rest",
    "_end",
    "_enter",
    "_begins",
    "_or_failed",
}


@contextmanager
def faulty(faults: Faults) -> Iterator[None]:
    """Within it every function behind the hooks can be made to fail."""

    def watched(function: Any, name: str) -> Any:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            faults.hit(name)
            return function(*arguments, **options)

        return call

    with ExitStack() as stack:
        for owner in CLASSES:
            for name, function in inspect.getmembers(owner, inspect.isfunction):
                if name not in UNTOUCHED:
                    place = f"{owner.__name__}.{name}"
                    stack.enter_context(patch.object(owner, name, watched(function, place)))
        stack.enter_context(patch.object(scheduler, "Index", lambda rows: Faulty(Index(rows), faults)))
        yield
