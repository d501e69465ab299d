"""The ranks of the random engine: they carry out steps, compute KV from KV, and answer late."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from late_mover import GARBAGE, LateMover
from late_tier import LateTiers, World
from toy_engine import BLOCK
from toy_prompts import Prompt

from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.orders import StepOrders, WorkerAcks
from lmcache_rs.connector.pace import Pace
from lmcache_rs.connector.tier_worker import TierWorker
from lmcache_rs.connector.worker import WorkerSide


@dataclass(frozen=True, slots=True)
class Shape:
    """What an engine is like; `overlap`: steps that are planned before the output of an earlier one is seen."""

    blocks: int
    caches: bool
    """Whether vLLM finds blocks in its own pool."""
    rows: int
    ranks: int
    chunk: int
    overlap: int
    fail_share: float
    failed_as_blocks: bool
    resumed_are_new: bool
    holders_go_first: bool
    """As in vLLM since 0.32."""
    nearby: bool
    layered: bool
    """Whether synchronous loads may come by layers."""
    tiers: tuple[str, ...]
    """Slower tiers, the quickest first."""
    extra: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """What a step computes of a request: `count` tokens from `start` on, and one more if it `samples`."""

    request: Prompt
    start: int
    count: int
    samples: bool
    table: list[int]


@dataclass(slots=True)
class Step:
    """A step in flight, and what the ranks said of it. Requests in `spoiled` were computed from KV of other tokens."""

    orders: StepOrders
    parts: list[Part]
    sync_loads: dict[str, range]
    """The tokens that are loaded synchronously, by request."""
    spoiled: set[str] = field(default_factory=set)
    bad: set[int] = field(default_factory=set)
    acks: WorkerAcks | None = None
    received: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)


class Soon(Pace):
    """Steps are regular, and longer than copies."""

    def lead(self) -> float:
        return 1.0


class Ranks:
    """Workers over numpy KV of one layer, each with a mover of its own."""

    def __init__(
        self,
        shape: Shape,
        world: World,
        source: Random,
        count: Callable[[str], None],
        is_held: Callable[[int], bool],
    ) -> None:
        self._source = source
        self._world = world
        self.tiers = LateTiers(world.media, shape.ranks)
        self._failed_as_blocks = shape.failed_as_blocks
        self.movers: list[LateMover] = []
        self.workers: list[WorkerSide] = []
        self._kv = [np.zeros((shape.blocks, BLOCK), np.uint64) for _ in range(shape.ranks)]
        for rank, kv in enumerate(self._kv):
            rows = shape.rows - (source.randrange(shape.rows) if source.random() < 0.05 else 0)
            touch = partial(self.tiers.claims.touch, rank)
            mover = LateMover(source, kv, rows, shape.fail_share, is_held, touch)
            worker = WorkerSide(Barrier(count), Soon(1))
            if source.random() < 0.99:
                pool: Any = mover.memory
                tiers = TierWorker(pool, self.tiers.opener(rank), Barrier(count))
                worker.attach(mover, {"l": 0}, tiers)
                if source.random() < 0.5:
                    worker.capture_layer("l")
                if shape.layered:
                    worker._stored_layers.takes = bool  # type: ignore[method-assign]
            else:
                worker.attach(None, {"l": 0})
            self.movers.append(mover)
            self.workers.append(worker)

    def _before_forward(self, worker: WorkerSide, step: Step) -> None:
        """A forward that asks for its layers, or a captured one."""
        asks = self._source.random() < 0.5
        worker.before_forward(step.orders, by_layers=asks)
        if asks:
            worker.before_layer("l")

    def execute(self, step: Step) -> None:
        """In the order of vLLM's hooks."""
        for rank, worker in enumerate(self.workers):
            worker.begin_step(step.orders)
            if step.sync_loads:
                self._before_forward(worker, step)
            for part in step.parts:
                self._forward(rank, step, part)
            if step.parts and self._source.random() < 0.5:
                worker.after_layer(step.orders, self._source.choice(["l", "one that is not stored"]))
            if not step.sync_loads:
                worker.before_forward(step.orders)
            if step.parts:  # vLLM up to 0.30 does not call it otherwise
                worker.after_forward(step.orders)
            received, failed = worker.take_received(self._failed_as_blocks)
            step.received += received
            step.failed |= set() if self._failed_as_blocks else failed
            step.bad |= worker.take_bad_blocks()
            acks = worker.take_step_acks()
            if acks is not None and step.acks is not None:
                step.acks.merge(acks)
            elif acks is not None:
                step.acks = acks

    def _forward(self, rank: int, step: Step, part: Part) -> None:
        request, start, end = part.request, part.start, part.start + part.count
        kv = self._kv[rank].reshape(-1)
        at = (np.array(part.table)[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
        right = np.array_equal(kv[at[:start]], self.cells(request, rank, 0, start))
        kv[at[start:end]] = self.cells(request, rank, start, end) if right else GARBAGE
        if not right:
            step.spoiled.add(request.request_id)

    def cells(self, request: Prompt, rank: int, start: int, end: int) -> npt.NDArray[np.uint64]:
        """What the KV of these tokens must be."""
        return request.cells_of(rank, start, end) ^ np.uint64(self._world.weights << 8)

    def holds(self, request: Prompt, rows: list[int]) -> bool:
        """Whether rows hold the request's KV from its start on, on every rank."""
        count = min(len(rows) * BLOCK, request.num_tokens)
        return all(
            np.array_equal(mover.memory[rows].reshape(-1)[:count], self.cells(request, rank, 0, count))
            for rank, mover in enumerate(self.movers)
        )

    @property
    def rows(self) -> int:
        """Those that every rank has."""
        return min(mover.rows for mover in self.movers)

    def violations(self) -> list[str]:
        return self.tiers.violations() + [what for mover in self.movers for what in mover.violations]

    def hurry(self) -> None:
        """All that is under way ends soon from now on."""
        self.tiers.hurry()
        for mover in self.movers:
            mover.hurry = True
