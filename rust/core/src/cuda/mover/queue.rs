//! Which stage is submitted next, what is in flight, and what became of the jobs. Pure state, kept under one lock.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::super::driver::Fault;
use super::super::events::Event;
use super::job::{End, Job, OpenLoad, Progress, Speed, Stage, Submitted};
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

/// How far closing has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    #[default]
    Open,
    /// No job is taken in any more.
    Closing,
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
    /// That of the last load which ended.
    load_speed: Option<Speed>,
    /// Since when stores let loads go first.
    held_since: Option<Instant>,
    /// Jobs that somebody is submitting a stage of.
    at_work: usize,
    /// Jobs, or parts, of which nobody can tell whether they ended.
    lost: usize,
    /// Submitted jobs that were not polled.
    unpolled: usize,
    ended: Vec<Outcome>,
    /// Of what was taken in until then nothing more is submitted.
    given_up_at: Option<Instant>,
    /// Why the GPU is not used any more.
    broken: Option<String>,
    pub(super) phase: Phase,
    pub(super) thread_runs: bool,
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
            self.open_loads.insert(job.end.name, OpenLoad::new(&job));
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
            let may_go = self.stores.front().is_some_and(|store| pinned(store.stage().rows));
            job = if may_go { self.stores.pop_front() } else { None };
        }
        self.at_work += usize::from(job.is_some());
        job
    }

    /// Fails stores that waited in vain for their rows to be pinned; whether there were any.
    pub(super) fn fail_late(
        &mut self,
        now: Instant,
        limits: &Limits,
        pinned: impl Fn(&[u32]) -> bool,
    ) -> bool {
        let is_late = |store: &Job| {
            let waited = now.saturating_duration_since(store.end.submitted);
            waited >= limits.pinning && !pinned(store.stage().rows)
        };
        let late = self.stores.iter().take_while(|store| is_late(store)).count();
        for _ in 0..late {
            if let Some(store) = self.stores.pop_front() {
                self.fail(store);
            }
        }
        late > 0
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
                if self.given_up_at.is_some_and(|at| job.end.submitted <= at) {
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
        if let Some(open) = self.open_load(job)
            && job.is_part_submitted()
        {
            open.parts.push(event.clone());
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
            return Progress::Failed;
        }
        let last = open.parts_total - 1;
        if let Some(event) = open.parts.get(part.map_or(last, |part| part.min(last))) {
            return Progress::Submitted(event.clone());
        }
        let place = self.loads.iter().position(|job| job.end.name == name);
        let Some(job) = place.and_then(|place| self.loads.remove(place)) else {
            return Progress::AtWork;
        };
        self.at_work += 1;
        Progress::Waiting(job)
    }

    /// Loads that will end within `limit`, or `limit_by_layers`, if they go on as they did, or as the last one did.
    pub(super) fn ending_within(&self, limit: Duration, limit_by_layers: Duration, now: Instant) -> Vec<u64> {
        let alone = self.open_loads.len() == 1;
        let soon = |open: &OpenLoad| {
            let limit = if open.parts_total > 1 { limit_by_layers } else { limit };
            open.left(self.load_speed, alone, now).is_some_and(|left| left <= limit)
        };
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
            open.stage_ended(Instant::now());
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
        self.fail_unsubmitted();
    }

    /// Fails what was taken in until now and not submitted, or not to its end.
    pub(super) fn fail_unsubmitted(&mut self) {
        self.given_up_at = Some(Instant::now());
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
        if end.direction == Direction::Load
            && let Some(open) = self.open_loads.remove(&end.name)
        {
            self.load_speed = open.speed().filter(|_| succeeds).or(self.load_speed);
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

    #[cfg(test)]
    pub(super) fn stages_done(&self, load: u64) -> Option<usize> {
        self.open_loads.get(&load).map(|open| open.done)
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
