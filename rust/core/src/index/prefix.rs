//! The longest prefix of a chain that is held, in O(log n) look-ups.

use super::entry::{NONE, RowState};
use super::table::Table;
use crate::error::Result;
use crate::key::{Key, KeySpace};

/// The keys of a prefix, from its start, one a block. A partial last block is simply the last of them.
///
/// Keys are asked for only where they are needed, and under the index's lock: `key` must not call into the index.
pub trait Chain {
    /// Keys in the chain.
    fn blocks(&self) -> usize;
    /// The key at `position`, below `blocks()`. An error ends the operation, which then has changed nothing.
    fn key(&self, position: usize) -> Result<Key>;
}

impl Chain for [Key] {
    fn blocks(&self) -> usize {
        self.len()
    }

    fn key(&self, position: usize) -> Result<Key> {
        Ok(self[position])
    }
}

/// The chain of block hashes in a key space.
pub struct Hashes<'a> {
    /// Where the hashes belong.
    pub space: &'a KeySpace,
    /// One a block.
    pub hashes: &'a [&'a [u8]],
}

impl Chain for Hashes<'_> {
    fn blocks(&self) -> usize {
        self.hashes.len()
    }

    fn key(&self, position: usize) -> Result<Key> {
        Ok(self.space.key(self.hashes[position]))
    }
}

/// Which rows count.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    Visible,
    /// Those in flight as well.
    Indexed,
}

/// The start of a chain that is there.
pub(super) struct Prefix {
    pub(super) blocks: usize,
    /// The row of its last block.
    pub(super) last: u32,
    /// Whether the block after it is in flight.
    pub(super) pending: bool,
}

impl Table {
    /// The longest prefix of `chain` that is there; none when the chain contradicts what is held: a key of it belongs
    /// to another prefix, which no chain of hashes over whole prefixes can do.
    pub(super) fn longest_prefix(
        &self,
        chain: &(impl Chain + ?Sized),
        presence: Presence,
    ) -> Result<Option<Prefix>> {
        let total = chain.blocks();
        let mut prefix = Prefix { blocks: 0, last: NONE, pending: false };
        // Positions from here on are not there. Presence is monotone: gallop until one is found, then halve.
        let mut end = total;
        while prefix.blocks < end {
            let at = if end == total {
                (2 * prefix.blocks).min(total - 1)
            } else {
                prefix.blocks + (end - prefix.blocks) / 2
            };
            let found = self.find(&chain.key(at)?);
            if found.is_some_and(|row| self.entry(row).depth as usize != at) {
                return Ok(None);
            }
            match found {
                Some(row) if presence == Presence::Indexed || self.entry(row).state == RowState::Visible => {
                    (prefix.blocks, prefix.last) = (at + 1, row);
                }
                _ => (end, prefix.pending) = (at, found.is_some()),
            }
        }
        Ok(self.continues(&prefix, chain)?.then_some(prefix))
    }

    /// Whether the block before the last of `prefix` is the chain's as well.
    fn continues(&self, prefix: &Prefix, chain: &(impl Chain + ?Sized)) -> Result<bool> {
        if prefix.blocks < 2 {
            return Ok(true);
        }
        let parent = self.entry(prefix.last).parent;
        Ok(self.entry(parent).key == chain.key(prefix.blocks - 2)?)
    }
}
