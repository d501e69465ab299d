//! Which stage is submitted next, what is in flight, and what became of the jobs. Pure state, kept under one lock.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::driver::Fault;
use super::super::events::Event;
use super::super::layout::Part;
use super::lane;
use crate::copy::{Direction, JOBS_MAX, Outcome};
use crate::{Error, ErrorKind, Result};

/// How far the submitting thread goes ahead, and for how long it holds things back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Stages of loads in flight: one that is copied and one that waits, so that the bus is busy and little is ahead of a
    /// synchronous load, or of the engine's own copies.
    pub(super) load_stages: usize,
    /// Stages of stores in flight: one that is copied and one that is gathered.
    pub(super) store_stages: usize,
    /// Stores let loads go first for so long; then they go beside them until no load is left.
    pub(super) loads_first: Duration,
    /// A store waits so long for its rows to be pinned.
    pub(super) pinning: Duration,
}

impl Limits {
    pub(super) const DEFAULT: Self = Self {
        load_stages: 2,
        store_stages: 2,
        loads_first: Duration::from_millis(250),
        pinning: Duration::from_secs(60),
    };
}

/// A job of which not every stage is submitted.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) direction: Direction,
    pub(super) rows: Vec<u32>,
    pub(super) blocks: Vec<u32>,
    /// What the first stage's kernel waits for.
    pub(super) after: Option<Event>,
    /// The parts of the rows, moved one after the other.
    pub(super) parts: Arc<[Part]>,
    /// Rows of each stage.
    pub(super) stage_rows: usize,
    /// Stages submitted so far.
    pub(super) submitted: usize,
    /// The end of the last stage submitted.
    last: Option<Event>,
    end: End,
}

/// A load that has not ended.
#[derive(Debug)]
struct OpenLoad {
    stages: usize,
    done: usize,
    /// When the first stage was submitted.
    began: Option<Instant>,
    /// The ends of the parts that were submitted.
    parts: Vec<Event>,
    parts_total: usize,
    /// It will be told as failed.
    failed: bool,
}

/// How far a load is, for somebody who waits for a part of it.
pub(super) enum Progress {
    /// Nothing of it runs any more, or it is not known.
    Ended,
    /// A stage is to be submitted, by who asked.
    Waiting(Job),
    /// Another thread is submitting a stage, or it failed and its end is awaited.
    AtWork,
    /// With this event the part is there.
    Submitted(Event),
}

/// How a job is told of.
#[derive(Clone, Copy, Debug)]
struct End {
    name: u64,
    direction: Direction,
    bytes: u64,
    submitted: Instant,
}

/// A stage that the GPU may be working on.
#[derive(Debug)]
struct Stage {
    event: Event,
    /// Its job's name.
    name: u64,
    /// The job that ends with it, and whether it succeeds.
    end: Option<(End, bool)>,
}

/// What a stage's submission gave.
pub(super) enum Submitted {
    /// It is done with this event.
    Stage(Event),
    /// It failed; with these events nothing of it runs any more.
    Failed(Vec<Event>),
    /// It failed, and nobody can tell until when parts of it run.
    Unknown(Fault),
}

/// How far closing has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    #[default]
    Open,
    /// No job is taken in any more.
    Closing,
    /// No stage is submitted any more.
    GaveUp,
    /// Nobody waits for what is in flight any more.
    Abandoned,
}

/// All jobs.
#[derive(Debug, Default)]
pub(super) struct Queue {
    loads: VecDeque<Job>,
    stores: VecDeque<Job>,
    loads_in_flight: VecDeque<Stage>,
    stores_in_flight: VecDeque<Stage>,
    open_loads: HashMap<u64, OpenLoad>,
    /// Since when stores let loads go first.
    held_since: Option<Instant>,
    /// Jobs that somebody is submitting a stage of.
    at_work: usize,
    /// Jobs, or parts, of which nobody can tell whether they ended.
    lost: usize,
    /// Submitted jobs that were not polled.
    unpolled: usize,
    ended: Vec<Outcome>,
    /// Why the GPU is not used any more.
    broken: Option<String>,
    pub(super) phase: Phase,
    pub(super) thread_runs: bool,
}

impl Job {
    pub(super) fn new(
        name: u64,
        direction: Direction,
        (rows, blocks): (Vec<u32>, Vec<u32>),
        after: Option<Event>,
        parts: Arc<[Part]>,
        stage_rows: usize,
    ) -> Self {
        let row_bytes: usize = parts.iter().map(|part| part.bytes).sum();
        let bytes = rows.len() as u64 * row_bytes as u64;
        let end = End { name, direction, bytes, submitted: Instant::now() };
        Self { direction, rows, blocks, after, parts, stage_rows, submitted: 0, last: None, end }
    }

    /// The next stage.
    pub(super) fn stage(&self) -> lane::Stage<'_> {
        let (part, number) = (self.submitted / self.part_stages(), self.submitted % self.part_stages());
        let first = number * self.stage_rows;
        let next = first..self.rows.len().min(first + self.stage_rows);
        lane::Stage { rows: &self.rows[next.clone()], blocks: &self.blocks[next], part: &self.parts[part] }
    }

    /// Stages of one part.
    fn part_stages(&self) -> usize {
        self.rows.len().div_ceil(self.stage_rows)
    }

    fn stages(&self) -> usize {
        self.part_stages() * self.parts.len()
    }

    fn is_submitted(&self) -> bool {
        self.submitted >= self.stages()
    }
}

impl OpenLoad {
    /// When it will have ended, as far as its own speed tells; None: nobody knows yet.
    fn left(&self, now: Instant) -> Option<Duration> {
        let began = self.began.filter(|_| self.done > 0 && !self.failed)?;
        let (done, left) = (u32::try_from(self.done).ok()?, u32::try_from(self.stages - self.done).ok()?);
        Some(now.saturating_duration_since(began) / done * left)
    }
}

impl Queue {
    /// No jobs, of a thread that runs.
    pub(super) fn new() -> Self {
        Self { thread_runs: true, ..Self::default() }
    }

    /// Takes a job in. A job without rows has ended.
    pub(super) fn push(&mut self, job: Job) -> Result<()> {
        self.check_open()?;
        if self.unpolled >= JOBS_MAX {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("{JOBS_MAX} jobs were submitted and not polled: poll before submitting more"),
            ));
        }
        self.unpolled += 1;
        if job.is_submitted() {
            self.tell(&job.end, true);
            return Ok(());
        }
        if job.direction == Direction::Load {
            let (stages, parts_total) = (job.stages(), job.parts.len());
            let parts = Vec::with_capacity(parts_total);
            let open = OpenLoad { stages, done: 0, began: None, parts, parts_total, failed: false };
            self.open_loads.insert(job.end.name, open);
        }
        self.waiting(job.direction).push_back(job);
        Ok(())
    }

    /// The job whose next stage is submitted now, to be given back by `submitted`. Loads first; `pinned` tells whether
    /// a store may go.
    pub(super) fn pick(
        &mut self,
        now: Instant,
        limits: &Limits,
        pinned: impl Fn(&[u32]) -> bool,
    ) -> Option<Job> {
        let mut job = None;
        if self.loads_in_flight.len() < limits.load_stages {
            job = self.loads.pop_front();
        }
        if job.is_none() && self.may_store(now, limits) {
            while let Some(store) = self.stores.front() {
                if pinned(store.stage().rows) {
                    job = self.stores.pop_front();
                    break;
                }
                if now.saturating_duration_since(store.end.submitted) < limits.pinning {
                    break;
                }
                if let Some(late) = self.stores.pop_front() {
                    self.fail(late);
                }
            }
        }
        self.at_work += usize::from(job.is_some());
        job
    }

    /// Whether loads and the stages in flight leave room for a store.
    fn may_store(&mut self, now: Instant, limits: &Limits) -> bool {
        if self.stores.is_empty() || (self.loads.is_empty() && self.loads_in_flight.is_empty()) {
            self.held_since = None;
        } else {
            let since = *self.held_since.get_or_insert(now);
            if now.saturating_duration_since(since) < limits.loads_first {
                return false;
            }
        }
        self.stores_in_flight.len() < limits.store_stages
    }

    /// Takes back a job whose next stage was submitted, in the order of the streams.
    pub(super) fn submitted(&mut self, mut job: Job, result: Submitted) {
        self.at_work -= 1;
        let (direction, name) = (job.direction, job.end.name);
        match result {
            Submitted::Stage(event) => {
                job.submitted += 1;
                job.last = Some(event.clone());
                self.note_submitted(&job, &event);
                let end = job.is_submitted().then_some((job.end, true));
                self.in_flight(direction).push_back(Stage { event, name, end });
                if end.is_some() {
                    return;
                }
                if self.phase >= Phase::GaveUp || self.broken.is_some() {
                    self.fail(job);
                } else {
                    self.waiting(direction).push_front(job);
                }
            }
            Submitted::Failed(fence) => {
                self.note_failed(&job);
                let last = fence.len();
                for (number, event) in fence.into_iter().enumerate() {
                    let end = (number + 1 == last).then_some((job.end, false));
                    self.in_flight(direction).push_back(Stage { event, name, end });
                }
            }
            Submitted::Unknown(fault) => self.lose(1, &fault),
        }
    }

    fn note_submitted(&mut self, job: &Job, event: &Event) {
        if let Some(open) = self.open_load(job) {
            open.began.get_or_insert_with(Instant::now);
            if job.submitted.is_multiple_of(job.part_stages()) {
                open.parts.push(event.clone());
            }
        }
    }

    fn note_failed(&mut self, job: &Job) {
        if let Some(open) = self.open_load(job) {
            open.failed = true;
        }
    }

    fn open_load(&mut self, job: &Job) -> Option<&mut OpenLoad> {
        self.open_loads.get_mut(&job.end.name).filter(|_| job.direction == Direction::Load)
    }

    /// How far part number `part` of a load is, or its last one. `Waiting` hands its next stage to the caller, to be
    /// given back by `submitted`.
    pub(super) fn progress(&mut self, name: u64, part: Option<usize>) -> Progress {
        let Some(open) = self.open_loads.get(&name) else { return Progress::Ended };
        if open.failed {
            return Progress::AtWork;
        }
        let last = open.parts_total - 1;
        if let Some(event) = open.parts.get(part.map_or(last, |part| part.min(last))) {
            return Progress::Submitted(event.clone());
        }
        let Some(place) = self.loads.iter().position(|job| job.end.name == name) else {
            return Progress::AtWork;
        };
        self.at_work += 1;
        self.loads.remove(place).map_or(Progress::Ended, Progress::Waiting)
    }

    /// Loads that will end within `limit`, if they go on as they did so far.
    pub(super) fn ending_within(&self, limit: Duration, now: Instant) -> Vec<u64> {
        let soon = |open: &OpenLoad| open.left(now).is_some_and(|left| left <= limit);
        self.open_loads.iter().filter(|(_, open)| soon(open)).map(|(&name, _)| name).collect()
    }

    /// The end of the oldest stage in flight.
    pub(super) fn oldest(&self, direction: Direction) -> Option<Event> {
        let stages =
            if direction == Direction::Load { &self.loads_in_flight } else { &self.stores_in_flight };
        stages.front().map(|stage| stage.event.clone())
    }

    /// Books the end of the oldest stage.
    pub(super) fn end_oldest(&mut self, direction: Direction) {
        let Some(Stage { name, end, .. }) = self.in_flight(direction).pop_front() else { return };
        if direction == Direction::Load
            && let Some(open) = self.open_loads.get_mut(&name)
        {
            open.done += 1;
        }
        if let Some((end, succeeds)) = end {
            self.tell(&end, succeeds);
        }
    }

    /// The GPU does not answer: nobody can tell what of the jobs in flight still runs.
    pub(super) fn lose_all(&mut self, fault: &Fault) {
        let stages = self.loads_in_flight.len() + self.stores_in_flight.len();
        self.loads_in_flight.clear();
        self.stores_in_flight.clear();
        self.lose(stages.max(1), fault);
    }

    /// Takes no job in any more and fails those that wait; `parts` of what was submitted are never told of.
    pub(super) fn lose(&mut self, parts: usize, fault: &Fault) {
        self.lost += parts;
        self.broken.get_or_insert_with(|| fault.to_string());
        self.fail_waiting();
    }

    /// Submits nothing any more; what is in flight ends by itself.
    pub(super) fn give_up(&mut self) {
        self.phase = self.phase.max(Phase::GaveUp);
        self.fail_waiting();
    }

    fn fail_waiting(&mut self) {
        let waiting: Vec<Job> = self.loads.drain(..).chain(self.stores.drain(..)).collect();
        for job in waiting {
            self.fail(job);
        }
    }

    /// A job that is not submitted further fails when its last stage is done; at once when it has none.
    fn fail(&mut self, job: Job) {
        self.note_failed(&job);
        match job.last {
            Some(event) => {
                let (name, end) = (job.end.name, Some((job.end, false)));
                self.in_flight(job.direction).push_back(Stage { event, name, end });
            }
            None => self.tell(&job.end, false),
        }
    }

    fn tell(&mut self, end: &End, succeeds: bool) {
        let failed = || {
            let message = "a copy failed or was given up".to_owned();
            Err(Error::new(ErrorKind::Device, self.broken.clone().unwrap_or(message)))
        };
        let bytes = if succeeds { Ok(end.bytes) } else { failed() };
        if end.direction == Direction::Load {
            self.open_loads.remove(&end.name);
        }
        let seconds = end.submitted.elapsed().as_secs_f64();
        self.ended.push(Outcome { job: end.name, bytes, seconds });
    }

    /// Jobs ended since the last call.
    pub(super) fn take_ended(&mut self) -> Vec<Outcome> {
        self.unpolled -= self.ended.len();
        std::mem::take(&mut self.ended)
    }

    /// Whether the GPU may be working for us.
    pub(super) fn is_any_in_flight(&self) -> bool {
        !self.loads_in_flight.is_empty() || !self.stores_in_flight.is_empty()
    }

    #[cfg(test)]
    pub(super) fn stages_in_flight(&self) -> usize {
        self.loads_in_flight.len() + self.stores_in_flight.len()
    }

    pub(super) fn is_any_waiting(&self) -> bool {
        !self.loads.is_empty() || !self.stores.is_empty()
    }

    /// Whether every job has ended.
    pub(super) fn is_idle(&self) -> bool {
        !self.is_any_waiting() && !self.is_any_in_flight() && self.at_work == 0 && self.lost == 0
    }

    /// Whether there is something that nobody can see the end of.
    pub(super) fn has_lost(&self) -> bool {
        self.lost > 0
    }

    /// Whether the thread has nothing to do any more.
    pub(super) fn is_over(&self) -> bool {
        let lost = self.has_lost() && !self.is_any_in_flight();
        self.phase == Phase::Abandoned || lost || (self.is_closing() && self.is_idle())
    }

    pub(super) fn is_closing(&self) -> bool {
        self.phase > Phase::Open
    }

    pub(super) fn check_open(&self) -> Result<()> {
        if self.is_closing() {
            return Err(Error::new(ErrorKind::Closed, "this GpuMover is closed: make a new one"));
        }
        self.check_not_broken()
    }

    pub(super) fn check_not_broken(&self) -> Result<()> {
        match &self.broken {
            Some(why) => {
                let message = format!("this GpuMover gave up, since the GPU's driver failed: {why}");
                Err(Error::new(ErrorKind::Device, message))
            }
            None => Ok(()),
        }
    }

    fn waiting(&mut self, direction: Direction) -> &mut VecDeque<Job> {
        if direction == Direction::Load { &mut self.loads } else { &mut self.stores }
    }

    fn in_flight(&mut self, direction: Direction) -> &mut VecDeque<Stage> {
        if direction == Direction::Load { &mut self.loads_in_flight } else { &mut self.stores_in_flight }
    }
}
