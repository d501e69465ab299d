//! Links between rows: prefixes form trees, and whole subtrees leave or become visible. Nothing here recurses, as
//! prefixes may be a hundred thousand blocks long.

use super::entry::{NONE, RowState};
use super::table::Table;

impl Table {
    /// Puts `row` under `parent`, in front of its other children. Rows without a parent are in no list.
    pub(super) fn link(&mut self, row: u32, parent: u32) {
        self.entry_mut(row).parent = parent;
        if parent == NONE {
            return;
        }
        let sibling = std::mem::replace(&mut self.entry_mut(parent).first_child, row);
        self.entry_mut(row).next_sibling = sibling;
        if sibling != NONE {
            self.entry_mut(sibling).prev_sibling = row;
        }
    }

    /// Undoes `link`.
    pub(super) fn unlink(&mut self, row: u32) {
        let entry = self.entry_mut(row);
        let parent = std::mem::replace(&mut entry.parent, NONE);
        let next = std::mem::replace(&mut entry.next_sibling, NONE);
        let prev = std::mem::replace(&mut entry.prev_sibling, NONE);
        if next != NONE {
            self.entry_mut(next).prev_sibling = prev;
        }
        if prev != NONE {
            self.entry_mut(prev).next_sibling = next;
        } else if parent != NONE {
            self.entry_mut(parent).first_child = next;
        }
    }

    /// The row `steps` above `row`; `NONE` beyond the start of the prefix.
    pub(super) fn ancestor(&self, mut row: u32, steps: usize) -> u32 {
        for _ in 0..steps {
            if row == NONE {
                break;
            }
            row = self.entry(row).parent;
        }
        row
    }

    /// Takes `root` and everything below it out of reach, and frees what nobody uses. `root` is indexed. Returns rows
    /// taken out.
    pub(super) fn sweep(&mut self, root: u32) -> u64 {
        let mut removed = 0;
        let mut row = self.first_indexed_leaf(root);
        // Children come before their parents, so that a parent whose children were all freed is a leaf in its turn.
        // What is below a leaving row is leaving as well, and is freed when its own use ends: not visited again.
        loop {
            let parent = self.entry(row).parent;
            let sibling = self.first_sibling(self.entry(row).next_sibling, RowState::is_indexed);
            self.retire(row);
            removed += 1;
            if self.entry(row).is_idle_leaf() {
                self.free(row);
            }
            if row == root {
                self.settle(parent);
                return removed;
            }
            row = if sibling == NONE { parent } else { self.first_indexed_leaf(sibling) };
        }
    }

    fn first_indexed_leaf(&self, mut row: u32) -> u32 {
        loop {
            let child = self.first_sibling(self.entry(row).first_child, RowState::is_indexed);
            if child == NONE {
                return row;
            }
            row = child;
        }
    }

    /// The first among `row` and its next siblings whose state is `wanted`.
    fn first_sibling(&self, mut row: u32, wanted: impl Fn(RowState) -> bool) -> u32 {
        while row != NONE && !wanted(self.entry(row).state) {
            row = self.entry(row).next_sibling;
        }
        row
    }

    /// What follows for `row` when it lost a child, a lease or its writer: a visible leaf counts as used, a leaving one
    /// that nobody uses any more is freed, which may free its parent.
    pub(super) fn settle(&mut self, mut row: u32) {
        while row != NONE && self.entry(row).is_leaf() {
            let entry = self.entry(row);
            match entry.state {
                RowState::Visible => return self.lru.touch(row),
                RowState::Leaving if entry.is_idle_leaf() => {
                    let parent = entry.parent;
                    self.free(row);
                    row = parent;
                }
                _ => return,
            }
        }
    }

    /// Makes `root` visible, and every written row below it that waited only for this.
    pub(super) fn reveal(&mut self, root: u32) {
        let written = |state| state == RowState::Written;
        let mut row = root;
        loop {
            self.set_state(row, RowState::Visible);
            self.epoch += 1;
            if self.entry(row).is_leaf() {
                self.lru.touch(row);
            }
            let mut next = self.first_sibling(self.entry(row).first_child, written);
            while next == NONE {
                if row == root {
                    return;
                }
                next = self.first_sibling(self.entry(row).next_sibling, written);
                row = self.entry(row).parent;
            }
            row = next;
        }
    }
}
