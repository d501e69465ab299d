//! Tests under random schedules. CI tries some; with `LMCACHE_SOAK_SECONDS` as many as the time allows.
//!
//! A schedule that fails is printed, to be replayed with `shuttle::replay`; `LMCACHE_SOAK_SEED` chooses the first.

#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod engine;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use shuttle::scheduler::{RandomScheduler, Schedule, Scheduler, Task, TaskId};
use shuttle::{Config, MaxSteps, Runner};

/// Counts the steps that it chooses.
struct Counting(RandomScheduler, Arc<AtomicU64>);

impl Scheduler for Counting {
    fn new_execution(&mut self) -> Option<Schedule> {
        self.0.new_execution()
    }

    fn next_task(&mut self, tasks: &[&Task], current: Option<TaskId>, is_yielding: bool) -> Option<TaskId> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.next_task(tasks, current, is_yielding)
    }

    fn next_u64(&mut self) -> u64 {
        self.0.next_u64()
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

/// Runs `body` under `in_ci` schedules, or for the time of a soak run, and prints how many steps that were.
pub(crate) fn try_schedules(name: &str, in_ci: usize, body: fn()) {
    let seconds = number("LMCACHE_SOAK_SECONDS");
    let steps = Arc::new(AtomicU64::new(0));
    let schedules = if seconds.is_some() { usize::MAX } else { in_ci };
    let seed = number("LMCACHE_SOAK_SEED").unwrap_or(0);
    let mut config = Config::new();
    config.silence_warnings = true;
    config.max_time = seconds.map(Duration::from_secs);
    config.max_steps = MaxSteps::FailAfter(1_000_000);
    Runner::new(Counting(RandomScheduler::new_from_seed(seed, schedules), Arc::clone(&steps)), config)
        .run(body);
    #[expect(clippy::print_stdout, reason = "`make soak` reads it")]
    {
        println!("soak: {name}: {} steps", steps.load(Ordering::Relaxed));
    }
}
