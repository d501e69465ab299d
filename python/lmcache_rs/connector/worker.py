"""The worker side: owns this rank's host memory and moves its bytes, as the scheduler side orders."""

from typing import Protocol

import numpy as np

from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.orders import BrokenLoad, JobResult, LoadOrder, Numbers, StepOrders, WorkerAcks
from lmcache_rs.log import init_logger

logger = init_logger(__name__)


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

    def close(self) -> None:
        """End in bounded time; nothing touches KV or rows afterwards."""


class WorkerSide:
    """Carries out orders on the worker's main thread and keeps the answers until they are asked for."""

    def __init__(self, barrier: Barrier) -> None:
        self._barrier = barrier
        self._mover: Mover | None = None
        self._rows_unreported = False
        self._async_loads: dict[int, LoadOrder] = {}
        self._sync_loads: dict[int, LoadOrder] = {}
        self._begun: StepOrders | None = None
        self._stored: StepOrders | None = None
        self._acks: dict[int, JobResult] = {}
        self._received: set[str] = set()
        self._failed: dict[str, Numbers] = {}
        self._bad_blocks: set[int] = set()

    @property
    def loading(self) -> int:
        """Asynchronous loads in flight."""
        return len(self._async_loads)

    def attach(self, mover: Mover | None) -> None:
        """Take the mover made for the registered KV caches; None: this rank has none, every job fails."""
        self._mover = mover
        self._rows_unreported = True

    def begin_step(self, orders: StepOrders) -> None:
        """The earliest hook of a step: start asynchronous loads, report the ones that cannot be. Idempotent."""
        if orders is self._begun:
            return
        self._begun = orders
        for broken in orders.broken:
            self._report_broken(broken)
        for order in orders.loads:
            if order.asynchronous:
                self._start(order)

    def before_forward(self, orders: StepOrders) -> None:
        """The step's forward comes next and reads what its synchronous loads bring."""
        self.begin_step(orders)
        for order in orders.loads:
            if not order.asynchronous:
                self._load_now(order)

    def after_forward(self, orders: StepOrders) -> None:
        """The step's KV is computed: store. Idempotent."""
        if orders is self._stored:
            return
        self._stored = orders
        for order in orders.stores:
            try:
                self._require_mover().store(order.job, order.rows, order.blocks)
            except Exception as error:
                self._barrier.report("store", error)
                self._end(order.job, JobResult(1, 1, 0, 0.0))

    def take_received(self, failed_as_blocks: bool = False) -> tuple[set[str], set[str]]:
        """Requests whose asynchronous load ended since the last call, and those of them whose load failed.

        `failed_as_blocks`: vLLM cannot be told of failed requests; their blocks count as bad instead.
        """
        if self._begun is not None and self._begun.idle:
            self.after_forward(self._begun)
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
        self._rows_unreported = False
        acks, self._acks = WorkerAcks(self._acks, rows), {}
        return acks

    def close(self) -> None:
        """End the mover; what it had not finished has failed."""
        if self._mover is not None:
            self._mover.close()
            self._poll()
            self._mover = None
        for job in (*self._async_loads, *self._sync_loads):
            self._end(job, JobResult(1, 1, 0, 0.0))

    def _require_mover(self) -> Mover:
        if self._mover is None:
            raise RuntimeError("this rank has no host memory for the cache")
        return self._mover

    def _start(self, order: LoadOrder) -> None:
        self._async_loads[order.job] = order
        try:
            self._require_mover().submit_load(order.job, order.rows, order.blocks)
        except Exception as error:
            self._barrier.report("load", error)
            self._end(order.job, JobResult(1, 1, 0, 0.0))

    def _load_now(self, order: LoadOrder) -> None:
        self._sync_loads[order.job] = order
        try:
            self._require_mover().load_now(order.job, order.rows, order.blocks)
        except Exception as error:
            self._barrier.report("load", error)
            self._end(order.job, JobResult(1, 1, 0, 0.0))

    def _report_broken(self, broken: BrokenLoad) -> None:
        self._acks[broken.job] = JobResult(1, 1, 0, 0.0)
        if broken.asynchronous:
            self._received.add(broken.request_id)
            self._failed[broken.request_id] = np.array(broken.blocks, dtype=np.uint32)
        else:
            self._bad_blocks.update(broken.blocks)

    def _poll(self) -> None:
        if self._mover is None:
            return
        for job, moved, seconds in self._mover.poll():
            self._end(job, JobResult(1, int(moved < 0), max(0, moved), seconds))

    def _end(self, job: int, result: JobResult) -> None:
        """A job ended: keep its answers for the scheduler side, and for vLLM if it was a load."""
        self._acks[job] = result
        order = self._async_loads.pop(job, None)
        if order is not None:
            self._received.add(order.request_id)
            if result.failed:
                self._failed[order.request_id] = order.blocks
        order = self._sync_loads.pop(job, None)
        if order is not None and result.failed:
            self._bad_blocks.update(order.blocks.tolist())
