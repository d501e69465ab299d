//! What every tier promises, as tests that each of them runs.

use std::sync::Barrier;
use std::thread;

use super::rows::key;
use super::{Rows, space};
use crate::tier::{Chunk, Namespace, Reason, Refusal, Seal, Space, Stored, Tier};

/// A medium under test. Values are whole: header, then payload.
pub(crate) trait Rig: Sync {
    /// A tier on the medium, as a new process would make it.
    fn open(&self, space: Space) -> Box<dyn Tier>;
    /// The names of all values.
    fn values(&self) -> Vec<String>;
    /// The bytes of a value.
    fn read(&self, name: &str) -> Vec<u8>;
    /// Puts other bytes in the place of a value, or where none is.
    fn write(&self, name: &str, bytes: &[u8]);
    /// Loses what says which generation is the present one.
    fn lose_records(&self);
}

/// The contract as tests of the module where this is called, each with a rig of its own.
macro_rules! tests {
    ($rig:expr) => {
        $crate::tier::fake::contract::tests!($rig;
            what_is_stored_is_loaded, nothing_is_found_that_was_not_stored, a_chunk_is_there_when_all_ranks_are,
            storing_again_moves_no_byte, changed_lengths_are_refused, flipped_bits_are_refused,
            values_in_the_place_of_others_are_refused, a_reset_reaches_every_process, lost_records_bring_nothing_back,
            values_without_the_secret_are_refused, many_threads_see_whole_values, first_stores_share_a_generation);

        /// The long form.
        #[test]
        #[ignore = "minutes"]
        fn a_hundred_thousand_flips_are_refused() {
            $crate::tier::fake::contract::flips(&$rig, 100_000);
        }
    };
    ($rig:expr; $($test:ident),*) => {
        $(#[test]
        fn $test() {
            $crate::tier::fake::contract::$test(&$rig);
        })*
    };
}
pub(crate) use tests;

fn reason<T: std::fmt::Debug>(ended: Result<T, Refusal>) -> Reason {
    ended.expect_err("refused").reason
}

/// A value of 2 rows in a tier of its own.
fn one_value(rig: &dyn Rig, rows: &Rows) -> (Box<dyn Tier>, Chunk, String) {
    let tier = rig.open(space("one value"));
    rows.fill(&[0, 1], 1);
    let chunk = rows.chunk(1, &[0, 1]);
    assert_eq!(tier.put(&chunk), Ok(Stored::Written(chunk.memory.bytes() as u64)));
    let name = rig.values().pop().expect("stored");
    (tier, chunk, name)
}

pub(crate) fn what_is_stored_is_loaded(rig: &dyn Rig) {
    for (row_bytes, source, target) in [
        (4096, &[0][..], &[5][..]),
        (5000, &[3, 1, 2, 7], &[0, 1, 2, 3]),
        (12_288, &[0, 1, 2, 3, 4, 5, 6, 7], &[7, 6, 5, 4, 3, 2, 1, 0]),
        // More pieces than are in flight at a time.
        (12 << 20, &[1, 2, 3], &[0, 3, 2]),
    ] {
        let rows = Rows::new(8, row_bytes);
        let name = row_bytes as u64;
        rows.fill(source, name);
        let stored = rows.read(source);
        let tier = rig.open(space("round trip"));
        assert_eq!(tier.put(&rows.chunk(name, source)), Ok(Stored::Written(stored.len() as u64)));
        // Another process, with other rows.
        let tier = rig.open(space("round trip"));
        rows.fill(&[0, 1, 2, 3, 4, 5, 6, 7], 99);
        let before = rows.read(&[0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(tier.present(&[key(name)]), Ok(vec![true]));
        assert_eq!(tier.get(&rows.chunk(name, target)), Ok(()));
        assert!(rows.read(target) == stored, "other bytes of {row_bytes}");
        let stride = before.len() / 8;
        for row in (0..8).filter(|row| !target.contains(row)) {
            let at = row as usize * stride;
            assert!(rows.read(&[row]) == before[at..at + stride], "row {row} was written to");
        }
    }
}

pub(crate) fn nothing_is_found_that_was_not_stored(rig: &dyn Rig) {
    let rows = Rows::new(2, 4096);
    let tier = rig.open(space("missing"));
    assert_eq!(tier.present(&[key(1), key(2)]), Ok(vec![false, false]));
    assert_eq!(reason(tier.get(&rows.chunk(1, &[0]))), Reason::Absent);
    assert!(rig.values().is_empty());
    tier.put(&rows.chunk(1, &[0])).expect("stored");
    assert_eq!(tier.present(&[key(2), key(1), key(3)]), Ok(vec![false, true, false]));
    assert_eq!(reason(tier.get(&rows.chunk(2, &[0]))), Reason::Absent);
    let elsewhere = rig.open(space("elsewhere"));
    assert_eq!(elsewhere.present(&[key(1)]), Ok(vec![false]));
    assert_eq!(reason(elsewhere.get(&rows.chunk(1, &[0]))), Reason::Absent);
}

pub(crate) fn a_chunk_is_there_when_all_ranks_are(rig: &dyn Rig) {
    let rows = Rows::new(3, 4096);
    let namespace = Namespace::new(&[]);
    let tiers: Vec<Box<dyn Tier>> =
        (0..3).map(|rank| rig.open(Space::new(namespace, rank, 3, Seal::Checksum).expect("valid"))).collect();
    for (rank, row) in [(2, 0), (0, 1), (1, 2)] {
        assert_eq!(tiers[0].present(&[key(1)]), Ok(vec![false]), "before rank {rank}");
        rows.fill(&[row], u64::from(row));
        tiers[rank].put(&rows.chunk(1, &[row])).expect("stored");
    }
    for (rank, row) in [(2, 0), (0, 1), (1, 2)] {
        let stored = rows.read(&[row]);
        rows.fill(&[row], 99);
        assert_eq!(tiers[rank].present(&[key(1)]), Ok(vec![true]));
        tiers[rank].get(&rows.chunk(1, &[row])).expect("there");
        assert!(rows.read(&[row]) == stored, "rank {rank}");
    }
}

pub(crate) fn storing_again_moves_no_byte(rig: &dyn Rig) {
    let rows = Rows::new(4, 4096);
    let (tier, chunk, name) = one_value(rig, &rows);
    let (bytes, first) = (rig.read(&name), rows.read(&[0, 1]));
    rows.fill(&[0, 1], 2);
    assert_eq!(tier.put(&chunk), Ok(Stored::Present));
    assert_eq!(rig.open(space("one value")).put(&chunk), Ok(Stored::Present));
    assert!(rig.values() == [name.clone()] && rig.read(&name) == bytes);
    tier.get(&rows.chunk(1, &[2, 3])).expect("there");
    assert!(rows.read(&[2, 3]) == first);
}

pub(crate) fn changed_lengths_are_refused(rig: &dyn Rig) {
    let rows = Rows::new(4, 4096);
    let (tier, chunk, name) = one_value(rig, &rows);
    let (bytes, first) = (rig.read(&name), rows.read(&[0, 1]));
    let longer = [&bytes[..], &[0]].concat();
    let borders = (0..bytes.len()).step_by(512);
    for length in borders.chain([1, 511, bytes.len() - 1, longer.len()]) {
        rig.write(&name, &longer[..length]);
        let refused = reason(tier.get(&chunk));
        assert!(matches!(refused, Reason::Truncated | Reason::Absent), "{length}: {refused:?}");
        // What was refused is gone, and can be stored again.
        assert_eq!(reason(tier.get(&chunk)), Reason::Absent, "{length}");
        rows.fill(&[0, 1], 1);
        assert!(matches!(tier.put(&chunk), Ok(Stored::Written(_))), "{length}");
        assert_eq!(tier.get(&chunk), Ok(()));
        assert!(rows.read(&[0, 1]) == first);
    }
}

pub(crate) fn flipped_bits_are_refused(rig: &dyn Rig) {
    flips(rig, 1_000);
}

/// Flips one bit of a value at a time, `count` times, all over it.
pub(crate) fn flips(rig: &dyn Rig, count: usize) {
    let rows = Rows::new(4, 4096);
    let (tier, chunk, name) = one_value(rig, &rows);
    let bytes = rig.read(&name);
    let bits = bytes.len() * 8;
    for number in 0..count {
        // 0.618 of all, with no common divisor: near every place after a few, at every place in the end.
        let bit = number * ((bits * 618 / 1000) | 1) % bits;
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        rig.write(&name, &flipped);
        let refused = reason(tier.get(&chunk));
        assert!(matches!(refused, Reason::Corrupt | Reason::Newer), "bit {bit}: {refused:?}");
    }
    rig.write(&name, &bytes);
    assert_eq!(tier.get(&chunk), Ok(()), "unchanged");
}

pub(crate) fn values_in_the_place_of_others_are_refused(rig: &dyn Rig) {
    let rows = Rows::new(4, 4096);
    let namespace = Namespace::new(&[("name".to_owned(), "one value".to_owned())]);
    let (tier, chunk, name) = one_value(rig, &rows);
    let bytes = rig.read(&name);
    let mut foreign = Vec::new();
    let mut other = |space: Space, chunk: &Chunk| {
        let before = rig.values();
        rig.open(space).put(chunk).expect("stored");
        let added = rig.values().into_iter().find(|name| !before.contains(name)).expect("stored");
        foreign.push(rig.read(&added));
    };
    other(space("one value"), &rows.chunk(2, &[0, 1]));
    other(space("another"), &rows.chunk(1, &[0, 1]));
    other(Space::new(namespace, 1, 2, Seal::Checksum).expect("valid"), &rows.chunk(1, &[0, 1]));
    for foreign in foreign {
        assert_eq!(foreign.len(), bytes.len());
        rig.write(&name, &foreign);
        assert_eq!(reason(tier.get(&chunk)), Reason::Foreign);
        assert_eq!(reason(tier.get(&chunk)), Reason::Absent);
    }
    rig.write(&name, &bytes);
    let refused = reason(tier.get(&rows.chunk(1, &[0])));
    assert!(matches!(refused, Reason::Truncated | Reason::Foreign), "fewer rows: {refused:?}");
    rig.write(&name, &bytes);
    let other_rows = Rows::new(4, 8192);
    assert_eq!(reason(tier.get(&other_rows.chunk(1, &[0]))), Reason::Foreign);
}

pub(crate) fn a_reset_reaches_every_process(rig: &dyn Rig) {
    let rows = Rows::new(4, 4096);
    let (tier, chunk, name) = one_value(rig, &rows);
    let bytes = rig.read(&name);
    let (other, bystander) = (rig.open(space("one value")), rig.open(space("bystander")));
    bystander.put(&chunk).expect("stored");
    other.reset().expect("reset");
    // As if it had been written by somebody who did not know.
    rig.write(&name, &bytes);
    for tier in [&tier, &other, &rig.open(space("one value"))] {
        assert_eq!(tier.present(&[key(1)]), Ok(vec![false]));
        assert_eq!(reason(tier.get(&chunk)), Reason::Absent);
    }
    assert_eq!(bystander.get(&chunk), Ok(()));
    let before = rig.values();
    rows.fill(&[0, 1], 7);
    let second = rows.read(&[0, 1]);
    assert!(matches!(tier.put(&chunk), Ok(Stored::Written(_))));
    rows.fill(&[0, 1], 8);
    assert_eq!(other.get(&chunk), Ok(()));
    assert!(rows.read(&[0, 1]) == second);
    // A value of the generation before, under the name of this one's.
    let name = rig.values().into_iter().find(|name| !before.contains(name)).expect("stored");
    rig.write(&name, &bytes);
    assert_eq!(reason(tier.get(&chunk)), Reason::Foreign);
}

pub(crate) fn lost_records_bring_nothing_back(rig: &dyn Rig) {
    let rows = Rows::new(4, 4096);
    let (tier, chunk, name) = one_value(rig, &rows);
    rig.lose_records();
    assert_eq!(tier.present(&[key(1)]), Ok(vec![false]));
    assert_eq!(reason(tier.get(&chunk)), Reason::Absent);
    assert!(matches!(tier.put(&rows.chunk(2, &[2])), Ok(Stored::Written(_))));
    assert_eq!(tier.present(&[key(1), key(2)]), Ok(vec![false, true]));
    assert!(rig.values().contains(&name), "there, and out of reach");
}

pub(crate) fn values_without_the_secret_are_refused(rig: &dyn Rig) {
    let rows = Rows::new(4, 4096);
    let sealed = |seal| Space { seal, ..space("sealed") };
    let (ours, theirs) = (sealed(Seal::from_secret(b"ours")), sealed(Seal::from_secret(b"theirs")));
    rows.fill(&[0, 1], 3);
    let (chunk, stored) = (rows.chunk(1, &[0, 1]), rows.read(&[0, 1]));
    let tier = rig.open(ours);
    tier.put(&chunk).expect("stored");
    rows.fill(&[0, 1], 4);
    assert_eq!(rig.open(ours).get(&chunk), Ok(()));
    assert!(rows.read(&[0, 1]) == stored);
    for space in [theirs, sealed(Seal::Checksum)] {
        assert_eq!(reason(rig.open(space).get(&chunk)), Reason::Absent);
    }
    let name = rig.values().pop().expect("stored");
    let mut forged = rig.read(&name);
    forged[5000] ^= 1;
    rig.write(&name, &forged);
    assert_eq!(reason(tier.get(&chunk)), Reason::Corrupt);
}

pub(crate) fn many_threads_see_whole_values(rig: &dyn Rig) {
    const ROUNDS: u64 = 60;
    let tier = rig.open(space("threads"));
    let tier = &*tier;
    thread::scope(|scope| {
        for thread in 0..4_u64 {
            scope.spawn(move || {
                let rows = Rows::new(6, 8192);
                for round in 0..ROUNDS {
                    let name = (round * 7 + thread) % 5;
                    rows.fill(&[0, 2, 4], name);
                    let expected = rows.read(&[0, 2, 4]);
                    if (round + thread) % 3 == 0 {
                        tier.put(&rows.chunk(name, &[0, 2, 4])).expect("stored or present");
                    }
                    match tier.get(&rows.chunk(name, &[1, 3, 5])) {
                        Ok(()) => assert!(rows.read(&[1, 3, 5]) == expected, "another value"),
                        Err(refusal) => assert_eq!(refusal.reason, Reason::Absent),
                    }
                }
            });
        }
    });
    assert_eq!(tier.present(&[0, 1, 2, 3, 4].map(key)), Ok(vec![true; 5]));
}

/// Whoever comes first to an empty medium, nobody's value is lost to another's generation.
pub(crate) fn first_stores_share_a_generation(rig: &dyn Rig) {
    let rows = Rows::new(1, 4096);
    for round in 0..5 {
        let mine = space(&format!("first stores {round}"));
        let together = Barrier::new(4);
        thread::scope(|scope| {
            for name in 0..4 {
                let (rows, together) = (&rows, &together);
                scope.spawn(move || {
                    let tier = rig.open(mine);
                    together.wait();
                    tier.put(&rows.chunk(name, &[0])).expect("stored");
                });
            }
        });
        assert_eq!(rig.open(mine).present(&[0, 1, 2, 3].map(key)), Ok(vec![true; 4]));
    }
}
