"""Loads whose last rows are still being fetched: each chunk is copied as soon as it is there."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from lmcache_rs.connector.mover import Mover
from lmcache_rs.connector.orders import JobResult, LoadOrder

FIRST_COPY = 1 << 62
"""Copies have names of their own, above those of the scheduler side's jobs."""

RESULTS_KEPT = 4096
"""Of fetched chunks so many results are remembered: an order may wait for one that its sender does not know of yet."""

Ended = tuple[int, int, float]
"""As `Mover.poll` tells it: job, bytes or -1, seconds."""


@dataclass(slots=True)
class _Load:
    order: LoadOrder
    waits: dict[int, slice] = field(default_factory=dict)
    """Rows that were not fetched, by the job that fetches them."""
    copies: set[int] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)
    bytes: int = 0
    failed: bool = False

    def fail(self) -> None:
        self.failed = True
        self.waits.clear()


class Pieces:
    """What was begun of such loads. To everybody else each is one job."""

    def __init__(self, report: Callable[[str, BaseException], None]) -> None:
        """`report`: told of copies that a mover refuses."""
        self._report = report
        self._loads: dict[int, _Load] = {}
        self._owners: dict[int, _Load] = {}
        self._names = itertools.count(FIRST_COPY)
        self._results: dict[int, bool] = {}

    def submit(self, order: LoadOrder, mover: Mover) -> None:
        """Begin a load with what is there already."""
        if not order.pieces:
            mover.submit_load(order.job, order.rows, order.blocks, order.by_layers)
            return
        load = _Load(order)
        ready = at = len(order.rows) - sum(count for _, count in order.pieces)
        for job, count in order.pieces:
            load.waits[job] = slice(at, at + count)
            at += count
        if ready:
            self._copy(load, slice(0, ready), mover)
        self._loads[order.job] = load
        self._go_on(load, mover)

    def fetched(self, results: Mapping[int, JobResult], mover: Mover) -> None:
        """Chunks have come, or will not. Copies what has come."""
        self._results |= {job: not result.failed for job, result in results.items()}
        while len(self._results) > RESULTS_KEPT:
            del self._results[next(iter(self._results))]
        for load in self._loads.values():
            if load.waits and time.monotonic() - load.began > load.order.wait_s:
                load.fail()
            self._go_on(load, mover)

    def whole(self, ended: Iterable[Ended]) -> Iterator[Ended]:
        """What the mover's `poll` told, with one end for all copies of a load."""
        for name, moved, seconds in ended:
            load = self._owners.pop(name, None)
            if load is None:
                yield name, moved, seconds
                continue
            load.copies.discard(name)
            load.bytes += max(0, moved)
            if moved < 0:
                load.fail()
        for job, load in list(self._loads.items()):
            if not load.waits and not load.copies:
                del self._loads[job]
                yield job, -1 if load.failed else load.bytes, time.monotonic() - load.began

    def settled(self, names: Iterable[int]) -> Iterator[int]:
        """Those of the mover's settled loads that are whole ones, and loads all of whose copies are settled."""
        settled = set(names)
        yield from settled - self._owners.keys()
        for job, load in self._loads.items():
            if not load.waits and not load.failed and load.copies and load.copies <= settled:
                yield job

    def join(self, job: int, mover: Mover) -> None:
        """See `Mover.join_load`; of a load whose chunks have all come."""
        load = self._loads.get(job)
        for name in (job,) if load is None else tuple(load.copies):
            mover.join_load(name)

    def give_up(self) -> None:
        """Nothing more is copied; what is not whole fails."""
        for load in self._loads.values():
            if load.waits:
                load.fail()

    def _go_on(self, load: _Load, mover: Mover) -> None:
        for job in [job for job in load.waits if job in self._results]:
            rows = load.waits.pop(job)
            if not self._results[job]:
                load.fail()
                return
            try:
                self._copy(load, rows, mover)
            except BaseException as error:
                self._report("load", error)
                load.fail()
                return

    def _copy(self, load: _Load, part: slice, mover: Mover) -> None:
        name = next(self._names)
        mover.submit_load(name, load.order.rows[part], load.order.blocks[part])
        load.copies.add(name)
        self._owners[name] = load
