//! Chunks: blocks of a prefix that go to slower tiers, and come back, as one value; and which are still to be saved.
//!
//! A chunk is the rows of one prefix whose depth divided by the blocks of a chunk is the same. It has the key of its last
//! row, and was saved if that row is marked. All its rows are marked when it is taken, not only the last: when its end
//! leaves, what is left of it needs no saving once more under another key.

use std::num::NonZeroU32;

use super::entry::{Entry, NONE};
use super::prefix::{Chain, Presence};
use super::table::Table;
use crate::error::Result;
use crate::key::Key;

/// Positions of the last blocks of the chunks of a chain of `blocks` blocks, a partial last block among them, from
/// chunk number `first` on. Each chunk has `chunk_blocks` blocks; what is left over at the end is one more.
pub fn chunk_ends(blocks: usize, chunk_blocks: NonZeroU32, first: usize) -> impl Iterator<Item = usize> {
    let size = chunk_blocks.get() as usize;
    (first..blocks.div_ceil(size)).map(move |chunk| blocks.min((chunk + 1) * size) - 1)
}

/// Chunks of one prefix, from its start on.
#[derive(Debug, Default)]
pub(super) struct Taken {
    pub(super) keys: Vec<Key>,
    /// Chunks before each in the prefix.
    pub(super) positions: Vec<u32>,
    /// Rows of each.
    pub(super) counts: Vec<u32>,
    /// Rows of all.
    pub(super) rows: Vec<u32>,
    /// The last of them, leased.
    pub(super) last: u32,
}

impl Table {
    pub(super) fn take_unsaved(
        &mut self,
        chain: &(impl Chain + ?Sized),
        chunk_blocks: NonZeroU32,
    ) -> Result<Option<Taken>> {
        let Some(prefix) = self.longest_prefix(chain, Presence::Visible)? else {
            self.counters.mismatches += 1;
            return Ok(None);
        };
        let is_complete = prefix.blocks == chain.blocks();
        let left_over = if is_complete { 0 } else { prefix.blocks % chunk_blocks.get() as usize };
        let mut ends = Vec::new();
        let mut end = self.ancestor(prefix.last, left_over);
        while end != NONE {
            if !self.entry(end).saved {
                ends.push(end);
            }
            end = self.chunk_before(end, chunk_blocks);
        }
        Ok(self.take(&ends, chunk_blocks))
    }

    pub(super) fn take_coldest(
        &mut self,
        chunk_blocks: NonZeroU32,
        rows_max: usize,
        chunks_max: usize,
    ) -> Vec<Taken> {
        let is_wanted = |&row: &u32| self.entry(row).is_idle_leaf() && !self.entry(row).saved;
        let leaves: Vec<u32> = self.lru.iter().take(rows_max).filter(is_wanted).collect();
        let mut room = chunks_max;
        let mut all = Vec::new();
        for leaf in leaves {
            let mut ends = Vec::new();
            let mut end = leaf;
            while end != NONE && !self.entry(end).saved && ends.len() < room {
                ends.push(end);
                end = self.chunk_before(end, chunk_blocks);
            }
            room -= ends.len();
            all.extend(self.take(&ends, chunk_blocks));
        }
        all
    }

    /// The last row of the chunk before the one that ends with `end`; `NONE` where it is the first.
    fn chunk_before(&self, end: u32, chunk_blocks: NonZeroU32) -> u32 {
        self.ancestor(end, (self.entry(end).depth % chunk_blocks) as usize + 1)
    }

    /// Marks and leases the chunks that end with `ends`, the last of one prefix first. None where there are none.
    fn take(&mut self, ends: &[u32], chunk_blocks: NonZeroU32) -> Option<Taken> {
        // Those before it are its ancestors.
        let last = *ends.first()?;
        if !self.lease(last) {
            return None;
        }
        let mut taken = Taken { last, ..Taken::default() };
        for &end in ends.iter().rev() {
            let Entry { key, depth, .. } = *self.entry(end);
            let count = depth % chunk_blocks + 1;
            taken.keys.push(key);
            taken.positions.push(depth / chunk_blocks);
            taken.counts.push(count);
            let first = taken.rows.len();
            let mut row = end;
            for _ in 0..count {
                taken.rows.push(row);
                let entry = self.entry_mut(row);
                entry.saved = true;
                row = entry.parent;
            }
            taken.rows[first..].reverse();
        }
        Some(taken)
    }
}
