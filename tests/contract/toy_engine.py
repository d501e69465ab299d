"""A small stand-in for vLLM: schedules requests over a block pool, calls both sides' hooks as vLLM does, and checks KV.

A cell of its KV is a digest of the tokens up to its position, so KV that belongs to other tokens is seen at once: every
forward checks all cells of the prefix it reads.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from lmcache_rs._core import HostPool
from lmcache_rs.config import load_config
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.breaker import Breaker
from lmcache_rs.connector.geometry import Geometry
from lmcache_rs.connector.orders import PlanningError, StepOrders, WorkerAcks
from lmcache_rs.connector.pace import Pace
from lmcache_rs.connector.rules import Roles
from lmcache_rs.connector.scheduler import SchedulerSide
from lmcache_rs.connector.stats import Counters
from lmcache_rs.connector.tier_worker import TierWorker
from lmcache_rs.connector.tiers import OpenTier
from lmcache_rs.connector.worker import WorkerSide
from lmcache_rs.copy.cpu import CpuMover

BLOCK = 4
LAYERS = 2
ROW_BYTES = LAYERS * BLOCK * 8


def cell(tokens: list[int], position: int, layer: int, rank: int) -> int:
    digest = hashlib.blake2b(repr((tokens[: position + 1], layer, rank)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


LOAD_S_MAX = 60.0
"""Copies that nobody else computes beside end within this time."""


@dataclass
class Block:
    block_id: int
    ref_cnt: int = 0


class Pool:
    """vLLM's BlockPool, as far as a connector touches it."""

    def __init__(self, blocks: int) -> None:
        self.num_gpu_blocks = blocks
        self.blocks = [Block(i) for i in range(blocks)]
        self.blocks[0].ref_cnt = 1  # the null block
        self.free = list(range(1, blocks))

    def touch(self, blocks: list[Block]) -> None:
        for block in blocks:
            assert block.ref_cnt > 0, "only blocks in use are ever held"
            block.ref_cnt += 1

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            assert block.ref_cnt > 0, "a block was given back twice"
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                self.free.insert(0, block.block_id)  # reused at once: a copy that comes late is seen

    def allocate(self, count: int) -> list[int] | None:
        if count > len(self.free):
            return None
        ids = [self.free.pop(0) for _ in range(count)]
        for i in ids:
            self.blocks[i].ref_cnt = 1
        return ids

    def reset_prefix_cache(self) -> bool:
        return len(self.free) == self.num_gpu_blocks - 1


@dataclass
class Request:
    """vLLM's Request, as far as a connector reads it."""

    request_id: str
    prompt: list[int]
    max_tokens: int = 1
    kv_transfer_params: dict[str, Any] | None = None
    priority: int = 0
    skip_reading_prefix_cache: bool = False
    salt: str = ""
    output: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    table: list[int] = field(default_factory=list)
    cached_tokens: int = 0

    @property
    def all_token_ids(self) -> list[int]:
        return self.prompt + self.output

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def block_hashes(self) -> list[bytes]:
        tokens = self.all_token_ids
        return [
            hashlib.sha256(repr((self.salt, tokens[:end])).encode()).digest()
            for end in range(BLOCK, len(tokens) + 1, BLOCK)
        ]


def tail_hash(request: Request, start: int) -> bytes | None:
    tokens = request.all_token_ids
    return hashlib.sha256(repr(("tail", request.salt, start, tokens)).encode()).digest()


class ToyEngine:
    """`ranks` workers over numpy KV. `wrong` counts cells that were read and did not belong to their tokens."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        rows: int = 64,
        chunk: int = 16,
        ranks: int = 1,
        extra: dict[str, Any] | None = None,
        roles: Roles | None = None,
        make_mover: Callable[..., Any] = CpuMover,
        open_tiers: Callable[[int, bool], Mapping[str, OpenTier]] = lambda rank, searching: {},
    ) -> None:
        config = load_config(extra or {}, environ={})
        self.counters = Counters()
        names = tuple(f"layer.{i}" for i in range(LAYERS))
        geometry = Geometry(BLOCK, ROW_BYTES, rows, names, blocks, ranks, "cpu", ranks)
        self.scheduler = SchedulerSide(
            config,
            geometry,
            roles or Roles(True, True),
            "sha256",
            tail_hash,
            self.counters,
            Barrier(self.counters.add, Breaker(self.counters.add)),
            open_tiers(0, True),
            bytes(32),
        )
        self.pool = Pool(blocks)
        self.scheduler.bind_block_pool(self.pool)
        self.chunk = chunk
        self.kv = [[np.zeros((blocks, BLOCK), np.uint64) for _ in range(LAYERS)] for _ in range(ranks)]
        self.workers: list[WorkerSide] = []
        for rank, tensors in enumerate(self.kv):
            barrier = Barrier(self.counters.add)
            worker = WorkerSide(barrier, Pace(1))
            layers = {name: number for number, name in enumerate(names)}
            pool = HostPool(rows * 4096, ROW_BYTES, 0)
            tiers = TierWorker(pool, lambda _, rank=rank: open_tiers(rank, False), barrier)
            worker.attach(make_mover(pool, tensors, blocks, 1), layers, tiers)
            self.workers.append(worker)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.loading: dict[str, Request] = {}
        self.received: dict[str, int] = {}
        self.failed: set[str] = set()
        self.done: dict[str, Request] = {}
        self.fresh: set[str] = set()
        """Scheduled for the first time since their blocks were allocated."""
        self.preempted: set[str] = set()
        """Since the last step."""
        self.resumed: set[str] = set()
        """Were preempted once; the first model runner lists them as cached, the second one as new."""
        self.wrong = 0

    # ---- what a user does

    def add(self, request: Request) -> Request:
        self.scheduler.add_request(request)
        self.waiting.append(request)
        return request

    def run(self, *requests: Request, steps: int = 300) -> None:
        for request in requests:
            self.add(request)
        deadline = time.monotonic() + LOAD_S_MAX
        while self.waiting or self.running or self.loading:
            self.step()
            if not self.running:
                # Copies and tiers have threads of their own, and may have to wait for a core.
                time.sleep(1e-3)
                assert time.monotonic() < deadline, "a load hangs"
            else:
                steps -= 1
            assert steps > 0, "no progress: a request hangs"

    def abort(self, request: Request) -> None:
        if request in self.running:
            self.running.remove(request)
        if request in self.waiting:
            self.waiting.remove(request)
        self.scheduler.finish_request(request, list(request.table))
        if request.request_id in self.loading:
            return  # vLLM keeps the blocks until the load has been reported
        self._free(request)

    def preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._free(request)
        request.num_computed_tokens = 0
        self.resumed.add(request.request_id)
        self.preempted.add(request.request_id)
        self.waiting.insert(0, request)

    # ---- a step, in vLLM's order

    def step(self) -> None:
        output, sync_loads = self._schedule()
        try:
            orders = self.scheduler.plan_step(output)
        except PlanningError as failure:
            orders = failure.orders
        merged: WorkerAcks | None = None
        bad: set[int] = set()
        for rank, worker in enumerate(self.workers):
            acks, worker_bad = self._execute(rank, worker, orders, output, sync_loads)
            bad |= worker_bad
            if acks is not None and merged is not None:
                merged.merge(acks)
            elif acks is not None:
                merged = acks
        self._update(output, bad, merged)

    def _schedule(self) -> tuple[Any, bool]:
        counts: dict[str, int] = {}
        added: dict[str, list[int]] = {}
        for request in list(self.running):
            count = min(self.chunk, request.num_tokens - request.num_computed_tokens)
            blocks = self._grow(request, count)
            if blocks is None:
                self.preempt(request)
                continue
            counts[request.request_id], added[request.request_id] = count, blocks
        sync_loads = False
        for request in list(self.waiting):
            tokens, asynchronous = self.scheduler.matched_tokens(request, 0)
            if tokens is None:
                continue
            count = 0 if asynchronous else min(self.chunk, request.num_tokens - tokens)
            if self._grow(request, tokens + count) is None:
                break
            self.waiting.remove(request)
            try:
                self.scheduler.admit(request, list(request.table), tokens)
            except RuntimeError:  # as the connector's barrier does
                self.scheduler.break_promise(request.request_id, list(request.table), tokens)
            request.num_computed_tokens = tokens
            request.cached_tokens = max(request.cached_tokens, tokens)
            if asynchronous:
                self.loading[request.request_id] = request
                continue
            sync_loads = sync_loads or tokens > 0
            self.running.append(request)
            self.fresh.add(request.request_id)
            counts[request.request_id] = count
        return self._describe(counts, added), sync_loads

    def _describe(self, counts: dict[str, int], added: dict[str, list[int]]) -> Any:
        """The SchedulerOutput: new requests with their whole tables, the others with what was added."""
        cached = SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[])
        new: list[Any] = []
        for request in self.running:
            request_id, computed, table = request.request_id, request.num_computed_tokens, list(request.table)
            if request_id not in counts:
                continue
            resumed = request_id in self.resumed
            if request_id in self.fresh and not resumed:
                new.append(
                    SimpleNamespace(req_id=request_id, block_ids=(table,), num_computed_tokens=computed)
                )
                continue
            blocks = table if request_id in self.fresh else added.get(request_id, [])
            if request_id in self.fresh:
                cached.resumed_req_ids.add(request_id)
            cached.req_ids.append(request_id)
            cached.new_block_ids.append((blocks,) if blocks else None)
            cached.num_computed_tokens.append(computed)
        self.fresh.clear()
        preempted, self.preempted = self.preempted, set()
        return SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=counts,
            preempted_req_ids=preempted,
        )

    def _execute(
        self, rank: int, worker: WorkerSide, orders: StepOrders, output: Any, sync_loads: bool
    ) -> tuple[WorkerAcks | None, set[int]]:
        worker.begin_step(orders)
        if sync_loads:
            worker.before_forward(orders)
        bad_now = set(worker.answers.bad_blocks)
        for layer in range(LAYERS):
            for request in self.running:
                if count := output.num_scheduled_tokens.get(request.request_id):
                    self._forward(rank, layer, request, count, not bad_now.isdisjoint(request.table))
            worker.after_layer(orders, f"layer.{layer}")
        if not sync_loads:
            worker.before_forward(orders)
        worker.after_forward(orders)
        received, failed = worker.take_received()
        for request_id in received:
            self.received[request_id] = self.received.get(request_id, 0) + 1
        self.failed |= failed
        bad = worker.take_bad_blocks()
        return worker.take_step_acks(), bad

    def _forward(self, rank: int, layer: int, request: Request, count: int, garbage: bool) -> None:
        tokens, done, kv = request.all_token_ids, request.num_computed_tokens, self.kv[rank][layer]
        for position in range(done + count):
            at = request.table[position // BLOCK], position % BLOCK
            expected = cell(tokens, position, layer, rank)
            if position >= done:
                kv[at] = 0xBAD if garbage else expected
            elif not garbage and kv[at] != expected:
                self.wrong += 1

    def _update(self, output: Any, bad: set[int], acks: WorkerAcks | None) -> None:
        for request in list(self.running):
            count = output.num_scheduled_tokens.get(request.request_id, 0)
            first_bad = next((i for i, b in enumerate(request.table) if b in bad), None)
            if first_bad is not None:
                request.num_computed_tokens = first_bad * BLOCK
                continue
            request.num_computed_tokens += count
            if request.num_computed_tokens == request.num_tokens:
                request.output.append(sum(request.all_token_ids) % 97)
                if len(request.output) == request.max_tokens:
                    self._finish(request)
        self.scheduler.spoiled(bad)
        if acks is not None:
            self.scheduler.acknowledge(acks)
        for request_id, ranks in list(self.received.items()):
            if ranks == len(self.workers):
                del self.received[request_id]
                self.scheduler.received([request_id])
                self._end_load(self.loading.pop(request_id))

    def _end_load(self, request: Request) -> None:
        failed = request.request_id in self.failed
        self.failed.discard(request.request_id)
        if request.request_id in self.done or request.request_id not in self.scheduler._records:
            self._free(request)  # aborted while it loaded
        elif failed:
            self._free(request)
            request.num_computed_tokens = 0
            self.waiting.insert(0, request)
        else:
            if request.num_computed_tokens == request.num_tokens:
                request.num_computed_tokens -= 1
            self._admit_loaded(request)

    def _admit_loaded(self, request: Request) -> None:
        self.scheduler.admit(request, list(request.table), 0)
        self.running.append(request)
        self.fresh.add(request.request_id)

    def _finish(self, request: Request) -> None:
        self.running.remove(request)
        self.done[request.request_id] = request
        self.scheduler.finish_request(request, list(request.table))
        self._free(request)

    def _grow(self, request: Request, tokens: int) -> list[int] | None:
        needed = -(-(request.num_computed_tokens + tokens) // BLOCK) - len(request.table)
        added = self.pool.allocate(max(0, needed))
        if added is not None:
            request.table.extend(added)
        return added

    def _free(self, request: Request) -> None:
        self.pool.free_blocks(self.pool.blocks[i] for i in reversed(request.table))
        request.table = []

    # ---- what must hold when nothing runs

    def assert_idle(self) -> None:
        for _ in range(3):
            self.step()
        stats = self.scheduler.index.stats()
        assert stats["leases"] == stats["reserved"] == stats["leaving"] == 0, stats
        assert stats["free"] + stats["visible"] == stats["rows"], stats
        assert len(self.pool.free) == self.pool.num_gpu_blocks - 1, "blocks are still held"
        assert self.wrong == 0
