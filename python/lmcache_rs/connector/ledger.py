"""Jobs the workers were ordered to do and have not all acknowledged, and what ends with them."""

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

from lmcache_rs._core import Index, Lease, Reservation
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.geometry import Geometry
from lmcache_rs.connector.holds import HeldBlocks
from lmcache_rs.connector.orders import BrokenLoad, JobResult, LoadOrder, Numbers, StoreOrder, WorkerAcks
from lmcache_rs.connector.requests import Record
from lmcache_rs.connector.stats import Counters
from lmcache_rs.log import init_logger

logger = init_logger(__name__)

STEPPING_S_MAX = 5.0
"""An engine with nothing else to do keeps stepping for an acknowledgement at most this long."""


@dataclass(slots=True)
class StoreJob:
    """Rows being written. `table` is the request's block table: a failed load of one of its blocks voids the job."""

    id: int
    step: int
    record: Record
    reservation: Reservation
    held: list[Any]
    table: list[int]
    tokens: int
    since: float
    result: JobResult = field(default_factory=lambda: JobResult(0, 0, 0, 0.0))
    void: bool = False
    orphan: bool = False
    """The request has gone: nobody but this job needs the blocks."""


@dataclass(slots=True)
class LoadJob:
    """Rows being read. The lease keeps them; `first` is the position of the first one loaded.

    Without a lease nothing is read: the load was promised, and fails.
    """

    id: int
    step: int
    record: Record
    lease: Lease | None
    first: int
    blocks: Numbers
    end_tokens: int
    since: float
    result: JobResult = field(default_factory=lambda: JobResult(0, 0, 0, 0.0))


class Ledger:
    """Opens jobs, collects what the ranks say, and ends each job exactly once.

    Each job ends by itself: one that cannot be ended as it should leaves the others as they are.
    """

    def __init__(
        self, index: Index, held: HeldBlocks, geometry: Geometry, counters: Counters, barrier: Barrier
    ) -> None:
        self._index = index
        self._held = held
        self._ranks = geometry.ranks
        self._rows_per_slot = len(geometry.groups)
        self._counters = counters
        self._barrier = barrier
        self._ids = itertools.count(1)
        self._stores: dict[int, StoreJob] = {}
        self._loads: dict[int, LoadJob] = {}

    def open_store(
        self, step: int, record: Record, reservation: Reservation, rows: Numbers, blocks: Numbers, tokens: int
    ) -> StoreOrder:
        """Order a store; its blocks are held from now on."""
        held = self._held.hold(blocks.tolist())
        job = StoreJob(
            next(self._ids), step, record, reservation, held, record.table, tokens, time.monotonic()
        )
        self._stores[job.id] = job
        return StoreOrder(job.id, rows, blocks)

    def open_load(
        self,
        step: int,
        record: Record,
        lease: Lease,
        first: int,
        order: tuple[Numbers, Numbers],
        end_tokens: int,
        asynchronous: bool,
    ) -> LoadOrder:
        """Order a load of (rows, blocks); the lease is the job's now."""
        rows, blocks = order
        job = LoadJob(next(self._ids), step, record, lease, first, blocks, end_tokens, time.monotonic())
        opened = LoadOrder(job.id, record.id, rows, blocks, asynchronous)
        self._loads[job.id] = job
        record.loading = True
        return opened

    def open_broken(
        self, step: int, record: Record, blocks: Numbers, end_tokens: int, asynchronous: bool
    ) -> BrokenLoad:
        """Have the workers fail a load of `blocks`: what this step computes on top of it is as bad as theirs."""
        job = LoadJob(next(self._ids), step, record, None, 0, blocks, end_tokens, time.monotonic())
        self._loads[job.id] = job
        record.loading = True
        return BrokenLoad(job.id, record.id, blocks, asynchronous)

    def acknowledge(self, acks: WorkerAcks) -> list[Record]:
        """Take the ranks' answers. Returns the requests whose load failed.

        Failed loads come first: a store of the same step may have read what they left behind.
        """
        loads: list[LoadJob] = []
        stores: list[StoreJob] = []
        for job_id, result in acks.jobs.items():
            try:
                self._merge(job_id, result, loads, stores)
            except BaseException as error:
                self._barrier.report("acknowledge", error)
        failed = self._settle(loads, stores)
        slots = self._index.rows if acks.rows is None else acks.rows // self._rows_per_slot
        if slots < self._index.rows:
            logger.warning("a worker has room for %d blocks only, %d were planned", slots, self._index.rows)
            self._index.shrink(slots)
        return failed

    def _merge(self, job_id: int, result: JobResult, loads: list[LoadJob], stores: list[StoreJob]) -> None:
        """Add a rank's answer to its job; one that all ranks have answered moves to `loads` or `stores`."""
        if (load := self._loads.get(job_id)) is not None:
            load.result.merge(result)
            if load.result.ranks >= self._ranks:
                loads.append(self._loads.pop(job_id))
        elif (store := self._stores.get(job_id)) is not None:
            store.result.merge(result)
            if store.result.ranks >= self._ranks:
                stores.append(store)

    def _settle(self, loads: list[LoadJob], stores: list[StoreJob]) -> list[Record]:
        """End each of these jobs; stores after all loads. Returns the requests whose load failed."""
        for load in loads:
            try:
                self._end_load(load)
            except BaseException as error:
                self._barrier.report("end_load", error)
        for store in stores:
            self._stores.pop(store.id, None)
            try:
                self._end_store(store)
            except BaseException as error:
                # What was reserved is given up with the job.
                self._barrier.report("end_store", error)
        return [load.record for load in loads if load.result.failed]

    def orphan(self, record: Record) -> None:
        """The request gives its blocks back: those held are held for us alone from now on."""
        for job in self._stores.values():
            if job.record is record and job.held and not job.orphan:
                job.orphan = True
                self._held.orphans += len(job.held)

    def void_stores(self) -> None:
        """Release every held block now; the stores that read them are dropped when they are acknowledged."""
        for job in self._stores.values():
            job.void = True
            try:
                self._release(job)
            except BaseException as error:
                self._barrier.report("release", error)

    def undo(self, orders: list[StoreOrder]) -> None:
        """Take back stores that no worker has seen."""
        jobs = [job for order in orders if (job := self._stores.get(order.job)) is not None]
        for job in jobs:
            job.void = True
        self._settle([], jobs)

    @property
    def busy(self) -> bool:
        """Whether an acknowledgement is awaited that is not overdue."""
        oldest = min(
            (job.since for jobs in (self._loads, self._stores) for job in jobs.values()), default=None
        )
        return oldest is not None and time.monotonic() - oldest < STEPPING_S_MAX

    @property
    def holds_blocks(self) -> bool:
        """Whether blocks will come back to vLLM's pool soon."""
        return any(j.held and time.monotonic() - j.since < STEPPING_S_MAX for j in self._stores.values())

    def _end_load(self, job: LoadJob) -> None:
        job.record.loading = False
        try:
            if job.result.failed:
                self._fail_load(job)
            else:
                self._count("load", job.record.user_id, job.result)
        finally:
            if job.lease is not None:
                job.lease.release()

    def _fail_load(self, job: LoadJob) -> None:
        self._counters.add("failed_loads")
        self._barrier.note_failure()
        job.record.failures += 1
        job.record.offer_below = job.end_tokens
        bad = set(job.blocks.tolist())
        for store in self._stores.values():
            if store.step >= job.step and not bad.isdisjoint(store.table):
                store.void = True
        removed = job.lease.discard(job.first) if job.lease is not None else 0
        logger.warning(
            "Loading KV cache for request %s failed: its %d blocks are computed again, %d rows are forgotten",
            job.record.user_id,
            len(job.blocks),
            removed,
        )

    def _end_store(self, job: StoreJob) -> None:
        self._release(job)
        if job.void or job.result.failed:
            if not job.void:
                self._barrier.note_failure()
            job.reservation.abort()
            self._counters.add("dropped_stores:" + ("void" if job.void else "failed"))
            return
        job.reservation.commit()
        self._counters.add("stored_tokens", job.tokens)
        self._count("store", job.record.user_id, job.result)

    def _release(self, job: StoreJob) -> None:
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
