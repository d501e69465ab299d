"""What the scheduler side tells the workers each step, and what they answer: flat arrays, no vLLM types."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint32]
"""Row or block numbers, one-dimensional."""


@dataclass(slots=True)
class LoadOrder:
    """Copy rows into blocks, pairwise. `asynchronous`: vLLM waits for the request's id, not for the step.

    `held`: vLLM gives the blocks to nobody else before the load is acknowledged. `by_layers`: the forward may begin
    when the first layers are there, as it computes nothing in these blocks.
    """

    job: int
    request_id: str
    rows: Numbers
    blocks: Numbers
    asynchronous: bool
    held: bool = False
    by_layers: bool = False
    pieces: Sequence[tuple[int, int]] = ()
    """Of the last rows, in order: the job that fetches them, and how many it fetches."""
    wait_s: float = 0.0
    """They are waited for so long."""


@dataclass(slots=True)
class StoreOrder:
    """Copy blocks into rows, pairwise, as they are after this step's forward."""

    job: int
    rows: Numbers
    blocks: Numbers


@dataclass(slots=True)
class BrokenLoad:
    """A load that was promised to vLLM and cannot be ordered: the workers report it as failed, to both sides."""

    job: int
    request_id: str
    blocks: Numbers
    asynchronous: bool


Order = LoadOrder | StoreOrder | BrokenLoad


@dataclass(slots=True)
class TierOrder:
    """Move chunks between rows and the tier called `tier`. Chunk i has the job number `job` + i.

    `keys`: 32 bytes a chunk; `positions`: its number in its prefix; `counts`: its number of rows; `rows`: those of all
    chunks, one chunk after the other.
    """

    job: int
    tier: str
    keys: bytes
    positions: Numbers
    counts: Numbers
    rows: Numbers

    @property
    def jobs(self) -> range:
        """The job numbers of its chunks."""
        return range(self.job, self.job + len(self.counts))


@dataclass(slots=True)
class StepOrders:
    """The orders of one scheduler step, the same for every rank."""

    loads: list[LoadOrder] = field(default_factory=list)
    stores: list[StoreOrder] = field(default_factory=list)
    broken: list[BrokenLoad] = field(default_factory=list)
    joins: list[int] = field(default_factory=list)
    """Loads that a forward may read from now on, told to vLLM as received while they were ending."""
    fetches: list[TierOrder] = field(default_factory=list)
    """From a tier into rows."""
    writes: list[TierOrder] = field(default_factory=list)
    """From rows to a tier."""
    namespace: bytes = b""
    """Of the values that are fetched and written, where some are."""
    idle: bool = False
    """No request computes anything in this step. vLLM up to 0.30 does not call the hook that stores then."""

    @property
    def empty(self) -> bool:
        """Whether nothing is ordered."""
        loads = self.loads or self.broken or self.joins
        return not (loads or self.stores or self.fetches or self.writes)

    def blocks_of_synchronous_loads(self) -> set[int]:
        """Blocks that this step's forward reads and a load fills, or was to fill."""
        loads: list[LoadOrder | BrokenLoad] = [*self.loads, *self.broken]
        return {block for load in loads if not load.asynchronous for block in load.blocks.tolist()}


@dataclass(slots=True)
class JobResult:
    """What the ranks said of one job so far. Bytes are the sum over ranks, seconds those of the slowest."""

    ranks: int
    failed: int
    bytes: int
    seconds: float
    cut: int = 0
    """Ranks that failed since something of the load did not come: nothing is wrong with what was there."""

    def merge(self, other: "JobResult") -> None:
        """Add what other ranks said."""
        self.ranks += other.ranks
        self.failed += other.failed
        self.cut += other.cut
        self.bytes += other.bytes
        self.seconds = max(self.seconds, other.seconds)


DONE, FAILED = JobResult(1, 0, 0, 0.0), JobResult(1, 1, 0, 0.0)
"""Of one rank."""


@dataclass(slots=True)
class WorkerAcks:
    """Jobs that ended on a rank since its last answer, and the rows its pool really has."""

    jobs: dict[int, JobResult] = field(default_factory=dict)
    rows: int | None = None

    def merge(self, other: "WorkerAcks") -> None:
        """Add another rank's answer: every rank counts, the smallest pool decides."""
        for job, result in other.jobs.items():
            mine = self.jobs.get(job)
            if mine is None:
                self.jobs[job] = result
            else:
                mine.merge(result)
        if other.rows is not None:
            self.rows = other.rows if self.rows is None else min(self.rows, other.rows)


class PlanningError(Exception):
    """Stores could not be planned; `orders` has what must be ordered all the same."""

    def __init__(self, orders: StepOrders) -> None:
        super().__init__("planning the step's stores failed")
        self.orders = orders
