//! Pins the pool for the GPU in the background, piece by piece, and unpins it before the memory goes.

use std::mem;
use std::ops::Range;
use std::sync::Arc;

use super::mapping::Mapping;
use super::prefault::PIECE_BYTES as TOUCH_BYTES;
use super::{prefer_node, use_every_cpu};
use crate::cuda::{Driver, Entered};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::thread::{self, JoinHandle};

/// Most bytes of one registration. Larger ones are no faster, and the driver lets nobody else in meanwhile: this one
/// takes about 7 ms on huge pages.
pub(super) const PIECE_BYTES_MAX: usize = 256 << 20;

/// What to do about a refused registration.
const REMEDY: &str = "raise the limit of locked memory (ulimit -l unlimited; docker run --ulimit memlock=-1) and the \
                      container's memory limit, or ask for a smaller pool";

/// The pinning of one pool. Dropping it ends the thread and unpins everything.
#[derive(Debug)]
pub(super) struct Pin {
    progress: Arc<Progress>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Progress {
    mapping: Arc<Mapping>,
    driver: Arc<dyn Driver>,
    piece_bytes: usize,
    /// All bytes below are pinned, in pieces that begin at multiples of `piece_bytes`.
    pinned_bytes: AtomicUsize,
    running: AtomicBool,
    stop: AtomicBool,
    error: Mutex<Option<String>>,
}

impl Pin {
    /// Starts to pin. That the thread does not start is an error like any other of pinning.
    pub(super) fn start(mapping: &Arc<Mapping>, driver: Arc<dyn Driver>, piece_bytes: usize) -> Self {
        let progress = Arc::new(Progress {
            mapping: Arc::clone(mapping),
            driver,
            piece_bytes,
            pinned_bytes: AtomicUsize::new(0),
            running: AtomicBool::new(true),
            stop: AtomicBool::new(false),
            error: Mutex::default(),
        });
        let running = Running(Arc::clone(&progress));
        let work = move || {
            let running = running;
            running.0.work();
        };
        let thread = match thread::Builder::new().name("lmcache-pin".to_owned()).spawn(work) {
            Ok(thread) => Some(thread),
            Err(error) => {
                *progress.error.lock() = Some(format!("the pinning thread did not start: {error}"));
                None
            }
        };
        Self { progress, thread }
    }

    pub(super) fn pinned_bytes(&self) -> usize {
        self.progress.pinned_bytes.load(Ordering::Acquire)
    }

    /// Whether more bytes may come to be pinned.
    pub(super) fn is_running(&self) -> bool {
        self.progress.running.load(Ordering::Acquire)
    }

    pub(super) fn error(&self) -> Option<String> {
        self.progress.error.lock().clone()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let thread = self.thread.take();
        if !self.progress.mapping.owner().is_here() {
            // A forked child has neither the thread nor the memory, and must not touch the driver.
            mem::forget(thread);
            return;
        }
        self.progress.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = thread {
            // A panic there ended the pinning like an error.
            let _ = thread.join();
        }
        self.progress.unpin();
    }
}

/// The running thread: no more bytes come once it is gone, also when it panics or never started.
struct Running(Arc<Progress>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.store(false, Ordering::Release);
    }
}

impl Progress {
    fn work(&self) {
        use_every_cpu();
        if let Err(fault) = self.driver.adopt_thread() {
            *self.error.lock() = Some(format!("the pool is not pinned: {fault}"));
            return;
        }
        if let Some(node) = self.driver.numa_node() {
            prefer_node(node);
        }
        for start in (0..self.mapping.len()).step_by(self.piece_bytes) {
            let piece = start..self.mapping.len().min(start + self.piece_bytes);
            match self.pin(&piece) {
                Ok(true) => self.pinned_bytes.store(piece.end, Ordering::Release),
                Ok(false) => return,
                Err(why) => {
                    let Range { start, end } = piece;
                    let message =
                        format!("bytes {start} to {end} of the pool and all after are not pinned: {why}");
                    *self.error.lock() = Some(message);
                    return;
                }
            }
        }
    }

    /// Touches and registers a piece; false when it was stopped. What fails leaves the piece as it was.
    fn pin(&self, piece: &Range<usize>) -> Result<bool, String> {
        for start in piece.clone().step_by(TOUCH_BYTES) {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            self.mapping.touch(&(start..piece.end.min(start + TOUCH_BYTES)));
        }
        let first = self.address(piece.start);
        // SAFETY: the piece is inside of the mapping, which is unmapped after `unpin`.
        unsafe { self.driver.register(first, piece.len()) }.map_err(|fault| format!("{fault}: {REMEDY}"))?;
        // A driver that took the call and did nothing would make every copy slow, without a word.
        let known = [piece.start, piece.end - 1].map(|byte| self.driver.is_pinned(self.address(byte)));
        match known {
            [Ok(true), Ok(true)] => return Ok(true),
            // SAFETY: nobody copies to or from a piece above the watermark as if it were pinned.
            _ => unsafe { self.driver.unregister(first) }.map_err(|fault| fault.to_string())?,
        }
        Err(format!("the driver registered them and does not know them as pinned: {REMEDY}"))
    }

    fn unpin(&self) {
        let Ok(_entered) = Entered::new(self.driver.as_ref()) else { return };
        for start in (0..self.pinned_bytes.load(Ordering::Acquire)).step_by(self.piece_bytes) {
            // SAFETY: whoever copies keeps a clone of the pool until the copy is done. A refusal means that the
            // driver has ended, with all registrations.
            let _ = unsafe { self.driver.unregister(self.address(start)) };
        }
    }

    fn address(&self, offset: usize) -> *mut u8 {
        self.mapping.base().as_ptr().wrapping_add(offset)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::cuda::fake::{Failing, Fake};
    use crate::{HostPool, HostPoolConfig};

    const ROWS: usize = 10;
    const ROW: usize = 8192;

    /// Ten rows, pinned three at a time.
    fn pool() -> HostPool {
        let config = HostPoolConfig {
            size_bytes: ROWS * ROW,
            row_bytes: 5_000,
            prefault_threads: 1,
            huge_pages: false,
        };
        HostPool::in_pieces(&config, 3 * ROW).expect("memory")
    }

    fn wait(pool: &HostPool, done: impl Fn(&HostPool) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done(pool) {
            assert!(Instant::now() < deadline, "{} bytes pinned", pool.pinned_bytes());
            thread::sleep(Duration::from_micros(100));
        }
    }

    #[test]
    fn all_pieces_are_pinned_and_unpinned_before_the_memory_goes() {
        let fake = Arc::new(Fake::new(1));
        let pool = pool();
        assert!(pool.are_pinned_or_never_will(&[9]), "nobody pins it");
        pool.pin_with(fake.clone());
        pool.pin_with(fake.clone());
        wait(&pool, |pool| pool.pinned_bytes() == ROWS * ROW);
        let base = pool.base().as_ptr() as usize;
        let pieces = [0, 3, 6, 9].map(|row| (base + row * ROW, ROW * if row == 9 { 1 } else { 3 }));
        assert_eq!(fake.pinned(), pieces);
        assert_eq!(pool.pin_error().expect("here"), None);
        let clone = pool.clone();
        drop(pool);
        assert_eq!(fake.pinned().len(), 4);
        drop(clone);
        assert_eq!(fake.pinned(), []);
        assert_eq!(fake.violations(), Vec::<String>::new());
    }

    #[test]
    fn rows_below_the_watermark_may_go_and_those_above_later() {
        let fake = Arc::new(Fake::new(1));
        fake.open_gate(false);
        let pool = pool();
        pool.pin_with(fake.clone());
        assert!(!pool.are_pinned_or_never_will(&[0]) && pool.are_pinned_or_never_will(&[]));
        fake.open_gate(true);
        wait(&pool, |pool| pool.are_pinned_or_never_will(&[2, 9]));
        assert_eq!(pool.pinned_bytes(), ROWS * ROW);
    }

    #[test]
    fn a_failure_at_any_call_keeps_what_was_pinned_before_and_says_what_to_do() {
        // One call adopts the thread, then each piece is registered and asked for at both ends.
        for call in 0..13 {
            let fake = Arc::new(Fake::new(1));
            fake.fail(Failing { first: call, calls: 1, in_vain: false });
            let pool = pool();
            pool.pin_with(fake.clone());
            wait(&pool, |pool| pool.pin_error().expect("here").is_some());
            let error = pool.pin_error().expect("here").expect("just seen");
            let pieces = call.saturating_sub(1) / 3;
            assert_eq!((pool.pinned_bytes(), fake.pinned().len()), (pieces * 3 * ROW, pieces), "call {call}");
            if call % 3 == 1 {
                assert!(error.contains("CUDA_ERROR_ON_PURPOSE") && error.contains("ulimit -l"), "{error}");
            }
            wait(&pool, |pool| pool.are_pinned_or_never_will(&[9]));
            drop(pool);
            assert_eq!((fake.pinned(), fake.violations()), (vec![], vec![]));
        }
    }

    #[test]
    fn a_driver_that_only_says_so_is_not_believed() {
        let fake = Arc::new(Fake::new(1));
        fake.refuse_pins_silently();
        let pool = pool();
        pool.pin_with(fake);
        wait(&pool, |pool| pool.pin_error().expect("here").is_some());
        assert!(pool.pin_error().expect("here").expect("just seen").contains("does not know"));
        assert_eq!(pool.pinned_bytes(), 0);
    }

    #[test]
    fn a_pool_can_be_dropped_while_it_is_pinned() {
        for _ in 0..8 {
            let fake = Arc::new(Fake::new(1));
            let config = HostPoolConfig {
                size_bytes: 8 << 30,
                row_bytes: 1 << 20,
                prefault_threads: 0,
                huge_pages: true,
            };
            let start = Instant::now();
            let pool = HostPool::new(&config).expect("address space");
            pool.pin_with(fake.clone());
            assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
            drop(pool);
            assert_eq!(fake.pinned(), []);
        }
    }
}
