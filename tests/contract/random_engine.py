"""vLLM's asynchronous scheduler in small: prefix cache, steps in flight, preemptions, loads that fail, late answers."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from random import Random
from types import SimpleNamespace
from typing import Any

from caching_pool import CachingPool
from late_ranks import Part, Ranks, Shape, Step
from late_tier import World
from operated_engine import OperatedEngine
from toy_engine import BLOCK
from toy_prompts import Prompt, tail_hash

from lmcache_rs.config import load_config
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.geometry import Geometry
from lmcache_rs.connector.orders import PlanningError
from lmcache_rs.connector.rules import Roles
from lmcache_rs.connector.scheduler import SchedulerSide
from lmcache_rs.connector.stats import Counters


class RandomEngine(OperatedEngine):
    """`wrong` names tokens that were sampled from KV of other tokens, and rows found that hold other tokens' KV."""

    def __init__(self, shape: Shape, world: World, source: Random) -> None:
        self.counters = Counters()
        size = BLOCK * 8
        geometry = Geometry(BLOCK, size, shape.rows, ("l",), shape.blocks, shape.ranks, "cpu", shape.ranks)
        config = load_config(shape.extra, environ={})
        roles = Roles(may_store=True, may_load=True)
        barrier = Barrier(self.counters.add)
        ranks = Ranks(shape, world, source, self.counters.add, lambda i: self.pool.blocks[i].ref_cnt > 0)
        side = SchedulerSide(
            config,
            geometry,
            roles,
            "sha256",
            tail_hash,
            self.counters,
            barrier,
            ranks.tiers.open(0),
            bytes(32),
            holders_go_first=shape.holders_go_first,
        )
        super().__init__(shape, side, CachingPool(shape.blocks, shape.caches, source), ranks, world)
        self.source = source
        side.bind_block_pool(self.pool)
        if shape.nearby and shape.ranks == 1:
            side.worker_nearby = self.ranks.workers[0]
        if shape.layered:
            side._lookup._rules = dataclasses.replace(side._lookup._rules, layered_bytes_min=1)
        side._storing._planner.plan = self._failing(side._storing._planner.plan)
        side._ledger.open_load = self._failing(side._ledger.open_load)
        side._tiering._writes.make_room = self._failing(side._tiering._writes.make_room)
        side._tiering._fetches._reserve = self._failing(side._tiering._fetches._reserve)
        side._tiering._fetches._end = self._failing(side._tiering._fetches._end)
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
        while self._pipeline:
            self._update(self._pipeline.popleft())

    def _schedule(self) -> Step:
        parts: list[Part] = []
        added: dict[str, list[int]] = {}
        preempted: set[str] = set()
        for request in list(self.running):
            if request not in self.running or self._is_sure_to_end(request):
                continue
            wanted = request.num_tokens + request.placeholders - request.num_computed_tokens
            count = min(self.shape.chunk, wanted)
            while (blocks := self._grow(request, request.num_computed_tokens + count)) is None:
                preempted.add(self.running[-1].request_id)
                self.preempt(self.running[-1], drop=self.shape.overlap > 1)
                if request not in self.running:
                    break
            if blocks is not None:
                added[request.request_id] = blocks
                parts.append(self._part(request, count))
        sync_loads = {} if preempted else self._admit_waiting(parts)
        output = self._describe(parts, added, preempted)
        for part in parts:
            part.request.num_computed_tokens += part.count
            if part.request.num_computed_tokens >= part.request.num_tokens:
                self.prefilling.pop(part.request.request_id, None)
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

    def _admit_waiting(self, parts: list[Part]) -> dict[str, range]:
        sync_loads: dict[str, range] = {}
        for request in self._in_order():
            tokens: int | None = 0
            asynchronous = False
            found: list[int] = []
            if not request.num_computed_tokens:
                found = self.pool.find(request.block_hashes[: (request.num_tokens - 1) // BLOCK])
                with suppress(RuntimeError):  # as the connector's barrier does
                    tokens, asynchronous = self.scheduler.matched_tokens(request, len(found) * BLOCK)
            if tokens is None:
                self._pass_over(request)
                continue
            total = (request.num_computed_tokens or len(found) * BLOCK) + tokens
            count = 0 if asynchronous else min(self.shape.chunk, request.num_tokens - total)
            assert asynchronous or count > 0, "nothing is left to compute"
            assert not tokens or total < request.offer_below, "as much is offered as what failed"
            self.pool.take(found)
            request.table += found
            fits = self._fits(request, total, asynchronous)
            if not fits or self._grow(request, total + count) is None:
                if found:
                    self._free(request)
                break
            self.waiting.remove(request)
            try:
                self.scheduler.admit(request, list(request.table), tokens)
            except RuntimeError:  # as the connector's barrier does
                self.scheduler.break_promise(request.request_id, list(request.table), tokens)
            request.num_computed_tokens = total
            if tokens:
                request.loaded = range(len(found) * BLOCK, total)
            self.prefilling[request.request_id] = request
            if asynchronous:
                self.loading[request.request_id] = request
                self._pass_over(request)
                continue
            request.place = None
            if tokens:
                sync_loads[request.request_id] = request.loaded
            self.running.append(request)
            self._fresh.add(request.request_id)
            parts.append(self._part(request, count))
        return sync_loads

    def _describe(self, parts: list[Part], added: dict[str, list[int]], preempted: set[str]) -> Any:
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
        described = {
            "scheduled_new_reqs": new,
            "scheduled_cached_reqs": cached,
            "num_scheduled_tokens": counts,
        }
        return SimpleNamespace(**described, preempted_req_ids=preempted)

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
        self.scheduler.spoiled(step.bad)
        if step.acks is not None:
            try:
                self.scheduler.acknowledge(step.acks)
            except RuntimeError:
                self.scheduler.acknowledge_later(step.acks)
        self._failed |= step.failed
        for request_id in step.failed & self.loading.keys():
            self.loading[request_id].offer_below = self.loading[request_id].loaded.stop
        self._received.update(step.received)
        for request_id, ranks in list(self._received.items()):
            if ranks == self.shape.ranks:
                del self._received[request_id]
                self.scheduler.received([request_id])
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
        repeated: set[str] = set()
        for flying in (step, *self._pipeline):
            for part in flying.parts:
                request_id, first = part.request.request_id, first_of(bad, part.table)
                if first is None:
                    continue
                # Also of requests that were preempted since, which vLLM 0.32 forgets.
                self.pool.evict(part.table[first:])
                if flying is step:
                    repeated.add(request_id)
                    load = step.sync_loads.get(request_id, range(0))
                    part.request.note_bad(bad, part.table, load)
        for request in [*self.running, *self.loading.values()]:
            first = first_of(bad, request.table)
            if first is None:
                continue
            self.seen["roll-backs"] += 1
            self.pool.evict(request.table[first:])
            request.num_computed_tokens = min(request.num_computed_tokens, first * BLOCK)
            request.placeholders = 0
            if request.request_id in self.loading:
                self._failed.add(request.request_id)
                request.note_bad(bad, request.table, request.loaded)
            else:
                repeated.add(request.request_id)
                # vLLM 0.32 delivers what is in flight of it, which is wrong: its bug, and not repeated here.
                request.stale, request.drop_stale = request.in_flight, True
        return repeated

    def _end_load(self, request: Prompt) -> None:
        failed = request.request_id in self._failed
        self._failed.discard(request.request_id)
        if request.ended:
            return self._free(request)  # aborted while it loaded
        self.waiting.insert(0, request)
        if failed:
            self.seen["failed while it waited"] += 1
        if failed and not (self.shape.failed_as_blocks and request.num_computed_tokens):
            return self._free(request)
        self.pool.cache(request.table, request.block_hashes, request.num_computed_tokens, BLOCK)
        if request.num_computed_tokens == request.num_tokens:
            request.num_computed_tokens -= 1
        return None


def first_of(bad: set[int], table: list[int]) -> int | None:
    return next((i for i, block in enumerate(table) if block in bad), None)
