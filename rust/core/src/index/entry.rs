//! What the index knows of one row.

use crate::key::Key;

/// In place of a row number: no row.
pub(super) const NONE: u32 = u32::MAX;

/// Row numbers end below this, so that `NONE` and the marks of `Lru` are none of them.
pub(super) const ROWS_MAX: usize = (u32::MAX - 1) as usize;

/// Where a row is in its life: Free, Reserved, (Written,) Visible, Free again, or Leaving on the way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowState {
    /// Nobody's.
    Free,
    /// Its key is taken, its bytes are on the way.
    Reserved,
    /// Its bytes are there, a parent's are not yet.
    Written,
    /// Can be found.
    Visible,
    /// Cannot be found any more, but someone still reads or writes it, or a row below it.
    Leaving,
}

pub(super) const ROW_STATES: usize = RowState::Leaving as usize + 1;

impl RowState {
    /// Whether the key of such a row is in the table of keys.
    pub(super) fn is_indexed(self) -> bool {
        matches!(self, Self::Reserved | Self::Written | Self::Visible)
    }
}

/// One row. Exactly one cache line, as a probe reads `key`, `depth` and `state`, and eviction all the rest.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Entry {
    pub(super) key: Key,
    /// The row of the block before it in its prefix; `NONE` at the start of one.
    pub(super) parent: u32,
    pub(super) first_child: u32,
    pub(super) next_sibling: u32,
    pub(super) prev_sibling: u32,
    /// Blocks before it in its prefix.
    pub(super) depth: u32,
    /// Guards on this row; those on its descendants keep it by being below it.
    pub(super) leases: u32,
    /// Counts the lives of the row, so that a `Match` notices that its row is another's now. It would have to be reused
    /// exactly 2^32 times under one `Match` to be missed.
    pub(super) generation: u32,
    pub(super) state: RowState,
    /// A reservation still owns it: its bytes may be written at any time.
    pub(super) writing: bool,
    /// A slower tier holds its bytes as well, or somebody took them to bring them there.
    pub(super) saved: bool,
}

const _: () = assert!(size_of::<Entry>() == 64, "one entry is one cache line");

impl Entry {
    pub(super) const FREE: Self = Self {
        key: Key::from_bytes([0; 32]),
        parent: NONE,
        first_child: NONE,
        next_sibling: NONE,
        prev_sibling: NONE,
        depth: 0,
        leases: 0,
        generation: 0,
        state: RowState::Free,
        writing: false,
        saved: false,
    };

    pub(super) fn is_leaf(&self) -> bool {
        self.first_child == NONE
    }

    /// Whether nothing stands in the way of freeing this row once it leaves.
    pub(super) fn is_idle_leaf(&self) -> bool {
        self.is_leaf() && self.leases == 0 && !self.writing
    }
}
