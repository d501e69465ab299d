"""Blocks that a copy still uses stay in vLLM's block pool until the copy is acknowledged."""

from collections.abc import Callable, Iterable
from typing import Any


class HeldBlocks:
    """References on blocks of vLLM's pool, those of stores given back before the pool is reset.

    A block costs nothing while its request runs. Blocks of requests that have gone, which nobody else could use, are
    at most about `share_max` of the pool: beyond it nothing more is held.
    """

    def __init__(self, share_max: float) -> None:
        self._share_max = share_max
        self._pool: Any = None
        self.orphans = 0
        """Blocks held whose request has gone."""

    def bind(self, pool: Any, before_reset: Callable[[], None]) -> None:
        """Take vLLM's block pool. `before_reset` runs before every reset of it and releases what it can.

        vLLM resets its pool before it asks the connector, and refuses while any block is referenced.
        """
        self._pool = pool
        reset = pool.reset_prefix_cache

        def reset_prefix_cache() -> bool:
            before_reset()
            done: bool = reset()
            return done

        pool.reset_prefix_cache = reset_prefix_cache

    @property
    def bound(self) -> bool:
        """Whether blocks can be held."""
        return self._pool is not None

    @property
    def room(self) -> int:
        """Blocks that may be held for one more store."""
        if self._pool is None:
            return 0
        return max(0, int(self._pool.num_gpu_blocks * self._share_max) - self.orphans)

    def hold(self, block_ids: Iterable[int]) -> list[Any]:
        """Reference blocks that are referenced by a request now, so that they outlive it."""
        blocks = [self._pool.blocks[i] for i in block_ids]
        self._pool.touch(blocks)
        return blocks

    def release(self, blocks: list[Any]) -> None:
        """Give the references back; the last blocks of a prefix are the first to be reused, as in vLLM."""
        self._pool.free_blocks(reversed(blocks))
