//! A decorator that makes any tier fail, hang or panic on demand.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::Key;
use crate::tier::{Chunk, Reason, Refusal, Stored, Tier};

/// What happens to calls from now on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    #[default]
    None,
    /// They are refused.
    Refuse(Reason),
    /// They wait until the fault is another one.
    Hang,
    /// They panic.
    Panic,
}

/// A tier with a fault that can be set from outside, and a count of its calls.
#[derive(Clone, Debug)]
pub(crate) struct FaultyTier<T> {
    tier: T,
    state: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Debug, Default)]
struct State {
    fault: Fault,
    calls: usize,
    hanging: usize,
}

impl<T: Tier> FaultyTier<T> {
    pub(crate) fn new(tier: T) -> Self {
        Self { tier, state: Arc::default() }
    }

    pub(crate) fn set(&self, fault: Fault) {
        self.state.0.lock().fault = fault;
        self.state.1.notify_all();
    }

    /// Calls so far.
    pub(crate) fn calls(&self) -> usize {
        self.state.0.lock().calls
    }

    /// Waits until so many calls hang.
    pub(crate) fn wait_hanging(&self, calls: usize) {
        let mut state = self.state.0.lock();
        while state.hanging < calls {
            self.state.1.wait(&mut state);
        }
    }

    fn pass(&self) -> Result<&T, Refusal> {
        let (state, changed) = &*self.state;
        let mut state = state.lock();
        state.calls += 1;
        state.hanging += 1;
        changed.notify_all();
        while state.fault == Fault::Hang {
            changed.wait(&mut state);
        }
        state.hanging -= 1;
        match state.fault {
            Fault::None | Fault::Hang => Ok(&self.tier),
            Fault::Refuse(reason) => Err(reason.into()),
            Fault::Panic => {
                drop(state);
                panic!("as the test wants it");
            }
        }
    }
}

impl<T: Tier> Tier for FaultyTier<T> {
    fn put(&self, chunk: &Chunk) -> Result<Stored, Refusal> {
        self.pass()?.put(chunk)
    }

    fn get(&self, chunk: &Chunk) -> Result<(), Refusal> {
        self.pass()?.get(chunk)
    }

    fn present(&self, keys: &[Key]) -> Result<Vec<bool>, Refusal> {
        self.pass()?.present(keys)
    }

    fn check(&self) -> Result<(), Refusal> {
        self.pass()?.check()
    }

    fn reset(&self) -> Result<(), Refusal> {
        self.pass()?.reset()
    }
}
