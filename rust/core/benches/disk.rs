//! Stores and cold loads of the disk tier beside what the machine does with plain files of the same size.
//!
//! First a table, from rounds in which all take turns, each first in some round (so that a neighbour's load, and the
//! bursts that cloud disks allow, meet all), then criterion's figures. Set `LMCACHE_RS_BENCH_DIRECTORY` to a directory
//! on the disk in question.

mod chunks;

use std::env;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lmcache_core::{
    Chunk, DiskConfig, DiskDirectory, DiskTier, Ended, HostPool, Namespace, RowMemory, Seal, Space,
    TierQueue, TierQueueConfig,
};

use chunks::{CHUNK_ROWS, CHUNKS, ROW_BYTES, WAIT, key};

const CHUNK_BYTES: usize = ROW_BYTES * CHUNK_ROWS;

/// Rounds of the table; the median is shown.
const ROUNDS: usize = 9;

/// Memory of all chunks, and where files go.
struct Setup {
    pool: HostPool,
    directory: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        let parent = env::var_os("LMCACHE_RS_BENCH_DIRECTORY")
            .map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
        Self { pool: chunks::pool(), directory: tempfile::tempdir_in(parent).expect("a directory") }
    }

    fn path(&self, who: &Contender) -> PathBuf {
        self.directory.path().join(who.name())
    }
}

/// Who takes turns.
#[derive(Clone, Copy, Debug)]
struct Contender {
    tier: bool,
    direct: bool,
    uring: bool,
    threads: usize,
}

impl Contender {
    fn name(&self) -> String {
        let Self { tier, direct, uring, threads } = self;
        let who = match (tier, uring) {
            (false, _) => "plain",
            (true, true) => "tier uring",
            (true, false) => "tier pread",
        };
        format!("{who} {} T{threads}", if *direct { "direct" } else { "buffered" })
    }

    /// How long a store of all chunks takes, until they are on the medium.
    fn store(&self, setup: &Setup) -> Duration {
        let path = setup.path(self);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("made");
        let queue = self.queue(setup);
        sync(&path);
        let start = Instant::now();
        if self.tier {
            queue.store(0, chunks::chunks(&setup.pool)).expect("open");
            wait(&queue);
        } else {
            self.run_plain(setup, |path, bytes| {
                let mut options = OpenOptions::new();
                options.write(true).create_new(true).custom_flags(self.flags());
                options.open(path).expect("made").write_all_at(bytes, 0).expect("written");
            });
        }
        sync(&path);
        start.elapsed()
    }

    /// How long a load of all chunks takes that are on the medium and nowhere else.
    fn load(&self, setup: &Setup) -> Duration {
        forget(&setup.path(self));
        let queue = self.queue(setup);
        let start = Instant::now();
        if self.tier {
            queue.load(0, chunks::chunks(&setup.pool)).expect("open");
            wait(&queue);
        } else {
            self.run_plain(setup, |path, bytes| {
                let mut options = OpenOptions::new();
                options.read(true).custom_flags(self.flags());
                options.open(path).expect("there").read_exact_at(bytes, 0).expect("read");
            });
        }
        start.elapsed()
    }

    fn flags(&self) -> i32 {
        if self.direct { libc::O_DIRECT } else { 0 }
    }

    /// One file a chunk, shared among the threads.
    fn run_plain(&self, setup: &Setup, act: impl Fn(&Path, &mut [u8]) + Sync) {
        let path = setup.path(self);
        let mut chunks: Vec<(usize, &mut [u8])> =
            chunks::bytes(&setup.pool).chunks_exact_mut(CHUNK_BYTES).enumerate().collect();
        thread::scope(|scope| {
            while !chunks.is_empty() {
                let share = chunks.split_off(chunks.len() - CHUNKS / self.threads);
                let (path, act) = (&path, &act);
                scope.spawn(move || {
                    for (number, bytes) in share {
                        act(&path.join(number.to_string()), bytes);
                    }
                });
            }
        });
    }

    /// The tier as an engine has it, which has stored before.
    fn queue(&self, setup: &Setup) -> TierQueue {
        let directories = vec![DiskDirectory { path: setup.path(self), quota_bytes: u64::MAX }];
        let config = DiskConfig { directories, direct: self.direct, io_uring: self.uring };
        let space = Space::new(Namespace::new(&[]), 0, 1, Seal::Checksum).expect("valid");
        let tier = DiskTier::new(space, &config).expect("valid");
        let config =
            TierQueueConfig { threads: self.threads, stores_max: CHUNKS, loads_max: CHUNKS, wait: WAIT };
        let queue = TierQueue::new(Arc::new(tier), &config).expect("valid");
        if self.tier {
            let rows = RowMemory::new(&setup.pool, &[0]).expect("valid");
            queue.store(0, vec![Chunk { key: key(255), position: 0, memory: rows }]).expect("open");
            wait(&queue);
        }
        queue
    }
}

fn wait(queue: &TierQueue) {
    assert!(queue.drain(WAIT).expect("open"));
    for outcome in queue.poll().expect("open") {
        assert!(matches!(outcome.ended, Ended::Stored(Ok(_)) | Ended::Loaded(Ok(_))), "{outcome:?}");
    }
}

/// Brings everything to the medium.
fn sync(path: &Path) {
    rustix::fs::syncfs(File::open(path).expect("there").as_fd()).expect("synced");
}

/// Drops all files below `path` from the page cache.
fn forget(path: &Path) {
    for entry in fs::read_dir(path).expect("there") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            forget(&path);
        } else {
            let file = File::open(&path).expect("there");
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("dropped");
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn contenders() -> Vec<Contender> {
    let plain = |direct, threads| Contender { tier: false, direct, uring: false, threads };
    let tier = |direct, uring, threads| Contender { tier: true, direct, uring, threads };
    vec![
        plain(true, 1),
        plain(true, 2),
        plain(true, 4),
        plain(false, 1),
        plain(false, 4),
        tier(true, true, 1),
        tier(true, true, 2),
        tier(true, true, 4),
        tier(true, false, 4),
        tier(false, true, 4),
    ]
}

fn table(setup: &Setup) {
    let contenders = contenders();
    let mut times = vec![[Vec::new(), Vec::new()]; contenders.len()];
    for round in 0..ROUNDS {
        for turn in 0..contenders.len() {
            let number = (round + turn) % contenders.len();
            let contender = &contenders[number];
            let [stores, loads] = &mut times[number];
            stores.push(contender.store(setup).as_secs_f64());
            loads.push(contender.load(setup).as_secs_f64());
            fs::remove_dir_all(setup.path(contender)).expect("removed");
        }
    }
    let mib = u32::try_from((CHUNKS * CHUNK_BYTES) >> 20).expect("few");
    let speed = |time: f64| f64::from(mib) * 1_048_576.0 / time / 1e9;
    let mut best = [0.0_f64; 2];
    for (contender, times) in contenders.iter().zip(&mut times) {
        for (times, best) in times.iter_mut().zip(&mut best) {
            median(times);
            if !contender.tier {
                *best = best.max(speed(times[ROUNDS / 2]));
            }
        }
    }
    for (contender, times) in contenders.iter().zip(&times) {
        let shown = times.iter().zip(best).map(|(times, best)| {
            let [slow, middle, fast] = [ROUNDS - 1, ROUNDS / 2, 0].map(|at| speed(times[at]));
            format!("{middle:5.2} GB/s ({slow:.2} to {fast:.2}), {:.2} of the limit", middle / best)
        });
        let [store, load]: [String; 2] = shown.collect::<Vec<_>>().try_into().expect("two");
        eprintln!("{:>22}: store {store}; load {load}", contender.name());
    }
}

fn disk(criterion: &mut Criterion) {
    let setup = Setup::new();
    // Not where `cargo test` only tries whether benchmarks run.
    if env::args().any(|argument| argument == "--bench") {
        table(&setup);
    }
    let mut group = criterion.benchmark_group("disk, 8 chunks of 36 MiB");
    group.sample_size(10).throughput(Throughput::Bytes((CHUNKS * CHUNK_BYTES) as u64));
    for contender in contenders() {
        group.bench_function(format!("store, {}", contender.name()), |bench| {
            bench.iter_custom(|rounds| (0..rounds).map(|_| contender.store(&setup)).sum());
        });
        group.bench_function(format!("cold load, {}", contender.name()), |bench| {
            bench.iter_custom(|rounds| (0..rounds).map(|_| contender.load(&setup)).sum());
        });
    }
    group.finish();
}

criterion_group!(benches, disk);
criterion_main!(benches);
