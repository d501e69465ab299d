"""What a request needs and a slower tier has is fetched into pool rows, chunk by chunk, before vLLM is told of it."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lmcache_rs._core import Index, KeySpace, Reservation
from lmcache_rs.connector.chunks import Chain, Chunks
from lmcache_rs.connector.coming import Batch, Coming, FetchJob
from lmcache_rs.connector.geometry import Geometry
from lmcache_rs.connector.orders import JobResult, Numbers, TierOrder
from lmcache_rs.connector.rates import Rates
from lmcache_rs.connector.requests import Record
from lmcache_rs.connector.stats import Counters
from lmcache_rs.log import init_logger

logger = init_logger(__name__)

KEY_BYTES = 32

ROWS_SHARE_MAX = 0.5
"""Share of the pool that is fetched for requests not yet admitted; the others wait for their turn."""

LENT_SHARE_MAX = 0.25
"""Share of vLLM's blocks that loads may hold whose chunks are on their way; the others wait until theirs are there."""


@dataclass(slots=True, eq=False)
class Fetch:
    """What the tiers have for one request. `sources` names the tier of each chunk from number `first` on."""

    record: Record
    chain: Chain
    first: int
    sources: Sequence[str]
    rows: int = 0
    """Slots taken for it."""
    parts: list[FetchJob] = field(default_factory=list)
    """Its chunks in their order, but those that were in RAM when it began."""
    jobs: set[int] = field(default_factory=set)
    """Those of them that it waits for."""
    begun: bool = False
    since: float = field(default_factory=time.monotonic)
    chunks: int = 0
    """Chunks that came, of those that it waits for."""
    bytes: int = 0
    forgotten: bool = False
    """The request waits no more."""


class Fetches:
    """Orders what was found, and makes it visible in the index as it comes."""

    def __init__(
        self,
        index: Index,
        geometry: Geometry,
        chunks: Chunks,
        rates: Rates,
        counters: Counters,
        ids: Iterator[int],
    ) -> None:
        self._index = index
        self._geometry = geometry
        self._chunks = chunks
        self._rates = rates
        self._counters = counters
        self._ids = ids
        self._scratch_space = KeySpace("scratch")
        self._scratch_names = 0
        self._waiting: deque[Fetch] = deque()
        self._begun: list[Fetch] = []
        self._rows = 0
        self._lent = 0
        self._jobs: dict[int, FetchJob] = {}
        self._unsettled: list[FetchJob] = []
        self._orders: list[TierOrder] = []

    def add(self, fetch: Fetch) -> None:
        """Fetch this when there is room for it."""
        self._waiting.append(fetch)
        self.begin()

    def begin(self) -> None:
        """Begin what waits, in its order, as far as there is room."""
        while self._waiting:
            fetch = self._waiting[0]
            wanted = len(fetch.sources) * self._chunks.blocks
            if self._rows and self._rows + wanted > self._index.rows * ROWS_SHARE_MAX:
                return
            self._waiting.popleft()
            self._begin(fetch)

    def is_under_way(self, fetch: Fetch) -> bool:
        """Whether the request gains from waiting."""
        return (
            not fetch.begun or bool(fetch.jobs) or any(part.came and not part.settled for part in fetch.parts)
        )

    def forget(self, fetch: Fetch) -> None:
        """The request was admitted, or is gone, or waits no more. What is under way ends by itself."""
        self._rows -= fetch.rows
        fetch.rows = 0
        fetch.begun = fetch.forgotten = True
        if fetch in self._waiting:
            self._waiting.remove(fetch)
        self._drop_forgotten()

    def join(self, fetch: Fetch, first: int, wait_s: float) -> Coming | None:
        """A guard on what comes from block `first` on, where some of it has come already and vLLM's blocks suffice."""
        if not self._geometry.groups.plain or not any(part.came for part in fetch.parts):
            return None
        jobs, end, tail = [], first, False
        for part in fetch.parts:
            if part.came is False:
                break
            if not part.settled:
                if part.reservation.first != end:
                    return None
                jobs.append(part)
                end, tail = end + len(part.reservation), bool(part.reservation.tail)
        if not jobs or self._lent + end > self._geometry.gpu_blocks * LENT_SHARE_MAX:
            return None
        tokens = fetch.record.request.num_prompt_tokens if tail else end * self._geometry.block_size
        coming = Coming(jobs, first, tokens, wait_s, self._let_go)
        self._lent += end
        for job in jobs:
            job.readers += 1
        return coming

    def _let_go(self, coming: Coming) -> None:
        self._lent -= coming.first + coming.blocks
        for job in coming.jobs:
            job.readers -= 1
        self.settle()

    def take_orders(self) -> list[TierOrder]:
        """What the workers are to be told next."""
        orders, self._orders = self._orders, []
        return orders

    @property
    def has_orders(self) -> bool:
        """Whether a step is needed to tell the workers."""
        return bool(self._orders)

    def owns(self, job_id: int) -> bool:
        """Whether the job is a chunk that is fetched."""
        return job_id in self._jobs

    def acknowledge(self, job_id: int, result: JobResult) -> None:
        """Take a rank's answer."""
        job = self._jobs[job_id]
        job.result.merge(result)
        if job.result.ranks >= self._geometry.ranks:
            del self._jobs[job_id]
            try:
                self._end(job)
            finally:
                job.came = bool(job.came)
                self._drop_forgotten()

    def _end(self, job: FetchJob) -> None:
        failed = bool(job.result.failed)
        for fetch in self._begun:
            if job.id not in fetch.jobs:
                continue
            fetch.jobs.discard(job.id)
            if failed:
                # What comes after a hole is of no use.
                fetch.jobs = {other for other in fetch.jobs if other < job.id}
            else:
                fetch.chunks += 1
                fetch.bytes += job.result.bytes
            if not fetch.jobs:
                _tell(fetch)
        if job.scratch is not None:
            job.scratch.abort()
        progress = job.progress
        progress.missing -= 1
        progress.seconds = max(progress.seconds, job.result.seconds)
        job.came = not failed
        self.settle()
        if failed:
            self._counters.add(f"failed_fetches:{job.tier}")
        else:
            progress.bytes += job.result.bytes
            self._counters.add(f"fetched_chunks:{job.tier}")
            self._counters.add(f"fetched_bytes:{job.tier}", job.result.bytes)
        if not progress.missing:
            self._rates.fetched(job.tier, progress.bytes, progress.seconds)

    def _drop_forgotten(self) -> None:
        """What is under way for requests that wait no more is followed to its end, to tell of it."""
        self._begun = [f for f in self._begun if not f.forgotten or not f.jobs.isdisjoint(self._jobs)]

    def settle(self) -> None:
        """Make visible what can be, and free what did not come."""
        for job in self._unsettled:  # in the order of their prefixes
            job.settle()
        self._unsettled = [job for job in self._unsettled if not job.settled]

    def _begin(self, fetch: Fetch) -> None:
        fetch.begun = True
        self._begun.append(fetch)
        chain, first = fetch.chain, fetch.first
        keys = fetch.record.space.chunk_keys(chain.hashes, chain.tail, self._chunks.blocks, first)
        under_way = {job.key: job for job in self._unsettled}
        batches: list[Batch] = []
        try:
            for i, tier in enumerate(fetch.sources):
                key, position = keys[KEY_BYTES * i : KEY_BYTES * (i + 1)], first + i
                reserved = self._reserve(fetch, position)
                if reserved is None:
                    break
                reservation, scratch = reserved
                if not len(reservation):
                    # In RAM by now, or on its way for somebody else.
                    if key in under_way:
                        self._wait_for(fetch, under_way[key])
                    continue
                rows, number = self._rows_of(scratch, reservation), next(self._ids)
                if not batches or batches[-1].tier != tier:
                    batches.append(Batch(tier, number))
                batches[-1].add(key, position, rows)
                before = fetch.parts[-1] if fetch.parts else None
                job = FetchJob(number, tier, key, reservation, scratch, batches[-1].progress, before=before)
                self._jobs[job.id] = job
                self._unsettled.append(job)
                self._wait_for(fetch, job)
        finally:  # whatever stopped this, a job ends only by an answer to its order
            self._orders += [batch.order() for batch in batches]

    def _wait_for(self, fetch: Fetch, job: FetchJob) -> None:
        fetch.parts.append(job)
        if job.came is None:
            fetch.jobs.add(job.id)
        else:
            fetch.chunks += 1

    def _reserve(self, fetch: Fetch, number: int) -> tuple[Reservation, Reservation | None] | None:
        """Rows for chunk `number`; an empty reservation when all of it has some; None: there is no room for it."""
        record, start = fetch.record, number * self._chunks.blocks
        chain = self._chunks.up_to(fetch.chain, number)
        reservation = self._index.reserve(record.space, chain.hashes, chain.tail)
        if reservation.dropped or (len(reservation) and reservation.first < start):
            # No room, or what comes before has left since the search.
            reservation.abort()
            self._counters.add("dropped_fetches:pool_full" if reservation.dropped else "dropped_fetches:hole")
            return None
        scratch = None
        if len(reservation) and reservation.first > start:
            scratch = self._reserve_scratch(reservation.first - start)
            if scratch is None:
                reservation.abort()
                return None
        taken = len(reservation) + (len(scratch) if scratch is not None else 0)
        fetch.rows += taken
        self._rows += taken
        return reservation, scratch

    def _reserve_scratch(self, blocks: int) -> Reservation | None:
        """Rows that nobody ever finds: a chunk's value comes whole, and what is visible must not be written."""
        first, self._scratch_names = self._scratch_names, self._scratch_names + blocks
        names = [number.to_bytes(16, "little") for number in range(first, first + blocks)]
        scratch = self._index.reserve(self._scratch_space, names)
        if scratch.dropped:
            scratch.abort()
            self._counters.add("dropped_fetches:pool_full")
            return None
        return scratch

    def _rows_of(self, scratch: Reservation | None, reservation: Reservation) -> Numbers:
        slots = np.frombuffer((scratch.rows if scratch is not None else b"") + reservation.rows, np.uint32)
        return self._geometry.groups.rows(slots)


def _tell(fetch: Fetch) -> None:
    """Log what came for a request, and how fast: from its search's end on."""
    if not fetch.chunks:
        return
    seconds = max(1e-9, time.monotonic() - fetch.since)
    logger.info(
        "Fetched %d of %d chunks from %s for request %s: %.4f GB in %.2f ms, %.2f GB/s",
        fetch.chunks,
        len(fetch.sources),
        " and ".join(dict.fromkeys(fetch.sources)),
        fetch.record.user_id,
        fetch.bytes / 1e9,
        seconds * 1e3,
        fetch.bytes / seconds / 1e9,
    )
