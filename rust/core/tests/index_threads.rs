//! Many threads on one small index: what a lease shows is what was written, and nothing is lost.

use std::sync::atomic::{AtomicU64, Ordering};

use lmcache_core::{Index, Key, KeySpace};

const ROWS: usize = 64;
const THREADS: u64 = 4;
const ROUNDS: u64 = 3000;

/// A small generator (splitmix64), the same on every run.
fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*seed ^ (*seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 27)
}

/// One of a few chains, which share their first blocks.
fn chain(seed: &mut u64) -> Vec<Key> {
    let space = KeySpace::new("threads", 0, &[]);
    let (document, question) = (next(seed) % 6, next(seed) % 4);
    let blocks = 1 + next(seed) % 20;
    (0..blocks)
        .map(|block| space.key(format!("{document}/{}/{block}", question * (block / 8)).as_bytes()))
        .collect()
}

fn content(key: &Key) -> u64 {
    u64::from_le_bytes(*key.as_bytes().first_chunk().expect("32 bytes"))
}

/// One store, one load and now and then something rude. `memory` stands for the rows' bytes.
fn round(index: &Index, memory: &[AtomicU64], seed: &mut u64) {
    let keys = chain(seed);
    let reservation = index.reserve(&keys[..]).expect("reserve");
    for (&row, key) in reservation.rows().iter().zip(&keys[reservation.first()..]) {
        memory[row as usize].store(content(key), Ordering::Relaxed);
    }
    match next(seed) % 8 {
        0 => drop(reservation),
        1 => assert!(reservation.discard().expect("discard") <= ROWS as u64),
        _ => assert!(reservation.commit().expect("commit") <= ROWS as u64),
    }
    let keys = chain(seed);
    let found = index.lookup(&keys[..]).expect("lookup");
    let Some(lease) = found.lease().expect("lease") else { return };
    assert_eq!(lease.blocks(), found.blocks());
    for (row, key) in lease.rows(0).expect("rows").into_iter().zip(&keys) {
        assert_eq!(memory[row as usize].load(Ordering::Relaxed), content(key));
    }
    match next(seed) % 64 {
        0 => assert!(index.clear().expect("clear") <= ROWS as u64),
        1..4 => assert!(lease.discard(found.blocks() / 2).expect("discard") <= ROWS as u64),
        _ => {}
    }
}

#[test]
fn leases_show_what_was_written() {
    let index = Index::new(ROWS).expect("index");
    let memory: Vec<AtomicU64> = (0..ROWS).map(|_| AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (index, memory) = (&index, &memory);
            scope.spawn(move || {
                let mut seed = thread;
                for _ in 0..ROUNDS {
                    round(index, memory, &mut seed);
                }
            });
        }
        for _ in 0..100 {
            index.check_integrity().expect("integrity");
            std::thread::yield_now();
        }
    });
    index.check_integrity().expect("integrity");
    let stats = index.stats().expect("stats");
    assert_eq!((stats.leases, stats.leaving, stats.reserved), (0, 0, 0));
    assert_eq!(stats.free + stats.visible, ROWS as u64);
    assert!(stats.counters.hits > 0 && stats.counters.evictions > 0);
    assert_eq!(stats.counters.mismatches, 0);
}
