//! `GpuMover`: copies of whole blocks between the pool's rows and KV tensors on one GPU.

mod config;
mod job;
mod lane;
mod queue;
mod shared;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers, and addresses of this machine")]
mod tests;

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::config::{Cut, Cuts, check_device, check_row};
pub use self::config::{GpuMoverConfig, LoadOrder, Staging, Streams};
use self::job::Job;
use self::lane::{Ends, Lane};
use self::queue::{Limits, Phase, Queue};
use self::shared::Shared;
use super::driver::{Driver, Entered, Stream};
use super::events::EventPool;
use super::kernels::Kernels;
use super::layout::Layout;
use super::libcuda::LibCuda;
use crate::copy::{Direction, Outcome, check_numbers};
use crate::pool::deadline;
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Condvar, Mutex, MutexGuard, wait_until};
use crate::{Error, ErrorKind, HostPool, Result};

/// What a close or a drain without success waits on top for the stages that were submitted.
const STAGES_END_LIMIT: Duration = Duration::from_secs(1);

/// What a dropped `GpuMover` waits for its jobs.
const DROP_LIMIT: Duration = Duration::from_secs(5);

/// Copies whole blocks between the rows of a pool and KV tensors on a GPU. Rows and blocks are given in pairs.
///
/// A thread of its own submits the work, stage by stage, loads before stores. A job ends when the GPU is done with it,
/// or when it failed and the GPU is done with what was submitted of it. When the driver fails so that the latter cannot
/// be seen, that job is never told of, the others fail, and every later submission is refused.
#[derive(Debug)]
pub struct GpuMover {
    shared: Arc<Shared>,
    layout: Layout,
    cuts: Cuts,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl GpuMover {
    /// Compiles the kernels and starts the thread.
    ///
    /// # Safety
    ///
    /// Layers, streams and staging are those of the GPU `device`: of each layer `page_bytes` bytes at
    /// `address + block * block_stride` for every `block < blocks`. They live until `close` returned true, or for ever.
    /// Nobody else uses the staging. Whoever submits a job sees to it that nobody else uses its rows and blocks
    /// (writes them, where they are read) until it ends.
    pub unsafe fn new(pool: HostPool, config: &GpuMoverConfig) -> Result<Self> {
        let driver = Arc::new(LibCuda::open(config.device)?);
        // SAFETY: the caller's promise.
        unsafe { Self::start(pool, config, driver, Limits::DEFAULT) }
    }

    /// # Safety
    ///
    /// As of `new`.
    unsafe fn start(
        pool: HostPool,
        config: &GpuMoverConfig,
        driver: Arc<dyn Driver>,
        limits: Limits,
    ) -> Result<Self> {
        pool.check_process()?;
        let (streams, layout) = (config.streams, Layout::new(config.layers.clone(), config.blocks)?);
        check_row(&pool, &layout)?;
        let cuts = Cuts::new(config, &layout, pool.row_stride())?;
        let entered = Entered::new(driver.as_ref())?;
        check_device(driver.as_ref(), &layout, config.load_staging.iter().chain(&config.store_staging))?;
        let kernels = Kernels::new(&driver, &layout, streams.store_gather)?;
        drop(entered);
        let addresses = |staging: &[Staging]| staging.iter().map(|buffer| buffer.address).collect::<Vec<_>>();
        let (loads, stores) = (addresses(&config.load_staging), addresses(&config.store_staging));
        let events = EventPool::new(Arc::clone(&driver));
        let shared = Arc::new(Shared {
            ends: Ends { driver, events, kernels, pool },
            loads: Mutex::new(Lane::new(Direction::Load, streams.load_copy, streams.load_scatter, &loads)),
            stores: Mutex::new(Lane::new(
                Direction::Store,
                streams.store_copy,
                streams.store_gather,
                &stores,
            )),
            queue: Mutex::new(Queue::new()),
            work: Condvar::new(),
            ended: Condvar::new(),
            limits,
        });
        let (at_work, name) = (Arc::clone(&shared), "lmcache-gpu".to_owned());
        let thread = thread::Builder::new().name(name).spawn(move || at_work.work()).map_err(|error| {
            Error::new(ErrorKind::OutOfMemory, format!("the GPU's copy thread did not start: {error}"))
        })?;
        Ok(Self { shared, layout, cuts, thread: Mutex::new(Some(thread)) })
    }

    /// The first layer of each part of a load `ByLayers`.
    pub fn load_parts(&self) -> impl Iterator<Item = usize> {
        self.cuts.load_by_layers.iter().map(|slice| slice.part.layers.start as usize)
    }

    /// The first layer of each part that can be stored for itself.
    pub fn store_parts(&self) -> impl Iterator<Item = usize> {
        self.cuts.store_parts.iter().flat_map(|cut| cut.iter()).map(|slice| slice.part.layers.start as usize)
    }

    /// Loads in the background, after what was submitted to `stream` until now, if one is given. `poll` tells the end.
    /// Refused when too many jobs were not polled.
    pub fn submit_load(
        &self,
        job: u64,
        rows: Vec<u32>,
        blocks: Vec<u32>,
        order: LoadOrder,
        stream: Option<Stream>,
    ) -> Result<()> {
        let cut = match order {
            LoadOrder::ByRows => &self.cuts.load,
            LoadOrder::ByLayers => &self.cuts.load_by_layers,
        };
        self.submit(Direction::Load, job, (rows, blocks), stream, cut)
    }

    /// Has what is left of a load submitted now, and makes `stream` wait on the GPU for all of it, or for the layer with
    /// this number if it came `ByLayers`. Nothing is waited for when the load has ended. A load that failed has
    /// ended, and can be polled, when this returns.
    pub fn join_load(&self, job: u64, layer: Option<usize>, stream: Stream) -> Result<()> {
        self.check_process()?;
        let part = layer.map(|layer| {
            let mut slices = self.cuts.load_by_layers.iter();
            slices.position(|slice| layer < slice.part.layers.end as usize).ok_or_else(|| {
                let message = format!("layer {layer} of {} layers", self.layout.layers());
                Error::new(ErrorKind::InvalidArgument, message)
            })
        });
        self.shared.join(job, part.transpose()?, stream)
    }

    /// Loads that will end within `limit`, those `ByLayers` within `limit_by_layers`, if they go on at the speed they had
    /// so far, or at first at that of the load before. What is left of them is submitted: nothing but the GPU itself can
    /// fail them any more.
    pub fn settle_loads(&self, limit: Duration, limit_by_layers: Duration) -> Result<Vec<u64>> {
        let ending = self.open()?.ending_within(limit, limit_by_layers, Instant::now());
        let mut settled = Vec::with_capacity(ending.len());
        for job in ending {
            if self.shared.settle(job)? {
                settled.push(job);
            }
        }
        Ok(settled)
    }

    /// Stores in the background what was submitted to `stream` until now: all layers, or those of part number `part`. `poll`
    /// tells the end. Rows that are being pinned are waited for, by the thread. Refused when too many jobs were not polled.
    pub fn submit_store(
        &self,
        job: u64,
        rows: Vec<u32>,
        blocks: Vec<u32>,
        part: Option<usize>,
        stream: Stream,
    ) -> Result<()> {
        let cut = match part {
            None => &self.cuts.store,
            Some(part) => self.cuts.store_parts.get(part).ok_or_else(|| {
                let message = format!("part {part} of {} parts", self.cuts.store_parts.len());
                Error::new(ErrorKind::InvalidArgument, message)
            })?,
        };
        self.submit(Direction::Store, job, (rows, blocks), Some(stream), cut)
    }

    /// Jobs ended since the last call; each is told exactly once, and then nothing of it touches memory any more.
    pub fn poll(&self) -> Result<Vec<Outcome>> {
        self.check_process()?;
        let mut queue = self.shared.queue.lock();
        if queue.is_closing() {
            queue.check_open()?;
        }
        Ok(queue.take_ended())
    }

    /// Waits until nothing is in flight. False when `timeout` passed first: what was not submitted by then has failed, as
    /// the caller is about to take its memory away, and what was is waited for a little longer.
    pub fn drain(&self, timeout: Duration) -> Result<bool> {
        let mut queue = self.open()?;
        let is_over = |queue: &Queue| queue.is_idle() || queue.has_lost();
        let drained = wait_until(&self.shared.ended, &mut queue, deadline(timeout), is_over);
        if !drained {
            queue.fail_unsubmitted();
            self.shared.ended.notify_all();
            wait_until(&self.shared.ended, &mut queue, deadline(STAGES_END_LIMIT), is_over);
        }
        queue.check_open()?;
        Ok(drained)
    }

    /// Refuses new jobs, waits for those in flight, gives up what was not submitted by then, ends the thread. Whether
    /// every job ended in time; if not, the GPU may go on to use rows, blocks and staging. Idempotent.
    pub fn close(&self, timeout: Duration) -> Result<bool> {
        self.check_process()?;
        let deadline = deadline(timeout);
        let mut queue = self.shared.queue.lock();
        queue.phase = queue.phase.max(Phase::Closing);
        self.shared.work.notify_all();
        let drained = wait_until(&self.shared.ended, &mut queue, deadline, |queue| {
            queue.is_idle() || !queue.thread_runs
        });
        if !drained {
            queue.fail_unsubmitted();
            self.shared.ended.notify_all();
        }
        let limit = deadline.max(Instant::now() + STAGES_END_LIMIT);
        let ended = wait_until(&self.shared.ended, &mut queue, limit, |queue| !queue.thread_runs);
        if !ended {
            queue.phase = Phase::Abandoned;
        }
        let idle = queue.is_idle();
        drop(queue);
        self.shared.work.notify_all();
        if let Some(thread) = self.thread.lock().take().filter(|_| ended) {
            // Its panics were caught. One that did not end keeps what it needs by itself.
            let _ = thread.join();
        }
        Ok(drained && ended && idle)
    }

    fn submit(
        &self,
        direction: Direction,
        job: u64,
        (rows, blocks): (Vec<u32>, Vec<u32>),
        stream: Option<Stream>,
        cut: &Cut,
    ) -> Result<()> {
        self.check(&rows, &blocks)?;
        let after = match stream {
            Some(stream) if !rows.is_empty() => {
                let _entered = Entered::new(self.shared.ends.driver.as_ref())?;
                Some(self.shared.ends.events.record(stream)?)
            }
            _ => None,
        };
        let job = Job::new(job, direction, (rows, blocks), after, Arc::clone(cut));
        self.shared.queue.lock().push(job)?;
        self.shared.work.notify_one();
        Ok(())
    }

    fn check(&self, rows: &[u32], blocks: &[u32]) -> Result<()> {
        drop(self.open()?);
        check_numbers(&self.shared.ends.pool, self.layout.blocks(), rows, blocks)
    }

    /// The queue, unless this is closed, broken or a forked child's copy.
    fn open(&self) -> Result<MutexGuard<'_, Queue>> {
        self.check_process()?;
        let queue = self.shared.queue.lock();
        queue.check_open()?;
        Ok(queue)
    }

    /// In a forked child the lock may be held by a thread that is not there: checked before each lock.
    fn check_process(&self) -> Result<()> {
        self.shared.ends.pool.owner().check("GpuMover")
    }
}

impl Drop for GpuMover {
    fn drop(&mut self) {
        if self.close(DROP_LIMIT).is_err() {
            // A forked child has neither the thread nor a driver that works: nothing of this may run there.
            mem::forget(mem::take(self.thread.get_mut()));
            mem::forget(Arc::clone(&self.shared));
        }
    }
}
