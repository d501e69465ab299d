//! What the submitting thread and the callers share: the order of submission, and how failures end.

use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::driver::{Entered, Fault, Stream};
use super::job::{Job, Progress, Submitted};
use super::lane::{Ends, Lane};
use super::queue::{Limits, Queue};
use crate::copy::Direction;
use crate::pool::use_every_cpu;
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::{Error, ErrorKind, Result};

/// How often the thread looks after stages in flight.
const LOOK_EVERY: Duration = Duration::from_micros(100);

/// How often it looks whether a store's rows are pinned, when nothing is in flight.
const LOOK_AT_PINS_EVERY: Duration = Duration::from_millis(2);

/// What `join` waits for another thread's submission of a stage, or for the end of a load that failed.
const JOIN_LIMIT: Duration = Duration::from_secs(10);

/// Locked in this order: a lane, then the queue, so that stages are booked in the order of their streams.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) ends: Ends,
    pub(super) loads: Mutex<Lane>,
    pub(super) stores: Mutex<Lane>,
    pub(super) queue: Mutex<Queue>,
    /// Something was submitted, or the mover closes.
    pub(super) work: Condvar,
    /// A job or the thread ended.
    pub(super) ended: Condvar,
    pub(super) limits: Limits,
}

impl Shared {
    /// The thread's life.
    pub(super) fn work(self: &Arc<Self>) {
        use_every_cpu();
        let worked = catch_unwind(AssertUnwindSafe(|| match self.ends.driver.adopt_thread() {
            Ok(()) => while self.step() {},
            Err(fault) => self.queue.lock().lose_all(&fault),
        }));
        let mut queue = self.queue.lock();
        if worked.is_err() {
            let fault = Fault { call: "the copy thread", error: "that it panicked".to_owned() };
            queue.lose_all(&fault);
        }
        if queue.has_lost() || queue.is_any_in_flight() {
            // The GPU may still use the pool, the events and the kernels: they stay for ever.
            mem::forget(Arc::clone(self));
        }
        queue.thread_runs = false;
        self.ended.notify_all();
    }

    /// Does one thing, or waits for one; false at the end.
    fn step(&self) -> bool {
        self.look_after(Direction::Load);
        self.look_after(Direction::Store);
        let mut queue = self.queue.lock();
        if queue.is_over() {
            return false;
        }
        let pinned = |rows: &[u32]| self.ends.pool.are_pinned_or_never_will(rows);
        let now = Instant::now();
        if queue.fail_late(now, &self.limits, pinned) {
            self.ended.notify_all();
        }
        if let Some(job) = queue.pick(now, &self.limits, pinned) {
            drop(queue);
            self.submit(job);
        } else if queue.is_any_in_flight() {
            self.work.wait_for(&mut queue, LOOK_EVERY);
        } else if queue.is_any_waiting() {
            self.work.wait_for(&mut queue, LOOK_AT_PINS_EVERY);
        } else {
            self.work.wait(&mut queue);
        }
        true
    }

    /// Books the stages of a direction that are done. The driver is asked without the queue's lock, which every caller
    /// needs; nobody but the thread takes stages out.
    fn look_after(&self, direction: Direction) {
        loop {
            let Some(oldest) = self.queue.lock().oldest(direction) else { return };
            match oldest.is_done() {
                Ok(false) => return,
                Ok(true) => self.queue.lock().end_oldest(direction),
                Err(fault) => self.queue.lock().lose_all(&fault),
            }
            self.ended.notify_all();
        }
    }

    fn submit(&self, job: Job) {
        let mut lane = self.lane(job.direction).lock();
        let after = if job.submitted == 0 { job.after.as_ref() } else { None };
        // SAFETY: `GpuMover` checked the numbers; whoever submits a job keeps its rows and blocks until it ends.
        let result = match unsafe { lane.submit(&self.ends, job.stage(), after) } {
            Ok(event) => Submitted::Stage(event),
            Err(_) => match lane.fence(&self.ends) {
                Ok(fence) => Submitted::Failed(fence),
                Err(fault) => Submitted::Unknown(fault),
            },
        };
        self.queue.lock().submitted(job, result);
        self.ended.notify_all();
    }

    fn lane(&self, direction: Direction) -> &Mutex<Lane> {
        if direction == Direction::Load { &self.loads } else { &self.stores }
    }

    /// Submits what is left of a load from the calling thread, as far as its part number `part` (None: all of it), and
    /// makes the stream wait for that on the GPU. A load that failed has ended when this returns.
    pub(super) fn join(&self, name: u64, part: Option<usize>, stream: Stream) -> Result<()> {
        let _entered = Entered::new(self.ends.driver.as_ref())?;
        let deadline = Instant::now() + JOIN_LIMIT;
        loop {
            match self.submit_rest(name, part, deadline)? {
                Progress::Submitted(event) => return Ok(event.hold_back(stream)?),
                Progress::Failed => {
                    let mut queue = self.queue.lock();
                    if matches!(queue.progress(name, part), Progress::Failed) {
                        self.wait_for_news(&mut queue, name, deadline)?;
                    }
                }
                _ => return Ok(()),
            }
        }
    }

    /// Submits what is left of a load from the calling thread; whether the GPU has all of it, and it did not fail.
    pub(super) fn settle(&self, name: u64) -> Result<bool> {
        let _entered = Entered::new(self.ends.driver.as_ref())?;
        let progress = self.submit_rest(name, None, Instant::now() + JOIN_LIMIT)?;
        Ok(matches!(progress, Progress::Submitted(_)))
    }

    /// Submits stages of a load until its part was submitted, it failed or it is not there any more.
    fn submit_rest(&self, name: u64, part: Option<usize>, deadline: Instant) -> Result<Progress> {
        loop {
            let mut queue = self.queue.lock();
            queue.check_not_broken()?;
            match queue.progress(name, part) {
                Progress::Waiting(job) => {
                    drop(queue);
                    self.submit(job);
                    // The thread sees to the stages in flight.
                    self.work.notify_one();
                }
                Progress::AtWork => self.wait_for_news(&mut queue, name, deadline)?,
                reached => return Ok(reached),
            }
        }
    }

    fn wait_for_news(&self, queue: &mut MutexGuard<'_, Queue>, load: u64, deadline: Instant) -> Result<()> {
        if Instant::now() >= deadline {
            let message = format!("load {load} was not submitted, or did not end, in {JOIN_LIMIT:?}");
            return Err(Error::new(ErrorKind::Device, message));
        }
        self.ended.wait_until(queue, deadline);
        Ok(())
    }
}
