"""The worker side: owns this rank's host memory and moves its bytes, as the scheduler side orders."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.orders import (
    BrokenLoad,
    JobResult,
    LoadOrder,
    Numbers,
    StepOrders,
    StoreOrder,
    WorkerAcks,
)
from lmcache_rs.log import init_logger

logger = init_logger(__name__)

Order = LoadOrder | StoreOrder | BrokenLoad

FAILED = JobResult(1, 1, 0, 0.0)


class Mover(Protocol):
    """Copies between pool rows and KV blocks; `lmcache_rs.copy` has one for each kind of device."""

    @property
    def rows(self) -> int:
        """Rows of the pool."""

    def load_now(self, job: int, rows: Numbers, blocks: Numbers) -> None:
        """Load before the step's forward reads the blocks, whichever way the device orders the two."""

    def submit_load(self, job: int, rows: Numbers, blocks: Numbers) -> None:
        """Load beside whatever runs."""

    def store(self, job: int, rows: Numbers, blocks: Numbers) -> None:
        """Store the blocks as they are after what the step has computed so far."""

    def poll(self) -> list[tuple[int, int, float]]:
        """Jobs of all three kinds that ended, nothing touching their rows or blocks any more: (job, bytes or -1, s)."""

    def close(self) -> bool:
        """End in bounded time. Whether nothing touches KV or rows afterwards; what ended can still be polled."""


class WorkerSide:
    """Carries out orders on the worker's main thread and keeps the answers until they are asked for."""

    def __init__(self, barrier: Barrier) -> None:
        self._barrier = barrier
        self._mover: Mover | None = None
        self._rows_unreported = False
        self._orders = StepOrders()
        self._begun: set[int] = set()
        """Jobs of the current orders that were begun, or have failed."""
        self._async_loads: dict[int, LoadOrder | BrokenLoad] = {}
        self._sync_loads: dict[int, LoadOrder | BrokenLoad] = {}
        self._acks: dict[int, JobResult] = {}
        self._received: set[str] = set()
        self._failed: dict[str, Numbers] = {}
        self._bad_blocks: set[int] = set()

    @property
    def loading(self) -> int:
        """Asynchronous loads in flight."""
        return len(self._async_loads)

    @property
    def bad_blocks(self) -> set[int]:
        """What `take_bad_blocks` would return."""
        return self._bad_blocks

    def attach(self, mover: Mover | None) -> None:
        """Take the mover made for the registered KV caches; None: this rank has none, every job fails."""
        self._mover = mover
        self._rows_unreported = True

    def begin_step(self, orders: StepOrders) -> None:
        """The earliest hook of a step: start asynchronous loads, report the ones that cannot be. Idempotent."""
        self._enter(orders)
        self._fail_rest(orders.broken)
        for order in orders.loads:
            if order.asynchronous and self._begins(order):
                with self._or_failed("load", order):
                    self._require_mover().submit_load(order.job, order.rows, order.blocks)

    def before_forward(self, orders: StepOrders) -> None:
        """The step's forward comes next and reads what its synchronous loads bring. Idempotent."""
        self.begin_step(orders)
        for order in orders.loads:
            if not order.asynchronous and self._begins(order):
                with self._or_failed("load", order):
                    self._require_mover().load_now(order.job, order.rows, order.blocks)

    def after_forward(self, orders: StepOrders) -> None:
        """The step's KV is computed: store. Idempotent."""
        self._enter(orders)
        for order in orders.stores:
            if self._begins(order):
                with self._or_failed("store", order):
                    self._require_mover().store(order.job, order.rows, order.blocks)

    def end_step(self, orders: StepOrders) -> None:
        """VLLM asks for results: a load that no hook of the step has begun has failed."""
        self._enter(orders)
        self._fail_rest(orders.broken)
        self._fail_rest(orders.loads)

    def take_received(self, failed_as_blocks: bool = False) -> tuple[set[str], set[str]]:
        """Requests whose asynchronous load ended since the last call, and those of them whose load failed.

        `failed_as_blocks`: vLLM cannot be told of failed requests; their blocks count as bad instead.
        """
        if self._orders.idle:
            self.after_forward(self._orders)
        self._poll()
        received, failed = self._received, self._failed
        self._received, self._failed = set(), {}
        if failed_as_blocks:
            self._bad_blocks.update(*(blocks.tolist() for blocks in failed.values()))
        return received, set(failed)

    def take_bad_blocks(self) -> set[int]:
        """Blocks that synchronous loads left bad since the last call."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_acks(self) -> WorkerAcks | None:
        """What the scheduler side has not been told; None: nothing."""
        self._poll()
        if not self._acks and not self._rows_unreported:
            return None
        rows = (self._mover.rows if self._mover is not None else 0) if self._rows_unreported else None
        acks = WorkerAcks(self._acks, rows)
        self._rows_unreported, self._acks = False, {}
        return acks

    def close(self) -> None:
        """End the mover; what it had not finished has failed."""
        mover, self._mover = self._mover, None
        if mover is not None:
            ended = mover.close()
            self._take_ended(mover)
            if not ended:
                # Its requests wait for ever rather than get blocks that are still written.
                logger.error("copies did not end in time: %d loads are never reported", self.loading)
                return
        for job in (*self._async_loads, *self._sync_loads):
            self._end(job, FAILED)

    def _enter(self, orders: StepOrders) -> None:
        """Make these the current orders. What no hook began of the orders before has failed."""
        if orders is self._orders:
            return
        before, self._orders = self._orders, orders
        self._fail_rest(before.broken)
        self._fail_rest(before.loads)
        self._fail_rest(before.stores)
        self._begun = set()

    def _begins(self, order: Order) -> bool:
        """Whether this is the first call for this job; it must end from now on."""
        if order.job in self._begun:
            return False
        self._begun.add(order.job)
        if not isinstance(order, StoreOrder):
            (self._async_loads if order.asynchronous else self._sync_loads)[order.job] = order
        return True

    @contextmanager
    def _or_failed(self, what: str, order: Order) -> Iterator[None]:
        """Whatever stops the mover from taking the job fails it."""
        try:
            yield
        except BaseException as error:
            self._barrier.report(what, error)
            self._end(order.job, FAILED)

    def _fail_rest(self, orders: Iterable[Order]) -> None:
        for order in orders:
            if self._begins(order):
                self._end(order.job, FAILED)

    def _require_mover(self) -> Mover:
        if self._mover is None:
            raise RuntimeError("this rank has no host memory for the cache")
        return self._mover

    def _poll(self) -> None:
        if self._mover is None:
            return
        try:
            self._take_ended(self._mover)
        except BaseException as error:
            # What ended before can be told all the same.
            self._barrier.report("poll", error)

    def _take_ended(self, mover: Mover) -> None:
        for job, moved, seconds in mover.poll():
            self._end(job, JobResult(1, int(moved < 0), max(0, moved), seconds))

    def _end(self, job: int, result: JobResult) -> None:
        """A job ended: keep its answers for the scheduler side, and for vLLM if it was a load."""
        self._acks[job] = replace(result)
        order = self._async_loads.pop(job, None)
        if order is not None:
            self._received.add(order.request_id)
            if result.failed:
                self._failed[order.request_id] = order.blocks
        order = self._sync_loads.pop(job, None)
        if order is not None and result.failed:
            self._bad_blocks.update(order.blocks.tolist())
