//! What other threads of a process pay while a pool is given its memory: mappings made and given back meanwhile.
//!
//! Beside it the same memory asked for by `MADV_POPULATE_WRITE`, 16 MiB at a time, which the pool does not use because
//! of what this prints. Rounds take turns, each with memory that the process did not have before.

use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lmcache_core::{HostPool, HostPoolConfig};

const ROUNDS: usize = 5;
const POOL_GIB: u32 = 3;
const POOL_BYTES: usize = (POOL_GIB as usize) << 30;
const POPULATED_BYTES: usize = 16 << 20;
const SMALL_BYTES: usize = 64 << 10;

/// One mapping is made, touched and given back, then the thread waits this long.
const PAUSE: Duration = Duration::from_micros(20);

#[expect(clippy::print_stdout, reason = "the table is the result")]
fn main() {
    let ways: [(&str, fn()); 3] = [
        ("nothing", || thread::sleep(Duration::from_millis(300))),
        ("touching", touch),
        ("populating", populate),
    ];
    let mut lates: [Vec<Duration>; 3] = Default::default();
    let mut seconds: [Vec<f64>; 3] = Default::default();
    for _ in 0..ROUNDS {
        for (way, (_, work)) in ways.iter().enumerate() {
            let (took, late) = beside(*work);
            seconds[way].push(took.as_secs_f64());
            lates[way].extend(late);
        }
    }
    println!("| beside | GiB/s | a mapping of 64 KiB, ms: 50 % | 99 % | most |\n|---|---|---|---|---|");
    for (way, (name, _)) in ways.iter().enumerate() {
        seconds[way].sort_by(f64::total_cmp);
        lates[way].sort();
        let [half, rare, most] = [500, 990, 1000].map(|thousandths| at(&lates[way], thousandths));
        let speed = f64::from(POOL_GIB) / seconds[way][ROUNDS / 2];
        let speed = if way == 0 { "-".to_owned() } else { format!("{speed:.1}") };
        println!("| {name} | {speed} | {half:.3} | {rare:.3} | {most:.1} |");
    }
}

/// The value that so many thousandths of all are not above, in ms.
fn at(sorted: &[Duration], thousandths: usize) -> f64 {
    sorted[(sorted.len() - 1) * thousandths / 1000].as_secs_f64() * 1e3
}

/// How long the work took in a thread of its own, and every mapping made meanwhile.
fn beside(work: fn()) -> (Duration, Vec<Duration>) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let start = Instant::now();
            work();
            done.store(true, Ordering::Release);
            start.elapsed()
        });
        let mut lates = Vec::new();
        while !done.load(Ordering::Acquire) {
            let start = Instant::now();
            with_mapping(SMALL_BYTES, |base| {
                // SAFETY: the first byte of a mapping that nobody else knows.
                unsafe { base.as_ptr().write(1) };
            });
            lates.push(start.elapsed());
            thread::sleep(PAUSE);
        }
        (worker.join().expect("no panic"), lates)
    })
}

fn touch() {
    let config =
        HostPoolConfig { size_bytes: POOL_BYTES, row_bytes: 1 << 20, prefault_threads: 1, huge_pages: true };
    let pool = HostPool::new(&config).expect("memory");
    assert!(pool.wait_prefaulted(Duration::from_secs(600)).expect("this process"));
}

fn populate() {
    with_mapping(POOL_BYTES, |base| {
        advise(base, 0..POOL_BYTES, libc::MADV_HUGEPAGE);
        for start in (0..POOL_BYTES).step_by(POPULATED_BYTES) {
            advise(base, start..start + POPULATED_BYTES, libc::MADV_POPULATE_WRITE);
        }
    });
}

fn advise(base: NonNull<u8>, range: Range<usize>, advice: libc::c_int) {
    // SAFETY: callers give ranges inside of their mapping; neither advice changes a byte.
    unsafe { libc::madvise(base.as_ptr().add(range.start).cast(), range.len(), advice) };
}

fn with_mapping(len: usize, with: impl FnOnce(NonNull<u8>)) {
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let mapped = unsafe { libc::mmap(ptr::null_mut(), len, access, flags, -1, 0) };
    assert_ne!(mapped, libc::MAP_FAILED, "no memory");
    with(NonNull::new(mapped.cast()).expect("not at address 0"));
    // SAFETY: made above, and `with` kept nothing of it.
    unsafe { libc::munmap(mapped, len) };
}
