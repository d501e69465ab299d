//! What the index costs: a long hit, a miss, and storing new blocks, also where each has to evict another.
//!
//! Hashes are 32 bytes and keys are derived from them, as in a lookup by the connector.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use lmcache_core::{Hashes, Index, KeySpace};

/// 512 GiB of 2 MiB blocks; the index does not fit the caches of a core.
const ROWS: usize = 1 << 18;
const PREFIX_BLOCKS: usize = 8192;
const BATCH_BLOCKS: usize = 1024;

/// Block hashes of prompt `number`: nothing in common with other prompts'.
fn prompt(number: u64, blocks: usize) -> Vec<[u8; 32]> {
    let hash =
        |block: usize| *blake3::hash(&[number, block as u64].map(u64::to_le_bytes).concat()).as_bytes();
    (0..blocks).map(hash).collect()
}

fn slices(hashes: &[[u8; 32]]) -> Vec<&[u8]> {
    hashes.iter().map(<[u8; 32]>::as_slice).collect()
}

fn store(index: &Index, space: &KeySpace, hashes: &[&[u8]]) -> u64 {
    let reservation = index.reserve(&Hashes { space, hashes }).expect("reserve");
    reservation.commit().expect("commit")
}

/// An index whose every row is taken, by prompts of a batch each.
fn full_index(space: &KeySpace) -> Index {
    let index = Index::new(ROWS).expect("memory");
    for number in 0..(ROWS / BATCH_BLOCKS) as u64 {
        store(&index, space, &slices(&prompt(u64::MAX - number, BATCH_BLOCKS)));
    }
    index
}

fn lookups(criterion: &mut Criterion) {
    let space = KeySpace::new("sha256", 0, &[]);
    let index = full_index(&space);
    let held = prompt(0, PREFIX_BLOCKS);
    let held = slices(&held);
    store(&index, &space, &held);
    let longer = prompt(0, PREFIX_BLOCKS + 100);
    let longer = slices(&longer);
    let other = prompt(1, PREFIX_BLOCKS);
    let other = slices(&other);
    let mut group = criterion.benchmark_group("lookup");
    for (name, hashes, blocks) in
        [("hit of 8192 blocks", &held, 8192), ("hit of 8192 of 8292", &longer, 8192), ("miss", &other, 0)]
    {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let found =
                    index.lookup(&Hashes { space: &space, hashes: black_box(hashes) }).expect("lookup");
                assert_eq!(found.blocks(), blocks);
                found
            });
        });
    }
    // As in service: each prompt was asked for long ago, and little of it is still in the core's caches.
    let others: Vec<_> =
        (0..200).map(|number| prompt(u64::MAX - ROWS as u64 / 1024 + 1 + number, 1024)).collect();
    let others: Vec<_> = others.iter().map(|hashes| slices(hashes)).collect();
    let mut turn = others.iter().cycle();
    group.bench_function("hit of 1024 blocks, 200 prompts in turn", |bencher| {
        bencher.iter(|| {
            let hashes = turn.next().expect("endless");
            index.lookup(&Hashes { space: &space, hashes }).expect("lookup").blocks()
        });
    });
    group.finish();
}

fn leases(criterion: &mut Criterion) {
    let space = KeySpace::new("sha256", 0, &[]);
    let index = full_index(&space);
    let held = prompt(0, PREFIX_BLOCKS);
    let held = slices(&held);
    store(&index, &space, &held);
    let found = index.lookup(&Hashes { space: &space, hashes: &held }).expect("lookup");
    criterion.bench_function("lease of 8192 blocks with its rows", |bencher| {
        bencher.iter(|| {
            let lease = found.lease().expect("lease").expect("visible");
            assert_eq!(lease.rows(0).expect("rows").len(), PREFIX_BLOCKS);
        });
    });
}

fn stores(criterion: &mut Criterion) {
    let space = KeySpace::new("sha256", 0, &[]);
    let mut group = criterion.benchmark_group("store of 1024 blocks");
    group.throughput(Throughput::Elements(BATCH_BLOCKS as u64));
    let mut number = 0;
    let mut next_prompt = || {
        number += 1;
        prompt(number, BATCH_BLOCKS)
    };
    // Emptied out of sight as soon as it is nearly full.
    let index = Index::new(ROWS).expect("memory");
    group.bench_function("free rows", |bencher| {
        bencher.iter_batched(
            || {
                if index.stats().expect("stats").free < BATCH_BLOCKS as u64 {
                    index.clear().expect("clear");
                }
                next_prompt()
            },
            |hashes| assert_eq!(store(&index, &space, &slices(&hashes)), BATCH_BLOCKS as u64),
            BatchSize::PerIteration,
        );
    });
    let index = full_index(&space);
    group.bench_function("each evicts another", |bencher| {
        bencher.iter_batched(
            &mut next_prompt,
            |hashes| assert_eq!(store(&index, &space, &slices(&hashes)), BATCH_BLOCKS as u64),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, lookups, leases, stores);
criterion_main!(benches);
