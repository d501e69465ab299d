"""The mover for KV that lies in the machine's own memory: Rust threads copy, without the GIL."""

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lmcache_rs._core import HostPool, KvLayers, Mover
from lmcache_rs.errors import LMCacheRsError

JOIN_S_MAX = 5.0
"""Waiting for loads takes at most this long; they are memory copies."""

Numbers = npt.NDArray[np.uint32]

CLOSE_S_MAX = 5.0
"""Closing waits this long for copies in flight; they are memory copies, so seconds mean something is very wrong."""


class CpuMover:
    """Copies whole blocks: on the CPU the inside of a block is packed for the instruction set and has no meaning here.

    Stores are done at once: on this device a copy in the background competes with the model for the same cores, and a
    store that ended in its step is found by a repeat that is sent right after the answer.
    """

    def __init__(self, pool: HostPool, tensors: Sequence[Any], blocks: int, threads: int) -> None:
        self._pool = pool
        self._mover = Mover(pool, KvLayers([as_blocks(t, blocks) for t in tensors]), threads)
        self._ended: list[tuple[int, int, float]] = []
        self._closed = False

    @property
    def rows(self) -> int:
        """Rows of the pool."""
        return self._pool.rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a block."""
        return self._pool.row_bytes

    def load_now(self, job: int, rows: Numbers, blocks: Numbers, by_layers: bool = False) -> None:
        """Load now, whole rows; the result comes with the next poll."""
        self._copy("load", job, rows, blocks)

    def submit_load(self, job: int, rows: Numbers, blocks: Numbers, by_layers: bool = False) -> None:
        """Load in the background, whole rows."""
        self._mover.submit("load", job, rows, blocks)

    def join_load(self, job: int, layer: int | None = None) -> None:
        """Wait for a load: at once if it was made between two steps, else until none is in flight."""
        if any(ended == job for ended, _, _ in self._ended):
            return
        if not self._mover.drain(JOIN_S_MAX):
            raise LMCacheRsError(f"load {job} did not end in {JOIN_S_MAX:.0f} s")

    def is_captured(self) -> bool:
        """Never."""
        return False

    def gate(self, layer: int) -> None:
        """Nothing: there are no captures."""

    def gate_load(self, job: int) -> bool:
        """No."""
        return False

    def rescue(self, rows: Numbers, blocks: Numbers) -> bool:
        """No: there is no other way than the one that failed."""
        return False

    def settle_loads(self, seconds: float, by_layers_seconds: float) -> list[int]:
        """None: here nothing could wait for the rest of a load but the engine's own thread."""
        return []

    @property
    def store_parts(self) -> Sequence[int]:
        """None: a store is done before the next layer is computed, and takes as long by parts."""
        return ()

    def store(self, job: int, rows: Numbers, blocks: Numbers, part: int | None = None) -> None:
        """Store now, whole rows; the result comes with the next poll."""
        self._copy("store", job, rows, blocks)

    def _copy(self, direction: Literal["store", "load"], job: int, rows: Numbers, blocks: Numbers) -> None:
        began = time.perf_counter()
        moved = self._mover.copy(direction, rows, blocks)
        self._ended.append((job, moved, time.perf_counter() - began))

    def drain(self, seconds: float) -> bool:
        """Wait until no copy is in flight; False when that took longer."""
        return self._mover.drain(seconds)

    def poll(self) -> list[tuple[int, int, float]]:
        """Jobs that ended since the last call: (job, bytes or -1, seconds)."""
        ended, self._ended = self._ended, []
        return ended if self._closed else ended + self._mover.poll()

    def close(self) -> bool:
        """End the copies and their threads; what ended until then can still be polled. Safe twice.

        Whether no thread can still write: false only when a piece of half a megabyte was not copied in a second.
        """
        if not self._closed:
            self._mover.drain(CLOSE_S_MAX)
            self._ended += self._mover.poll()
            self._closed = True
            self._mover.close(0)
        # The first call gives up what was not begun and says so; a second one tells whether the rest has ended.
        return self._mover.close(0)


def as_blocks(tensor: Any, blocks: int) -> Any:
    """A view [blocks, ...] of a layer's KV tensor, whose first dimension may count smaller kernel blocks."""
    if tensor.shape[0] == blocks:
        return tensor
    if tensor.shape[0] % blocks:
        raise ValueError(f"{tensor.shape[0]} kernel blocks do not make {blocks} blocks")
    return tensor.unflatten(0, (blocks, tensor.shape[0] // blocks))
