"""Jobs the workers were ordered to do and have not all acknowledged, and what ends with them."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lmcache_rs._core import Index, Lease, Reservation
from lmcache_rs.connector.barrier import Barrier
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
        self, index: Index, held: HeldBlocks, ranks: int, counters: Counters, barrier: Barrier
    ) -> None:
        self._index = index
        self._held = held
        self._ranks = ranks
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
        order = StoreOrder(job.id, rows, blocks)
        self._stores[job.id] = job
        return order

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
        ended: list[int] = []
        for job_id, result in acks.jobs.items():
            job = self._loads.get(job_id) or self._stores.get(job_id)
            if job is None:
                continue
            self._survives("acknowledge", partial(job.result.merge, result))
            if job.result.ranks >= self._ranks:
                ended.append(job_id)
        failed = self._end_loads([i for i in ended if i in self._loads])
        self._end_stores([i for i in ended if i in self._stores])
        if acks.rows is not None and acks.rows < self._index.rows:
            logger.warning("a worker has room for %d rows only, %d were planned", acks.rows, self._index.rows)
            self._index.shrink(acks.rows)
        return failed

    def _end_loads(self, ids: list[int]) -> list[Record]:
        """End each of these loads. Returns the requests whose load failed."""
        jobs = [self._loads.pop(i) for i in ids]
        for job in jobs:
            if not self._survives("end_load", partial(self._end_load, job)) and job.lease is not None:
                self._survives("end_load", job.lease.release)
        return [job.record for job in jobs if job.result.failed]

    def _end_stores(self, ids: list[int]) -> None:
        """End each of these stores, after all loads that ended with them."""
        for job in [self._stores.pop(i) for i in ids]:
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
            self._survives("release", partial(self._release, job))

    def undo(self, orders: list[StoreOrder]) -> None:
        """Take back stores that no worker has seen."""
        for order in orders:
            self._stores[order.job].void = True
        self._end_stores([order.job for order in orders])

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
        if job.result.failed:
            self._fail_load(job)
        else:
            self._count("load", job.record.user_id, job.result)
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
