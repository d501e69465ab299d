"""vLLM's block pool with its prefix cache, as far as a connector meets it."""

from collections.abc import Iterable
from random import Random
from typing import Any

from toy_engine import Pool


class CachingPool(Pool):
    """Blocks that were freed stay cached until they are reused: at once, or as late as possible, by chance."""

    def __init__(self, blocks: int, caches: bool, source: Random) -> None:
        super().__init__(blocks)
        self._caches, self._source = caches, source
        self.cached: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            assert block.ref_cnt > 0, "a block was given back twice"
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                at = 0 if self._source.random() < 0.3 else len(self.free)
                self.free.insert(at, block.block_id)

    def allocate(self, count: int) -> list[int] | None:
        ids = super().allocate(count)
        self.evict(ids or ())
        return ids

    def find(self, hashes: list[bytes]) -> list[int]:
        found: list[int] = []
        for block_hash in hashes:
            if block_hash not in self.cached:
                break
            found.append(self.cached[block_hash])
        return found

    def take(self, ids: Iterable[int]) -> None:
        """Reference cached blocks, free or not."""
        for i in ids:
            if self.blocks[i].ref_cnt == 0:
                self.free.remove(i)
            self.blocks[i].ref_cnt += 1

    def cache(self, table: list[int], hashes: list[bytes], tokens: int, block_size: int) -> None:
        if not self._caches:
            return
        for i, block_hash in zip(table[: tokens // block_size], hashes, strict=False):
            if block_hash not in self.cached and i not in self._hashes:
                self.cached[block_hash], self._hashes[i] = i, block_hash

    def evict(self, ids: Iterable[int]) -> None:
        for i in ids:
            block_hash = self._hashes.pop(i, None)
            if block_hash is not None:
                del self.cached[block_hash]

    def reset_prefix_cache(self) -> bool:
        if not super().reset_prefix_cache():
            return False
        self.cached.clear()
        self._hashes.clear()
        return True
