//! Least recently used first: a doubly linked list over row numbers, every operation O(1).
//!
//! The index puts only visible rows in. It may leave rows in that cannot be evicted at the moment (they have children
//! or leases) and skips them when they come out; how they come back in is written in `index/reserve.rs`.

/// The end of the list.
const END: u32 = u32::MAX;
/// In place of a neighbour: the row is not in the list.
const OUT: u32 = u32::MAX - 1;

#[derive(Clone, Copy)]
struct Link {
    colder: u32,
    hotter: u32,
}

/// Rows by the time of their last use. Rows are numbered below `u32::MAX - 1`.
pub(crate) struct Lru {
    links: Vec<Link>,
    coldest: u32,
    hottest: u32,
}

impl Lru {
    /// An empty list that can take rows below the capacity of `links`, which the caller allocated.
    pub(crate) fn new(rows: usize) -> Result<Self, std::collections::TryReserveError> {
        let mut links = Vec::new();
        links.try_reserve_exact(rows)?;
        links.resize(rows, Link { colder: OUT, hotter: OUT });
        Ok(Self { links, coldest: END, hottest: END })
    }

    pub(crate) fn contains(&self, row: u32) -> bool {
        self.links[row as usize].colder != OUT
    }

    /// Makes `row` the hottest, wherever it was.
    pub(crate) fn touch(&mut self, row: u32) {
        if row == self.hottest {
            return;
        }
        self.remove(row);
        self.links[row as usize] = Link { colder: self.hottest, hotter: END };
        match self.hottest {
            END => self.coldest = row,
            hottest => self.links[hottest as usize].hotter = row,
        }
        self.hottest = row;
    }

    /// Puts `row` in as the coldest; nothing when it is in the list.
    pub(crate) fn enter_coldest(&mut self, row: u32) {
        if self.contains(row) {
            return;
        }
        self.links[row as usize] = Link { colder: END, hotter: self.coldest };
        match self.coldest {
            END => self.hottest = row,
            coldest => self.links[coldest as usize].colder = row,
        }
        self.coldest = row;
    }

    /// Takes `row` out; nothing when it is not in the list.
    pub(crate) fn remove(&mut self, row: u32) {
        if !self.contains(row) {
            return;
        }
        let Link { colder, hotter } = self.links[row as usize];
        match colder {
            END => self.coldest = hotter,
            colder => self.links[colder as usize].hotter = hotter,
        }
        match hotter {
            END => self.hottest = colder,
            hotter => self.links[hotter as usize].colder = colder,
        }
        self.links[row as usize] = Link { colder: OUT, hotter: OUT };
    }

    /// Takes the coldest row out.
    pub(crate) fn pop_coldest(&mut self) -> Option<u32> {
        let row = self.coldest;
        (row != END).then(|| {
            self.remove(row);
            row
        })
    }

    /// Rows from the coldest to the hottest.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        let present = |row: u32| (row != END).then_some(row);
        std::iter::successors(present(self.coldest), move |&row| present(self.links[row as usize].hotter))
            .take(self.links.len())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn does_what_a_vector_does(steps in prop::collection::vec((0..4, 0..6_u32), 0..60)) {
            let mut lru = Lru::new(6).unwrap();
            let mut oracle: Vec<u32> = Vec::new();
            for (operation, row) in steps {
                match operation {
                    0 => {
                        lru.touch(row);
                        oracle.retain(|&other| other != row);
                        oracle.push(row);
                    }
                    1 => {
                        lru.enter_coldest(row);
                        if !oracle.contains(&row) {
                            oracle.insert(0, row);
                        }
                    }
                    2 => {
                        lru.remove(row);
                        oracle.retain(|&other| other != row);
                    }
                    _ => {
                        let coldest = (!oracle.is_empty()).then(|| oracle.remove(0));
                        prop_assert_eq!(lru.pop_coldest(), coldest);
                    }
                }
                prop_assert_eq!(lru.iter().collect::<Vec<_>>(), oracle.clone());
                prop_assert!((0..6).all(|row| lru.contains(row) == oracle.contains(&row)));
            }
        }
    }
}
