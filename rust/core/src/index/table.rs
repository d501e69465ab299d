//! The rows, the keys that lead to them, and the few steps that change what a row is.

use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;
use hashbrown::hash_table::Entry as Slot;

use super::entry::{Entry, NONE, ROW_STATES, ROWS_MAX, RowState};
use super::stats::{Counters, Stats};
use crate::error::{Error, ErrorKind, Result};
use crate::evict::Lru;
use crate::key::Key;

/// Everything behind the lock of an index. All memory is allocated by `new`; nothing grows afterwards.
///
/// Invariants, checked by `check`: an indexed row is the only one of its key, and its parent is indexed (or it has
/// none). A visible row's parent is visible. So presence and visibility are both monotone along a prefix. A leaving row
/// stays linked to its parent until it is freed, so that a lease can walk up to the start of its prefix. Every row that
/// can be evicted is in the list `lru`.
pub(super) struct Table {
    pub(super) rows: Vec<Entry>,
    pub(super) lru: Lru,
    /// Rows to hand out, below `limit`, the next one last.
    pub(super) free: Vec<u32>,
    /// Rows from here on are not used any more.
    pub(super) limit: u32,
    pub(super) counters: Counters,
    /// Leases of callers. A row that is protected during a reservation does not count.
    pub(super) leases: u64,
    /// See `Index::epoch`.
    pub(super) epoch: u64,
    /// An operation panicked half-way: nothing here can be trusted.
    pub(super) broken: bool,
    pub(super) keys: HashTable<u32>,
    seeds: [u64; 2],
    pub(super) rows_in_state: [u64; ROW_STATES],
}

impl Table {
    pub(super) fn new(rows: usize) -> Result<Self> {
        let limit = u32::try_from(rows).ok().filter(|_| (1..=ROWS_MAX).contains(&rows)).ok_or_else(|| {
            Error::new(ErrorKind::InvalidArgument, format!("rows is {rows}, it must be from 1 to {ROWS_MAX}"))
        })?;
        Self::allocate(rows, limit)
            .map_err(|_| Error::new(ErrorKind::OutOfMemory, format!("no memory for an index of {rows} rows")))
    }

    fn allocate(rows: usize, limit: u32) -> std::result::Result<Self, Box<dyn std::error::Error>> {
        let mut entries = Vec::new();
        entries.try_reserve_exact(rows)?;
        entries.resize(rows, Entry::FREE);
        let mut free = Vec::new();
        free.try_reserve_exact(rows)?;
        free.extend((0..limit).rev());
        // Never more than half full: hashbrown then never grows it. Few removals leave a tombstone, and when these have
        // used up the room, after many evictions a row, it rehashes in place.
        let mut keys = HashTable::new();
        keys.try_reserve(2 * rows, |_| 0).map_err(|error| format!("{error:?}"))?;
        let random = RandomState::new();
        let mut rows_in_state = [0; ROW_STATES];
        rows_in_state[RowState::Free as usize] = rows as u64;
        Ok(Self {
            rows: entries,
            lru: Lru::new(rows)?,
            free,
            limit,
            counters: Counters::default(),
            leases: 0,
            epoch: 0,
            broken: false,
            keys,
            seeds: [random.hash_one(0), random.hash_one(1) | 1],
            rows_in_state,
        })
    }

    pub(super) fn entry(&self, row: u32) -> &Entry {
        &self.rows[row as usize]
    }

    pub(super) fn entry_mut(&mut self, row: u32) -> &mut Entry {
        &mut self.rows[row as usize]
    }

    /// The row that holds `key`, be it visible or in flight.
    pub(super) fn find(&self, key: &Key) -> Option<u32> {
        self.keys.find(slot_hash(self.seeds, key), |&row| self.entry(row).key == *key).copied()
    }

    /// Makes the free `row`, taken from `free`, the reserved row of `key` under `parent`. False, and nothing done, when
    /// the key has a row.
    pub(super) fn occupy(&mut self, row: u32, key: Key, parent: u32) -> bool {
        let (rows, seeds) = (&self.rows, self.seeds);
        let same = |&other: &u32| rows[other as usize].key == key;
        let hash = |&other: &u32| slot_hash(seeds, &rows[other as usize].key);
        match self.keys.entry(slot_hash(seeds, &key), same, hash) {
            Slot::Occupied(_) => return false,
            Slot::Vacant(slot) => slot.insert(row),
        };
        let depth = if parent == NONE { 0 } else { self.entry(parent).depth + 1 };
        let entry = self.entry_mut(row);
        entry.key = key;
        entry.depth = depth;
        entry.writing = true;
        self.set_state(row, RowState::Reserved);
        self.link(row, parent);
        true
    }

    /// Takes the indexed `row` out of reach: it is leaving, and cannot be found or evicted.
    pub(super) fn retire(&mut self, row: u32) {
        let hash = slot_hash(self.seeds, &self.entry(row).key);
        if let Ok(slot) = self.keys.find_entry(hash, |&other| other == row) {
            slot.remove();
        }
        self.lru.remove(row);
        self.set_state(row, RowState::Leaving);
        self.epoch += 1;
    }

    /// Ends the life of the leaving `row`, an idle leaf.
    pub(super) fn free(&mut self, row: u32) {
        debug_assert!(self.entry(row).is_idle_leaf() && self.entry(row).state == RowState::Leaving);
        self.unlink(row);
        self.set_state(row, RowState::Free);
        let entry = self.entry_mut(row);
        entry.generation = entry.generation.wrapping_add(1);
        entry.saved = false;
        if row < self.limit {
            self.free.push(row);
        }
    }

    pub(super) fn set_state(&mut self, row: u32, state: RowState) {
        let entry = &mut self.rows[row as usize];
        self.rows_in_state[entry.state as usize] -= 1;
        self.rows_in_state[state as usize] += 1;
        entry.state = state;
    }

    pub(super) fn stats(&self) -> Stats {
        let rows_in = |state: RowState| self.rows_in_state[state as usize];
        Stats {
            rows: u64::from(self.limit),
            free: self.free.len() as u64,
            visible: rows_in(RowState::Visible),
            reserved: rows_in(RowState::Reserved) + rows_in(RowState::Written),
            leaving: rows_in(RowState::Leaving),
            leases: self.leases,
            counters: self.counters,
        }
    }
}

/// Where a key goes in the table of keys. Keys are uniform already; the folded product with random seeds keeps whoever
/// can choose prompts from choosing keys that collide here.
fn slot_hash(seeds: [u64; 2], key: &Key) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&key.as_bytes()[..8]);
    let product = u128::from(u64::from_le_bytes(word) ^ seeds[0]) * u128::from(seeds[1]);
    #[expect(clippy::cast_possible_truncation, reason = "both halves are used")]
    let folded = (product as u64) ^ ((product >> 64) as u64);
    folded
}
