"""The worker side: owns this rank's host memory and moves its bytes, as the scheduler side orders."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from lmcache_rs.connector.answers import Answers
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.copies import CUT, Copies
from lmcache_rs.connector.early import EarlyEnds
from lmcache_rs.connector.joins import Joins
from lmcache_rs.connector.mover import DRAIN_S_MAX, Mover
from lmcache_rs.connector.orders import FAILED, JobResult, LoadOrder, Order, StepOrders, WorkerAcks
from lmcache_rs.connector.pace import Pace
from lmcache_rs.connector.pieces import Pieces
from lmcache_rs.connector.stored_layers import StoredLayers
from lmcache_rs.connector.tier_worker import TierWorker
from lmcache_rs.log import init_logger

logger = init_logger(__name__)


class WorkerSide:
    """Carries out orders on the worker's main thread and keeps the answers until they are asked for."""

    def __init__(self, barrier: Barrier, pace: Pace, is_left_early: bool = False) -> None:
        """`is_left_early`: vLLM calls no hook of a step here after it has asked for results."""
        self._barrier = barrier
        self._is_left_early = is_left_early
        self._pace = pace
        self._mover: Mover | None = None
        self._copies = Copies()
        self._pieces = Pieces(self._copies, barrier.report)
        self._stored_layers = StoredLayers({}, (), 0, self._copies, barrier.report)
        self.tiers = TierWorker(None, lambda _: {}, barrier)
        self._untold_rows: int | None = None
        self._orders = StepOrders()
        self.quiet: StepOrders | None = None
        """The orders of a step that orders nothing, begun when nothing was under way and everything was told."""
        self._begun: set[int] = set()
        """Jobs of the current orders, and of those to come, that were begun or have failed."""
        self._joined: StepOrders | None = None
        self._computing: StepOrders | None = None
        """Orders of which some layers were computed."""
        self.answers = Answers()
        self._joins = Joins(self._pieces, self.answers, barrier.report, self._poll)
        self._early = EarlyEnds(pace, self._pieces, self.answers, barrier.report)
        self._is_asked = False
        """The scheduler side is in this process and asks for acknowledgements."""

    def attach(self, mover: Mover | None, layers: Mapping[str, int], tiers: TierWorker | None = None) -> None:
        """Take the mover of the KV caches (None: every job fails), its layers' numbers and the slower tiers."""
        self._mover = mover
        self._joins.attach(layers)
        parts, row_bytes = (mover.store_parts, mover.row_bytes) if mover is not None else ((), 0)
        self._stored_layers = StoredLayers(layers, parts, row_bytes, self._copies, self._barrier.report)
        self.tiers = tiers or self.tiers
        self._untold_rows = mover.rows if mover is not None else 0

    def start_loads(self, orders: StepOrders) -> None:
        """Start a step's loads, as soon as some or all of its orders are known. Idempotent."""
        for order in orders.loads:
            if self._begins(order):
                with self._or_failed("load", order.job):
                    self._start(order)
        self.tiers.start(orders)

    def begin_step(self, orders: StepOrders) -> None:
        """The earliest hook of a step on the worker: report the loads that cannot be ordered. Idempotent."""
        self._enter(orders)
        if orders.empty:
            self.quiet = orders if self._has_told_all and not self._joins.layered.waited_for else None
            return
        self.start_loads(orders)
        self._fail_rest(orders.broken)
        if self._joined is not orders and self._mover is not None:
            for job in orders.joins:
                # Whether the forward asks for layers is not known here, since 0.33 not before it either.
                self._joins.wait_for(job, False, self._mover)
            self._joined = orders

    def before_forward(self, orders: StepOrders, by_layers: bool = False) -> None:
        """The step's forward comes next and reads what its synchronous loads bring; `by_layers`: it asks for each."""
        self.begin_step(orders)
        if self._mover is None or all(order.asynchronous for order in orders.loads):
            return
        for order in orders.loads:
            if not order.asynchronous:
                self._joins.wait_for(order.job, by_layers, self._mover)
        self._poll()
        self._joins.rescue(orders.loads, self._mover)

    def is_captured(self) -> bool:
        """Whether vLLM does not run a forward now, but captures it as a CUDA graph."""
        return self._mover is not None and self._mover.is_captured()

    def before_layer(self, name: str) -> None:
        """The forward reads this layer next; it may ask again, from another stream."""
        if self._mover is not None:
            self._joins.layered.before(name, self._mover)

    def capture_layer(self, name: str) -> None:
        """The forward that is captured reads this layer next."""
        if self._mover is not None:
            self._joins.layered.capture(name, self._mover)

    def after_layer(self, orders: StepOrders, name: str) -> None:
        """The step's forward has computed this layer's KV: store it, if that is worth it."""
        self._enter(orders)
        if self._mover is None:
            return
        if self._computing is not orders:
            self._computing = orders
            if self._stored_layers.takes(orders.stores):
                self._stored_layers.begin([order for order in orders.stores if self._begins(order)])
        self._stored_layers.computed(name, self._mover)

    def after_forward(self, orders: StepOrders) -> None:
        """The step's KV is computed: store. Idempotent."""
        self._enter(orders)
        self._joins.settle(self._mover)
        self._stored_layers.end(self._mover)
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
        if self._orders.idle or self._is_left_early:
            self.after_forward(self._orders)
        self._joins.settle(self._mover)
        self._poll()
        self._early.tell(self._mover, self._joins.layered.gated)
        received, failed = self.answers.take_received()
        if failed_as_blocks:
            self.answers.bad_blocks.update(*(blocks.tolist() for blocks in failed.values()))
        return received, set(failed)

    def take_bad_blocks(self) -> set[int]:
        """Blocks that loads left bad since the last call."""
        return self.answers.take_bad_blocks()

    def take_acks(self) -> WorkerAcks | None:
        """What the scheduler side may hear at any time and has not been told; None: nothing."""
        self._is_asked = True
        return self._take_acks(told=False, others=True)

    def take_step_acks(self) -> WorkerAcks | None:
        """What goes with a step's output: loads that failed, and the rest unless the scheduler side asks by itself.

        With overlapping steps an output is read late, also one of a step that computed nothing.
        """
        return self._take_acks(told=True, others=not self._is_asked)

    def _take_acks(self, told: bool, others: bool) -> WorkerAcks | None:
        if self._has_told_all:
            return None
        if others:
            self._poll()
        results = self.answers.take_results(told, others)
        rows, self._untold_rows = self._untold_rows, None
        return WorkerAcks(results, rows) if results or rows is not None else None

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
        self._stored_layers.end(None)
        if mover is not None:
            ended = mover.close()
            self._take_ended(mover)
            if not ended:
                # Its requests wait for ever rather than get blocks that are still written.
                count = len(self.answers.asynchronous)
                logger.error("copies did not end in time: %d loads are never reported", count)
                return
        self.answers.end_loads()

    def _enter(self, orders: StepOrders) -> None:
        """Make these the current orders. What no hook began of the orders before has failed."""
        if orders is self._orders:
            return
        before, self._orders = self._orders, orders
        self._pace.step()
        if before is self.quiet or before.empty:  # the first says it without a call, in most steps
            return
        jobs: list[Order] = [*before.broken, *before.loads, *before.stores]
        self._fail_rest(jobs)
        self._begun.difference_update(order.job for order in jobs)
        self._stored_layers.end(None)
        self.tiers.leave(before)

    @property
    def _has_told_all(self) -> bool:
        return self.answers.none and self.tiers.absent and self._untold_rows is None

    def _begins(self, order: Order) -> bool:
        """Whether this is the first call for this job; it must end from now on."""
        if order.job in self._begun:
            return False
        self._begun.add(order.job)
        self.answers.begin(order)
        return True

    @contextmanager
    def _or_failed(self, what: str, job: int) -> Iterator[None]:
        """Whatever stops the mover from taking the job fails it."""
        try:
            yield
        except BaseException as error:
            self._barrier.report(what, error)
            self.answers.end(job, FAILED)

    def _fail_rest(self, orders: Iterable[Order]) -> None:
        for order in orders:
            if self._begins(order):
                self.answers.end(order.job, FAILED)

    def _require_mover(self) -> Mover:
        if self._mover is None:
            raise RuntimeError("this rank has no host memory for the cache")
        return self._mover

    def _start(self, order: LoadOrder) -> None:
        mover = self._require_mover()
        if order.asynchronous:
            # Only captured forwards wait for its layers; what waits for all of it gets it sooner by rows.
            order.by_layers = order.by_layers and self._joins.layered.gated
            self._pieces.submit(order, mover)
        else:
            mover.load_now(order.job, order.rows, order.blocks, order.by_layers)

    def _poll(self) -> bool:
        """Take in what ended; whether the mover, if asked, could say it."""
        results = self.tiers.take_results()
        self.answers.add_results(results)
        if self._mover is not None and (results or self.answers.busy):
            try:
                self._pieces.fetched(results, self._mover)
                self._take_ended(self._mover)
            except BaseException as error:
                # What ended before can be told all the same.
                self._barrier.report("poll", error)
                return False
        return True

    def _take_ended(self, mover: Mover) -> None:
        for job, moved, seconds in self._pieces.whole(mover.poll()):
            self.answers.end(job, JobResult(1, int(moved < 0), max(0, moved), seconds, int(moved == CUT)))
