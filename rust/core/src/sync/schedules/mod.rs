//! Tests under random schedules. CI tries some; with `LMCACHE_SOAK_SECONDS` as many as the time allows.
//!
//! The one that fails is named, to be the first of another run with `LMCACHE_SOAK_SEED`.

#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod engine;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use shuttle::scheduler::{RandomScheduler, Schedule, Scheduler, Task, TaskId};
use shuttle::{Config, MaxSteps, Runner};

/// Random schedules, each with a seed of its own so that it can be repeated alone; counts their steps.
struct Schedules {
    current: RandomScheduler,
    seed: u64,
    left: usize,
    until: Option<Instant>,
    steps: Arc<AtomicU64>,
}

impl Scheduler for Schedules {
    fn new_execution(&mut self) -> Option<Schedule> {
        // The one that ended notes that it did not fail.
        assert!(self.current.new_execution().is_none());
        if self.left == 0 || self.until.is_some_and(|until| Instant::now() > until) {
            return None;
        }
        self.left -= 1;
        self.seed += 1;
        self.current = RandomScheduler::new_from_seed(self.seed, 1);
        self.current.new_execution()
    }

    fn next_task(&mut self, tasks: &[&Task], current: Option<TaskId>, is_yielding: bool) -> Option<TaskId> {
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.current.next_task(tasks, current, is_yielding)
    }

    fn next_u64(&mut self) -> u64 {
        self.current.next_u64()
    }
}

impl Drop for Schedules {
    #[expect(clippy::print_stdout, reason = "to whoever looks for the failure")]
    fn drop(&mut self) {
        if thread::panicking() {
            println!("repeat this schedule with LMCACHE_SOAK_SEED={}", self.seed - 1);
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

/// Runs `body` under `in_ci` schedules, or for the time of a soak run, and prints how many steps that were.
#[expect(clippy::print_stdout, reason = "`make soak` reads it")]
pub(crate) fn try_schedules(name: &str, in_ci: usize, body: fn()) {
    let seconds = number("LMCACHE_SOAK_SECONDS");
    let seed = number("LMCACHE_SOAK_SEED").unwrap_or(0);
    let steps = Arc::new(AtomicU64::new(0));
    let schedules = Schedules {
        current: RandomScheduler::new_from_seed(seed, 0),
        seed,
        left: if seconds.is_some() { usize::MAX } else { in_ci },
        until: seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds)),
        steps: Arc::clone(&steps),
    };
    let mut config = Config::new();
    config.silence_warnings = true;
    config.max_steps = MaxSteps::FailAfter(1_000_000);
    Runner::new(schedules, config).run(body);
    println!("soak: {name}: {} steps", steps.load(Ordering::Relaxed));
}
