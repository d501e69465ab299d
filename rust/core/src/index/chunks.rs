//! Chunks: blocks of a prefix that go to later tiers, and come back, as one value.

use std::num::NonZeroU32;

/// Positions of the last blocks of the chunks of a chain of `blocks` blocks, a partial last block among them, from
/// chunk number `first` on. Each chunk has `chunk_blocks` blocks; what is left over at the end is one more.
pub fn chunk_ends(blocks: usize, chunk_blocks: NonZeroU32, first: usize) -> impl Iterator<Item = usize> {
    let size = chunk_blocks.get() as usize;
    (first..blocks.div_ceil(size)).map(move |chunk| blocks.min((chunk + 1) * size) - 1)
}
