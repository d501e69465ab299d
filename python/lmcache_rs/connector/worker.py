"""The worker side: owns this rank's host memory and moves its bytes, as the scheduler side orders."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.layered import LayeredLoads
from lmcache_rs.connector.mover import DRAIN_S_MAX, SPOILED_S_MAX, Mover
from lmcache_rs.connector.orders import (
    DONE,
    FAILED,
    BrokenLoad,
    JobResult,
    LoadOrder,
    Numbers,
    Order,
    StepOrders,
    StoreOrder,
    WorkerAcks,
)
from lmcache_rs.connector.pace import Pace
from lmcache_rs.connector.pieces import Pieces
from lmcache_rs.connector.tier_worker import TierWorker
from lmcache_rs.log import init_logger

logger = init_logger(__name__)


class WorkerSide:
    """Carries out orders on the worker's main thread and keeps the answers until they are asked for."""

    def __init__(self, barrier: Barrier, pace: Pace) -> None:
        self._barrier = barrier
        self._pace = pace
        self._mover: Mover | None = None
        self._layered = LayeredLoads({})
        self._pieces = Pieces(barrier.report)
        self.tiers = TierWorker(None, lambda _: {}, barrier)
        self._rows_unreported = False
        self._orders = StepOrders()
        self._begun: set[int] = set()
        """Jobs of the current orders, and of those to come, that were begun or have failed."""
        self._open: set[int] = set()
        """Jobs that were begun and have not ended."""
        self._joined: StepOrders | None = None
        self._async_loads: dict[int, LoadOrder | BrokenLoad] = {}
        self._sync_loads: dict[int, LoadOrder | BrokenLoad] = {}
        self._early: set[int] = set()
        """Asynchronous loads told to vLLM as ended, shortly before they are."""
        self._acks: dict[int, JobResult] = {}
        self._received: set[str] = set()
        self._failed: dict[str, Numbers] = {}
        self.bad_blocks: set[int] = set()

    def attach(self, mover: Mover | None, layers: Mapping[str, int], tiers: TierWorker | None = None) -> None:
        """Take the mover of the KV caches (None: every job fails), its layers' numbers and the slower tiers."""
        self._mover = mover
        self._layered = LayeredLoads(layers)
        self.tiers = tiers or self.tiers
        self._rows_unreported = True

    def start_loads(self, orders: StepOrders) -> None:
        """Start a step's loads, as soon as its orders are known. Idempotent."""
        for order in orders.loads:
            if self._begins(order):
                with self._or_failed("load", order.job):
                    self._start(order)
        self.tiers.start(orders)

    def begin_step(self, orders: StepOrders) -> None:
        """The earliest hook of a step on the worker: report the loads that cannot be ordered. Idempotent."""
        self._enter(orders)
        self.start_loads(orders)
        self._fail_rest(orders.broken)
        if self._joined is not orders:
            for job in orders.joins:
                self._join(job)
            self._joined = orders

    def before_forward(self, orders: StepOrders, by_layers: bool = False) -> None:
        """The step's forward comes next and reads what its synchronous loads bring; `by_layers`: it asks for each."""
        self.begin_step(orders)
        for order in orders.loads:
            if not (order.asynchronous or self._follow(order, by_layers)):
                self._join(order.job)
        if any(not order.asynchronous for order in orders.loads):
            self._poll()
            self._rescue(orders)

    def is_captured(self) -> bool:
        """Whether vLLM does not run a forward now, but captures it as a CUDA graph."""
        return self._mover is not None and self._mover.is_captured()

    def before_layer(self, name: str) -> None:
        """The forward reads this layer next; it may ask again, from another stream."""
        if self._mover is not None:
            self._layered.before(name, self._mover)

    def capture_layer(self, name: str) -> None:
        """The forward that is captured reads this layer next."""
        if self._mover is not None:
            self._layered.capture(name, self._mover)

    def after_forward(self, orders: StepOrders) -> None:
        """The step's KV is computed: store. Idempotent."""
        self._enter(orders)
        self._settle_layers()
        for order in orders.stores:
            if self._begins(order):
                with self._or_failed("store", order.job):
                    self._require_mover().store(order.job, order.rows, order.blocks)

    def end_step(self, orders: StepOrders) -> None:
        """VLLM asks for results: a load that no hook of the step has begun has failed."""
        self._enter(orders)
        self._fail_rest((*orders.broken, *orders.loads))

    def take_received(self, failed_as_blocks: bool = False) -> tuple[set[str], set[str]]:
        """Requests whose asynchronous load ended since the last call, and those of them whose load failed.

        `failed_as_blocks`: vLLM cannot be told of failed requests; their blocks count as bad instead.
        """
        if self._orders.idle:
            self.after_forward(self._orders)
        self._settle_layers()
        self._poll()
        self._report_early()
        received, failed = self._received, self._failed
        self._received, self._failed = set(), {}
        if failed_as_blocks:
            self.bad_blocks.update(*(blocks.tolist() for blocks in failed.values()))
        return received, set(failed)

    def take_bad_blocks(self) -> set[int]:
        """Blocks that synchronous loads left bad since the last call."""
        bad, self.bad_blocks = self.bad_blocks, set()
        return bad

    def take_acks(self) -> WorkerAcks | None:
        """What the scheduler side has not been told; None: nothing."""
        self._poll()
        if not self._acks and not self._rows_unreported:
            return None
        rows = (self._mover.rows if self._mover is not None else 0) if self._rows_unreported else None
        results, self._acks, self._rows_unreported = self._acks, {}, False
        return WorkerAcks(results, rows)

    def drain(self) -> None:
        """Wait until no copy is in flight, for a bounded time, and begin none of what waits for more."""
        self._pieces.give_up()
        try:
            if self._mover is not None and not self._mover.drain(DRAIN_S_MAX):
                raise TimeoutError(f"copies did not end in {DRAIN_S_MAX:.0f} s")
        except BaseException as error:
            self._barrier.report("drain", error)

    def close(self) -> None:
        """End the tiers and the mover; what they had not finished has failed."""
        self.tiers.close()
        mover, self._mover = self._mover, None
        if mover is not None:
            ended = mover.close()
            self._take_ended(mover)
            if not ended:
                # Its requests wait for ever rather than get blocks that are still written.
                logger.error(
                    "copies did not end in time: %d loads are never reported", len(self._async_loads)
                )
                return
        for job in (*self._async_loads, *self._sync_loads):
            self._end(job, FAILED)

    def _enter(self, orders: StepOrders) -> None:
        """Make these the current orders. What no hook began of the orders before has failed."""
        if orders is self._orders:
            return
        before, self._orders = self._orders, orders
        self._pace.step()
        self.tiers.leave(before)
        jobs: list[Order] = [*before.broken, *before.loads, *before.stores]
        self._fail_rest(jobs)
        self._begun.difference_update(order.job for order in jobs)

    def _begins(self, order: Order) -> bool:
        """Whether this is the first call for this job; it must end from now on."""
        if order.job in self._begun:
            return False
        self._begun.add(order.job)
        self._open.add(order.job)
        if not isinstance(order, StoreOrder):
            (self._async_loads if order.asynchronous else self._sync_loads)[order.job] = order
        return True

    @contextmanager
    def _or_failed(self, what: str, job: int) -> Iterator[None]:
        """Whatever stops the mover from taking the job fails it."""
        try:
            yield
        except BaseException as error:
            self._barrier.report(what, error)
            self._end(job, FAILED)

    def _fail_rest(self, orders: Iterable[Order]) -> None:
        for order in orders:
            if self._begins(order):
                self._end(order.job, FAILED)

    def _require_mover(self) -> Mover:
        if self._mover is None:
            raise RuntimeError("this rank has no host memory for the cache")
        return self._mover

    def _start(self, order: LoadOrder) -> None:
        mover = self._require_mover()
        if order.asynchronous:
            self._pieces.submit(order, mover)
        else:
            mover.load_now(order.job, order.rows, order.blocks, order.by_layers)

    def _join(self, job: int) -> None:
        """Have what is computed from now on wait for a load, unless it has ended."""
        if job in self._async_loads or job in self._sync_loads:
            with self._or_failed("load", job):
                self._pieces.join(job, self._require_mover())

    def _follow(self, order: LoadOrder, asks: bool) -> bool:
        """Have the forward wait for each layer of a load; False: for this one, or by this forward, it cannot be."""
        with self._or_failed("load", order.job):
            return order.job in self._sync_loads and self._layered.begin(order, asks, self._require_mover())
        return True  # It ended, failed.

    def _rescue(self, orders: StepOrders) -> None:
        """Load in another way what has failed: with overlapping steps vLLM keeps a token that it computes meanwhile."""
        for order in orders.loads:
            if order.asynchronous or not self._acks.get(order.job, DONE).failed or self._mover is None:
                continue
            try:
                if self._mover.rescue(order.rows, order.blocks):
                    self._acks[order.job] = replace(DONE)
                    self.bad_blocks.difference_update(order.blocks.tolist())
            except BaseException as error:
                self._barrier.report("rescue", error)

    def _settle_layers(self) -> None:
        """The forward was submitted. Loads of which it did not wait for every layer end, and count as failed."""
        for order, missing in self._layered.end(self._mover):
            self._barrier.report("load", RuntimeError(f"{missing} layers of it were not waited for"))
            deadline = time.monotonic() + SPOILED_S_MAX
            while order.job in self._sync_loads and time.monotonic() < deadline:
                self._poll()
                time.sleep(0.001)
            self.bad_blocks.update(order.blocks.tolist())
            self._acks[order.job] = replace(FAILED)

    def _report_early(self) -> None:
        """Tell vLLM of loads that will have ended before it can use their blocks; it is made to join them then."""
        if self._mover is None or not self._async_loads or not (lead := self._pace.lead()):
            return
        for job in self._pieces.settled(self._mover.settle_loads(lead)):
            order = self._async_loads.get(job)
            if isinstance(order, LoadOrder) and order.held and job not in self._early:
                self._early.add(job)
                self._received.add(order.request_id)

    def _poll(self) -> None:
        results = self.tiers.take_results()
        self._acks |= results
        if self._mover is None:
            return
        try:
            self._pieces.fetched(results, self._mover)
            self._take_ended(self._mover)
        except BaseException as error:
            # What ended before can be told all the same.
            self._barrier.report("poll", error)

    def _take_ended(self, mover: Mover) -> None:
        for job, moved, seconds in self._pieces.whole(mover.poll()):
            self._end(job, JobResult(1, int(moved < 0), max(0, moved), seconds))

    def _end(self, job: int, result: JobResult) -> None:
        """A job ended: keep its answers for the scheduler side, and for vLLM if it was a load. Once a job."""
        if job not in self._open:
            return
        self._open.discard(job)
        self._acks[job] = replace(result)
        order = self._async_loads.pop(job, None)
        if order is not None and job in self._early:
            self._early.discard(job)
            if result.failed:
                self.bad_blocks.update(order.blocks.tolist())
        elif order is not None:
            self._received.add(order.request_id)
            if result.failed:
                self._failed[order.request_id] = order.blocks
        order = self._sync_loads.pop(job, None)
        if order is not None and result.failed:
            self.bad_blocks.update(order.blocks.tolist())
