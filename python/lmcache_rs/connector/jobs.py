"""What the workers were ordered to do and have not all acknowledged: one load, one store."""

from dataclasses import dataclass, field
from typing import Any

from lmcache_rs._core import Lease, Reservation
from lmcache_rs.connector.coming import Coming
from lmcache_rs.connector.orders import JobResult, Numbers
from lmcache_rs.connector.requests import Record


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
    """Rows being read. The lease keeps them; `first` is the position of the first one loaded. None: a broken load.

    The blocks of an asynchronous one are held: the worker may tell vLLM that it has ended shortly before it has.
    """

    id: int
    step: int
    record: Record
    lease: Lease | None
    first: int
    blocks: Numbers
    held: list[Any]
    end_tokens: int
    asynchronous: bool
    since: float
    result: JobResult = field(default_factory=lambda: JobResult(0, 0, 0, 0.0))
    orphan: bool = False
    joined: bool = False
    """Steps may read the blocks of an asynchronous one before its answer is here."""
    coming: Coming | None = None
    """Its last rows were still being fetched when it was ordered."""

    @property
    def cut(self) -> bool:
        """Whether it failed since something of it did not come, and nothing else did."""
        return 0 < self.result.failed == self.result.cut
