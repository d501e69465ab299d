//! `Departure`: chunks on their way to a slower tier, and the lease that keeps their rows until they are there.

use super::Index;
use super::chunks::Taken;
use crate::key::Key;
use crate::sync::atomic::{AtomicBool, Ordering};

/// Chunks of one prefix that a slower tier is to hold, from the start of the prefix on. Their rows neither leave nor
/// change until this is released or dropped. That is no use of them: where they are among those that leave first, they
/// stay; what was passed over meanwhile is the next to leave.
pub struct Departure {
    index: Index,
    taken: Taken,
    /// Read and written under the index's lock.
    released: AtomicBool,
}

impl Departure {
    pub(super) fn new(index: &Index, taken: Taken) -> Self {
        Self { index: index.clone(), taken, released: AtomicBool::new(false) }
    }

    /// The key of each chunk: that of its last row.
    #[must_use]
    pub fn keys(&self) -> &[Key] {
        &self.taken.keys
    }

    /// For each chunk, the number of chunks before it in its prefix.
    #[must_use]
    pub fn positions(&self) -> &[u32] {
        &self.taken.positions
    }

    /// For each chunk, the number of its rows.
    #[must_use]
    pub fn counts(&self) -> &[u32] {
        &self.taken.counts
    }

    /// The rows of all chunks, one after the other, in prefix order. Once this is released they may hold anything.
    #[must_use]
    pub fn rows(&self) -> &[u32] {
        &self.taken.rows
    }

    /// Ends the lease. Idempotent.
    pub fn release(&self) {
        self.end(true);
    }

    /// Ends the lease of chunks that no slower tier has taken: they are still to be saved.
    pub fn release_unsaved(&self) {
        self.end(false);
    }

    fn end(&self, saved: bool) {
        // As for `Lease`: an index that failed keeps its rows.
        let _ = self.index.with(|table| {
            if self.released.swap(true, Ordering::Relaxed) {
                return;
            }
            if !saved {
                // The leased row and ancestors of it: nobody else's until now.
                for &row in &self.taken.rows {
                    table.entry_mut(row).saved = false;
                }
            }
            let last = self.taken.last;
            if table.end_lease(last) && table.entry(last).is_idle_leaf() {
                // Out of the list only if it came out at its cold end: all that is left is hotter.
                table.lru.enter_coldest(last);
            }
        });
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        self.release();
    }
}
