"""What became of a worker's jobs, kept until vLLM or the scheduler side asks."""

from collections.abc import Mapping
from dataclasses import replace

from lmcache_rs.connector.orders import (
    DONE,
    FAILED,
    BrokenLoad,
    JobResult,
    LoadOrder,
    Numbers,
    Order,
    StoreOrder,
)


class Answers:
    """Every job that begins ends once; loads are told to vLLM too, those that hold the step by their bad blocks."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._loads: dict[int, LoadOrder | BrokenLoad] = {}
        """Loads that have not ended."""
        self._early: set[int] = set()
        """Asynchronous loads told to vLLM as ended, shortly before they are."""
        self._spoiled: set[int] = set()
        """Loads that have not ended and count as failed, however they will."""
        self._results: dict[int, JobResult] = {}
        self._failed_loads: dict[int, JobResult] = {}
        """The scheduler side hears of them when vLLM does: until then vLLM computes from their blocks."""
        self._told: dict[int, JobResult] = {}
        """Those of which vLLM was told, with the answers of the step that is under way."""
        self._received: set[str] = set()
        self._failed: dict[str, Numbers] = {}
        self.bad_blocks: set[int] = set()

    def begin(self, order: Order) -> None:
        """The job must end from now on."""
        self._open.add(order.job)
        if not isinstance(order, StoreOrder):
            self._loads[order.job] = order

    def end(self, job: int, result: JobResult) -> None:
        """A job ended; only the first end counts."""
        if job not in self._open:
            return
        self._open.discard(job)
        if job in self._spoiled:
            self._spoiled.discard(job)
            result = FAILED
        order, early = self._loads.pop(job, None), job in self._early
        self._early.discard(job)
        failed_load = order is not None and result.failed
        (self._failed_loads if failed_load else self._results)[job] = replace(result)
        if order is None:
            return
        if order.asynchronous and not early:
            self._received.add(order.request_id)
            if result.failed:
                self._failed[order.request_id] = order.blocks
        elif result.failed:
            self.bad_blocks.update(order.blocks.tolist())

    def tell_early(self, order: LoadOrder) -> None:
        """Tell vLLM that an asynchronous load has ended, though it has not quite. Once."""
        if order.job not in self._early:
            self._early.add(order.job)
            self._received.add(order.request_id)

    def spoil(self, order: LoadOrder) -> None:
        """A load whose blocks were read too early counts as failed, however it ended.

        One that has not ended is answered when it does: until then it may write its blocks, and reads its rows. So its
        blocks are bad now, and once more then.
        """
        self.bad_blocks.update(order.blocks.tolist())
        if order.job in self._open:
            self._spoiled.add(order.job)
            return
        self._results.pop(order.job, None)
        self._failed_loads[order.job] = replace(FAILED)

    def rescued(self, order: LoadOrder) -> None:
        """A load that failed was made up for."""
        del self._failed_loads[order.job]
        self._results[order.job] = replace(DONE)
        self.bad_blocks.difference_update(order.blocks.tolist())

    def has_failed(self, order: LoadOrder) -> bool:
        """Whether it ended so, and vLLM was not told of it."""
        return order.job in self._failed_loads

    def load(self, job: int) -> LoadOrder | BrokenLoad | None:
        """The load of this name, unless it has ended."""
        return self._loads.get(job)

    @property
    def busy(self) -> bool:
        """Whether any job has begun and not ended."""
        return bool(self._open)

    @property
    def none(self) -> bool:
        """Whether no job is open and everybody has been told of all that ended."""
        untold = self._results or self._failed_loads or self._told or self._received or self.bad_blocks
        return not (self._open or untold)

    @property
    def asynchronous(self) -> list[int]:
        """Asynchronous loads that have not ended."""
        return [job for job, order in self._loads.items() if order.asynchronous]

    def end_loads(self) -> None:
        """Nothing loads any more: what has not ended has failed."""
        for job in list(self._loads):
            self.end(job, FAILED)

    def add_results(self, results: Mapping[int, JobResult]) -> None:
        """Of jobs that were begun elsewhere."""
        self._results.update(results)

    def take_results(self, told: bool, others: bool) -> dict[int, JobResult]:
        """What ended and was not taken, by job: loads that failed, once vLLM was `told` of them, and all `others`."""
        results: dict[int, JobResult] = {}
        if told:
            results, self._told = self._told, {}
        if others:
            results, self._results = results | self._results, {}
        return results

    def take_received(self) -> tuple[set[str], dict[str, Numbers]]:
        """Requests whose asynchronous load ended since the last call, and the blocks of those whose load failed."""
        received, failed = self._received, self._failed
        self._received, self._failed = set(), {}
        return received, failed

    def take_bad_blocks(self) -> set[int]:
        """Blocks that loads left bad since the last call, but for those told by `take_received`, which comes before."""
        bad, self.bad_blocks = self.bad_blocks, set()
        self._told |= self._failed_loads
        self._failed_loads = {}
        return bad
