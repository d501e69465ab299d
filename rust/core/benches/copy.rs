//! Copies of whole blocks beside a plain memcpy of the same bytes by the same number of threads.
//!
//! First a table of ratios, from rounds in which memcpy, store and load take turns (so that a neighbour's load on
//! the machine meets all three), then criterion's figures.

use std::hint::black_box;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lmcache_core::{Direction, HostPool, HostPoolConfig, KvLayers, Layer, Mover};

/// Bytes that one copy moves: with both ends many times the last-level cache.
const COPY_BYTES: usize = 384 << 20;

/// Rounds of the table; the median is shown.
const ROUNDS: usize = 11;

const WAIT: Duration = Duration::from_secs(60);

/// Page bytes, layers, and whether blocks are visited all over the place (else in order, as in a fresh engine).
const SHAPES: [(usize, usize, bool); 6] = [
    (65_536, 30, true),
    (98_304, 30, true),
    (1 << 20, 8, true),
    (16_384, 4, true),
    (16_384, 4, false),
    (4_096, 16, true),
];

/// Both ends, and row and block numbers.
struct Setup {
    pool: HostPool,
    layers: Arc<KvLayers>,
    rows: Vec<u32>,
    blocks: Vec<u32>,
    /// Source and target of the memcpy, as large as the copy.
    plain: (HostPool, HostPool),
}

fn pool(size_bytes: usize, row_bytes: usize) -> HostPool {
    let config = HostPoolConfig { size_bytes, row_bytes, prefault_threads: 2, huge_pages: true };
    let pool = HostPool::new(&config).expect("memory");
    assert!(pool.wait_prefaulted(WAIT).expect("here"), "{:?}", pool.prefault_error());
    pool
}

impl Setup {
    fn new(page_bytes: usize, layers: usize, scattered: bool) -> Self {
        let row_bytes = page_bytes * layers;
        let count = COPY_BYTES / row_bytes;
        let tensors: Vec<HostPool> = (0..layers).map(|_| pool(count * page_bytes, page_bytes)).collect();
        let described = tensors
            .iter()
            .map(|tensor| Layer { base: tensor.base().as_ptr(), block_stride: page_bytes, page_bytes })
            .collect();
        // SAFETY: each tensor has `count` pages, kept by the box, used by this bench only.
        let layers = unsafe { KvLayers::new(described, count, Box::new(tensors)) }.expect("valid");
        let numbers =
            |step: usize| (0..count).map(|i| u32::try_from(i * step % count).expect("few")).collect();
        Self {
            pool: pool(count * row_bytes, row_bytes),
            layers: Arc::new(layers),
            rows: numbers(1),
            blocks: numbers(if scattered { coprime_step(count) } else { 1 }),
            plain: (pool(count * row_bytes, row_bytes), pool(count * row_bytes, row_bytes)),
        }
    }

    fn bytes(&self) -> usize {
        self.rows.len() * self.layers.row_bytes()
    }

    /// One memcpy a thread.
    fn memcpy(&self, threads: usize) {
        let share = self.bytes() / threads;
        thread::scope(|scope| {
            for number in 0..threads {
                let part = move || {
                    // SAFETY: parts of two different mappings, each used by this thread only.
                    unsafe {
                        let source = self.plain.0.base().add(number * share);
                        self.plain.1.base().add(number * share).copy_from_nonoverlapping(source, share);
                    }
                };
                if number + 1 == threads { part() } else { drop(scope.spawn(part)) }
            }
        });
        black_box(self.plain.1.base());
    }

    /// With 1 thread in the background, with 2 the caller and one helper.
    fn copy(&self, mover: &Mover, direction: Direction, threads: usize) {
        if threads == 1 {
            mover.submit(direction, 0, &self.rows, &self.blocks).expect("valid");
            assert!(mover.drain(WAIT).expect("open"));
            assert!(mover.poll().expect("open").iter().all(|outcome| outcome.bytes.is_ok()));
        } else {
            mover.copy(direction, &self.rows, &self.blocks).expect("valid");
        }
    }

    fn mover(&self, threads: usize) -> Mover {
        Mover::new(self.pool.clone(), Arc::clone(&self.layers), (threads - 1).max(1)).expect("valid")
    }
}

/// About 0.4 of `count`, with no common divisor: visits every number, neighbours far apart.
fn coprime_step(count: usize) -> usize {
    let divisor = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    (count * 2 / 5..count).find(|&step| divisor(step, count) == 1).unwrap_or(1)
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn ratio_line(setup: &Setup, threads: usize, name: &str) {
    let mover = setup.mover(threads);
    let mut rounds = [Vec::new(), Vec::new(), Vec::new()];
    for round in 0..=ROUNDS {
        let times = [
            seconds(|| setup.memcpy(threads)),
            seconds(|| setup.copy(&mover, Direction::Store, threads)),
            seconds(|| setup.copy(&mover, Direction::Load, threads)),
        ];
        if round > 0 {
            rounds.iter_mut().zip(times).for_each(|(rounds, time)| rounds.push(time));
        }
    }
    let [memcpy, store, load] = rounds.map(median);
    let kib = u32::try_from(setup.bytes() >> 10).expect("below 4 TiB");
    let speed = |time: f64| f64::from(kib) * 1024.0 / time / 1e9;
    eprintln!(
        "{name:>24} {threads} thread(s): memcpy {:5.2} GB/s, store {:5.2} ({:.2} of memcpy), load {:5.2} ({:.2})",
        speed(memcpy),
        speed(store),
        memcpy / store,
        speed(load),
        memcpy / load
    );
}

fn copies(criterion: &mut Criterion) {
    for (page_bytes, layers, scattered) in SHAPES {
        let order = if scattered { "scattered" } else { "in order" };
        let name = format!("{page_bytes} B x {layers} {order}");
        let setup = Setup::new(page_bytes, layers, scattered);
        for threads in [1, 2] {
            ratio_line(&setup, threads, &name);
        }
        for threads in [1, 2] {
            let mover = setup.mover(threads);
            let mut group = criterion.benchmark_group(format!("{name}, {threads} threads"));
            group
                .sample_size(10)
                .warm_up_time(Duration::from_millis(200))
                .measurement_time(Duration::from_secs(1));
            group.throughput(Throughput::Bytes(setup.bytes() as u64));
            group.bench_function("memcpy", |bench| bench.iter(|| setup.memcpy(threads)));
            for (name, direction) in [("store", Direction::Store), ("load", Direction::Load)] {
                group.bench_function(name, |bench| bench.iter(|| setup.copy(&mover, direction, threads)));
            }
            group.finish();
        }
    }
}

criterion_group!(benches, copies);
criterion_main!(benches);
