//! The interface of `parking_lot` over the locks of loom or shuttle.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

#[cfg(feature = "loom")]
use loom::sync as checked;
#[cfg(not(feature = "loom"))]
use shuttle::sync as checked;

pub(crate) use checked::atomic;
#[cfg(not(feature = "loom"))]
pub(crate) use shuttle::thread;

#[cfg(feature = "loom")]
pub(crate) use loom::thread;

/// As `parking_lot::Mutex`, which knows no poison.
pub(crate) struct Mutex<T>(checked::Mutex<T>);

pub(crate) struct MutexGuard<'a, T> {
    mutex: &'a checked::Mutex<T>,
    /// None during a wait only.
    held: Option<checked::MutexGuard<'a, T>>,
}

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(checked::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard { mutex: &self.0, held: Some(lock(&self.0)) }
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mutex")
    }
}

fn lock<T>(mutex: &checked::Mutex<T>) -> checked::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const TAKEN: &str = "a guard is there but for the time of a wait";

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.held.as_ref().expect(TAKEN)
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.held.as_mut().expect(TAKEN)
    }
}

/// As `parking_lot::Condvar`. Time is a choice: a wait with a limit may reach it at once.
#[derive(Debug)]
pub(crate) struct Condvar(checked::Condvar);

pub(crate) struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    pub(crate) fn timed_out(&self) -> bool {
        self.0
    }
}

impl Condvar {
    pub(crate) fn new() -> Self {
        Self(checked::Condvar::new())
    }

    pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        let held = guard.held.take().expect(TAKEN);
        guard.held = Some(self.0.wait(held).unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, _: Instant) -> WaitTimeoutResult {
        let times_out = may_time_out();
        if times_out {
            let_others_run(guard);
        } else {
            self.wait(guard);
        }
        WaitTimeoutResult(times_out)
    }

    /// A short wait, of who looks again and again: nobody need notify.
    #[expect(clippy::unused_self, reason = "the interface is parking_lot's")]
    pub(crate) fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, _: Duration) {
        let_others_run(guard);
    }

    pub(crate) fn notify_one(&self) -> bool {
        self.0.notify_one();
        true
    }

    pub(crate) fn notify_all(&self) -> usize {
        self.0.notify_all();
        1
    }
}

fn let_others_run<T>(guard: &mut MutexGuard<'_, T>) {
    guard.held = None;
    thread::yield_now();
    guard.held = Some(lock(guard.mutex));
}

/// loom tries every choice of its own only; there limits are never reached.
#[cfg(feature = "loom")]
fn may_time_out() -> bool {
    false
}

#[cfg(not(feature = "loom"))]
fn may_time_out() -> bool {
    shuttle::rand::Rng::gen_bool(&mut shuttle::rand::thread_rng(), 0.1)
}
