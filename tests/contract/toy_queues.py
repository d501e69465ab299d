"""vLLM's queues of requests and the blocks that they hold, beside the connector's scheduler side."""

import contextlib
import itertools
from collections import Counter

from caching_pool import CachingPool
from late_ranks import Shape
from toy_engine import BLOCK
from toy_prompts import Prompt

from lmcache_rs.connector.scheduler import SchedulerSide


class Queues:
    """Requests by what vLLM does with them, and how blocks come and go."""

    def __init__(self, shape: Shape, scheduler: SchedulerSide, pool: CachingPool) -> None:
        self.shape, self.scheduler, self.pool = shape, scheduler, pool
        self.waiting: list[Prompt] = []
        self.running: list[Prompt] = []
        self.loading: dict[str, Prompt] = {}
        self.all: list[Prompt] = []
        self.prefilling: dict[str, Prompt] = {}
        """They load, or parts of their prompts are computed."""
        self._places = itertools.count()
        self.seen: Counter[str] = Counter()
        """How often what is rare happened."""

    def add(self, request: Prompt) -> None:
        self.all.append(request)
        self.waiting.append(request)
        with contextlib.suppress(RuntimeError):
            self.scheduler.add_request(request)

    def abort(self, request: Prompt) -> None:
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        self._finish(request)

    def preempt(self, request: Prompt, drop: bool) -> None:
        """`drop`: it may be resumed before the output of its steps in flight is seen, which it computes again."""
        self.seen["preemptions"] += 1
        self.running.remove(request)
        self.prefilling.pop(request.request_id, None)
        self._free(request)
        request.placeholders = 0
        request.drop_stale = drop or (request.drop_stale and request.stale > 0)
        request.stale, request.resumed = request.in_flight, True
        self.waiting.insert(0, request)

    def _in_order(self) -> list[Prompt]:
        """Those that wait, as vLLM asks about them: first who was passed over and kept its place."""
        return sorted(self.waiting, key=lambda r: (r.place is None, r.place or 0))

    def _pass_over(self, request: Prompt) -> None:
        """It loads, or was told to ask again. vLLM since 0.32 lets only those keep their places that hold blocks."""
        if request.table or not self.shape.holders_go_first:
            request.place = next(self._places) if request.place is None else request.place
        else:
            request.place = None

    def _fits(self, request: Prompt, total: int, asynchronous: bool) -> bool:
        """All of it must fit; a load must leave what others need until their prompts are computed."""
        free = len(self.pool.free)
        own = -(-total // BLOCK) - len(request.table)
        # What failed counts as well, until it runs: it needs its blocks twice for one more load.
        others = sum(self._missing(r) for r in self.prefilling.values()) if asynchronous else 0
        return self._missing(request) <= free and own <= free - others

    @staticmethod
    def _missing(request: Prompt) -> int:
        return max(0, -(-request.num_tokens // BLOCK) - len(request.table))

    def _finish(self, request: Prompt) -> None:
        request.ended = True
        self.prefilling.pop(request.request_id, None)
        with contextlib.suppress(RuntimeError):
            self.scheduler.finish_request(request, list(request.table))
        if request.request_id not in self.loading:
            self._free(request)  # vLLM keeps the blocks of one that loads

    def _grow(self, request: Prompt, tokens: int) -> list[int] | None:
        added = self.pool.allocate(max(0, -(-tokens // BLOCK) - len(request.table)))
        if added is not None:
            request.table.extend(added)
        return added

    def _free(self, request: Prompt) -> None:
        self.pool.free_blocks(self.pool.blocks[i] for i in reversed(request.table))
        request.table, request.num_computed_tokens = [], 0
