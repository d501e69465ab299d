//! `TierQueue`: threads that do a tier's work behind bounded queues, so that nobody waits for a medium.

use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::queue::{Ended, Limits, Queue, Task, TierOutcome, Work};
use super::{Chunk, Reason, Refusal, Tier, TierCounters};
use crate::pool::{Owner, deadline, use_every_cpu};
use crate::sync::{Condvar, Mutex, MutexGuard, wait_until};
use crate::{Error, ErrorKind, Key, Result};

/// No medium gains from more.
const THREADS_MAX: usize = 64;

/// What a dropped `TierQueue` waits for its tasks.
const DROP_LIMIT: Duration = Duration::from_secs(5);

/// How a queue is made.
#[derive(Clone, Copy, Debug)]
pub struct TierQueueConfig {
    /// Threads that work; where there are several, stores leave one of them to searches and loads.
    pub threads: usize,
    /// Chunks that may wait to be stored; more are dropped.
    pub stores_max: usize,
    /// Chunks that may wait to be loaded, and searches that may wait; more are misses.
    pub loads_max: usize,
    /// What was not begun so long after its submission ends as `Reason::Late`.
    pub wait: Duration,
}

/// Stores, loads and searches of a tier, in the background. A tier that hangs keeps the rows of the tasks that it
/// works on, and nothing else: their callers decide by themselves how long they wait.
#[derive(Debug)]
pub struct TierQueue {
    owner: Owner,
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    tier: Arc<dyn Tier>,
    queue: Mutex<Queue>,
    /// There is something to do, or the queue closes.
    work: Condvar,
    /// A task or a thread ended.
    ended: Condvar,
}

impl TierQueue {
    /// Starts threads that work on `tier`.
    pub fn new(tier: Arc<dyn Tier>, config: &TierQueueConfig) -> Result<Self> {
        let TierQueueConfig { threads, stores_max, loads_max, wait } = *config;
        if !(1..=THREADS_MAX).contains(&threads) {
            let message = format!("a TierQueue has 1 to {THREADS_MAX} threads, not {threads}");
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let limits = Limits { stores_max, loads_max, wait, stores_at_once: (threads - 1).max(1) };
        let queue = Mutex::new(Queue::new(limits));
        let shared = Arc::new(Shared { tier, queue, work: Condvar::new(), ended: Condvar::new() });
        let this = Self { owner: Owner::this_process(), shared, threads: Mutex::default() };
        for _ in 0..threads {
            let thread = this.spawn()?;
            this.threads.lock().push(thread);
        }
        Ok(this)
    }

    fn spawn(&self) -> Result<JoinHandle<()>> {
        self.shared.queue.lock().threads += 1;
        let alive = Alive(Arc::clone(&self.shared));
        let work = move || {
            let alive = alive;
            alive.0.work();
        };
        thread::Builder::new().name("lmcache-tier".to_owned()).spawn(work).map_err(|error| {
            Error::new(ErrorKind::OutOfMemory, format!("a tier's thread did not start: {error}"))
        })
    }

    /// Stores `chunks` in the background. Each ends once, seen by `poll`; until then its rows must stay as they are.
    pub fn store(&self, job: u64, chunks: Vec<Chunk>) -> Result<()> {
        self.push(job, chunks.into_iter().map(Work::Store))
    }

    /// Loads `chunks`, one prefix in its order, in the background, before all stores. Each ends once, seen by `poll`;
    /// until then nobody else may touch its rows. After a miss those that were not begun are misses too.
    pub fn load(&self, job: u64, chunks: Vec<Chunk>) -> Result<()> {
        self.push(job, chunks.into_iter().map(Work::Load))
    }

    /// Searches for `keys` in the background, before all else.
    pub fn find(&self, job: u64, keys: Vec<Key>) -> Result<()> {
        self.push(job, [Work::Find(keys)].into_iter())
    }

    /// Tasks ended since the last call; each is told exactly once.
    pub fn poll(&self) -> Result<Vec<TierOutcome>> {
        Ok(self.open()?.take_ended())
    }

    /// What the tier did so far.
    pub fn counters(&self) -> Result<TierCounters> {
        self.owner.check("TierQueue")?;
        Ok(self.shared.queue.lock().counters.clone())
    }

    /// Waits until some task has ended that was not polled, nothing is to do, or `timeout` passed.
    pub fn wait(&self, timeout: Duration) -> Result<()> {
        let mut queue = self.open()?;
        self.wait_until(&mut queue, deadline(timeout), |queue| queue.has_ended() || queue.is_idle());
        Ok(())
    }

    /// Waits until nothing is to do; false when `timeout` passed first.
    pub fn drain(&self, timeout: Duration) -> Result<bool> {
        let mut queue = self.open()?;
        Ok(self.wait_until(&mut queue, deadline(timeout), Queue::is_idle))
    }

    /// Refuses new tasks, waits for the others, gives up what was not begun by then, ends the threads. Whether all
    /// ended in time; a thread that hangs in its medium is left to itself, with what it needs. Idempotent.
    pub fn close(&self, timeout: Duration) -> Result<bool> {
        self.owner.check("TierQueue")?;
        let deadline = deadline(timeout);
        let mut queue = self.shared.queue.lock();
        queue.closing = true;
        self.shared.work.notify_all();
        let drained = self.wait_until(&mut queue, deadline, Queue::is_idle);
        if !drained {
            queue.give_up();
        }
        let ended = self.wait_until(&mut queue, deadline, |queue| queue.is_idle() && queue.threads == 0);
        drop(queue);
        for thread in mem::take(&mut *self.threads.lock()).into_iter().filter(|_| ended) {
            // Its panics were caught where they could happen.
            let _ = thread.join();
        }
        Ok(drained && ended)
    }

    fn push(&self, job: u64, works: impl ExactSizeIterator<Item = Work>) -> Result<()> {
        self.open()?.push(job, works)?;
        self.shared.work.notify_all();
        self.shared.ended.notify_all();
        Ok(())
    }

    /// The queue, unless this is closed or a forked child's copy.
    fn open(&self) -> Result<MutexGuard<'_, Queue>> {
        self.owner.check("TierQueue")?;
        let queue = self.shared.queue.lock();
        queue.check_open()?;
        Ok(queue)
    }

    fn wait_until(
        &self,
        queue: &mut MutexGuard<'_, Queue>,
        deadline: Instant,
        done: impl Fn(&Queue) -> bool,
    ) -> bool {
        wait_until(&self.shared.ended, queue, deadline, &done) || {
            queue.expire();
            done(queue)
        }
    }
}

impl Drop for TierQueue {
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
        // One thread is woken for each task: the last to end tells the others that nothing comes any more.
        self.0.work.notify_all();
        self.0.ended.notify_all();
    }
}

impl Shared {
    fn work(&self) {
        use_every_cpu();
        while let Some(task) = self.next() {
            let rests = matches!(task.work, Work::Find(_)) && self.tier.rests();
            let ended = if rests { Ended::Found(Err(Reason::Paused.into())) } else { self.run(&task.work) };
            let mut queue = self.queue.lock();
            queue.finish(&task, ended);
            drop(queue);
            // A store that ended may let another thread begin one.
            self.work.notify_one();
            self.ended.notify_all();
            if rests {
                // Whether the medium is well again is found out while nobody waits for it.
                drop(self.run(&task.work));
            }
        }
    }

    /// Waits for something to do; None when the queue closes and nothing is left.
    fn next(&self) -> Option<Task> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(task) = queue.take() {
                return Some(task);
            }
            if queue.closing && queue.waits_for_nothing() {
                return None;
            }
            self.work.wait(&mut queue);
        }
    }

    fn run(&self, work: &Work) -> Ended {
        match work {
            Work::Store(chunk) => Ended::Stored(guarded(|| self.tier.put(chunk))),
            Work::Load(chunk) => {
                let got = guarded(|| self.tier.get(chunk));
                Ended::Loaded(got.map(|()| chunk.memory.bytes() as u64))
            }
            Work::Find(keys) => Ended::Found(guarded(|| self.tier.present(keys))),
        }
    }
}

/// A panic is a refusal too.
fn guarded<T>(work: impl FnOnce() -> std::result::Result<T, Refusal>) -> std::result::Result<T, Refusal> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Refusal::new(Reason::Internal, "a tier panicked")))
}

#[cfg(test)]
mod tests;
