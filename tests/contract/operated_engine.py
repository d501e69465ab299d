"""What operators do to a random engine, and what they and other engines would find in its cache at any moment."""

from collections import deque

import numpy as np
from caching_pool import CachingPool
from late_ranks import Ranks, Shape, Step
from late_tier import World, split
from toy_engine import BLOCK
from toy_prompts import Prompt, tail_hash
from toy_queues import Queues

from lmcache_rs.connector.scheduler import SchedulerSide


class OperatedEngine(Queues):
    """`wrong` names tokens that were sampled from KV of other tokens, and what is found that holds other tokens' KV."""

    def __init__(
        self, shape: Shape, scheduler: SchedulerSide, pool: CachingPool, ranks: Ranks, world: World
    ) -> None:
        super().__init__(shape, scheduler, pool)
        self.ranks, self.world = ranks, world
        self.wrong: list[str] = []
        self._pipeline: deque[Step] = deque()
        self._was_told = True
        """The last reset said that nothing older is found by anybody."""

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self.loading or self._pipeline)

    def drain(self) -> None:
        """See the output of every step in flight."""
        raise NotImplementedError

    def reset(self, clear: bool) -> None:
        planned = [order for step in self._pipeline for order in step.orders.stores]
        planned += self.scheduler._storing._late
        for mover in self.ranks.movers:
            mover.release(planned)
        self.pool.reset_prefix_cache()
        used = {block for request in self.all for block in request.table}
        # Those of ended requests that are still being loaded.
        used |= {block.block_id for job in self.scheduler._ledger._loads.values() for block in job.held}
        assert len(self.pool.free) == self.pool.num_gpu_blocks - 1 - len(used), "held blocks outlive a reset"
        if clear:
            self._was_told = self.scheduler.clear()[1]

    def load_weights(self) -> None:
        """The model gets other weights, and everything from before is forgotten."""
        self.drain()
        if self.loading or self.scheduler._ledger._loads:
            return  # vLLM keeps what was loaded before
        for request in list(self.running):
            self.preempt(request, drop=True)
        for request in self.waiting:
            self._free(request)
        self.seen["new weights"] += 1
        self.world.weights += 1
        self.reset(clear=True)
        self.seen["new weights, told later"] += not self._was_told

    def kill(self) -> None:
        """The processes are gone, and what was under way is done or not."""
        self.ranks.tiers.die()
        if not self._is_clean:
            # The operator was told that it may be found.
            for medium in self.world.media.values():
                medium.values.clear()

    def look(self, request: Prompt) -> None:
        """Every row that is found for a request must hold its KV, and every value that another engine would find."""
        start = request.num_tokens // BLOCK * BLOCK
        tail = tail_hash(request, start) if start < request.num_tokens else None
        if self._is_clean:
            self._look_into_tiers(request, tail)
        lease = self.scheduler.index.match(self.scheduler._spaces.plain, request.block_hashes, tail).lease()
        if lease is None:
            return
        self.seen["rows looked at"] += len(lease)
        if not self.ranks.holds(request, np.frombuffer(lease.rows(), np.uint32).tolist()):
            self.wrong.append(f"rows found for {request.request_id} hold other tokens' KV")
        lease.release()

    @property
    def is_moving_chunks(self) -> bool:
        """Whether anything is fetched or written, or waited for."""
        tiering = self.scheduler._tiering
        return bool(tiering._fetches._jobs or tiering._writes.busy)

    def assert_tiering_is_idle(self) -> None:
        """Nothing is kept for anybody."""
        tiering = self.scheduler._tiering
        fetches, writes = tiering._fetches, tiering._writes
        left = [tiering._wanted, tiering._searches, fetches._waiting, fetches._begun, fetches._jobs]
        left += [
            fetches._rows,
            fetches._lent,
            fetches._unsettled,
            writes._slots,
            writes._jobs,
            tiering._resets.due,
        ]
        assert not any(left), left

    @property
    def _is_clean(self) -> bool:
        """Whether what other engines find in the tiers must be right."""
        return self._was_told or not self.scheduler._tiering._resets.due

    def _look_into_tiers(self, request: Prompt, tail: bytes | None) -> None:
        size = self.scheduler._tiering._chunks.blocks
        keys = split(self.scheduler._spaces.plain.chunk_keys(request.block_hashes, tail, size))
        for medium in self.world.media.values():
            for number, key in enumerate(keys):
                for rank in range(self.shape.ranks):
                    value = medium.values.get((medium.generation, key, rank))
                    if value is None:
                        continue
                    self.seen["values looked at"] += 1
                    start = number * size * BLOCK
                    end = min(start + value.size, request.num_tokens)
                    right = self.ranks.cells(request, rank, start, end)
                    if not np.array_equal(value.reshape(-1)[: end - start], right):
                        self.wrong.append(f"chunk {number} of {request.request_id} is other tokens' KV")
