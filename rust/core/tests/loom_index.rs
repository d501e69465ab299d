//! The index under every interleaving of a few threads: leases, commits, evictions and removals.
//!
//! `Row` stands for a row's bytes, which nothing but the index protects: loom sees whoever touches them at once.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lmcache_core::{Index, Key, KeySpace, Lease};
use loom::cell::UnsafeCell;
use loom::thread;

/// What is in a row: the number of the block that was written there.
struct Row(UnsafeCell<u64>);

// SAFETY: loom reports every access that another one may run beside.
unsafe impl Sync for Row {}
// SAFETY: a number.
unsafe impl Send for Row {}

impl Row {
    fn read(&self) -> u64 {
        // SAFETY: as above.
        self.0.with(|content| unsafe { *content })
    }

    fn write(&self, number: u64) {
        // SAFETY: as above.
        self.0.with_mut(|content| unsafe { *content = number });
    }
}

/// An index with its rows, as each thread has it.
#[derive(Clone)]
struct World {
    index: Index,
    rows: Arc<Vec<Row>>,
}

/// Block `n` of a chain has the path `chain[..=n]`, as a hash over the whole prefix would have it.
fn keys(chain: &[u64]) -> Vec<Key> {
    let space = KeySpace::new("loom", 0, &[]);
    (1..=chain.len())
        .map(|end| space.key(&chain[..end].iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>()))
        .collect()
}

impl World {
    fn new(rows: usize) -> Self {
        let memory = (0..rows).map(|_| Row(UnsafeCell::new(0))).collect();
        Self { index: Index::new(rows).unwrap(), rows: Arc::new(memory) }
    }

    /// Stores what of the chain is missing. Returns rows that became visible or wait for their parent.
    fn store(&self, chain: &[u64]) -> u64 {
        let reservation = self.index.reserve(&keys(chain)[..]).unwrap();
        for (&row, &number) in reservation.rows().iter().zip(&chain[reservation.first()..]) {
            self.rows[row as usize].write(number);
        }
        reservation.commit().unwrap()
    }

    fn lease(&self, chain: &[u64]) -> Option<Lease> {
        self.index.lookup(&keys(chain)[..]).unwrap().lease().unwrap()
    }

    /// Reads all that is found of the chain, under a lease. Returns the blocks found.
    fn load(&self, chain: &[u64]) -> usize {
        let Some(lease) = self.lease(chain) else { return 0 };
        for (row, &number) in lease.rows(0).unwrap().into_iter().zip(chain) {
            assert_eq!(self.rows[row as usize].read(), number, "a row under a lease changed");
        }
        lease.blocks()
    }

    /// Nothing is held any more: whatever happened, all is in order and every row can be had.
    fn assert_idle(&self) {
        self.index.check_integrity().unwrap();
        let stats = self.index.stats().unwrap();
        assert_eq!((stats.leases, stats.reserved, stats.leaving), (0, 0, 0));
        assert_eq!(stats.free + stats.visible, stats.rows);
    }
}

/// Runs what threads do under every interleaving, and looks at the end. Three threads have millions of them: those of up
/// to two preemptions in CI, and in a soak run as many as the time allows.
fn check(rows: usize, before: fn(&World), threads: &'static [fn(&World)]) {
    let mut model = loom::model::Builder::new();
    let soak = std::env::var("LMCACHE_SOAK_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    model.max_duration = soak.map(Duration::from_secs_f64);
    model.preemption_bound = if soak.is_some() || threads.len() < 3 { None } else { Some(2) };
    let tried = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&tried);
    model.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        let world = World::new(rows);
        before(&world);
        let handles: Vec<_> = threads
            .iter()
            .map(|&work| {
                let world = world.clone();
                thread::spawn(move || work(&world))
            })
            .collect();
        for handle in handles {
            handle.join().unwrap();
        }
        world.assert_idle();
    });
    #[expect(clippy::print_stdout, reason = "`make soak` reads it")]
    {
        let name = std::thread::current().name().unwrap_or_default().replace('_', " ");
        println!("soak: {name}: {} interleavings", tried.load(Ordering::Relaxed));
    }
}

fn store_a(world: &World) {
    world.store(&[1]);
}

fn store_ab(world: &World) {
    world.store(&[1, 2]);
}

fn store_c(world: &World) {
    world.store(&[3]);
}

fn load_a(world: &World) {
    assert!(world.load(&[1]) <= 1);
}

fn load_ab(world: &World) {
    assert!(world.load(&[1, 2]) <= 2);
}

fn nothing(_: &World) {}

#[test]
fn what_is_leased_is_not_evicted() {
    check(1, store_a, &[load_a, store_c]);
    check(2, store_ab, &[load_ab, load_ab, store_c]);
}

#[test]
fn what_is_found_was_written() {
    check(2, nothing, &[store_ab, load_ab]);
    check(1, nothing, &[store_a, load_a, store_c]);
}

#[test]
fn the_same_blocks_are_stored_once() {
    fn store_once(world: &World) {
        let stored = world.store(&[1, 2]);
        assert!(stored == 0 || stored == 2);
    }
    check(4, nothing, &[store_once, store_once]);
}

#[test]
fn a_removed_row_is_reused_only_when_readers_and_writers_have_ended() {
    fn clear(world: &World) {
        world.index.clear().unwrap();
        world.store(&[3]);
    }
    check(1, store_a, &[load_a, clear]);
    check(1, nothing, &[store_a, clear, load_a]);
}

#[test]
fn what_turned_out_bad_is_gone_while_others_read_it() {
    fn discard(world: &World) {
        if let Some(lease) = world.lease(&[1, 2]) {
            lease.discard(0).unwrap();
            assert_eq!(world.load(&[1, 2]), 0);
        }
        world.store(&[3]);
    }
    check(2, store_ab, &[load_ab, discard]);
}

#[test]
fn a_child_is_seen_only_with_its_parent_and_goes_with_it() {
    fn store_child(world: &World) {
        // The parent is reserved by the other thread, or was aborted, or is this thread's own.
        world.store(&[1, 2]);
    }
    fn store_parent_or_not(world: &World) {
        let reservation = world.index.reserve(&keys(&[1])[..]).unwrap();
        if let Some(&row) = reservation.rows().first() {
            world.rows[row as usize].write(1);
        }
        reservation.abort().unwrap();
    }
    check(2, nothing, &[store_a, store_child, load_ab]);
    check(2, nothing, &[store_parent_or_not, store_child, load_ab]);
}

#[test]
fn a_hole_in_a_prefix_is_never_seen() {
    fn store_middle(world: &World) {
        world.store(&[1, 2]);
    }
    fn store_end(world: &World) {
        world.store(&[1, 2, 4]);
    }
    fn load_all(world: &World) {
        world.load(&[1, 2, 4]);
    }
    check(3, store_a, &[store_middle, store_end, load_all]);
}

#[test]
fn guards_end_once_whoever_ends_them() {
    loom::model(|| {
        let world = World::new(1);
        let reservation = Arc::new(world.index.reserve(&keys(&[1])[..]).unwrap());
        world.rows[0].write(1);
        let other = Arc::clone(&reservation);
        let aborted = thread::spawn(move || other.abort().unwrap());
        let committed = reservation.commit().unwrap();
        assert_eq!(committed + aborted.join().unwrap(), 1);
        drop(reservation);
        assert_eq!(world.load(&[1]) as u64, committed);
        if let Some(lease) = world.lease(&[1]).map(Arc::new) {
            let other = Arc::clone(&lease);
            let released = thread::spawn(move || other.release());
            lease.release();
            released.join().unwrap();
        }
        world.assert_idle();
    });
}

#[test]
fn an_answer_of_an_epoch_stays_right_as_long_as_the_epoch() {
    check(
        1,
        nothing,
        &[store_a, |world| {
            let before = world.index.epoch();
            let found = world.load(&[1]);
            let again = world.load(&[1]);
            assert!(
                found == again || world.index.epoch() != before,
                "what is found changed, and the epoch did not"
            );
        }],
    );
}
