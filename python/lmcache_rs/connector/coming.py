"""Chunks on their way into RAM that a load reads as they come, so that it need not wait for the last one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lmcache_rs._core import Lease, Reservation
from lmcache_rs.connector.orders import JobResult, Numbers, TierOrder


@dataclass(slots=True)
class Progress:
    """Chunks of one order that have not come, and what came."""

    missing: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class FetchJob:
    """One chunk on its way. `scratch`: rows for those of its blocks that are in RAM already."""

    id: int
    tier: str
    key: bytes
    reservation: Reservation
    scratch: Reservation | None
    progress: Progress
    result: JobResult = field(default_factory=lambda: JobResult(0, 0, 0, 0.0))
    before: "FetchJob | None" = None
    """The chunk before it, if that was not in RAM either."""
    came: bool | None = None
    """Whether all ranks have it; None: not all have answered."""
    readers: int = 0
    """Loads that read its rows. Until they have ended nobody finds these rows, and they cannot leave."""
    settled: bool = False
    """Its rows can be found, or are free."""

    def settle(self) -> None:
        """Its rows can be found from now on, or are free, unless somebody reads them or the chunk before is not yet."""
        waits = self.came is None or self.readers or (self.before is not None and not self.before.settled)
        if self.settled or waits:
            return
        self.settled, self.before = True, None
        if self.came:
            self.reservation.commit(saved=True)
        else:
            self.reservation.abort()


@dataclass(slots=True)
class Batch:
    """Chunks of one order, as they are collected."""

    tier: str
    first_job: int
    progress: Progress = field(default_factory=Progress)
    keys: list[bytes] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: list[Numbers] = field(default_factory=list)

    def add(self, key: bytes, position: int, rows: Numbers) -> None:
        """A chunk, its number in its prefix and its rows."""
        self.progress.missing += 1
        self.keys.append(key)
        self.positions.append(position)
        self.rows.append(rows)

    def order(self) -> TierOrder:
        """What the workers are told."""
        counts = np.array([len(rows) for rows in self.rows], dtype=np.uint32)
        positions = np.array(self.positions, dtype=np.uint32)
        return TierOrder(
            self.first_job, self.tier, b"".join(self.keys), positions, counts, np.concatenate(self.rows)
        )


@dataclass(slots=True, eq=False)
class Coming:
    """A guard on chunks that follow each other from block `first` on, up to the request's first `tokens` tokens."""

    jobs: Sequence[FetchJob]
    first: int
    tokens: int
    wait_s: float
    """They are waited for so long."""
    let_go: Callable[["Coming"], None]
    held: bool = True

    @property
    def blocks(self) -> int:
        """How many."""
        return sum(len(job.reservation) for job in self.jobs)

    def slots(self, first: int) -> Numbers:
        """Those from block `first` on."""
        rows = b"".join(job.reservation.rows for job in self.jobs)
        return np.frombuffer(rows, dtype=np.uint32)[max(0, first - self.first) :]

    def pieces(self, first: int, end: int) -> list[tuple[int, int]]:
        """For each chunk that has blocks from `first` up to `end`, its job and the number of these blocks."""
        pieces, start = [], self.first
        for job in self.jobs:
            after = start + len(job.reservation)
            count = min(after, end) - max(start, first)
            if count > 0:
                pieces.append((job.id, count))
            start = after
        return pieces

    def release(self) -> None:
        """What has come can be found from now on. Safe twice."""
        if self.held:
            self.held = False
            self.let_go(self)


class KeepsRows(Protocol):
    """Whoever has a lease on rows, and perhaps a guard on those that follow and are still on their way."""

    lease: Lease | None
    coming: Coming | None


def release_rows(keeper: KeepsRows) -> None:
    """The rows may leave."""
    guards, keeper.lease, keeper.coming = (keeper.lease, keeper.coming), None, None
    for guard in guards:
        if guard is not None:
            guard.release()
