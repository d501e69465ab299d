"""Loads whose last rows are still being fetched: each chunk is copied as soon as it is there."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from lmcache_rs.connector.copies import Copied, Copies, Ended
from lmcache_rs.connector.mover import Mover
from lmcache_rs.connector.orders import JobResult, LoadOrder

RESULTS_KEPT = 4096
"""Of fetched chunks so many results are remembered: an order may wait for one that its sender does not know of yet."""


@dataclass(slots=True)
class _Load:
    order: LoadOrder
    copied: Copied
    waits: dict[int, slice] = field(default_factory=dict)
    """Rows that were not fetched, by the job that fetches them."""


class Pieces:
    """What was begun of such loads."""

    def __init__(self, copies: Copies, report: Callable[[str, BaseException], None]) -> None:
        """`report`: told of copies that a mover refuses."""
        self._copies, self._report = copies, report
        self._loads: dict[int, _Load] = {}
        self._results: dict[int, bool] = {}

    def submit(self, order: LoadOrder, mover: Mover) -> None:
        """Begin a load with what is there already."""
        if not order.pieces:
            mover.submit_load(order.job, order.rows, order.blocks, order.by_layers)
            return
        load = _Load(order, Copied({order.job: len(order.rows)}))
        ready = at = len(order.rows) - sum(count for _, count in order.pieces)
        for job, count in order.pieces:
            load.waits[job] = slice(at, at + count)
            at += count
        if ready:
            self._copy(load, slice(0, ready), mover)
        self._copies.begin(load.copied)
        self._loads[order.job] = load
        self._go_on(load, mover)

    def fetched(self, results: Mapping[int, JobResult], mover: Mover) -> None:
        """Chunks have come, or will not. Copies what has come."""
        self._results |= {job: not result.failed for job, result in results.items()}
        while len(self._results) > RESULTS_KEPT:
            del self._results[next(iter(self._results))]
        for load in self._loads.values():
            if load.waits and time.monotonic() - load.copied.began > load.order.wait_s:
                load.copied.fail(cut=True)
            self._go_on(load, mover)

    def whole(self, ended: Iterable[Ended]) -> Iterator[Ended]:
        """See `Copies.whole`."""
        for load in self._copies.whole(ended):
            self._loads.pop(load[0], None)
            yield load

    def settled(self, names: Iterable[int]) -> Iterator[int]:
        """Those of the mover's settled loads that are whole ones, and loads all of whose copies are settled."""
        settled = set(names)
        yield from (name for name in settled if not self._copies.is_copy(name))
        for job, load in self._loads.items():
            copied = load.copied
            if not copied.more and not copied.failed and copied.names and copied.names <= settled:
                yield job

    def join(self, job: int, mover: Mover) -> None:
        """See `Mover.join_load`; of a load whose chunks have all come."""
        load = self._loads.get(job)
        for name in (job,) if load is None else tuple(load.copied.names):
            mover.join_load(name)

    def give_up(self) -> None:
        """Nothing more is copied; what is not whole fails."""
        for load in self._loads.values():
            if load.waits:
                load.copied.fail(cut=True)

    def _go_on(self, load: _Load, mover: Mover) -> None:
        if load.copied.failed:
            return
        for job in [job for job in load.waits if job in self._results]:
            rows = load.waits.pop(job)
            if not self._results[job]:
                load.copied.fail(cut=True)
                return
            try:
                self._copy(load, rows, mover)
            except BaseException as error:
                self._report("load", error)
                load.copied.fail()
                return
        load.copied.more = bool(load.waits)

    def _copy(self, load: _Load, part: slice, mover: Mover) -> None:
        rows, blocks = load.order.rows[part], load.order.blocks[part]
        self._copies.add(load.copied, lambda name: mover.submit_load(name, rows, blocks))
