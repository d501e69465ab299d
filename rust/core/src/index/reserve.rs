//! The life of a row: reserved, committed or aborted, evicted for another.
//!
//! Eviction is exact least-recently-used over leaves, where the last use of a row is the latest of its own and its
//! descendants'. The list needs no time stamps for it: a row with children, or leased, that comes out of the cold end
//! just leaves the list, and comes back either by a use (hot end) or when its last child is evicted, at the cold end, as
//! it was last used when that child was.

use super::entry::{NONE, RowState};
use super::prefix::{Chain, Presence};
use super::table::Table;
use crate::error::Result;

/// What `Table::reserve` took.
#[derive(Default)]
pub(super) struct Reserved {
    /// Position in the chain of the first row.
    pub(super) first: usize,
    /// In chain order, and ascending, so that rows of one prefix lie in runs.
    pub(super) rows: Vec<u32>,
    /// The generation of the first row. It stands for all: the others are below it and go when it goes.
    pub(super) generation: u32,
    pub(super) dropped: usize,
}

impl Table {
    /// Gives a row to each key of `chain` that has none, as far as there are rows; what finds none is the chain's end.
    pub(super) fn reserve(&mut self, chain: &(impl Chain + ?Sized)) -> Result<Reserved> {
        let Some(prefix) = self.longest_prefix(chain, Presence::Indexed)? else {
            self.counters.mismatches += 1;
            self.counters.dropped += chain.blocks() as u64;
            return Ok(Reserved { dropped: chain.blocks(), ..Reserved::default() });
        };
        let wanted = chain.blocks() - prefix.blocks;
        // Derived before anything changes, because it may fail; and no more than could ever be given.
        let keys = (prefix.blocks..chain.blocks())
            .take(self.limit as usize)
            .map(|position| chain.key(position))
            .collect::<Result<Vec<_>>>()?;
        let mut rows = self.take_rows(keys.len(), prefix.last);
        let mut parent = prefix.last;
        let mut taken = 0;
        for (&row, key) in rows.iter().zip(keys) {
            if !self.occupy(row, key, parent) {
                // The key is held elsewhere: the chain contradicts what is held, or names a key twice.
                self.counters.mismatches += 1;
                break;
            }
            parent = row;
            taken += 1;
        }
        self.free.extend(rows.drain(taken..).rev());
        self.unprotect(prefix.last);
        let dropped = wanted - taken;
        self.counters.dropped += dropped as u64;
        let generation = rows.first().map_or(0, |&row| self.entry(row).generation);
        Ok(Reserved { first: prefix.blocks, rows, generation, dropped })
    }

    /// Takes up to `count` rows, ascending, evicting others as needed but not `parent`, which stays protected.
    fn take_rows(&mut self, count: usize, parent: u32) -> Vec<u32> {
        if parent != NONE {
            self.entry_mut(parent).leases += 1;
        }
        while self.free.len() < count && self.evict() {}
        let mut rows = self.free.split_off(self.free.len().saturating_sub(count));
        rows.sort_unstable();
        rows
    }

    fn unprotect(&mut self, row: u32) {
        if row == NONE {
            return;
        }
        self.entry_mut(row).leases -= 1;
        let entry = self.entry(row);
        // Eviction may have taken it out of the list, or its last child away. All that is left in the list is hotter.
        if entry.is_idle_leaf() && entry.state == RowState::Visible {
            self.lru.enter_coldest(row);
        }
    }

    /// Frees the least recently used leaf. False when there is none.
    fn evict(&mut self) -> bool {
        while let Some(row) = self.lru.pop_coldest() {
            let entry = self.entry(row);
            if !entry.is_idle_leaf() {
                continue;
            }
            let (parent, saved) = (entry.parent, entry.saved);
            self.retire(row);
            self.free(row);
            self.counters.evictions += 1;
            self.counters.unsaved_evictions += u64::from(!saved);
            if parent != NONE && self.entry(parent).is_idle_leaf() {
                self.lru.enter_coldest(parent);
            }
            return true;
        }
        false
    }

    /// The bytes of `rows`, which one reservation took, are there, and in a slower tier as well if `saved`. Returns rows
    /// that were still wanted.
    pub(super) fn commit(&mut self, rows: &[u32], saved: bool) -> u64 {
        // What was removed meanwhile hangs below its first row, so it is the end of the chain.
        let wanted = rows.iter().take_while(|&&row| self.entry(row).state == RowState::Reserved).count();
        self.end_writing(rows, wanted);
        for &row in &rows[..wanted] {
            self.entry_mut(row).saved = saved;
            let parent = self.entry(row).parent;
            if parent == NONE || self.entry(parent).state == RowState::Visible {
                self.reveal(row);
            } else {
                self.set_state(row, RowState::Written);
            }
        }
        self.counters.committed += wanted as u64;
        wanted as u64
    }

    /// The bytes of `rows`, which one reservation took, will not come. Returns rows forgotten.
    pub(super) fn abort(&mut self, rows: &[u32]) -> u64 {
        let removed = match rows.first() {
            Some(&row) if self.entry(row).state.is_indexed() => self.sweep(row),
            _ => 0,
        };
        self.end_writing(rows, 0);
        self.counters.aborted += removed;
        removed
    }

    /// Nobody writes `rows` any more. Frees those after the first `kept`, which are leaving, unless others need them.
    fn end_writing(&mut self, rows: &[u32], kept: usize) {
        for &row in rows {
            self.entry_mut(row).writing = false;
        }
        for &row in rows[kept..].iter().rev() {
            self.settle(row);
        }
    }

    /// Removes the indexed `row` and all below it. Returns rows removed.
    pub(super) fn remove(&mut self, row: u32) -> u64 {
        let removed = if self.entry(row).state.is_indexed() { self.sweep(row) } else { 0 };
        self.counters.removed += removed;
        removed
    }

    /// Removes everything. Returns rows removed.
    pub(super) fn clear(&mut self) -> u64 {
        self.remove_from(0)
    }

    /// Stops using rows from `limit` on. Returns rows removed.
    pub(super) fn shrink(&mut self, limit: usize) -> u64 {
        let Some(limit) = u32::try_from(limit).ok().filter(|&limit| limit < self.limit) else {
            return 0;
        };
        self.limit = limit;
        self.free.retain(|&row| row < limit);
        self.remove_from(limit)
    }

    fn remove_from(&mut self, first: u32) -> u64 {
        let mut removed = 0;
        for row in first..u32::try_from(self.rows.len()).unwrap_or(NONE) {
            removed += self.remove(row);
        }
        removed
    }
}
