//! Which copy is worked on next, and what became of those that ended. Pure state, kept under one lock.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::route::{Direction, Pair};
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::{Error, ErrorKind, Result};

/// Jobs submitted and not yet seen by `poll`: a caller that never polls is stopped. A step of an engine may begin a load
/// for every request that waits.
pub(crate) const JOBS_MAX: usize = 1 << 16;

/// What became of a submitted job.
#[derive(Debug)]
pub struct Outcome {
    /// The job's name, as submitted.
    pub job: u64,
    /// Bytes copied.
    pub bytes: Result<u64>,
    /// From submission to end.
    pub seconds: f64,
}

/// One batch of copies.
#[derive(Debug)]
pub(super) struct Job {
    /// Its name for `poll`; None when the caller of `copy` waits for it.
    name: Option<u64>,
    pub(super) direction: Direction,
    pub(super) pairs: Vec<Pair>,
    bytes: u64,
    claims: usize,
    /// Claims that did not end.
    left: AtomicUsize,
    failed: AtomicBool,
    submitted: Instant,
}

impl Job {
    pub(super) fn new(
        name: Option<u64>,
        direction: Direction,
        pairs: Vec<Pair>,
        bytes: u64,
        claims: usize,
    ) -> Self {
        let (left, failed) = (AtomicUsize::new(claims), AtomicBool::new(false));
        Self { name, direction, pairs, bytes, claims, left, failed, submitted: Instant::now() }
    }

    /// Nothing of it will touch memory any more.
    pub(super) fn has_ended(&self) -> bool {
        self.left.load(Ordering::Acquire) == 0
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    pub(super) fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// Ends `claims` claims; whether they were the last. Exactly one caller is told so.
    pub(super) fn end_claims(&self, claims: usize) -> bool {
        let before = self.left.fetch_sub(claims, Ordering::AcqRel);
        debug_assert!(before >= claims, "{claims} claims ended of {before} left");
        before == claims
    }

    /// Bytes copied, once it has ended.
    pub(super) fn result(&self) -> Result<u64> {
        if self.has_failed() {
            let what = if self.direction == Direction::Store { "store" } else { "load" };
            let message = format!("a {what} of {} rows failed or was given up", self.pairs.len());
            return Err(Error::new(ErrorKind::Internal, message));
        }
        Ok(self.bytes)
    }
}

/// A job with claims that nobody took.
#[derive(Debug)]
struct Waiting {
    job: Arc<Job>,
    next: usize,
}

/// All jobs: those to be worked on, in their order, and those that ended.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// Somebody waits for these: before all others.
    now: VecDeque<Waiting>,
    loads: VecDeque<Waiting>,
    stores: VecDeque<Waiting>,
    in_flight: usize,
    /// Submitted jobs in flight or in `ended`.
    named: usize,
    ended: Vec<Outcome>,
    /// No job is taken in any more, and threads end when none is left.
    pub(super) closing: bool,
    /// Threads that did not end.
    pub(super) threads: usize,
}

impl Queue {
    /// Takes a job in. A job without claims has ended.
    pub(super) fn push(&mut self, job: &Arc<Job>) -> Result<()> {
        self.check_open()?;
        if job.name.is_some() {
            if self.named >= JOBS_MAX {
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    format!("{JOBS_MAX} jobs were submitted and not polled: poll before submitting more"),
                ));
            }
            self.named += 1;
        }
        self.in_flight += 1;
        if job.claims == 0 {
            self.end(job);
            return Ok(());
        }
        let queue = match (job.name, job.direction) {
            (None, _) => &mut self.now,
            (Some(_), Direction::Load) => &mut self.loads,
            (Some(_), Direction::Store) => &mut self.stores,
        };
        queue.push_back(Waiting { job: Arc::clone(job), next: 0 });
        Ok(())
    }

    /// The next claim of all: of loads before stores, even those that were begun.
    pub(super) fn claim(&mut self) -> Option<(Arc<Job>, usize)> {
        [&mut self.now, &mut self.loads, &mut self.stores].into_iter().find_map(|queue| claim_at(queue, 0))
    }

    /// The next claim of `job`, for its caller.
    pub(super) fn claim_of(&mut self, job: &Arc<Job>) -> Option<usize> {
        let position = self.now.iter().position(|waiting| Arc::ptr_eq(&waiting.job, job))?;
        claim_at(&mut self.now, position).map(|(_, claim)| claim)
    }

    /// Books a job whose last claim ended.
    pub(super) fn end(&mut self, job: &Job) {
        debug_assert!(job.has_ended());
        self.in_flight -= 1;
        if let Some(name) = job.name {
            let seconds = job.submitted.elapsed().as_secs_f64();
            self.ended.push(Outcome { job: name, bytes: job.result(), seconds });
        }
    }

    /// Fails all that nobody began; what was begun ends by itself.
    pub(super) fn give_up(&mut self) {
        let queues = [&mut self.now, &mut self.loads, &mut self.stores];
        let waiting: Vec<Waiting> = queues.into_iter().flat_map(|queue| queue.drain(..)).collect();
        for Waiting { job, next } in waiting {
            job.fail();
            if job.end_claims(job.claims - next) {
                self.end(&job);
            }
        }
    }

    /// Jobs ended since the last call.
    pub(super) fn take_ended(&mut self) -> Vec<Outcome> {
        self.named -= self.ended.len();
        std::mem::take(&mut self.ended)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.in_flight == 0
    }

    pub(super) fn check_open(&self) -> Result<()> {
        if self.closing {
            return Err(Error::new(ErrorKind::Closed, "this Mover is closed: make a new one"));
        }
        Ok(())
    }
}

/// Takes a claim of the job at `position`; the last one removes it.
fn claim_at(queue: &mut VecDeque<Waiting>, position: usize) -> Option<(Arc<Job>, usize)> {
    let waiting = queue.get_mut(position)?;
    let claim = waiting.next;
    waiting.next += 1;
    if waiting.next < waiting.job.claims {
        return Some((Arc::clone(&waiting.job), claim));
    }
    queue.remove(position).map(|waiting| (waiting.job, claim))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(name: Option<u64>, direction: Direction, claims: usize) -> Arc<Job> {
        Arc::new(Job::new(name, direction, Vec::new(), 8, claims))
    }

    fn drain(queue: &mut Queue) -> Vec<Option<u64>> {
        std::iter::from_fn(|| queue.claim().map(|(job, _)| job.name)).collect()
    }

    #[test]
    fn callers_go_first_then_loads_then_stores() {
        let mut queue = Queue::default();
        let jobs = [
            job(Some(1), Direction::Store, 3),
            job(Some(2), Direction::Load, 2),
            job(Some(3), Direction::Load, 1),
            job(None, Direction::Store, 1),
        ];
        queue.push(&jobs[0]).expect("open");
        assert_eq!(queue.claim().map(|(job, claim)| (job.name, claim)), Some((Some(1), 0)));
        for job in &jobs[1..] {
            queue.push(job).expect("open");
        }
        assert_eq!(drain(&mut queue), [None, Some(2), Some(2), Some(3), Some(1), Some(1)]);
    }

    #[test]
    fn a_caller_takes_claims_of_its_own_job_only() {
        let mut queue = Queue::default();
        let (mine, other) = (job(None, Direction::Load, 2), job(None, Direction::Load, 1));
        queue.push(&other).expect("open");
        queue.push(&mine).expect("open");
        assert_eq!(
            [queue.claim_of(&mine), queue.claim_of(&mine), queue.claim_of(&mine)],
            [Some(0), Some(1), None]
        );
        assert!(queue.claim().is_some() && queue.claim().is_none());
    }

    #[test]
    fn what_is_given_up_fails_once_and_what_was_begun_ends_by_itself() {
        let mut queue = Queue::default();
        let (begun, not_begun) = (job(Some(1), Direction::Load, 3), job(Some(2), Direction::Store, 5));
        queue.push(&begun).expect("open");
        queue.push(&not_begun).expect("open");
        queue.claim().expect("a claim");
        queue.give_up();
        assert!(!queue.is_idle() && not_begun.has_ended() && !begun.has_ended());
        assert!(begun.end_claims(1));
        queue.end(&begun);
        assert!(queue.is_idle());
        let ended = queue.take_ended();
        assert_eq!(ended.iter().map(|outcome| outcome.job).collect::<Vec<_>>(), [2, 1]);
        assert!(ended.iter().all(|outcome| outcome.bytes.is_err()));
    }

    #[test]
    fn unpolled_jobs_are_limited_and_callers_are_not() {
        let mut queue = Queue::default();
        for name in 0..JOBS_MAX as u64 {
            queue.push(&job(Some(name), Direction::Load, 0)).expect("room");
        }
        let refused = queue.push(&job(Some(0), Direction::Load, 0)).expect_err("full");
        assert!(refused.to_string().contains("poll before"), "{refused}");
        queue.push(&job(None, Direction::Load, 1)).expect("not limited");
        assert_eq!(queue.take_ended().len(), JOBS_MAX);
        queue.push(&job(Some(0), Direction::Load, 0)).expect("room again");
    }
}
