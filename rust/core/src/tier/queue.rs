//! Which store, load or search of a tier is worked on next, and what became of those that ended. Pure state, kept
//! under one lock.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::{Chunk, Reason, Refusal, Stored, TierCounters};
use crate::{Error, ErrorKind, Key, Result};

/// Tasks submitted and not yet seen by `poll`.
const TASKS_MAX: usize = 65_536;

/// How a task ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// A chunk of a store.
    Stored(std::result::Result<Stored, Refusal>),
    /// A chunk of a load, with its bytes. After a refusal its rows hold anything.
    Loaded(std::result::Result<u64, Refusal>),
    /// A search: for each key, whether all its parts are there.
    Found(std::result::Result<Vec<bool>, Refusal>),
}

/// What became of one chunk of a store or load, or of a search. Nothing of it touches memory any more.
#[derive(Debug)]
pub struct TierOutcome {
    /// The job's name, as submitted.
    pub job: u64,
    /// Which chunk of the job.
    pub index: usize,
    /// How it ended.
    pub ended: Ended,
    /// From submission to end.
    pub seconds: f64,
}

/// What there is to do.
#[derive(Debug)]
pub(super) enum Work {
    Store(Chunk),
    Load(Chunk),
    Find(Vec<Key>),
}

impl Work {
    fn refused(&self, refusal: Refusal) -> Ended {
        match self {
            Self::Store(_) => Ended::Stored(Err(refusal)),
            Self::Load(_) => Ended::Loaded(Err(refusal)),
            Self::Find(_) => Ended::Found(Err(refusal)),
        }
    }
}

/// Work with its name.
#[derive(Debug)]
pub(super) struct Task {
    job: u64,
    /// Which call submitted it: names of jobs are the caller's and may repeat.
    batch: u64,
    index: usize,
    pub(super) work: Work,
    submitted: Instant,
}

/// How much may wait, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) stores_max: usize,
    pub(super) loads_max: usize,
    pub(super) wait: Duration,
    /// Stores worked on at a time.
    pub(super) stores_at_once: usize,
}

/// All tasks: those that wait, in their order, and those that ended.
#[derive(Debug)]
pub(super) struct Queue {
    limits: Limits,
    finds: VecDeque<Task>,
    loads: VecDeque<Task>,
    stores: VecDeque<Task>,
    /// Keys of the stores that wait or are worked on.
    storing: HashSet<Key>,
    running: usize,
    stores_running: usize,
    batches: u64,
    ended: Vec<TierOutcome>,
    pub(super) counters: TierCounters,
    /// No task is taken in any more, and threads end when none is left.
    pub(super) closing: bool,
    /// Threads that did not end.
    pub(super) threads: usize,
}

impl Queue {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            finds: VecDeque::new(),
            loads: VecDeque::new(),
            stores: VecDeque::new(),
            storing: HashSet::new(),
            running: 0,
            stores_running: 0,
            batches: 0,
            ended: Vec::new(),
            counters: TierCounters::default(),
            closing: false,
            threads: 0,
        }
    }

    /// Takes a job in. What finds no room ends at once, refused.
    pub(super) fn push(&mut self, job: u64, works: impl ExactSizeIterator<Item = Work>) -> Result<()> {
        self.check_open()?;
        let known = self.waiting() + self.running + self.ended.len();
        if known + works.len() > TASKS_MAX {
            let message =
                format!("{known} tasks of a tier were not polled, of at most {TASKS_MAX}: poll before more");
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        self.batches += 1;
        for (index, work) in works.enumerate() {
            self.push_one(Task { job, batch: self.batches, index, work, submitted: Instant::now() });
        }
        Ok(())
    }

    fn push_one(&mut self, task: Task) {
        let room = match &task.work {
            Work::Store(chunk) if self.stores.len() < self.limits.stores_max => {
                if !self.storing.insert(chunk.key) {
                    return self.refuse(&task, Reason::InFlight);
                }
                &mut self.stores
            }
            Work::Load(_) if self.loads.len() < self.limits.loads_max => &mut self.loads,
            Work::Find(_) if self.finds.len() < self.limits.loads_max => &mut self.finds,
            _ => return self.refuse(&task, Reason::Full),
        };
        room.push_back(task);
    }

    /// The next task: searches before loads before stores. Those that waited for too long end instead.
    pub(super) fn take(&mut self) -> Option<Task> {
        self.expire();
        let task = self.finds.pop_front().or_else(|| self.loads.pop_front()).or_else(|| {
            let free = self.stores_running < self.limits.stores_at_once;
            if free { self.stores.pop_front() } else { None }
        })?;
        self.running += 1;
        self.stores_running += usize::from(matches!(task.work, Work::Store(_)));
        Some(task)
    }

    /// Books the end of a task that was taken.
    pub(super) fn finish(&mut self, task: &Task, ended: Ended) {
        self.running -= 1;
        self.stores_running -= usize::from(matches!(task.work, Work::Store(_)));
        self.forget_key(task);
        let missed = matches!(ended, Ended::Loaded(Err(_)));
        self.book(task, ended);
        if missed {
            // What comes after a hole in a prefix is of no use.
            let (rest, kept) =
                std::mem::take(&mut self.loads).into_iter().partition(|waiting| waiting.batch == task.batch);
            self.loads = kept;
            self.refuse_all(rest, Reason::Broken);
        }
    }

    /// Ends what waited for too long: also when every thread hangs, if somebody polls.
    pub(super) fn expire(&mut self) {
        let limit = self.limits.wait;
        let is_late = |task: &Task| task.submitted.elapsed() > limit;
        let mut late = VecDeque::new();
        for queue in [&mut self.finds, &mut self.loads, &mut self.stores] {
            // In the order of their submission: the first that is in time ends the search.
            while queue.front().is_some_and(is_late) {
                late.extend(queue.pop_front());
            }
        }
        self.refuse_all(late, Reason::Late);
    }

    /// Ends all that nobody began; what was begun ends by itself.
    pub(super) fn give_up(&mut self) {
        let queues = [&mut self.finds, &mut self.loads, &mut self.stores];
        let waiting: VecDeque<Task> = queues.into_iter().flat_map(std::mem::take).collect();
        self.refuse_all(waiting, Reason::Closed);
    }

    /// Tasks ended since the last call.
    pub(super) fn take_ended(&mut self) -> Vec<TierOutcome> {
        self.expire();
        std::mem::take(&mut self.ended)
    }

    pub(super) fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    pub(super) fn waits_for_nothing(&self) -> bool {
        self.waiting() == 0
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting() + self.running == 0
    }

    pub(super) fn check_open(&self) -> Result<()> {
        if self.closing {
            return Err(Error::new(ErrorKind::Closed, "this TierQueue is closed: make a new one"));
        }
        Ok(())
    }

    fn waiting(&self) -> usize {
        self.finds.len() + self.loads.len() + self.stores.len()
    }

    fn refuse_all(&mut self, tasks: VecDeque<Task>, reason: Reason) {
        for task in tasks {
            self.forget_key(&task);
            self.refuse(&task, reason);
        }
    }

    fn refuse(&mut self, task: &Task, reason: Reason) {
        self.book(task, task.work.refused(reason.into()));
    }

    fn forget_key(&mut self, task: &Task) {
        if let Work::Store(chunk) = &task.work {
            self.storing.remove(&chunk.key);
        }
    }

    fn book(&mut self, task: &Task, ended: Ended) {
        let counters = &mut self.counters;
        match &ended {
            Ended::Stored(Ok(Stored::Present)) => counters.present += 1,
            Ended::Stored(Ok(Stored::Written(bytes))) => counters.stores.add(*bytes),
            Ended::Stored(Err(refusal)) => counters.stores.refuse(refusal),
            Ended::Loaded(Ok(bytes)) => counters.loads.add(*bytes),
            Ended::Loaded(Err(refusal)) => counters.loads.refuse(refusal),
            Ended::Found(Ok(_)) => counters.finds.add(0),
            Ended::Found(Err(refusal)) => counters.finds.refuse(refusal),
        }
        let seconds = task.submitted.elapsed().as_secs_f64();
        self.ended.push(TierOutcome { job: task.job, index: task.index, ended, seconds });
    }
}
