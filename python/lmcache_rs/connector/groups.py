"""Several cache groups behind one index: a slot is one pool row for each group, a table is one list for all groups.

vLLM gives each cache group (layers of one kind of attention) a block table of its own, over one pool of blocks. What is
stored and found is always the blocks of all groups for the same tokens: a slot of the index. Slot s of G groups is the
pool rows s * G to s * G + G - 1, and a table has the G blocks of a position side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np

from lmcache_rs.connector.orders import Numbers

NULL_BLOCK = 0
"""vLLM's placeholder in block tables; it never holds a request's KV."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The cache groups of a model, all with blocks of `block_size` tokens."""

    block_size: int
    windows: tuple[int, ...] = (0,)
    """Of each group: tokens that its attention sees, whose blocks vLLM keeps; 0: all of them."""

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def plain(self) -> bool:
        """One group that keeps all blocks, as most models have it."""
        return self.windows == (0,)

    def table(self, per_group: Sequence[Sequence[int]]) -> list[int]:
        """The block tables of all groups as one. A group that knows of fewer positions has null blocks there."""
        if len(per_group) == 1:
            return list(per_group[0])
        return list(chain.from_iterable(zip_longest(*per_group, fillvalue=NULL_BLOCK)))

    def extend(self, table: list[int], per_group: Sequence[Sequence[int]]) -> None:
        """Add the blocks that a step added. Raises ValueError when groups got different numbers of them."""
        if any(len(added) != len(per_group[0]) for added in per_group):
            raise ValueError(f"cache groups grew by {[len(added) for added in per_group]} blocks")
        table.extend(self.table(per_group))

    def out_of_window(self, group: int, computed: int) -> int:
        """Positions from the start whose blocks vLLM no longer keeps when it goes on after `computed` tokens."""
        window = self.windows[group]
        return max(0, computed - window + 1) // self.block_size if window else 0

    def forget_out_of_window(self, table: list[int], computed: int) -> None:
        """Null the blocks that vLLM has taken from a running request; it does not say so."""
        if self.plain:
            return
        positions = len(table) // len(self)
        for group in range(len(self)):
            gone = min(positions, self.out_of_window(group, computed))
            table[group : gone * len(self) : len(self)] = [NULL_BLOCK] * gone

    def incomplete(self, table: list[int]) -> int:
        """Positions from the start up to the last one that lacks a block of some group."""
        if self.plain:
            return 0
        nulls = np.flatnonzero(np.array(table, dtype=np.uint32) == NULL_BLOCK)
        return int(nulls[-1]) // len(self) + 1 if len(nulls) else 0

    def rows(self, slots: Numbers) -> Numbers:
        """The pool rows of slots, in the order of a table."""
        count = len(self)
        return slots if count == 1 else (slots[:, None] * count + np.arange(count, dtype=np.uint32)).ravel()

    def to_load(self, table: list[int], first: int, end_tokens: int) -> Numbers:
        """The blocks to be loaded, from position `first` on, for a hit of `end_tokens` tokens; null: nothing to load.

        Raises LookupError when a block is missing that the next token will see.
        """
        count, last = len(self), -(-end_tokens // self.block_size)
        blocks = np.array(table[first * count : last * count], dtype=np.uint32)
        if len(blocks) != (last - first) * count:
            raise LookupError(f"{last - first} blocks were promised, the table has {len(blocks) // count}")
        for group in range(count):
            seen = max(0, self.out_of_window(group, end_tokens) - first)
            if (blocks[seen * count + group :: count] == NULL_BLOCK).any():
                raise LookupError(f"blocks of cache group {group} were promised and are not there")
        return blocks
