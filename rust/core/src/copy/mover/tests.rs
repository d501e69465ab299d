//! Copies against a naive oracle, and the life of jobs and threads.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;
use proptest::prelude::*;

use super::super::Layer;
use super::*;
use crate::HostPoolConfig;

const LONG: Duration = Duration::from_secs(60);

/// A layer: page bytes, gap after each page.
type Shape = (usize, usize);

/// Both ends as plain memory that tests may look at.
struct Ends {
    pool: HostPool,
    layers: Arc<KvLayers>,
    tensors: Vec<(*mut u8, usize)>,
    shapes: Vec<Shape>,
}

impl Ends {
    /// Memory filled with bytes that differ from place to place.
    fn new(shapes: &[Shape], rows: usize, blocks: usize) -> Self {
        let mut memory: Vec<Vec<u8>> =
            shapes.iter().map(|(page, gap)| pattern(blocks * (page + gap), *page)).collect();
        let tensors: Vec<_> = memory.iter_mut().map(|bytes| (bytes.as_mut_ptr(), bytes.len())).collect();
        let layers = shapes.iter().zip(&tensors).map(|(&(page_bytes, gap), &(base, _))| Layer {
            base,
            block_stride: page_bytes + gap,
            page_bytes,
        });
        // SAFETY: each layer has `blocks` pages and gaps in `memory`, which is kept and used by tests only.
        let layers = unsafe { KvLayers::new(layers.collect(), blocks, Box::new(memory)) }.expect("valid");
        let row_bytes = layers.row_bytes();
        let size_bytes = rows * row_bytes.next_multiple_of(4096);
        let config = HostPoolConfig { size_bytes, row_bytes, prefault_threads: 0, huge_pages: false };
        let pool = HostPool::new(&config).expect("memory");
        assert_eq!(pool.rows() as usize, rows);
        let filling = pattern(size_bytes, 5);
        // SAFETY: the whole mapping, used by this test only.
        unsafe { pool.base().as_ptr().copy_from(filling.as_ptr(), size_bytes) };
        Self { pool, layers: Arc::new(layers), tensors, shapes: shapes.to_vec() }
    }

    fn mover(&self, threads: usize) -> Mover {
        Mover::new(self.pool.clone(), Arc::clone(&self.layers), threads).expect("valid")
    }

    /// All bytes: the pool's, then each tensor's with its gaps.
    fn bytes(&self) -> Vec<Vec<u8>> {
        let pool = (self.pool.base().as_ptr(), self.pool.size_bytes());
        // SAFETY: these ranges are alive, and no copy runs when a test asks.
        let read =
            |&(base, len): &(*mut u8, usize)| unsafe { std::slice::from_raw_parts(base, len).to_vec() };
        std::iter::once(&pool).chain(&self.tensors).map(read).collect()
    }

    /// What `bytes` must be after a copy, byte by byte.
    fn expected(
        &self,
        mut bytes: Vec<Vec<u8>>,
        direction: Direction,
        rows: &[u32],
        blocks: &[u32],
    ) -> Vec<Vec<u8>> {
        for (&row, &block) in rows.iter().zip(blocks) {
            let mut in_row = row as usize * self.pool.row_stride();
            for (number, (page, gap)) in self.shapes.iter().enumerate() {
                for byte in 0..*page {
                    let in_tensor = block as usize * (page + gap) + byte;
                    match direction {
                        Direction::Store => bytes[0][in_row] = bytes[1 + number][in_tensor],
                        Direction::Load => bytes[1 + number][in_tensor] = bytes[0][in_row],
                    }
                    in_row += 1;
                }
            }
        }
        bytes
    }
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    let mut state = seed as u64 | 1;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .take(len)
    .collect()
}

/// Distinct row and block numbers, in any order, as many of each.
fn some_pairs(rows: usize, blocks: usize) -> impl Strategy<Value = (Vec<u32>, Vec<u32>)> {
    let numbers = |count: usize| Just((0_u32..).take(count).collect::<Vec<u32>>()).prop_shuffle();
    (numbers(rows), numbers(blocks), 0..=rows.min(blocks)).prop_map(|(mut rows, mut blocks, count)| {
        rows.truncate(count);
        blocks.truncate(count);
        (rows, blocks)
    })
}

fn direction() -> impl Strategy<Value = Direction> {
    prop_oneof![Just(Direction::Store), Just(Direction::Load)]
}

type Step = (Direction, bool, (Vec<u32>, Vec<u32>));

fn scenario() -> impl Strategy<Value = (Vec<Shape>, usize, usize, usize, Vec<Step>)> {
    let page = prop_oneof![4 => 1_usize..5_000, 1 => 250_000_usize..700_000];
    let shapes = prop::collection::vec((page, 0_usize..200), 1..5);
    (shapes, 1_usize..8, 1_usize..8, 1_usize..4).prop_flat_map(|(shapes, rows, blocks, threads)| {
        let steps = prop::collection::vec((direction(), any::<bool>(), some_pairs(rows, blocks)), 1..5);
        (Just(shapes), Just(rows), Just(blocks), Just(threads), steps)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn copies_do_what_the_oracle_does_and_touch_nothing_else((shapes, rows, blocks, threads, steps) in scenario()) {
        let ends = Ends::new(&shapes, rows, blocks);
        let mover = ends.mover(threads);
        for (direction, background, (rows, blocks)) in steps {
            let expected = ends.expected(ends.bytes(), direction, &rows, &blocks);
            let bytes = (rows.len() * ends.layers.row_bytes()) as u64;
            if background {
                mover.submit(direction, 7, &rows, &blocks).expect("valid");
                prop_assert!(mover.drain(LONG).expect("open"));
                let ended = mover.poll().expect("open");
                prop_assert_eq!(ended.len(), 1);
                prop_assert!(ended[0].job == 7 && ended[0].seconds >= 0.0);
                prop_assert_eq!(ended[0].bytes.as_ref().ok(), Some(&bytes));
            } else {
                prop_assert_eq!(mover.copy(direction, &rows, &blocks).expect("valid"), bytes);
            }
            prop_assert!(ends.bytes() == expected, "bytes differ after {direction:?} {rows:?} {blocks:?}");
        }
    }

    #[test]
    fn wrong_arguments_copy_nothing(
        (rows, blocks) in some_pairs(6, 4), at in 0_usize..5, wrong in 0_usize..3, direction in direction()
    ) {
        let ends = Ends::new(&[(100, 3), (4_000, 0)], 6, 4);
        let mover = ends.mover(1);
        let (mut rows, mut blocks) = (rows, blocks);
        match wrong {
            0 => rows.insert(at.min(rows.len()), 1),
            1 => { rows.insert(at.min(rows.len()), 6); blocks.push(0); }
            _ => { rows.push(0); blocks.insert(at.min(blocks.len()), u32::MAX); }
        }
        let before = ends.bytes();
        let refused = mover.copy(direction, &rows, &blocks).expect_err("wrong");
        prop_assert_eq!(refused.kind(), ErrorKind::InvalidArgument);
        prop_assert!(mover.submit(direction, 1, &rows, &blocks).is_err());
        prop_assert!(mover.drain(LONG).expect("open") && mover.poll().expect("open").is_empty());
        prop_assert!(ends.bytes() == before);
    }
}

#[test]
fn the_ends_must_fit_and_threads_are_limited() {
    let (small, large) = (Ends::new(&[(10, 0)], 2, 2), Ends::new(&[(11, 0)], 2, 2));
    let error = Mover::new(small.pool.clone(), Arc::clone(&large.layers), 1).expect_err("does not fit");
    assert!(error.to_string().contains("10 bytes") && error.to_string().contains("row_bytes=11"), "{error}");
    for threads in [0, THREADS_MAX + 1] {
        let error = Mover::new(small.pool.clone(), Arc::clone(&small.layers), threads).expect_err("threads");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}

#[test]
fn many_threads_submit_and_poll_and_every_job_ends_once() {
    const SUBMITTERS: u32 = 4;
    const JOBS: u32 = 200;
    let total = SUBMITTERS * JOBS;
    let ends = Ends::new(&[(3_000, 50); 3], 64, 64);
    let mover = ends.mover(3);
    let mut seen = thread::scope(|scope| {
        for submitter in 0..SUBMITTERS {
            let mover = &mover;
            scope.spawn(move || {
                let first = submitter * 16;
                let numbers: Vec<u32> = (first..first + 16).collect();
                for job in 0..JOBS {
                    let direction = if job % 2 == 0 { Direction::Store } else { Direction::Load };
                    let name = u64::from(submitter * JOBS + job);
                    while mover.submit(direction, name, &numbers, &numbers).is_err() {
                        thread::yield_now();
                    }
                    if job % 16 == 0 {
                        mover.copy(Direction::Store, &numbers[..2], &numbers[..2]).expect("valid");
                    }
                }
            });
        }
        let mut seen = Vec::new();
        while seen.len() < total as usize {
            seen.extend(mover.poll().expect("open").into_iter().map(|outcome| {
                assert_eq!(outcome.bytes.expect("copied"), 16 * 9_000);
                outcome.job
            }));
            thread::yield_now();
        }
        seen
    });
    seen.sort_unstable();
    assert_eq!(seen, (0..u64::from(total)).collect::<Vec<_>>());
    assert!(mover.drain(LONG).expect("open") && mover.poll().expect("open").is_empty());
}

#[test]
fn a_closed_mover_refuses_and_says_so_again() {
    let ends = Ends::new(&[(100, 0)], 2, 2);
    let mover = ends.mover(2);
    mover.submit(Direction::Store, 1, &[0], &[1]).expect("open");
    assert!(mover.close(LONG).expect("here"));
    assert!(mover.close(Duration::ZERO).expect("idempotent"));
    let refusals = [
        mover.copy(Direction::Store, &[], &[]).map(drop),
        mover.submit(Direction::Store, 1, &[], &[]),
        mover.poll().map(drop),
        mover.drain(LONG).map(drop),
    ];
    assert!(
        refusals.iter().all(|refusal| refusal.as_ref().is_err_and(|error| error.kind() == ErrorKind::Closed))
    );
}

/// Set when a slow copy may go on; tests that use it hold `SLOW`.
static GO_ON: AtomicBool = AtomicBool::new(false);
static BEGUN: AtomicUsize = AtomicUsize::new(0);
static SLOW: Mutex<()> = Mutex::new(());

fn slow_copy(route: &Route, direction: Direction, pairs: &[Pair], claim: usize) {
    BEGUN.fetch_add(1, Ordering::SeqCst);
    while !GO_ON.load(Ordering::SeqCst) {
        thread::yield_now();
    }
    route.copy(direction, pairs, claim);
}

/// A mover whose one thread is in the middle of job 1 (a load) while job 2 (a store) waits.
fn stuck_mover(ends: &Ends) -> Mover {
    GO_ON.store(false, Ordering::SeqCst);
    BEGUN.store(0, Ordering::SeqCst);
    let mover = Mover::start(ends.pool.clone(), Arc::clone(&ends.layers), 1, slow_copy).expect("valid");
    mover.submit(Direction::Load, 1, &[0], &[0]).expect("open");
    mover.submit(Direction::Store, 2, &[1], &[1]).expect("open");
    while BEGUN.load(Ordering::SeqCst) == 0 {
        thread::yield_now();
    }
    mover
}

#[test]
fn closing_in_vain_gives_up_what_was_not_begun_and_keeps_the_memory_of_what_was() {
    let _slow = SLOW.lock();
    let ends = Ends::new(&[(100, 0)], 2, 2);
    let mover = stuck_mover(&ends);
    assert!(!mover.drain(Duration::from_millis(1)).expect("open"));
    assert!(!mover.close(Duration::from_millis(1)).expect("here"));
    let before = ends.bytes();
    let layers = Arc::downgrade(&ends.layers);
    let shared = Arc::downgrade(&mover.shared);
    drop(mover);
    GO_ON.store(true, Ordering::SeqCst);
    // The thread ends by itself, after its claim and nothing else.
    while shared.upgrade().is_some() {
        thread::yield_now();
    }
    assert_eq!(BEGUN.load(Ordering::SeqCst), 1);
    assert!(ends.bytes() == ends.expected(before, Direction::Load, &[0], &[0]));
    drop(ends);
    assert!(layers.upgrade().is_none());
}

#[test]
fn dropping_waits_for_jobs_in_flight() {
    let _slow = SLOW.lock();
    let ends = Ends::new(&[(100, 0)], 2, 2);
    let before = ends.bytes();
    let mover = stuck_mover(&ends);
    thread::scope(|scope| {
        scope.spawn(move || drop(mover));
        thread::sleep(Duration::from_millis(20));
        GO_ON.store(true, Ordering::SeqCst);
    });
    let loaded = ends.expected(before, Direction::Load, &[0], &[0]);
    assert!(ends.bytes() == ends.expected(loaded, Direction::Store, &[1], &[1]));
}

#[test]
fn closing_while_somebody_copies_waits_for_them() {
    let ends = Ends::new(&[(300_000, 0); 4], 16, 16);
    let numbers: Vec<u32> = (0..16).collect();
    for _ in 0..20 {
        let mover = ends.mover(2);
        thread::scope(|scope| {
            let copier = scope.spawn(|| mover.copy(Direction::Store, &numbers, &numbers));
            assert!(mover.close(LONG).expect("here"));
            if let Err(error) = copier.join().expect("no panic") {
                assert_eq!(error.kind(), ErrorKind::Closed);
            }
        });
    }
}

fn panicking_copy(route: &Route, direction: Direction, pairs: &[Pair], claim: usize) {
    assert_ne!(claim, 1, "a deliberate panic of this test");
    route.copy(direction, pairs, claim);
}

#[test]
fn a_panic_is_a_failed_job_and_the_threads_live_on() {
    let ends = Ends::new(&[(300_000, 0); 4], 2, 2);
    let mover = Mover::start(ends.pool.clone(), Arc::clone(&ends.layers), 2, panicking_copy).expect("valid");
    for round in 0..3 {
        mover.submit(Direction::Store, round, &[0, 1], &[0, 1]).expect("open");
        assert!(mover.drain(LONG).expect("open"));
        let ended = mover.poll().expect("open");
        assert!(ended.len() == 1 && ended[0].job == round && ended[0].bytes.is_err());
        let error = mover.copy(Direction::Load, &[0], &[0]).expect_err("a panic");
        assert_eq!(error.kind(), ErrorKind::Internal);
    }
    assert!(mover.close(LONG).expect("here"));
}
