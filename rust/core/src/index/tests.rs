//! Single behaviours of the index, one a test; `tests/index_model.rs` checks them all together.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use super::*;
use crate::key::{Key, KeySpace};

fn chain(names: &[&str]) -> Vec<Key> {
    let space = KeySpace::new("test", 0, &[]);
    (1..=names.len()).map(|end| space.key(names[..end].join("/").as_bytes())).collect()
}

/// A chain of `blocks` blocks that shares nothing with those of other numbers.
fn long_chain(number: usize, blocks: usize) -> Vec<Key> {
    let space = KeySpace::new("long", u32::try_from(number).unwrap(), &[]);
    (0..blocks).map(|block| space.key(&block.to_le_bytes())).collect()
}

fn store(index: &Index, keys: &[Key]) -> Vec<u32> {
    let reservation = index.reserve(keys).unwrap();
    reservation.commit().unwrap();
    reservation.rows().to_vec()
}

fn found(index: &Index, keys: &[Key]) -> usize {
    let found = index.lookup(keys).unwrap().blocks();
    index.check_integrity().unwrap();
    found
}

/// Counts the keys that were derived.
struct Counted<'a>(&'a [Key], std::cell::Cell<usize>);

impl Chain for Counted<'_> {
    fn blocks(&self) -> usize {
        self.0.len()
    }

    fn key(&self, position: usize) -> Result<Key> {
        self.1.set(self.1.get() + 1);
        Ok(self.0[position])
    }
}

#[test]
fn finds_the_longest_prefix_with_few_keys() {
    let index = Index::new(5000).unwrap();
    let keys = long_chain(0, 8192);
    assert_eq!(store(&index, &keys[..5000]).len(), 5000);
    for (blocks, derived_max) in [(8192, 28), (5000, 28), (4999, 28), (1, 1), (0, 0)] {
        let chain = Counted(&keys[..blocks], 0.into());
        assert_eq!(index.lookup(&chain).unwrap().blocks(), blocks.min(5000));
        assert!(chain.1.get() <= derived_max, "{} keys for {blocks} blocks", chain.1.get());
    }
    let elsewhere = long_chain(1, 8192);
    let miss = Counted(&elsewhere, 0.into());
    assert_eq!((index.lookup(&miss).unwrap().blocks(), miss.1.get()), (0, 1));
}

#[test]
fn a_child_waits_for_its_parent() {
    let index = Index::new(10).unwrap();
    let keys = long_chain(0, 6);
    let first = index.reserve(&keys[..2]).unwrap();
    let second = index.reserve(&keys[..4]).unwrap();
    let third = index.reserve(&keys[..]).unwrap();
    assert_eq!((second.first(), third.first()), (2, 4));
    third.commit().unwrap();
    second.commit().unwrap();
    let before = index.lookup(&keys[..]).unwrap();
    assert_eq!((before.blocks(), before.pending()), (0, true));
    let epoch = index.epoch();
    first.commit().unwrap();
    assert_ne!(index.epoch(), epoch);
    let after = index.lookup(&keys[..]).unwrap();
    assert_eq!((after.blocks(), after.pending()), (6, false));
}

#[test]
fn leaves_leave_in_the_order_of_their_last_use() {
    let index = Index::new(6).unwrap();
    store(&index, &chain(&["a", "b", "c"]));
    store(&index, &chain(&["a", "x"]));
    store(&index, &chain(&["z"]));
    assert_eq!(found(&index, &chain(&["a", "b", "c"])), 3);
    // One row is free; x and z are older than c, then b and a follow c, as old as it is.
    for (number, left) in
        [(0, [3, 2, 1]), (1, [3, 1, 1]), (2, [3, 1, 0]), (3, [2, 1, 0]), (4, [1, 1, 0]), (5, [0; 3])]
    {
        store(&index, &long_chain(number, 1));
        let paths: [&[&str]; 3] = [&["a", "b", "c"], &["a", "x"], &["z"]];
        assert_eq!(paths.map(|path| index.present(&chain(path)[..]).unwrap()), left);
    }
}

#[test]
fn a_store_never_evicts_its_own_ancestors() {
    let index = Index::new(4).unwrap();
    let keys = long_chain(0, 9);
    store(&index, &keys[..3]);
    let reservation = index.reserve(&keys[..]).unwrap();
    assert_eq!((reservation.first(), reservation.rows().len(), reservation.dropped()), (3, 1, 5));
    reservation.abort().unwrap();
    assert_eq!(found(&index, &keys), 3);
}

#[test]
fn a_lease_keeps_its_prefix_whatever_happens() {
    let index = Index::new(4).unwrap();
    let keys = long_chain(0, 3);
    let rows = store(&index, &keys);
    let matched = index.lookup(&keys[..]).unwrap();
    let lease = matched.lease().unwrap().unwrap();
    let mut other = index.reserve(&long_chain(1, 4)[..]).unwrap();
    assert_eq!((other.rows().len(), other.dropped()), (1, 3));
    assert_eq!(index.clear().unwrap(), 4);
    assert_eq!(index.stats().unwrap().leaving, 4);
    other.commit().unwrap();
    assert_eq!(index.stats().unwrap().free, 1);
    other = index.reserve(&keys[..]).unwrap();
    assert!(!rows.contains(&other.rows()[0]));
    assert_eq!(lease.rows(0).unwrap(), rows);
    assert_eq!(lease.rows(2).unwrap(), rows[2..]);
    assert_eq!(lease.rows(7).unwrap(), [0_u32; 0]);
    assert!(matched.lease().unwrap().is_none());
    drop(lease);
    assert_eq!(index.stats().unwrap().free, 3);
    index.check_integrity().unwrap();
}

#[test]
fn block_hashes_are_keys_of_their_space() {
    let index = Index::new(3).unwrap();
    assert_eq!(index.rows().unwrap(), 3);
    let (space, other) = (KeySpace::new("sha256", 0, &[]), KeySpace::new("sha256", 1, &[]));
    let hashes: [&[u8]; 2] = [b"first", b"second"];
    index.reserve(&Hashes { space: &space, hashes: &hashes }).unwrap().commit().unwrap();
    assert_eq!(found(&index, &hashes.map(|hash| space.key(hash))), 2);
    assert_eq!(index.lookup(&Hashes { space: &space, hashes: &hashes[..1] }).unwrap().blocks(), 1);
    assert_eq!(index.lookup(&Hashes { space: &other, hashes: &hashes }).unwrap().blocks(), 0);
}

#[test]
fn a_match_outlives_its_row_and_notices() {
    let index = Index::new(1).unwrap();
    let keys = long_chain(0, 1);
    store(&index, &keys);
    let matched = index.lookup(&keys[..]).unwrap();
    store(&index, &long_chain(1, 1));
    assert!(matched.lease().unwrap().is_none());
    store(&index, &keys);
    assert!(matched.lease().unwrap().is_none(), "the row has the same key again, but another content");
}

#[test]
fn discarding_a_reservation_keeps_its_rows_until_the_writing_ended() {
    let index = Index::new(2).unwrap();
    let keys = long_chain(0, 2);
    let reservation = index.reserve(&keys[..]).unwrap();
    assert_eq!(reservation.discard().unwrap(), 2);
    assert_eq!(index.reserve(&keys[..]).unwrap().rows().len(), 0);
    assert_eq!(reservation.commit().unwrap(), 0);
    assert_eq!(index.stats().unwrap().free, 2);
    store(&index, &keys);
    assert_eq!(reservation.discard().unwrap(), 0, "these rows are another's now");
}

#[test]
fn contradicting_chains_get_nothing_and_break_nothing() {
    let index = Index::new(10).unwrap();
    let keys = long_chain(0, 5);
    store(&index, &keys[..4]);
    // The middle of a chain, a chain with another start, one with a key twice, one that ends in another's key.
    assert_eq!(found(&index, &keys[1..]), 0);
    assert_eq!(index.reserve(&keys[1..]).unwrap().rows().len(), 0);
    let swapped = [long_chain(1, 1)[0], keys[1]];
    assert_eq!(found(&index, &swapped), 0);
    assert_eq!(store(&index, &swapped).len(), 1);
    let twice = [long_chain(2, 1)[0]; 3];
    assert_eq!(store(&index, &twice).len(), 1);
    let crossed = [long_chain(3, 1)[0], keys[1], keys[2]];
    assert_eq!(store(&index, &crossed).len(), 1);
    let skewed = [keys[0], long_chain(4, 1)[0], keys[2]];
    assert_eq!(found(&index, &skewed), 0);
    index.check_integrity().unwrap();
    assert!(index.stats().unwrap().counters.mismatches >= 5);
    assert_eq!(found(&index, &keys), 4);
}

#[test]
fn shrinking_takes_the_upper_rows_out_of_use() {
    let index = Index::new(10).unwrap();
    let rows = store(&index, &long_chain(0, 6));
    assert_eq!(rows, [0, 1, 2, 3, 4, 5]);
    let lease = index.lookup(&long_chain(0, 6)[..]).unwrap().lease().unwrap().unwrap();
    assert_eq!(index.shrink(4).unwrap(), 2);
    assert_eq!(index.shrink(8).unwrap(), 0);
    assert_eq!(found(&index, &long_chain(0, 6)), 4);
    assert_eq!(lease.rows(0).unwrap(), rows);
    drop(lease);
    let stats = index.stats().unwrap();
    assert_eq!((stats.rows, stats.free, stats.visible, stats.leaving), (4, 0, 4, 0));
    assert_eq!(store(&index, &long_chain(1, 9)).len(), 4);
}

#[test]
fn an_error_of_the_chain_changes_nothing() {
    struct Failing(Vec<Key>);
    impl Chain for Failing {
        fn blocks(&self) -> usize {
            self.0.len() + 1
        }
        fn key(&self, position: usize) -> Result<Key> {
            self.0.get(position).copied().ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "no bytes"))
        }
    }
    let index = Index::new(1).unwrap();
    store(&index, &long_chain(0, 1));
    assert!(index.reserve(&Failing(long_chain(1, 0))).is_err());
    assert!(index.lookup(&Failing(long_chain(0, 1))).is_err());
    assert_eq!(found(&index, &long_chain(0, 1)), 1);
}

#[test]
fn an_index_that_panicked_answers_with_errors() {
    struct Panicking;
    impl Chain for Panicking {
        fn blocks(&self) -> usize {
            1
        }
        fn key(&self, _: usize) -> Result<Key> {
            panic!("on purpose")
        }
    }
    let index = Index::new(1).unwrap();
    let reservation = index.reserve(&long_chain(0, 1)[..]).unwrap();
    let panicked =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| index.lookup(&Panicking).is_ok()));
    assert!(panicked.is_err());
    assert_eq!(index.stats().unwrap_err().kind(), ErrorKind::Internal);
    assert_eq!(reservation.commit().unwrap_err().kind(), ErrorKind::Internal);
}

#[test]
fn the_number_of_rows_is_checked() {
    for rows in [0, u32::MAX as usize] {
        assert!(matches!(Index::new(rows), Err(error) if error.kind() == ErrorKind::InvalidArgument));
    }
}

#[test]
fn chains_of_a_hundred_thousand_blocks_are_nothing_special() {
    const BLOCKS: usize = 100_000;
    let index = Index::new(BLOCKS).unwrap();
    let keys = long_chain(0, BLOCKS);
    let first = index.reserve(&keys[..1]).unwrap();
    let rest = index.reserve(&keys[..]).unwrap();
    rest.commit().unwrap();
    first.commit().unwrap();
    assert_eq!(found(&index, &keys), BLOCKS);
    let lease = index.lookup(&keys[..]).unwrap().lease().unwrap().unwrap();
    assert_eq!(lease.discard(1).unwrap(), BLOCKS as u64 - 1);
    assert_eq!(index.stats().unwrap().leaving, BLOCKS as u64 - 1);
    drop(lease);
    assert_eq!(store(&index, &keys).len(), BLOCKS - 1);
    assert_eq!(store(&index, &long_chain(1, BLOCKS)).len(), BLOCKS);
    assert_eq!(index.clear().unwrap(), BLOCKS as u64);
    index.check_integrity().unwrap();
}

#[test]
fn nothing_grows_after_construction() {
    let index = Index::new(512).unwrap();
    let capacities = || index.with(|table| (table.keys.num_buckets(), table.free.capacity())).unwrap();
    let before = capacities();
    for round in 0..2000 {
        store(&index, &long_chain(round, 1 + round % 700));
    }
    assert_eq!(capacities(), before);
}
