//! Which blocks are held, in which row, in what order they may leave. Thread-safe; moves no bytes.

mod check;
mod chunks;
mod departure;
mod entry;
mod guards;
mod prefix;
mod reserve;
mod stats;
mod table;
mod tree;

use std::num::NonZeroU32;
use std::sync::Arc;

pub use self::chunks::chunk_ends;
pub use self::departure::Departure;
pub use self::guards::{Lease, Match, Reservation};
pub use self::prefix::{Chain, Hashes};
pub use self::stats::{Counters, Stats};

use self::entry::NONE;
use self::guards::Anchor;
use self::prefix::Presence;
use self::table::Table;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};

/// An index over a fixed number of rows. Clones are handles of the same index.
///
/// Every key has one row. A row is reserved (being written), visible (can be found) or leaving. A row is visible only
/// when its parent, the row of the block before it, is. Least recently used leaves leave first; leased rows and their
/// ancestors stay.
#[derive(Clone)]
pub struct Index {
    shared: Arc<Shared>,
}

struct Shared {
    /// Copied from the table at the end of each operation, to be read without the lock.
    epoch: AtomicU64,
    table: Mutex<Table>,
}

impl Index {
    /// An index of `rows` rows. Allocates all it will ever need, about 100 bytes a row.
    pub fn new(rows: usize) -> Result<Self> {
        let table = Mutex::new(Table::new(rows)?);
        Ok(Self { shared: Arc::new(Shared { epoch: AtomicU64::new(0), table }) })
    }

    /// Runs `work` under the lock. After a panic in there every call fails: a half-made change could lie.
    fn with<R>(&self, work: impl FnOnce(&mut Table) -> R) -> Result<R> {
        let mut table = self.shared.table.lock();
        if std::mem::replace(&mut table.broken, true) {
            return Err(Error::new(ErrorKind::Internal, "an earlier call panicked, the index is out of use"));
        }
        let result = work(&mut table);
        table.broken = false;
        self.shared.epoch.store(table.epoch, Ordering::Release);
        Ok(result)
    }

    /// Rows in use: as constructed, or shrunk.
    pub fn rows(&self) -> Result<usize> {
        self.with(|table| table.limit as usize)
    }

    /// Changes whenever something becomes visible, is removed or stops being in flight.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.shared.epoch.load(Ordering::Acquire)
    }

    /// The longest visible prefix of `chain`. Counts as a use of what it finds.
    pub fn lookup(&self, chain: &(impl Chain + ?Sized)) -> Result<Match> {
        self.with(|table| {
            table.counters.lookups += 1;
            let Some(prefix) = table.longest_prefix(chain, Presence::Visible)? else {
                table.counters.mismatches += 1;
                return Ok(Match::new(self, 0, false, None));
            };
            let anchor = (prefix.last != NONE).then(|| {
                table.counters.hits += 1;
                table.lru.touch(prefix.last);
                Anchor::of(table, prefix.last)
            });
            Ok(Match::new(self, prefix.blocks, prefix.pending, anchor))
        })?
    }

    /// How many blocks of `chain`, from its start, are visible or in flight. Not a use.
    pub fn present(&self, chain: &(impl Chain + ?Sized)) -> Result<usize> {
        let prefix = self.with(|table| table.longest_prefix(chain, Presence::Indexed))??;
        Ok(prefix.map_or(0, |prefix| prefix.blocks))
    }

    /// Gives a row to each key of `chain` that is neither visible nor in flight.
    ///
    /// Evicts what it needs, never an ancestor of what it reserves. When rows run out, the rest of the chain is dropped.
    /// A chain that contradicts what is held (a key of it is held under another parent) gets no rows from there on.
    pub fn reserve(&self, chain: &(impl Chain + ?Sized)) -> Result<Reservation> {
        let reserved = self.with(|table| table.reserve(chain))??;
        Ok(Reservation::new(self, reserved))
    }

    /// The chunks of `chain` that are visible and were not saved, marked as saved from now on. Whole chunks of the
    /// visible prefix, and the shorter one at the chain's end if all of the chain is visible. None when there are none.
    /// Not a use. Reads every row of the prefix.
    pub fn take_unsaved(
        &self,
        chain: &(impl Chain + ?Sized),
        chunk_blocks: NonZeroU32,
    ) -> Result<Option<Departure>> {
        let taken = self.with(|table| table.take_unsaved(chain, chunk_blocks))??;
        Ok(taken.map(|taken| Departure::new(self, taken)))
    }

    /// Chunks that were not saved of rows that would leave first, marked as saved from now on: at most `chunks_max` in
    /// all. Looks at the `rows_max` coldest rows of the list; of each that could leave it takes the chunk that ends
    /// there, which may be a shorter one, and the chunks before it up to one that was saved. Not a use.
    pub fn take_coldest(
        &self,
        chunk_blocks: NonZeroU32,
        rows_max: usize,
        chunks_max: usize,
    ) -> Result<Vec<Departure>> {
        let taken = self.with(|table| table.take_coldest(chunk_blocks, rows_max, chunks_max))?;
        Ok(taken.into_iter().map(|taken| Departure::new(self, taken)).collect())
    }

    /// Forgets everything; rows that are leased or being written are freed when that ends. Returns rows forgotten.
    pub fn clear(&self) -> Result<u64> {
        self.with(Table::clear)
    }

    /// Uses rows below `rows` only, from now on. Returns rows forgotten. Growing is ignored.
    pub fn shrink(&self, rows: usize) -> Result<u64> {
        self.with(|table| table.shrink(rows))
    }

    /// Gauges and counters.
    pub fn stats(&self) -> Result<Stats> {
        self.with(|table| table.stats())
    }

    /// An error that names the first broken invariant. Reads every row.
    pub fn check_integrity(&self) -> Result<()> {
        self.with(|table| table.check())?
    }
}

#[cfg(test)]
mod tests;
