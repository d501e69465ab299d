//! `Mover`: threads that copy blocks, on a caller's behalf now or in the background.

use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::queue::{Job, Outcome, Queue};
use super::route::{Pair, Route};
use super::{Direction, KvLayers};
use crate::pool::{deadline, use_every_cpu};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Condvar, Mutex, MutexGuard, wait_until};
use crate::{Error, ErrorKind, HostPool, Result};

/// Memory is saturated long before.
const THREADS_MAX: usize = 64;

/// What a close without success waits on top for the claims that were begun: each is half a megabyte.
const CLAIMS_END_LIMIT: Duration = Duration::from_secs(1);

/// What a dropped `Mover` waits for its jobs.
const DROP_LIMIT: Duration = Duration::from_secs(5);

/// Copies one claim; a parameter so that tests can make it fail.
type CopyClaim = fn(&Route, Direction, &[Pair], usize);

/// Copies whole blocks between the rows of a pool and KV tensors. Rows and blocks are given in pairs. A block named
/// twice in one load, or a row named twice in one store, has no defined content afterwards.
#[derive(Debug)]
pub struct Mover {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    route: Route,
    copy_claim: CopyClaim,
    queue: Mutex<Queue>,
    /// There is something to claim, or the mover closes.
    work: Condvar,
    /// A job or a thread ended.
    ended: Condvar,
}

impl Mover {
    /// Starts `threads` threads for copies between `pool` and `layers`.
    pub fn new(pool: HostPool, layers: Arc<KvLayers>, threads: usize) -> Result<Self> {
        Self::start(pool, layers, threads, Route::copy)
    }

    fn start(pool: HostPool, layers: Arc<KvLayers>, threads: usize, copy_claim: CopyClaim) -> Result<Self> {
        pool.check_process()?;
        if !(1..=THREADS_MAX).contains(&threads) {
            let message = format!("a Mover has 1 to {THREADS_MAX} threads, not {threads}");
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let (work, ended) = (Condvar::new(), Condvar::new());
        let route = Route::new(pool, layers)?;
        let shared = Arc::new(Shared { route, copy_claim, queue: Mutex::default(), work, ended });
        let mover = Self { shared, threads: Mutex::default() };
        for _ in 0..threads {
            let thread = mover.spawn()?;
            mover.threads.lock().push(thread);
        }
        Ok(mover)
    }

    fn spawn(&self) -> Result<JoinHandle<()>> {
        self.shared.queue.lock().threads += 1;
        let alive = Alive(Arc::clone(&self.shared));
        let work = move || {
            let alive = alive;
            alive.0.work();
        };
        thread::Builder::new().name("lmcache-copy".to_owned()).spawn(work).map_err(|error| {
            Error::new(ErrorKind::OutOfMemory, format!("a copy thread did not start: {error}"))
        })
    }

    /// Copies now, the calling thread working too. Returns bytes copied; copies nothing when an argument is wrong.
    pub fn copy(&self, direction: Direction, rows: &[u32], blocks: &[u32]) -> Result<u64> {
        let job = self.push(None, direction, rows, blocks)?;
        let shared = &*self.shared;
        loop {
            let claim = shared.queue.lock().claim_of(&job);
            let Some(claim) = claim else { break };
            shared.run(&job, claim);
        }
        // Without a limit, since returning earlier would leave a thread writing: each has half a megabyte to go.
        let mut queue = shared.queue.lock();
        while !job.has_ended() {
            shared.ended.wait(&mut queue);
        }
        job.result()
    }

    /// Copies in the background; `poll` tells the end. Loads go before stores. Refused when too many jobs were not
    /// polled.
    pub fn submit(&self, direction: Direction, job: u64, rows: &[u32], blocks: &[u32]) -> Result<()> {
        self.push(Some(job), direction, rows, blocks).map(drop)
    }

    /// Jobs ended since the last call; each is told exactly once, and then nothing of it touches memory any more.
    pub fn poll(&self) -> Result<Vec<Outcome>> {
        let mut queue = self.open()?;
        Ok(queue.take_ended())
    }

    /// Waits until nothing is in flight; false when `timeout` passed first.
    pub fn drain(&self, timeout: Duration) -> Result<bool> {
        let mut queue = self.open()?;
        Ok(wait_until(&self.shared.ended, &mut queue, deadline(timeout), Queue::is_idle))
    }

    /// Refuses new jobs, waits for those in flight, gives up what was not begun by then, ends the threads. Whether
    /// every job ended in time. Idempotent.
    pub fn close(&self, timeout: Duration) -> Result<bool> {
        self.check_process()?;
        let deadline = deadline(timeout);
        let mut queue = self.shared.queue.lock();
        queue.closing = true;
        self.shared.work.notify_all();
        let drained = wait_until(&self.shared.ended, &mut queue, deadline, Queue::is_idle);
        if !drained {
            queue.give_up();
            self.shared.ended.notify_all();
        }
        let limit = deadline.max(Instant::now() + CLAIMS_END_LIMIT);
        let ended =
            wait_until(&self.shared.ended, &mut queue, limit, |queue| queue.is_idle() && queue.threads == 0);
        drop(queue);
        // A thread that did not end keeps pool and tensors by itself; joining it could wait for ever.
        for thread in mem::take(&mut *self.threads.lock()).into_iter().filter(|_| ended) {
            // Its panics were caught where they could happen.
            let _ = thread.join();
        }
        Ok(drained && ended)
    }

    fn push(
        &self,
        name: Option<u64>,
        direction: Direction,
        rows: &[u32],
        blocks: &[u32],
    ) -> Result<Arc<Job>> {
        drop(self.open()?);
        let route = &self.shared.route;
        let pairs = route.pairs(rows, blocks)?;
        let bytes = pairs.len() as u64 * route.row_bytes() as u64;
        let claims = route.claims(pairs.len());
        let job = Arc::new(Job::new(name, direction, pairs, bytes, claims));
        self.shared.queue.lock().push(&job)?;
        // The caller of `copy` takes a claim itself: no thread is woken for a small copy.
        match claims - usize::from(name.is_none()).min(claims) {
            0 => 0,
            1 => usize::from(self.shared.work.notify_one()),
            _ => self.shared.work.notify_all(),
        };
        Ok(job)
    }

    /// The queue, unless this is closed or a forked child's copy.
    fn open(&self) -> Result<MutexGuard<'_, Queue>> {
        self.check_process()?;
        let queue = self.shared.queue.lock();
        queue.check_open()?;
        Ok(queue)
    }

    /// In a forked child the lock may be held by a thread that is not there: checked before each lock.
    fn check_process(&self) -> Result<()> {
        self.shared.route.pool().owner().check("Mover")
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        if self.close(DROP_LIMIT).is_err() {
            // In a forked child there are no threads to join.
            mem::forget(mem::take(self.threads.get_mut()));
        }
    }
}

/// One running thread: counted down also when it never starts.
struct Alive(Arc<Shared>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.queue.lock().threads -= 1;
        self.0.ended.notify_all();
    }
}

impl Shared {
    fn work(&self) {
        use_every_cpu();
        while let Some((job, claim)) = self.next() {
            self.run(&job, claim);
        }
    }

    /// Waits for something to do; None when the mover closes and nothing is left.
    fn next(&self) -> Option<(Arc<Job>, usize)> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(claimed) = queue.claim() {
                return Some(claimed);
            }
            if queue.closing {
                return None;
            }
            self.work.wait(&mut queue);
        }
    }

    /// Copies one claim, unless its job has failed already, and ends the job with its last.
    fn run(&self, job: &Job, claim: usize) {
        if !job.has_failed() {
            let copied = catch_unwind(AssertUnwindSafe(|| {
                (self.copy_claim)(&self.route, job.direction, &job.pairs, claim);
            }));
            if copied.is_err() {
                job.fail();
            }
        }
        if job.end_claims(1) {
            self.queue.lock().end(job);
            self.ended.notify_all();
        }
    }
}

#[cfg(test)]
mod tests;
