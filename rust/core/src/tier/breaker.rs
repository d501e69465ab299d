//! Rest after faults: what fails again and again is not tried at every request.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::space::random;
use super::{Reason, Refusal};

/// Faults in a row after which a medium rests.
const FAULTS_MAX: u32 = 3;

/// For how long it rests, at most. Then one attempt shows whether it is well.
pub(super) const REST: Duration = Duration::from_secs(5);

/// Lets attempts through, or not.
#[derive(Debug)]
pub(super) struct Breaker {
    rest: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    faults: u32,
    rests_until: Option<Instant>,
    cause: String,
}

impl Breaker {
    pub(super) fn new(rest: Duration) -> Self {
        Self { rest, state: Mutex::default() }
    }

    /// Runs `attempt` unless the medium rests, and books how it ended.
    pub(super) fn run<T>(&self, attempt: impl FnOnce() -> Result<T, Refusal>) -> Result<T, Refusal> {
        self.admit()?;
        let ended = attempt();
        match &ended {
            Err(refusal) if refusal.is_fault() => self.fault(refusal),
            _ => *self.state.lock() = State::default(),
        }
        ended
    }

    /// Whether nothing went well since it began to rest.
    pub(super) fn rests(&self) -> bool {
        self.state.lock().rests_until.is_some()
    }

    fn admit(&self) -> Result<(), Refusal> {
        let mut state = self.state.lock();
        let Some(until) = state.rests_until else { return Ok(()) };
        let now = Instant::now();
        if now < until {
            return Err(Refusal::new(Reason::Paused, state.cause.clone()));
        }
        // The others rest on while this one tries.
        state.rests_until = Some(now + jittered(self.rest));
        Ok(())
    }

    fn fault(&self, refusal: &Refusal) {
        let mut state = self.state.lock();
        state.faults = state.faults.saturating_add(1);
        // A full medium does not get emptier by the next attempt, and one that hangs costs a long wait each time.
        if state.faults >= FAULTS_MAX || matches!(refusal.reason, Reason::NoSpace | Reason::Late) {
            state.rests_until = Some(Instant::now() + jittered(self.rest));
            state.cause.clone_from(&refusal.cause);
        }
    }
}

/// Half of `rest` to all of it, so that many processes do not come back at the same moment.
fn jittered(rest: Duration) -> Duration {
    let [byte] = random::<1>().unwrap_or_default();
    rest.mul_f64(0.5 + f64::from(byte) / 512.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn attempt(breaker: &Breaker, reason: Option<Reason>) -> Result<(), Reason> {
        let ended = || reason.map_or(Ok(()), |reason| Err(Refusal::from(reason)));
        breaker.run(ended).map_err(|refusal| refusal.reason)
    }

    #[test]
    fn faults_in_a_row_make_it_rest() {
        let breaker = Breaker::new(HOUR);
        for reason in [Reason::Io, Reason::Denied, Reason::Absent, Reason::Io, Reason::Locked] {
            assert_eq!(attempt(&breaker, Some(reason)), Err(reason));
        }
        assert_eq!(attempt(&breaker, None), Ok(()));
        for _ in 0..FAULTS_MAX {
            assert_eq!(attempt(&breaker, Some(Reason::Io)), Err(Reason::Io));
        }
        assert_eq!(attempt(&breaker, None), Err(Reason::Paused));
    }

    #[test]
    fn a_full_or_hanging_medium_rests_at_once() {
        for reason in [Reason::NoSpace, Reason::Late] {
            let breaker = Breaker::new(HOUR);
            assert_eq!(attempt(&breaker, Some(reason)), Err(reason));
            assert_eq!(attempt(&breaker, None), Err(Reason::Paused));
        }
    }

    #[test]
    fn rests_differ_and_end() {
        let rests: Vec<Duration> = (0..50).map(|_| jittered(HOUR)).collect();
        assert!(rests.iter().all(|&rest| rest >= HOUR / 2 && rest <= HOUR), "{rests:?}");
        assert!(rests.iter().any(|rest| rest != &rests[0]), "{rests:?}");
    }

    #[test]
    fn after_the_rest_one_attempt_decides() {
        let breaker = Breaker::new(Duration::ZERO);
        for _ in 0..2 * FAULTS_MAX {
            assert_eq!(attempt(&breaker, Some(Reason::Io)), Err(Reason::Io));
        }
        let breaker = Breaker::new(HOUR);
        assert_eq!(attempt(&breaker, Some(Reason::NoSpace)), Err(Reason::NoSpace));
        breaker.state.lock().rests_until = Some(Instant::now());
        let inner = breaker.run(|| Ok(attempt(&breaker, None)));
        assert_eq!(inner, Ok(Err(Reason::Paused)), "one at a time");
        assert_eq!(attempt(&breaker, None), Ok(()));
    }
}
