"""Jobs the workers were ordered to do and have not all acknowledged, and what ends with them."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any

from lmcache_rs._core import Index, Reservation
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.coming import release_rows
from lmcache_rs.connector.geometry import Geometry
from lmcache_rs.connector.holds import HeldBlocks
from lmcache_rs.connector.jobs import LoadJob, StoreJob
from lmcache_rs.connector.orders import BrokenLoad, JobResult, LoadOrder, Numbers, StoreOrder, WorkerAcks
from lmcache_rs.connector.requests import Plan, Record
from lmcache_rs.connector.stats import Counters
from lmcache_rs.log import init_logger

logger = init_logger(__name__)

STEPPING_S_MAX = 5.0
"""An engine with nothing else to do keeps stepping for an acknowledgement at most this long."""


class Ledger:
    """Opens jobs, collects what the ranks say, and ends each job once, whatever becomes of the others."""

    def __init__(
        self,
        index: Index,
        held: HeldBlocks,
        geometry: Geometry,
        counters: Counters,
        barrier: Barrier,
        ids: Iterator[int],
    ) -> None:
        self._barrier = barrier
        self._index = index
        self._held = held
        self._ranks = geometry.ranks
        self._rows_per_slot = len(geometry.groups)
        self._counters = counters
        self._ids = ids
        self._stores: dict[int, StoreJob] = {}
        self._loads: dict[int, LoadJob] = {}
        self._joins: list[int] = []
        self.on_stored: Callable[[StoreJob], None] = lambda job: None
        """Called with each store whose rows can be found from now on."""

    def open_store(
        self, step: int, record: Record, reservation: Reservation, rows: Numbers, blocks: Numbers, tokens: int
    ) -> StoreOrder:
        """Order a store; its blocks are held from now on."""
        held = self._held.hold(blocks.tolist())
        job = StoreJob(
            next(self._ids), step, record, reservation, held, record.table, tokens, time.monotonic()
        )
        order = StoreOrder(job.id, rows, blocks)
        self._stores[job.id] = job
        return order

    def open_load(
        self,
        step: int,
        record: Record,
        plan: Plan,
        first: int,
        order: tuple[Numbers, Numbers],
        end_tokens: int,
    ) -> LoadOrder:
        """Order a load of (rows, blocks), the first for block `first`; what the plan keeps is the job's now."""
        rows, blocks = order
        asynchronous, coming = plan.asynchronous, plan.coming
        held = self._held.hold(blocks.tolist()) if asynchronous and self._held.bound else []
        number, now = next(self._ids), time.monotonic()
        job = LoadJob(number, step, record, plan.lease, first, blocks, held, end_tokens, asynchronous, now)
        opened = LoadOrder(job.id, record.id, rows, blocks, asynchronous, bool(held), plan.by_layers)
        if coming is not None:
            job.coming, opened.wait_s = coming, coming.wait_s
            opened.pieces = coming.pieces(first, first + len(blocks))
            self._counters.add("loads_as_fetched")
        self._loads[job.id] = job
        record.loading = True
        return opened

    def received(self, request_ids: Iterable[str]) -> None:
        """Every rank told vLLM that these requests' loads have ended: readers join those that have not quite."""
        requests = set(request_ids)
        for job in self._loads.values():
            if job.held and not job.joined and job.record.id in requests:
                job.joined = True
                self._joins.append(job.id)

    def take_joins(self) -> list[int]:
        """Loads that the next step's forward may read."""
        joins, self._joins = self._joins, []
        return joins

    def open_broken(
        self, step: int, record: Record, blocks: Numbers, end_tokens: int, asynchronous: bool
    ) -> BrokenLoad:
        """A load that was promised and is not ordered: fails like one, so that stores that read its blocks are void."""
        number, now = next(self._ids), time.monotonic()
        job = LoadJob(number, step, record, None, 0, blocks, [], end_tokens, asynchronous, now)
        self._loads[job.id] = job
        record.loading = True
        return BrokenLoad(job.id, record.id, blocks, asynchronous)

    def acknowledge(self, acks: WorkerAcks) -> None:
        """Take the ranks' answers.

        Loads come first: a store of their step or later may have read what a failed one left behind. It waits for the
        load's answer, which may come later: those of a worker nearby overtake what is in a step's output.
        """
        while acks.jobs:  # taken out one by one: what failed half-way may be taken in again
            job_id, result = acks.jobs.popitem()
            job = self._loads.get(job_id) or self._stores.get(job_id)
            if job is not None:
                self._survives("acknowledge", partial(job.result.merge, result))
        for load in list(self._loads.values()):
            if load.result.ranks >= self._ranks:
                self._close_load(load)
        for store in list(self._stores.values()):
            if store.result.ranks >= self._ranks and not self._may_become_void(store):
                self._close_store(store)
        rows, acks.rows = acks.rows, None
        slots = self._index.rows if rows is None else rows // self._rows_per_slot
        if slots < self._index.rows:
            logger.warning("a worker has room for %d blocks only, %d were planned", slots, self._index.rows)
            self._index.shrink(slots)

    def _close_load(self, job: LoadJob) -> None:
        del self._loads[job.id]
        job.record.loading = False
        if not self._survives("end_load", partial(self._end_load, job)):
            self._void_above(job)
            self._survives("end_load", partial(release_rows, job))
        self._survives("release", partial(self._release, job))

    def _close_store(self, job: StoreJob) -> None:
        del self._stores[job.id]
        self._survives("release", partial(self._release, job))
        if not self._survives("end_store", partial(self._end_store, job)):
            self._survives("end_store", job.reservation.abort)

    def _survives(self, what: str, work: Callable[[], Any]) -> bool:
        """Whether `work` was done; a failure is reported and concerns nobody else."""
        try:
            work()
        except BaseException as error:
            self._barrier.report(what, error)
            return False
        return True

    def orphan(self, request_ids: Collection[str]) -> None:
        """These requests gave their blocks back: those held are held for us alone from now on."""
        if not request_ids:
            return
        for job in self._jobs:
            if job.record.id in request_ids and job.held and not job.orphan:
                job.orphan = True
                self._held.orphans += len(job.held)

    def void_stores(self) -> None:
        """Release every block held for a store now; these stores are dropped when they are acknowledged.

        Blocks that are being loaded stay held: nobody else may write them.
        """
        for job in self._stores.values():
            job.void = True
            self._survives("release", partial(self._release, job))

    def undo(self, orders: list[StoreOrder]) -> None:
        """Take back stores that no worker has seen."""
        for order in orders:
            job = self._stores.pop(order.job)
            self._survives("release", partial(self._release, job))
            self._survives("end_store", job.reservation.abort)

    @property
    def busy(self) -> bool:
        """Whether an acknowledgement is awaited that is not overdue."""
        return _any_due(self._jobs)

    @property
    def loads_beside(self) -> bool:
        """Whether an asynchronous load is in flight."""
        return any(job.asynchronous for job in self._loads.values())

    @property
    def holds_orphans(self) -> bool:
        """Whether blocks that no request needs any more will come back to vLLM's pool soon.

        Requests that this very schedule preempts are not known here yet: their last block is held for us alone.
        """
        return _any_due(job for job in self._jobs if job.orphan or (job.held and job.held[-1].ref_cnt == 1))

    @property
    def _jobs(self) -> list[StoreJob | LoadJob]:
        return [*self._stores.values(), *self._loads.values()]

    def _may_become_void(self, store: StoreJob) -> bool:
        """Whether a load that the step of the store waited for has not been answered, and wrote blocks of its table."""
        return any(
            (load.joined or not load.asynchronous)
            and load.step <= store.step
            and not set(load.blocks.tolist()).isdisjoint(store.table)
            for load in self._loads.values()
        )

    def void_reading(self, blocks: set[int], from_step: int = 0) -> None:
        """Drop stores, of this step or later, whose requests read these blocks."""
        for store in self._stores.values():
            if store.step >= from_step and not blocks.isdisjoint(store.table):
                store.void = True

    def _void_above(self, job: LoadJob) -> None:
        self.void_reading(set(job.blocks.tolist()), job.step)

    def _end_load(self, job: LoadJob) -> None:
        if job.result.failed:
            self._fail_load(job)
        else:
            self._count("load", job.record.user_id, job.result)
        release_rows(job)

    def _fail_load(self, job: LoadJob) -> None:
        job.record.failures += 1
        job.record.offer_below = job.end_tokens
        self._void_above(job)
        if job.cut:
            self._counters.add("cut_loads")
            return
        self._counters.add("failed_loads")
        self._barrier.note_failure()
        removed = job.lease.discard(job.first) if job.lease is not None else 0
        logger.warning(
            "Loading KV cache for request %s failed: its %d blocks are computed again, %d rows are forgotten",
            job.record.user_id,
            len(job.blocks),
            removed,
        )

    def _end_store(self, job: StoreJob) -> None:
        if job.void or job.result.failed:
            if not job.void:
                self._barrier.note_failure()
            job.reservation.abort()
            self._counters.add("dropped_stores:" + ("void" if job.void else "failed"))
            return
        # What may not leave RAM is not offered to slower tiers.
        job.reservation.commit(saved=job.record.private)
        self._counters.add("stored_tokens", job.tokens)
        self._count("store", job.record.user_id, job.result)
        self.on_stored(job)

    def _release(self, job: StoreJob | LoadJob) -> None:
        held, job.held = job.held, []
        if held:
            self._held.orphans -= len(held) if job.orphan else 0
            self._held.release(held)

    def _count(self, what: str, request_id: str, result: JobResult) -> None:
        self._counters.add(f"{what}s")
        self._counters.add(f"{what}_bytes", result.bytes)
        self._counters.add(f"{what}_seconds", result.seconds)
        verb = "Stored" if what == "store" else "Loaded"
        rate = result.bytes / result.seconds / 1e9 if result.seconds > 0 else 0.0
        logger.info(
            "%s KV cache for request %s: %.4f GB in %.2f ms, %.2f GB/s",
            verb,
            request_id,
            result.bytes / 1e9,
            result.seconds * 1e3,
            rate,
        )


def _any_due(jobs: Iterable[LoadJob | StoreJob]) -> bool:
    """Whether the answer to one of them is awaited and not overdue."""
    now = time.monotonic()
    return any(now - job.since < STEPPING_S_MAX for job in jobs)
