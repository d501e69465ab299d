//! What callers hold of an index: matches, leases and reservations. Dropping any of them is always safe.

use super::Index;
use super::entry::RowState;
use super::reserve::Reserved;
use super::table::Table;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::atomic::{AtomicBool, Ordering};

/// A row in one of its lives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Anchor {
    row: u32,
    generation: u32,
}

impl Anchor {
    pub(super) fn of(table: &Table, row: u32) -> Self {
        Self { row, generation: table.entry(row).generation }
    }

    /// The row, if it still is what it was and can be found or is in flight.
    fn indexed(self, table: &Table) -> Option<u32> {
        let entry = table.entry(self.row);
        (entry.generation == self.generation && entry.state.is_indexed()).then_some(self.row)
    }
}

/// What `Index::lookup` found. Holds nothing: what was found may leave at any time unless it is leased.
pub struct Match {
    index: Index,
    blocks: usize,
    pending: bool,
    last: Option<Anchor>,
}

impl Match {
    pub(super) fn new(index: &Index, blocks: usize, pending: bool, last: Option<Anchor>) -> Self {
        Self { index: index.clone(), blocks, pending, last }
    }

    /// Blocks found, from the start of the chain.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Whether the next block is in flight: asking again later may find more.
    #[must_use]
    pub fn pending(&self) -> bool {
        self.pending
    }

    /// Keeps what was found from leaving, until the lease is released. None when nothing was found, or when it left
    /// since. Each call makes another lease.
    pub fn lease(&self) -> Result<Option<Lease>> {
        let Some(last) = self.last else { return Ok(None) };
        self.index.with(|table| {
            let row = last.indexed(table)?;
            let index = self.index.clone();
            let blocks = self.blocks;
            table.lease(row).then(|| Lease { index, row, blocks, released: AtomicBool::new(false) })
        })
    }
}

impl Table {
    /// One more lease on the indexed `row`. False, and nothing done, when it has as many as can be counted.
    pub(super) fn lease(&mut self, row: u32) -> bool {
        // One is left for the protection during a reservation.
        if self.entry(row).leases >= u32::MAX - 1 {
            return false;
        }
        self.entry_mut(row).leases += 1;
        self.leases += 1;
        true
    }

    /// One lease on `row` less. Whether it was the last of a visible row; what that means for its place in the list is
    /// the caller's.
    pub(super) fn end_lease(&mut self, row: u32) -> bool {
        self.leases -= 1;
        let entry = self.entry_mut(row);
        entry.leases -= 1;
        let is_last = entry.leases == 0;
        let is_visible = entry.state == RowState::Visible;
        if is_last && !is_visible {
            self.settle(row);
        }
        is_last && is_visible
    }
}

/// A guard over a matched prefix: its rows neither leave nor change. Dropping it releases it.
///
/// It sits on the last row only. The rows before are that row's ancestors, and stay because rows with children do.
pub struct Lease {
    index: Index,
    row: u32,
    blocks: usize,
    /// Read and written under the index's lock.
    released: AtomicBool,
}

impl Lease {
    /// Rows under the lease; none once it is released.
    #[must_use]
    pub fn blocks(&self) -> usize {
        if self.released.load(Ordering::Relaxed) { 0 } else { self.blocks }
    }

    /// Runs `work` while the lease is sure to be held.
    fn held<R>(&self, work: impl FnOnce(&mut Table) -> R) -> Result<R> {
        self.index.with(|table| {
            if self.released.load(Ordering::Relaxed) {
                return Err(Error::new(
                    ErrorKind::Closed,
                    "the lease was released, its rows may hold anything",
                ));
            }
            Ok(work(table))
        })?
    }

    /// Rows of the blocks from `first` to the end, in prefix order.
    pub fn rows(&self, first: usize) -> Result<Vec<u32>> {
        self.held(|table| {
            let mut rows = vec![0; self.blocks.saturating_sub(first)];
            let mut row = self.row;
            for slot in rows.iter_mut().rev() {
                *slot = row;
                row = table.entry(row).parent;
            }
            rows
        })
    }

    /// Removes the row at position `first` and all its descendants from the index: their content is bad. Returns rows
    /// removed. The lease stays until it is released.
    pub fn discard(&self, first: usize) -> Result<u64> {
        self.held(|table| {
            if first >= self.blocks {
                return 0;
            }
            let row = table.ancestor(self.row, self.blocks - 1 - first);
            table.remove(row)
        })
    }

    /// Ends the lease. Idempotent.
    pub fn release(&self) {
        // An index that failed keeps its rows: there is nobody to tell, and nothing is handed out any more.
        let _ = self.index.with(|table| {
            if self.released.swap(true, Ordering::Relaxed) {
                return;
            }
            if table.end_lease(self.row) {
                table.lru.touch(self.row);
            }
        });
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.release();
    }
}

/// Rows being written. Dropping it aborts it.
pub struct Reservation {
    index: Index,
    reserved: Reserved,
    /// Neither committed nor aborted. Read and written under the index's lock.
    open: AtomicBool,
}

impl Reservation {
    pub(super) fn new(index: &Index, reserved: Reserved) -> Self {
        Self { index: index.clone(), reserved, open: AtomicBool::new(true) }
    }

    /// Position in the chain of the first row reserved here: what was there already comes before.
    #[must_use]
    pub fn first(&self) -> usize {
        self.reserved.first
    }

    /// The rows reserved, in chain order, ascending.
    #[must_use]
    pub fn rows(&self) -> &[u32] {
        &self.reserved.rows
    }

    /// Keys of the chain that found no row.
    #[must_use]
    pub fn dropped(&self) -> usize {
        self.reserved.dropped
    }

    fn close(&self, work: impl FnOnce(&mut Table, &[u32]) -> u64) -> Result<u64> {
        self.index.with(|table| {
            if self.open.swap(false, Ordering::Relaxed) { work(table, &self.reserved.rows) } else { 0 }
        })
    }

    /// The bytes are there: makes the rows visible, each as soon as its parent is. Returns rows that were still wanted
    /// (others were removed meanwhile and are freed). A second call of a `commit` or `abort` does nothing.
    pub fn commit(&self) -> Result<u64> {
        self.close(|table, rows| table.commit(rows, false))
    }

    /// As `commit`, for bytes that came from a slower tier: it has them still.
    pub fn commit_saved(&self) -> Result<u64> {
        self.close(|table, rows| table.commit(rows, true))
    }

    /// The bytes are not there: forgets the rows and all that was reserved on top. Returns rows forgotten.
    pub fn abort(&self) -> Result<u64> {
        self.close(Table::abort)
    }

    /// Removes these rows and all descendants, also after `commit`: their content turned out to be bad. Returns rows
    /// removed. Rows that are still being written are not reused before `commit` or `abort` says that this ended.
    pub fn discard(&self) -> Result<u64> {
        let Some(&row) = self.reserved.rows.first() else { return Ok(0) };
        let first = Anchor { row, generation: self.reserved.generation };
        self.index.with(|table| first.indexed(table).map_or(0, |row| table.remove(row)))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // As for leases: an index that failed hands nothing out any more.
        let _ = self.abort();
    }
}
