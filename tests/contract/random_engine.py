"""vLLM's asynchronous scheduler in small: prefix cache, steps in flight, preemptions, loads that fail, late answers."""

import contextlib
from collections import Counter, deque
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
from caching_pool import CachingPool
from late_ranks import Part, Ranks, Shape, Step
from toy_engine import BLOCK
from toy_prompts import Prompt, tail_hash

from lmcache_rs.config import load_config
from lmcache_rs.connector.geometry import Geometry
from lmcache_rs.connector.scheduler import PlanningError, Roles, SchedulerSide
from lmcache_rs.connector.stats import Counters


class RandomEngine:
    """`wrong` names tokens that were sampled from KV of other tokens, and rows found that hold other tokens' KV."""

    def __init__(self, shape: Shape, source: Random) -> None:
        self.shape, self.source = shape, source
        self.counters = Counters()
        geometry = Geometry(
            BLOCK, BLOCK * 8, shape.rows, ("l",), shape.blocks, shape.ranks, "cpu", shape.ranks
        )
        config = load_config(shape.extra, environ={})
        self.scheduler = SchedulerSide(
            config, geometry, Roles(True, True), "sha256", tail_hash, self.counters
        )
        self.pool = CachingPool(shape.blocks, shape.caches, source)
        self.scheduler.bind_block_pool(self.pool)
        self.ranks = Ranks(shape, source, self.counters.add, lambda i: self.pool.blocks[i].ref_cnt > 0)
        if shape.nearby and shape.ranks == 1:
            self.scheduler.worker_nearby = self.ranks.workers[0].take_acks
        self.scheduler._planner.plan = self._failing(self.scheduler._planner.plan)
        self.scheduler._ledger.open_load = self._failing(self.scheduler._ledger.open_load)
        self.waiting: list[Prompt] = []
        self.running: list[Prompt] = []
        self.loading: dict[str, Prompt] = {}
        self.all: list[Prompt] = []
        self.seen: Counter[str] = Counter()
        """How often what is rare happened."""
        self.wrong: list[str] = []
        self._pipeline: deque[Step] = deque()
        self._fresh: set[str] = set()
        self._received: Counter[str] = Counter()
        self._failed: set[str] = set()

    def _failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, which fails now and then."""

        def failing(*arguments: Any) -> Any:
            if self.source.random() < self.shape.fail_share / 10:
                self.seen["failed plans"] += 1
                raise RuntimeError("injected")
            return call(*arguments)

        return failing

    # ---- what users and operators do

    def add(self, request: Prompt) -> None:
        self.all.append(request)
        self.waiting.append(request)
        self.scheduler.add_request(request)

    def abort(self, request: Prompt) -> None:
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        self._finish(request)

    def preempt(self, request: Prompt, drop: bool) -> None:
        """`drop`: it may be resumed before the output of its steps in flight is seen, which computes their tokens again."""
        self.seen["preemptions"] += 1
        self.running.remove(request)
        self._free(request)
        request.placeholders = 0
        request.drop_stale = drop or (request.drop_stale and request.stale > 0)
        request.stale, request.resumed = request.in_flight, True
        self.waiting.insert(0, request)

    def reset(self, clear: bool) -> None:
        planned = {order.job for step in self._pipeline for order in step.orders.stores}
        planned |= {order.job for order in self.scheduler._late_stores}
        for mover in self.ranks.movers:
            mover.excused |= mover.jobs() | planned
        self.pool.reset_prefix_cache()
        if clear:
            self.scheduler.clear()

    def look(self, request: Prompt) -> None:
        """Every row that is found for a request must hold its KV."""
        start = request.num_tokens // BLOCK * BLOCK
        tail = tail_hash(request, start) if start < request.num_tokens else None
        lease = self.scheduler.index.match(self.scheduler._space, request.block_hashes, tail).lease()
        if lease is None:
            return
        self.seen["rows looked at"] += len(lease)
        if not self.ranks.holds(request, np.frombuffer(lease.rows(), np.uint32).tolist()):
            self.wrong.append(f"rows found for {request.request_id} hold other tokens' KV")
        lease.release()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self.loading or self._pipeline)

    # ---- a step

    def step(self) -> None:
        step = self._schedule()
        self._pipeline.append(step)
        # The ranks run beside the scheduler: it sees an earlier step's output before or after this one is carried out.
        late = self.shape.overlap > 0 and self.source.random() < 0.5
        if not late:
            self.ranks.execute(step)
        while len(self._pipeline) > self.shape.overlap:
            self._update(self._pipeline.popleft())
        if late:
            self.ranks.execute(step)

    def drain(self) -> None:
        """See the output of every step in flight."""
        while self._pipeline:
            self._update(self._pipeline.popleft())

    def _schedule(self) -> Step:
        parts: list[Part] = []
        added: dict[str, list[int]] = {}
        preempted = False
        for request in list(self.running):
            if request not in self.running or self._is_sure_to_end(request):
                continue
            wanted = request.num_tokens + request.placeholders - request.num_computed_tokens
            count = min(self.shape.chunk, wanted)
            while (blocks := self._grow(request, request.num_computed_tokens + count)) is None:
                preempted = True
                self.preempt(self.running[-1], drop=self.shape.overlap > 1)
                if request not in self.running:
                    break
            if blocks is not None:
                added[request.request_id] = blocks
                parts.append(self._part(request, count))
        sync_loads = False if preempted else self._admit_waiting(parts)
        output = self._describe(parts, added)
        for part in parts:
            part.request.num_computed_tokens += part.count
            part.request.placeholders += part.samples
            part.request.in_flight += 1
        try:
            orders = self.scheduler.plan_step(output)
        except PlanningError as failure:
            orders = failure.orders
        return Step(orders, parts, sync_loads)

    @staticmethod
    def _is_sure_to_end(request: Prompt) -> bool:
        """With what is in flight it reaches its limit."""
        return request.num_tokens + request.placeholders >= request.num_prompt_tokens + request.max_tokens

    def _part(self, request: Prompt, count: int) -> Part:
        start, known = request.num_computed_tokens, request.num_tokens
        self.pool.cache(request.table, request.block_hashes, min(start + count, known), BLOCK)
        samples = start + count >= known + request.placeholders
        return Part(request, start, count, samples, list(request.table))

    def _admit_waiting(self, parts: list[Part]) -> bool:
        sync_loads = False
        for request in list(self.waiting):
            tokens: int | None = 0
            asynchronous = False
            found: list[int] = []
            if not request.num_computed_tokens:
                found = self.pool.find(request.block_hashes[: (request.num_tokens - 1) // BLOCK])
                tokens, asynchronous = self.scheduler.matched_tokens(request, len(found) * BLOCK)
            if tokens is None:
                continue
            total = (request.num_computed_tokens or len(found) * BLOCK) + tokens
            count = 0 if asynchronous else min(self.shape.chunk, request.num_tokens - total)
            self.pool.take(found)
            request.table += found
            if self._grow(request, total + count) is None:
                if found:
                    self._free(request)
                if not self.running and not self.loading:
                    self._free_one_that_waits(request)
                break
            self.waiting.remove(request)
            with contextlib.suppress(RuntimeError):  # as the connector's barrier does
                self.scheduler.admit(request, list(request.table), tokens)
            request.num_computed_tokens = total
            request.cached_tokens += tokens
            if asynchronous:
                self.loading[request.request_id] = request
                continue
            sync_loads = sync_loads or tokens > 0
            self.running.append(request)
            self._fresh.add(request.request_id)
            parts.append(self._part(request, count))
        return sync_loads

    def _describe(self, parts: list[Part], added: dict[str, list[int]]) -> Any:
        """The SchedulerOutput: new requests with their whole tables, the others with what was added."""
        cached = SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[])
        new: list[Any] = []
        for part in parts:
            request, request_id, start = part.request, part.request.request_id, part.start
            is_fresh = request_id in self._fresh
            if is_fresh and (not request.resumed or self.shape.resumed_are_new):
                new.append(
                    SimpleNamespace(req_id=request_id, block_ids=(part.table,), num_computed_tokens=start)
                )
                continue
            if is_fresh:
                cached.resumed_req_ids.add(request_id)
            blocks = part.table if is_fresh else added[request_id]
            cached.req_ids.append(request_id)
            cached.new_block_ids.append((blocks,) if blocks else None)
            cached.num_computed_tokens.append(start)
        self._fresh.clear()
        counts = {part.request.request_id: part.count for part in parts}
        return SimpleNamespace(
            scheduled_new_reqs=new, scheduled_cached_reqs=cached, num_scheduled_tokens=counts
        )

    def _free_one_that_waits(self, first: Prompt) -> None:
        """Requests that were loaded and wait hold all blocks, so that none goes on."""
        for request in reversed(self.waiting):
            if request.table and request is not first:
                return self._free(request)
        return None

    # ---- its output

    def _update(self, step: Step) -> None:
        repeated = self._roll_back(step) if step.bad else set()
        for part in step.parts:
            request = part.request
            request.in_flight -= 1
            stale = request.stale > 0
            request.stale -= stale
            if request.ended or request.request_id in repeated or (stale and request.drop_stale):
                continue
            if part.samples:
                self._sample(step, request, stale)
        if step.acks is not None:
            self.scheduler.acknowledge(step.acks)
        self._failed |= step.failed
        self._received.update(step.received)
        for request_id, ranks in list(self._received.items()):
            if ranks == self.shape.ranks:
                del self._received[request_id]
                self._end_load(self.loading.pop(request_id))

    def _sample(self, step: Step, request: Prompt, stale: bool) -> None:
        if request.request_id in step.spoiled:
            self.wrong.append(f"a token of {request.request_id} was computed from other tokens' KV")
        request.output.append(request.next_token)
        if not stale:
            request.placeholders -= 1
        if request in self.running:
            final = request.num_computed_tokens - request.placeholders
            self.pool.cache(request.table, request.block_hashes, min(final, request.num_tokens), BLOCK)
        if len(request.output) >= min(request.max_tokens, request.stop_after):
            self.abort(request)

    def _roll_back(self, step: Step) -> set[str]:
        """What reads bad blocks is computed again from the first of them on, and what is in flight of it is dropped."""
        bad = step.bad
        repeated = {part.request.request_id for part in step.parts if not bad.isdisjoint(part.table)}
        for request in [*self.running, *self.loading.values()]:
            first = next((i for i, block in enumerate(request.table) if block in bad), None)
            if first is None:
                continue
            self.seen["roll-backs"] += 1
            self.pool.evict(request.table[first:])
            request.num_computed_tokens = min(request.num_computed_tokens, first * BLOCK)
            request.placeholders = 0
            if request.request_id in self.loading:
                self._failed.add(request.request_id)
            else:
                repeated.add(request.request_id)
                request.stale, request.drop_stale = request.in_flight, True
        return repeated

    def _end_load(self, request: Prompt) -> None:
        failed = request.request_id in self._failed
        self._failed.discard(request.request_id)
        if request.ended:
            return self._free(request)  # aborted while it loaded
        self.waiting.insert(0, request)
        if failed and not (self.shape.failed_as_blocks and request.num_computed_tokens):
            return self._free(request)
        self.pool.cache(request.table, request.block_hashes, request.num_computed_tokens, BLOCK)
        if request.num_computed_tokens == request.num_tokens:
            request.num_computed_tokens -= 1
        return None

    def _finish(self, request: Prompt) -> None:
        request.ended = True
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
