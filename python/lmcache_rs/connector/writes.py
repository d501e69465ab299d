"""Chunks in RAM are written to the slower tiers behind everything else: seen again, or about to leave, or at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lmcache_rs._core import Departure, Index
from lmcache_rs.connector.chunks import Chain, Chunks
from lmcache_rs.connector.groups import Groups
from lmcache_rs.connector.orders import JobResult, TierOrder
from lmcache_rs.connector.requests import Record
from lmcache_rs.connector.stats import Counters

ROWS_SHARE_MAX = 0.25
"""Share of the pool that is written at a time, and cannot leave meanwhile; beyond it chunks wait to be seen again."""

FREE_SHARE_MIN = 0.1
"""With less of the pool free than this, what would leave next is written."""

CHUNKS_AT_ONCE = 16
"""Chunks about to leave that are written in one step."""


@dataclass(slots=True)
class Write:
    """Chunks being written, of one prefix. Their rows stay as long as it does."""

    departure: Departure
    slots: int
    jobs: set[int] = field(default_factory=set)
    failed: bool = False


class Writes:
    """Decides what is written, and keeps it from leaving meanwhile."""

    def __init__(
        self,
        index: Index,
        groups: Groups,
        chunks: Chunks,
        ranks: int,
        tiers: Sequence[str],
        counters: Counters,
        ids: Iterator[int],
    ) -> None:
        self._index = index
        self._groups = groups
        self._chunks = chunks
        self._ranks = ranks
        self._tiers = tiers
        self._counters = counters
        self._ids = ids
        self._slots = 0
        self._jobs: dict[int, tuple[Write, str, JobResult]] = {}
        self._orders: list[TierOrder] = []

    @property
    def busy(self) -> bool:
        """Whether some write was ordered and has not ended."""
        return bool(self._jobs)

    @property
    def has_orders(self) -> bool:
        """Whether a step is needed to tell the workers."""
        return bool(self._orders)

    def take_orders(self) -> list[TierOrder]:
        """What the workers are to be told next."""
        orders, self._orders = self._orders, []
        return orders

    def write(self, record: Record, chain: Chain) -> None:
        """Write what of the chain is in RAM and was not written."""
        if self._has_room():
            departure = self._index.take_unsaved(
                record.space, list(chain.hashes), chain.tail, self._chunks.blocks
            )
            if departure is not None:
                self._order(departure)

    def make_room(self) -> None:
        """Write what would leave next, if the pool is nearly full."""
        if not self._has_room():
            return
        stats = self._index.stats()
        if stats["free"] >= stats["rows"] * FREE_SHARE_MIN:
            return
        rows_max = int(stats["rows"] * FREE_SHARE_MIN)
        for departure in self._index.take_coldest(self._chunks.blocks, rows_max, CHUNKS_AT_ONCE):
            self._order(departure)

    def owns(self, job_id: int) -> bool:
        """Whether the job is a chunk that is written."""
        return job_id in self._jobs

    def acknowledge(self, job_id: int, result: JobResult) -> None:
        """Take a rank's answer."""
        write, tier, total = self._jobs[job_id]
        total.merge(result)
        if total.ranks < self._ranks:
            return
        if total.failed:
            self._counters.add(f"failed_writes:{tier}")
            write.failed = True
        else:
            self._counters.add(f"written_chunks:{tier}")
            self._counters.add(f"written_bytes:{tier}", total.bytes)
        self._end(job_id)

    def withdraw(self) -> None:
        """Take back what no worker was told of."""
        for order in self.take_orders():
            for job in order.jobs:
                self._end(job)

    def _end(self, job_id: int) -> None:
        write, _, _ = self._jobs.pop(job_id)
        write.jobs.discard(job_id)
        if not write.jobs:
            self._slots -= write.slots
            write.departure.release(saved=not write.failed)

    def _has_room(self) -> bool:
        return bool(self._tiers) and self._slots < self._index.rows * ROWS_SHARE_MAX

    def _order(self, departure: Departure) -> None:
        slots = np.frombuffer(departure.rows, dtype=np.uint32)
        counts = np.frombuffer(departure.counts, dtype=np.uint32) * np.uint32(len(self._groups))
        positions = np.frombuffer(departure.positions, dtype=np.uint32)
        rows = self._groups.rows(slots)
        write = Write(departure, len(slots))
        self._slots += write.slots
        for tier in self._tiers:
            ids = [next(self._ids) for _ in range(len(departure))]
            write.jobs.update(ids)
            self._jobs |= {job: (write, tier, JobResult(0, 0, 0, 0.0)) for job in ids}
            self._orders.append(TierOrder(ids[0], tier, departure.keys, positions, counts, rows))
