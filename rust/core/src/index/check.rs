//! Whether the invariants of `Table` hold: O(rows), for tests and for doubt.

use super::entry::{NONE, RowState};
use super::table::Table;
use crate::error::{Error, ErrorKind, Result};

fn ensure(holds: bool, row: usize, rule: &str) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(Error::new(ErrorKind::Internal, format!("row {row} of the index: {rule}")))
    }
}

impl Table {
    pub(super) fn check(&self) -> Result<()> {
        let mut in_list = vec![false; self.rows.len()];
        for row in self.lru.iter() {
            ensure(!in_list[row as usize], row as usize, "is in the list twice")?;
            in_list[row as usize] = true;
        }
        let mut is_free = vec![false; self.rows.len()];
        for &row in &self.free {
            ensure(row < self.limit && !is_free[row as usize], row as usize, "is free twice, or out of use")?;
            is_free[row as usize] = true;
        }
        for (row, number) in (0..).zip(0..self.rows.len()) {
            self.check_state(row, in_list[number], is_free[number])?;
            self.check_links(row)?;
        }
        self.check_totals()
    }

    fn check_state(&self, row: u32, in_list: bool, is_free: bool) -> Result<()> {
        let entry = self.entry(row);
        let state = entry.state;
        let ensure = |holds, rule| ensure(holds, row as usize, rule);
        ensure(
            state.is_indexed() == (self.find(&entry.key) == Some(row)),
            "is found exactly if it is indexed",
        )?;
        ensure(
            is_free == (state == RowState::Free && row < self.limit),
            "is handed out exactly if it is free",
        )?;
        ensure(
            !entry.saved || !matches!(state, RowState::Free | RowState::Reserved),
            "is saved, and holds nothing",
        )?;
        ensure(state != RowState::Free || entry.is_idle_leaf() && entry.parent == NONE, "is free but used")?;
        ensure(state != RowState::Leaving || !entry.is_idle_leaf(), "is leaving, and nobody uses it")?;
        ensure(state != RowState::Reserved || entry.writing, "is reserved, and nobody writes it")?;
        ensure(!in_list || state == RowState::Visible, "is in the list, and not visible")?;
        let evictable = state == RowState::Visible && entry.is_idle_leaf();
        ensure(in_list || !evictable, "could be evicted, and is not in the list")?;
        ensure(
            entry.leases == 0 || matches!(state, RowState::Visible | RowState::Leaving),
            "is leased unseen",
        )?;
        ensure(
            !entry.writing || matches!(state, RowState::Reserved | RowState::Leaving),
            "is seen half-written",
        )
    }

    fn check_links(&self, row: u32) -> Result<()> {
        let entry = self.entry(row);
        let ensure = |holds, rule| ensure(holds, row as usize, rule);
        if entry.parent != NONE {
            let parent = self.entry(entry.parent);
            ensure(entry.depth == parent.depth + 1, "has another depth than its parent says")?;
            ensure(!entry.state.is_indexed() || parent.state.is_indexed(), "is an orphan")?;
            let hidden = entry.state == RowState::Visible && parent.state != RowState::Visible;
            ensure(!hidden, "is visible, and its parent is not")?;
            let waits = entry.state == RowState::Written && parent.state == RowState::Visible;
            ensure(!waits, "waits for a parent that is visible")?;
        }
        let mut previous = NONE;
        let mut child = entry.first_child;
        while child != NONE {
            let link = self.entry(child);
            ensure(
                link.parent == row && link.prev_sibling == previous,
                "has a child that is linked elsewhere",
            )?;
            (previous, child) = (child, link.next_sibling);
        }
        Ok(())
    }

    fn check_totals(&self) -> Result<()> {
        use RowState::{Free, Leaving, Reserved, Visible, Written};
        let ensure = |holds, rule| ensure(holds, self.rows.len(), rule);
        let leases: u64 = self.rows.iter().map(|entry| u64::from(entry.leases)).sum();
        ensure(leases == self.leases, "(all) leases are not as many as were made")?;
        let indexed = self.rows.iter().filter(|entry| entry.state.is_indexed()).count();
        ensure(indexed == self.keys.len(), "(all) keys are not as many as rows")?;
        let counted = |state| self.rows.iter().filter(|entry| entry.state == state).count() as u64;
        let right = [Free, Reserved, Written, Visible, Leaving]
            .map(|state| counted(state) == self.rows_in_state[state as usize]);
        ensure(!right.contains(&false), "(all) states are miscounted")
    }
}
