"""A mover that copies at any moment between a job's order and its end, in any order, and sees what others change."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcache_rs.connector.orders import StoreOrder

GARBAGE = np.uint64(0xBAD)


@dataclass(slots=True)
class Copy:
    """A job in flight. `snapshot`: what its rows must stay, from its order on if it loads, once copied if it stores.

    `released`: of its blocks those that were released under it.
    """

    job: int
    is_load: bool
    rows: npt.NDArray[np.uint32]
    blocks: npt.NDArray[np.uint32]
    fails: bool
    snapshot: Any = None
    copied: bool = False
    released: set[int] = field(default_factory=set)

    @property
    def kept(self) -> list[int]:
        return [block for block in self.blocks.tolist() if block not in self.released]


class LateMover:
    """One rank's copies between `kv` [blocks, tokens] and rows of its own.

    A load that was joined is done before anything else, and no store overtakes its end, as on a device whose streams
    keep that order; nothing else is in order. `is_held` says whether a block is referenced in vLLM's pool. `touch` is
    told which rows a job uses. `violations` is what must never happen.
    """

    def __init__(
        self,
        source: Random,
        kv: npt.NDArray[np.uint64],
        rows: int,
        fail_share: float,
        is_held: Callable[[int], bool],
        touch: Callable[[int, Any, str], None],
    ) -> None:
        self.rows = rows
        self.store_parts, self.row_bytes = (0,), 8 * kv.shape[1]
        self.memory = np.zeros((rows, kv.shape[1]), np.uint64)
        self.hurry = False
        self._released: set[tuple[int, int]] = set()
        self.violations: list[str] = []
        self._source = source
        self._kv = kv
        self._fail_share = fail_share
        self._is_held = is_held
        self._touch = touch
        self._flying: list[Copy] = []
        self._now: list[tuple[int, int, float]] = []
        self._broken: list[tuple[int, int, float]] = []

    def load_now(self, job: int, rows: Any, blocks: Any, by_layers: bool = False) -> None:
        self.submit_load(job, rows, blocks)

    def submit_load(self, job: int, rows: Any, blocks: Any, by_layers: bool = False) -> None:
        self._flying.append(self._begin(job, True, rows, blocks))

    def join_load(self, job: int, layer: int | None = None) -> None:
        copy = next((copy for copy in self._flying if copy.job == job), None)
        if copy is None:
            return
        if not copy.copied:
            self._copy(copy)
        self._flying.remove(copy)
        self._end(copy)
        if copy.fails:
            self._broken.append((job, -1, 0.0))
        else:
            self._now.append((job, copy.blocks.nbytes, 0.0))

    def gate(self, layer: int) -> None:
        pass

    def gate_load(self, job: int) -> bool:
        """What a replay waits for is there before it reads it."""
        gates = self._source.random() < 0.5
        if gates:
            self.join_load(job)
        return gates

    def rescue(self, rows: Any, blocks: Any) -> bool:
        if self._source.random() < 0.5:
            return False
        self._kv[blocks] = self.memory[rows]
        return True

    def settle_loads(self, seconds: float, by_layers_seconds: float) -> list[int]:
        loads = [copy for copy in self._flying if copy.is_load and not copy.fails]
        return [copy.job for copy in loads if self._source.random() < min(0.5, by_layers_seconds)]

    def store(self, job: int, rows: Any, blocks: Any, part: int | None = None) -> None:
        """All of it: there is one layer."""
        released = self._released.intersection(zip(rows.tolist(), blocks.tolist(), strict=True))
        self._released -= released
        copy = self._begin(job, False, rows, blocks)
        copy.released = {block for _, block in released}
        self._flying.append(copy)
        if self._source.random() < 0.3:
            self._copy(copy)

    def poll(self) -> list[tuple[int, int, float]]:
        ended, self._broken = self._broken, []
        late = bool(self._now) and not self.hurry and self._source.random() < 0.3
        if not late:
            ended += self._now
            self._now = []
        for copy in list(self._flying):
            if not self.hurry and self._source.random() < 0.5:
                continue
            if not copy.copied:
                self._copy(copy)
            elif copy.is_load or not late:
                self._flying.remove(copy)
                self._end(copy)
                ended.append((copy.job, -1 if copy.fails else copy.blocks.nbytes, 0.0))
        return ended

    @property
    def busy(self) -> bool:
        return bool(self._flying or self._now or self._broken)

    def release(self, planned: Iterable[StoreOrder]) -> None:
        """Blocks are released under the stores in flight, and under these that come: their owner knows."""
        for copy in self._flying:
            if not copy.is_load:
                copy.released = set(copy.blocks.tolist())
        for order in planned:
            self._released.update(zip(order.rows.tolist(), order.blocks.tolist(), strict=True))

    def drain(self, seconds: float) -> bool:
        for copy in list(self._flying):
            if copy.is_load:
                self.join_load(copy.job)
        for copy in self._flying:
            if not copy.copied:
                self._copy(copy)
            self._end(copy)
            ended = (copy.job, -1 if copy.fails else copy.blocks.nbytes, 0.0)
            (self._broken if copy.fails else self._now).append(ended)
        self._flying.clear()
        return True

    def close(self) -> None:
        """Nothing to end."""

    def _begin(self, job: int, is_load: bool, rows: Any, blocks: Any) -> Copy:
        if self._source.random() < self._fail_share / 2:
            raise RuntimeError("injected: refused")
        if int(rows.max(initial=0)) >= self.rows:
            raise ValueError("a row outside of the pool")
        self._touch(job, rows, "load" if is_load else "store")
        copy = Copy(job, is_load, rows, blocks, self._source.random() < self._fail_share / 2)
        for other in self._flying:
            if not (is_load and other.is_load) and np.intersect1d(rows, other.rows).size:
                self.violations.append(f"jobs {other.job} and {job} share rows, and one of them writes")
            if is_load and np.intersect1d(blocks, other.kept).size:
                self.violations.append(f"load {job} writes blocks that job {other.job} uses")
        if is_load:
            copy.snapshot = self.memory[rows]
        return copy

    def _copy(self, copy: Copy) -> None:
        copy.copied = True
        if not all(map(self._is_held, copy.kept)):
            self.violations.append(f"job {copy.job} touches a block that was given back")
        if copy.is_load:
            self._kv[copy.blocks] = GARBAGE if copy.fails else self.memory[copy.rows]
        else:
            self.memory[copy.rows] = GARBAGE if copy.fails else self._kv[copy.blocks]
            copy.snapshot = self.memory[copy.rows]

    def _end(self, copy: Copy) -> None:
        if not np.array_equal(copy.snapshot, self.memory[copy.rows]):
            self.violations.append(f"rows of job {copy.job} were written by another job")
