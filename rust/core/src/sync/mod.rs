//! Locks, atomics and threads: the machine's own, or those of a model checker that tries interleavings.
//!
//! The features `loom` and `shuttle` are for the tests of that name only; everything that more than one thread uses
//! takes its locks, atomics and threads from here, so that these tests run the very code of the product.

#[cfg(any(feature = "loom", feature = "shuttle"))]
mod model;
#[cfg(all(test, feature = "shuttle"))]
mod schedules;

#[cfg(all(test, feature = "shuttle"))]
pub(crate) use self::schedules::try_schedules;

#[cfg(any(feature = "loom", feature = "shuttle"))]
pub(crate) use self::model::{Condvar, Mutex, MutexGuard, atomic, thread};

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
pub(crate) use {
    parking_lot::{Condvar, Mutex, MutexGuard},
    std::{sync::atomic, thread},
};

/// Waits for news until `done`; false when `deadline` passed first.
pub(crate) fn wait_until<T>(
    news: &Condvar,
    state: &mut MutexGuard<'_, T>,
    deadline: std::time::Instant,
    done: impl Fn(&T) -> bool,
) -> bool {
    while !done(state) {
        if news.wait_until(state, deadline).timed_out() {
            return done(state);
        }
    }
    true
}
