"""How a prompt is cut into chunks, the unit of disk and Redis: so many blocks each, the last one what is left."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chain:
    """The block hashes of a prompt, and that of its partial last block where that is kept too."""

    hashes: Sequence[bytes]
    tail: bytes | None

    def __len__(self) -> int:
        return len(self.hashes) + (self.tail is not None)


@dataclass(frozen=True, slots=True)
class Chunks:
    """Chunks of `blocks` blocks. The partial last block of a prompt counts as a block of its last chunk."""

    blocks: int

    def count(self, chain: Chain) -> int:
        """Chunks of the chain, the last one shorter if need be."""
        return -(-len(chain) // self.blocks)

    def up_to(self, chain: Chain, number: int) -> Chain:
        """The chain's beginning that ends with chunk `number`."""
        end = (number + 1) * self.blocks
        if end >= len(chain):
            return chain
        return Chain(chain.hashes[:end], None)

    def whole(self, blocks: int) -> int:
        """Blocks of the first `blocks` that make whole chunks."""
        return blocks // self.blocks * self.blocks
