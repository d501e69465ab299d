//! What the submitting thread and the callers share: the order of submission, and how failures end.

use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::driver::{Entered, Fault, Stream};
use super::lane::{Ends, Lane};
use super::queue::{Job, Limits, Queue, Submitted};
use crate::copy::Direction;
use crate::pool::use_every_cpu;
use crate::sync::{Condvar, Mutex, thread};
use crate::{Error, ErrorKind, Result};

/// How often the thread looks after stages in flight.
const LOOK_EVERY: Duration = Duration::from_micros(100);

/// How often it looks whether a store's rows are pinned, when nothing is in flight.
const LOOK_AT_PINS_EVERY: Duration = Duration::from_millis(2);

/// What a failed `load_now` waits for the parts of it that were submitted.
const FAILED_NOW_LIMIT: Duration = Duration::from_secs(10);

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

/// A caller of `load_now`, counted out also when it panics.
struct Now<'a>(&'a Shared);

impl Drop for Now<'_> {
    fn drop(&mut self) {
        self.0.queue.lock().end_now();
        self.0.ended.notify_all();
        // The thread sees to the stages in flight.
        self.0.work.notify_one();
    }
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
        if let Some(job) = queue.pick(Instant::now(), &self.limits, pinned) {
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
        let (rows, blocks) = job.stage();
        let count = rows.len();
        let after = if job.submitted_rows == 0 { job.after.as_ref() } else { None };
        // SAFETY: `GpuMover` checked the numbers; whoever submits a job keeps its rows and blocks until it ends.
        let result = match unsafe { lane.submit(&self.ends, rows, blocks, after) } {
            Ok(event) => Submitted::Stage(event),
            Err(_) => match lane.fence(&self.ends) {
                Ok(fence) => Submitted::Failed(fence),
                Err(fault) => Submitted::Unknown(fault),
            },
        };
        self.queue.lock().submitted(job, count, result);
        self.ended.notify_all();
    }

    fn lane(&self, direction: Direction) -> &Mutex<Lane> {
        if direction == Direction::Load { &self.loads } else { &self.stores }
    }

    /// Submits a whole load from the calling thread: it waits for the stream, and the stream for it, on the GPU.
    pub(super) fn load_now(
        &self,
        rows: &[u32],
        blocks: &[u32],
        stage_rows: usize,
        stream: Stream,
    ) -> Result<()> {
        self.queue.lock().begin_now()?;
        let _now = Now(self);
        let _entered = Entered::new(self.ends.driver.as_ref())?;
        let mut after = Some(self.ends.events.record(stream)?);
        let mut last = None;
        for (rows, blocks) in rows.chunks(stage_rows).zip(blocks.chunks(stage_rows)) {
            // Locked for each stage: jobs of the thread come in between, and none of them waits for long.
            let mut lane = self.loads.lock();
            // SAFETY: `GpuMover` checked the numbers; the caller keeps rows and blocks, and the stream waits.
            match unsafe { lane.submit(&self.ends, rows, blocks, after.take().as_ref()) } {
                Ok(event) => {
                    self.queue.lock().add_now(event.clone());
                    last = Some(event);
                }
                Err(fault) => return Err(self.fail_now(&mut lane, &fault)),
            }
        }
        match last.map_or(Ok(()), |last| last.hold_back(stream)) {
            Ok(()) => Ok(()),
            Err(fault) => Err(self.fail_now(&mut self.loads.lock(), &fault)),
        }
    }

    /// Waits until nothing of a failed `load_now` runs any more. When that cannot be seen the mover gives up.
    fn fail_now(&self, lane: &mut Lane, fault: &Fault) -> Error {
        let waited = lane.fence(&self.ends).and_then(|fence| {
            let mut queue = self.queue.lock();
            for event in &fence {
                queue.add_now(event.clone());
            }
            drop(queue);
            let deadline = Instant::now() + FAILED_NOW_LIMIT;
            for event in &fence {
                while !event.is_done()? {
                    if Instant::now() > deadline {
                        return Err(Fault { call: "the end of a failed load", error: "nothing".to_owned() });
                    }
                    thread::sleep(LOOK_EVERY);
                }
            }
            Ok(())
        });
        match waited {
            Ok(()) => Error::from(fault.clone()),
            Err(unknown) => {
                self.queue.lock().lose(1, &unknown);
                Error::new(ErrorKind::Device, format!("{fault}, and its end cannot be seen: {unknown}"))
            }
        }
    }
}
