//! The whole engine (index, pool, copy threads): clients store, load, remove and give up.

use std::cell::UnsafeCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::Mutex;
use shuttle::thread;

use super::try_schedules;
use crate::{
    Direction, ErrorKind, HostPool, HostPoolConfig, Index, Key, KeySpace, KvLayers, Layer, Mover, Result,
};

const ROWS: usize = 6;
const CLIENTS: usize = 3;
const ROUNDS: usize = 4;
/// Blocks of KV that each client has for itself.
const BLOCKS: usize = 5;

/// The KV of all clients: one number a block in each of two layers.
struct Kv([Vec<UnsafeCell<u64>>; 2]);

// SAFETY: shuttle runs one thread at a time; each block is used by its client and the copies it ordered.
unsafe impl Sync for Kv {}
// SAFETY: as above.
unsafe impl Send for Kv {}

impl Kv {
    fn set(&self, block: u32, number: u64) {
        for (layer, memory) in (0..).zip(&self.0) {
            // SAFETY: as above.
            unsafe { *memory[block as usize].get() = number * 2 + layer };
        }
    }

    /// What the block holds in both layers, if they agree.
    fn get(&self, block: u32) -> Option<u64> {
        // SAFETY: as above.
        let [first, second] = [0, 1].map(|layer| unsafe { *self.0[layer][block as usize].get() });
        (first + 1 == second && first % 2 == 0).then_some(first / 2)
    }
}

#[derive(Clone)]
struct World {
    index: Index,
    mover: Arc<Mover>,
    kv: Arc<Kv>,
    /// Ended jobs that their client has not asked for yet.
    ended: Arc<Mutex<HashMap<u64, bool>>>,
    /// Somebody closes the mover; otherwise no copy may fail.
    closes: bool,
}

impl World {
    fn new(closes: bool) -> Self {
        let memory = || (0..CLIENTS * BLOCKS).map(|_| UnsafeCell::new(0)).collect();
        let kv = Arc::new(Kv([memory(), memory()]));
        let layer = |memory: &Vec<UnsafeCell<u64>>| Layer {
            base: memory[0].get().cast(),
            block_stride: 8,
            page_bytes: 8,
        };
        let layers = kv.0.iter().map(layer).collect();
        // SAFETY: `kv` keeps the memory and is kept; each block is used by its client only.
        let layers = unsafe { KvLayers::new(layers, CLIENTS * BLOCKS, Box::new(Arc::clone(&kv))) }.unwrap();
        let config =
            HostPoolConfig { size_bytes: ROWS * 4096, row_bytes: 16, prefault_threads: 0, huge_pages: false };
        let mover = Mover::new(HostPool::new(&config).unwrap(), Arc::new(layers), 2).unwrap();
        let index = Index::new(ROWS).unwrap();
        Self { index, mover: Arc::new(mover), kv, ended: Arc::default(), closes }
    }

    /// Whether a call was carried out: refused, or given up with what was not begun, it is when the mover closes only.
    fn is_done(&self, result: Result<()>) -> bool {
        let kind = result.err().map(|error| error.kind());
        let closed = matches!(kind, Some(ErrorKind::Closed | ErrorKind::Internal));
        assert!(kind.is_none() || (self.closes && closed), "{kind:?}");
        kind.is_none()
    }

    /// Copies now or in the background, as chance has it. Whether it was done; either way nothing of it runs any more.
    fn copy(&self, direction: Direction, job: u64, rows: &[u32], blocks: &[u32]) -> bool {
        if thread_rng().gen_bool(0.3) {
            return self.is_done(self.mover.copy(direction, rows, blocks).map(drop));
        }
        if !self.is_done(self.mover.submit(direction, job, rows, blocks)) {
            return false;
        }
        loop {
            if let Ok(outcomes) = self.mover.poll() {
                let mut ended = self.ended.lock().unwrap();
                ended.extend(outcomes.into_iter().map(|outcome| (outcome.job, outcome.bytes.is_ok())));
                if let Some(done) = ended.remove(&job) {
                    assert!(done || self.closes, "job {job} failed");
                    return done;
                }
            } else {
                // Closed: after this nothing of the job runs, and nobody is told how it ended.
                assert!(self.mover.close(Duration::from_secs(1)).is_ok());
                return false;
            }
            thread::yield_now();
        }
    }
}

/// Two chains with a common start; the number of a block is the same wherever it is.
fn chain() -> (Vec<Key>, Vec<u64>) {
    let (fork, blocks) = (thread_rng().gen_range(0..2_u64), thread_rng().gen_range(1..=BLOCKS as u64));
    let numbers: Vec<u64> =
        (1..=blocks).map(|block| if block > 2 { block + 100 * fork } else { block }).collect();
    let space = KeySpace::new("shuttle", 0, &[]);
    (numbers.iter().map(|number| space.key(&number.to_le_bytes())).collect(), numbers)
}

fn store(world: &World, job: u64, first_block: u32) {
    let (keys, numbers) = chain();
    let reservation = world.index.reserve(&keys[..]).unwrap();
    let blocks: Vec<u32> = (first_block..).take(reservation.rows().len()).collect();
    for (&block, number) in blocks.iter().zip(&numbers[reservation.first()..]) {
        world.kv.set(block, *number);
    }
    let done = world.copy(Direction::Store, job, reservation.rows(), &blocks);
    match thread_rng().gen_range(0..8) {
        _ if !done => drop(reservation),
        0 => assert!(reservation.abort().unwrap() <= ROWS as u64),
        1 => assert!(reservation.discard().unwrap() <= ROWS as u64),
        _ => assert!(reservation.commit().unwrap() <= ROWS as u64),
    }
}

fn load(world: &World, job: u64, first_block: u32) {
    let (keys, numbers) = chain();
    let found = world.index.lookup(&keys[..]).unwrap();
    let Some(lease) = found.lease().unwrap() else { return };
    let rows = lease.rows(0).unwrap();
    assert_eq!(rows.len(), found.blocks());
    let blocks: Vec<u32> = (first_block..).take(rows.len()).collect();
    if world.copy(Direction::Load, job, &rows, &blocks) {
        for (&block, &number) in blocks.iter().zip(&numbers) {
            assert_eq!(world.kv.get(block), Some(number), "a leased row holds another block");
        }
    }
    match thread_rng().gen_range(0..8) {
        0 => assert!(lease.discard(rows.len() / 2).unwrap() <= ROWS as u64),
        1 => assert!(world.index.clear().unwrap() <= ROWS as u64),
        _ => lease.release(),
    }
}

/// What the clients do, with somebody who closes the mover under them or not.
fn life(closes: bool) {
    let world = World::new(closes);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let world = world.clone();
            thread::spawn(move || {
                let first_block = u32::try_from(client * BLOCKS).unwrap();
                for round in 0..ROUNDS {
                    let job = (client * ROUNDS + round) as u64;
                    if thread_rng().gen_bool(0.5) {
                        store(&world, job, first_block);
                    } else {
                        load(&world, job, first_block);
                    }
                }
            })
        })
        .collect();
    if closes {
        assert!(world.mover.close(Duration::from_secs(1)).is_ok());
    }
    for client in clients {
        client.join().unwrap();
    }
    world.index.check_integrity().unwrap();
    let stats = world.index.stats().unwrap();
    assert_eq!((stats.leases, stats.reserved, stats.leaving), (0, 0, 0));
    assert_eq!(stats.free + stats.visible, ROWS as u64);
    assert_eq!(stats.counters.mismatches, 0);
}

#[test]
fn clients_meet() {
    try_schedules("clients meet", 2000, || life(false));
}

#[test]
fn the_mover_is_closed_under_its_clients() {
    try_schedules("the mover is closed under its clients", 2000, || life(true));
}
