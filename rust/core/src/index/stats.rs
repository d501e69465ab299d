//! What an index counts.

/// Events since the index was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Calls of `lookup`.
    pub lookups: u64,
    /// Those that found at least one block.
    pub hits: u64,
    /// Rows whose bytes arrived while they were still wanted.
    pub committed: u64,
    /// Rows forgotten because their bytes, or those of a row above, did not arrive.
    pub aborted: u64,
    /// Rows that made room for others.
    pub evictions: u64,
    /// Those of them whose bytes no slower tier holds.
    pub unsaved_evictions: u64,
    /// Rows forgotten on request: discarded, cleared, or beyond a smaller limit.
    pub removed: u64,
    /// Keys that found no row.
    pub dropped: u64,
    /// Calls that named a key that is held under another parent.
    pub mismatches: u64,
}

/// A snapshot: gauges in rows, and counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Rows in use or free.
    pub rows: u64,
    /// Rows that hold nothing.
    pub free: u64,
    /// Rows that can be found.
    pub visible: u64,
    /// Rows in flight: their bytes, or those of a row above, are not there yet.
    pub reserved: u64,
    /// Rows that cannot be found any more but are still read or written.
    pub leaving: u64,
    /// Leases that were not released.
    pub leases: u64,
    /// Events since the index was made.
    pub counters: Counters,
}
