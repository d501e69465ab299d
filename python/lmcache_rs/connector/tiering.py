"""The slower tiers as the scheduler side sees them: searched for what RAM lacks, fetched from, written to."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import sleep

from lmcache_rs._core import Index
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.chunks import Chain, Chunks
from lmcache_rs.connector.coming import Coming
from lmcache_rs.connector.fetches import KEY_BYTES, Fetch, Fetches
from lmcache_rs.connector.geometry import Geometry
from lmcache_rs.connector.jobs import StoreJob
from lmcache_rs.connector.ledger import STEPPING_S_MAX
from lmcache_rs.connector.lookup import Lookup
from lmcache_rs.connector.orders import StepOrders, WorkerAcks
from lmcache_rs.connector.rates import Rates
from lmcache_rs.connector.requests import Record
from lmcache_rs.connector.resets import Resets
from lmcache_rs.connector.rules import TieringRules
from lmcache_rs.connector.stats import Counters
from lmcache_rs.connector.tiers import FIND_S_MAX, OpenTier
from lmcache_rs.connector.troubles import Troubles
from lmcache_rs.connector.writes import Writes

LAST_WRITES_S_MAX, LAST_WRITES_LOOKS = 1.0, 200
"""A reset waits so long for what is being written, and looks so often. VLLM's sleep (0.33) fails when it says False."""


@dataclass(slots=True, eq=False)
class Wanted:
    """What a request lacks in RAM, from chunk `first` on: searched for, then fetched."""

    record: Record
    chain: Chain
    first: int
    since: float
    missing: dict[str, int] = field(default_factory=dict)
    """Searches that were not answered, by tier."""
    answers: dict[str, bytes] = field(default_factory=dict)
    """By tier, for each chunk whether it is there."""
    fetch: Fetch | None = None


class Tiering:
    """Searches, fetches and writes. None of its methods waits, but `clear`, as long as the tiers' own limits say."""

    def __init__(
        self,
        index: Index,
        geometry: Geometry,
        lookup: Lookup,
        tiers: Mapping[str, OpenTier],
        namespace: bytes,
        rules: TieringRules,
        counters: Counters,
        barrier: Barrier,
        ids: Iterator[int],
    ) -> None:
        self._index = index
        self._geometry = geometry
        self._chunks = chunks = Chunks(geometry.chunk_blocks(rules.chunk_size))
        self._lookup = lookup
        self._tiers = tiers
        self._namespace = namespace
        self._rules = rules
        self._counters = counters
        self._barrier = barrier
        self._ids = ids
        self._rates = Rates()
        self._troubles = Troubles("Looking for KV")
        self._readable = {name for name, tier in tiers.items() if tier.may_load}
        writable = [name for name, tier in tiers.items() if tier.may_store]
        self._fetches = Fetches(index, geometry, chunks, self._rates, counters, ids)
        self._writes = Writes(index, geometry.groups, chunks, geometry.ranks, writable, counters, ids)
        self._resets = Resets([tier.tier for tier in tiers.values()], barrier)
        self._cleared_at = 0.0
        self._wanted: dict[str, Wanted] = {}
        self._searches: dict[int, Wanted] = {}

    def arrived(self, record: Record, frozen: bool) -> None:
        """Look the request up in RAM; write what is seen again, unless `frozen`, and search for what is lacking."""
        if not self._tiers or record.private:
            if record.may_load:
                self._index.match(record.space, record.request.block_hashes)
            return
        chain = self._lookup.chain(record)
        match = self._index.match(record.space, chain.hashes, chain.tail)
        found = match.blocks + match.tail
        if self._resets.due:
            return
        if found and record.may_store and not frozen:  # seen again
            self._writes.write(record, chain)
        if found < len(chain):
            self._search(record, chain, found // self._chunks.blocks)

    def stored(self, job: StoreJob) -> None:
        """The rows of a store can be found from now on."""
        if not self._rules.write_through or self._resets.due or job.record.private:
            return
        reservation, hashes = job.reservation, job.record.request.block_hashes
        whole = self._lookup.chain(job.record)
        if reservation.tail:
            self._writes.write(job.record, whole)
            return
        blocks = reservation.first + len(reservation)
        if blocks != len(whole):
            blocks = self._chunks.whole(blocks)
        self._writes.write(job.record, Chain(hashes[:blocks], None))

    def poll(self) -> None:
        """Take in what the tiers have answered."""
        self._fetches.settle()
        if self._resets.due:
            if not self._writes.busy:
                self._resets.retry()
            return
        for name in self._tiers:
            if not self._searches:
                break
            for job, found in self._answers(name):
                wanted = self._searches.pop(job, None)
                if wanted is not None:
                    del wanted.missing[name]
                    wanted.answers[name] = found
                    self._take_found(wanted)
        self._fetches.begin()

    def _answers(self, name: str) -> Sequence[tuple[int, bytes]]:
        """What this tier has found; a tier that fails concerns nobody else."""
        answers = []
        try:
            for job, _, refusal, found, _ in self._tiers[name].queue.poll():
                if refusal is not None:
                    self._counters.add(f"tier_refusals:{name}:find:{refusal}")
                self._troubles.note(name, refusal, found)
                answers.append((job, found if isinstance(found, bytes) else b""))
        except BaseException as error:
            self._barrier.report("tier_search", error)
        return answers

    def waits(self, record: Record) -> bool:
        """Whether vLLM should ask again for this request; bounded."""
        wanted = self._wanted.get(record.id)
        if wanted is None:
            return False
        now = time.monotonic()
        if wanted.missing and now - wanted.since > FIND_S_MAX:
            self._counters.add("search_timeouts")
            self._end_search(wanted)
            self._take_found(wanted)
        under_way = bool(wanted.missing) or (
            wanted.fetch is not None and self._fetches.is_under_way(wanted.fetch)
        )
        if under_way and now - wanted.since <= self._rules.wait_s_max:
            return True
        if under_way:
            self._counters.add("fetch_timeouts")
            self.forget(record)
        return False

    def join(self, record: Record, first: int) -> Coming | None:
        """A guard on what is fetched for the request from block `first` on, if it can be loaded as it comes."""
        wanted = self._wanted.get(record.id)
        if wanted is None or wanted.fetch is None or wanted.missing:
            return None
        wait_s = self._rules.wait_s_max - (time.monotonic() - wanted.since)
        return self._fetches.join(wanted.fetch, first, wait_s)

    def forget(self, record: Record) -> None:
        """The request was admitted, or is gone."""
        wanted = self._wanted.get(record.id)
        if wanted is None:
            return
        self._end_search(wanted)
        if wanted.fetch is not None:
            self._fetches.forget(wanted.fetch)
        del self._wanted[record.id]

    def plan_step(self, scheduled_tokens: Mapping[str, int], orders: StepOrders, resting: bool) -> None:
        """A step begins: add what the workers are to move. Nothing is written while `resting`."""
        if not self._tiers:
            return
        self._rates.step(sum(scheduled_tokens.values()))
        self.poll()
        orders.namespace = self._namespace
        orders.fetches = self._fetches.take_orders()
        if not self._resets.due:
            if not resting:
                self._writes.make_room()
            orders.writes = self._writes.take_orders()

    @property
    def writes_any(self) -> bool:
        """Whether some tier is written to."""
        return any(tier.may_store for tier in self._tiers.values())

    @property
    def needs_steps(self) -> bool:
        """Whether the workers must be told something, or a reset waits for their answers; that is bounded in time."""
        if self._fetches.has_orders or self._writes.has_orders:
            return True
        waits = self._resets.due and not self._resets.retrying
        return waits and time.monotonic() - self._cleared_at < STEPPING_S_MAX

    def acknowledge(self, acks: WorkerAcks) -> None:
        """Take out and take in the workers' answers to what is ordered here."""
        for job, result in list(acks.jobs.items()):
            owner = next((part for part in (self._fetches, self._writes) if part.owns(job)), None)
            if owner is not None:
                owner.acknowledge(job, result)
                del acks.jobs[job]  # only now: what fails is taken in again with what is left

    def clear(self, ask: Callable[[], None] | None) -> bool:
        """Have nothing found any more that was written before now; until that is sure the tiers are not used.

        `ask` takes in the answers of a worker nearby, so that what is being written now can be waited for. False: other
        processes may find it. Some tier could not be told; or something is still being written and may come after
        this, so that there is another reset once that has ended.
        """
        self._cleared_at = time.monotonic()
        for wanted in list(self._wanted.values()):
            self.forget(wanted.record)
        self._writes.withdraw()
        for _ in range(LAST_WRITES_LOOKS):
            if ask is None or not self._writes.busy:
                break
            sleep(LAST_WRITES_S_MAX / LAST_WRITES_LOOKS)
            ask()
        return self._resets.reset(again=self._writes.busy)

    def close(self) -> None:
        """Search and reset no more, and end the threads."""
        for wanted in list(self._wanted.values()):
            self.forget(wanted.record)
        self._resets.close()
        for tier in self._tiers.values():
            tier.queue.close(0)

    def _search(self, record: Record, chain: Chain, first: int) -> None:
        if not self._readable or not record.reads:
            return
        keys = record.space.chunk_keys(list(chain.hashes), chain.tail, self._chunks.blocks, first)
        self.forget(record)
        self._wanted[record.id] = wanted = Wanted(record, chain, first, time.monotonic())
        for name in self._readable:
            job = next(self._ids)
            try:
                self._tiers[name].queue.find(job, keys)
            except BaseException as error:
                self._barrier.report("tier_search", error)
                continue
            wanted.missing[name] = job
            self._searches[job] = wanted
        self._counters.add("tier_lookups", len(keys) // KEY_BYTES)

    def _end_search(self, wanted: Wanted) -> None:
        """What was not answered is not waited for any more."""
        for job in wanted.missing.values():
            self._searches.pop(job, None)
        wanted.missing.clear()

    def _take_found(self, wanted: Wanted) -> None:
        """Every tier has answered, or may not any more: fetch what is worth it."""
        if wanted.missing:
            return
        sources = self._sources(wanted)
        if sources:
            wanted.fetch = Fetch(wanted.record, wanted.chain, wanted.first, sources)
            self._fetches.add(wanted.fetch)

    def _sources(self, wanted: Wanted) -> Sequence[str]:
        """The quickest tier that has each chunk, up to the first chunk that none has."""
        sources: list[str] = []
        for number in range(self._chunks.count(wanted.chain) - wanted.first):
            having = (
                name for name in self._tiers if wanted.answers.get(name, b"")[number : number + 1] == b"\1"
            )
            name = next(having, None)
            if name is None:
                break
            sources.append(name)
        block_size, chunk = self._geometry.block_size, self._chunks.blocks
        if (wanted.first + len(sources)) * chunk * block_size < self._rules.min_tokens:
            return ()
        slot_bytes = self._geometry.slot_bytes * self._geometry.ranks
        for name in set(sources):
            blocks = sources.count(name) * chunk
            if self._rates.is_quicker_to_compute(name, blocks * slot_bytes, blocks * block_size):
                self._counters.add("dropped_fetches:quicker_to_compute")
                return ()
        return sources
