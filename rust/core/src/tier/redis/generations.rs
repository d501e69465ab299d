//! What a process knows of its namespace's generations: the last one that a record named, and those that are gone for good.
//!
//! A server may come back with an older record than the one it confirmed: from a snapshot, or as a replica that had not
//! heard of a reset. The values of that generation come back with it, so what was replaced once is never believed again.

use std::collections::VecDeque;

use parking_lot::Mutex;

use crate::tier::space::Generation;

/// Generations that are remembered as gone. A server that goes back by more resets than that is believed.
const GONE_MAX: usize = 1024;

/// Shared by the threads of a tier.
#[derive(Debug, Default)]
pub(super) struct Generations(Mutex<Known>);

/// When a record was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(u64);

#[derive(Debug, Default)]
struct Known {
    latest: Option<Generation>,
    /// How often `latest` has changed.
    now: Moment,
    gone: VecDeque<Generation>,
}

impl Generations {
    /// The generation that is the present one unless it was replaced.
    pub(super) fn latest(&self) -> Option<Generation> {
        self.0.lock().latest
    }

    /// To be taken before a record is asked for.
    pub(super) fn now(&self) -> Moment {
        self.0.lock().now
    }

    /// Takes in what a record names that was asked for at `asked`. False where that is gone for good.
    pub(super) fn learn(&self, found: Generation, asked: Moment) -> bool {
        let mut known = self.0.lock();
        if known.gone.contains(&found) {
            return false;
        }
        // Of two answers to questions that crossed nobody knows which is the older one: the next question tells.
        if known.latest != Some(found) && known.now <= asked {
            known.retire_latest();
            known.latest = Some(found);
            known.now.0 += 1;
        }
        true
    }

    /// `latest` is about to be replaced.
    pub(super) fn retire_latest(&self) {
        self.0.lock().retire_latest();
    }

    /// `found` is about to be replaced.
    pub(super) fn retire(&self, found: Generation) {
        let mut known = self.0.lock();
        if known.latest == Some(found) {
            known.latest = None;
        }
        known.push(found);
    }
}

impl Known {
    fn retire_latest(&mut self) {
        if let Some(latest) = self.latest.take() {
            self.push(latest);
        }
    }

    fn push(&mut self, generation: Generation) {
        if self.gone.contains(&generation) {
            return;
        }
        if self.gone.len() == GONE_MAX {
            self.gone.pop_front();
        }
        self.gone.push_back(generation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generation(number: usize) -> Generation {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
        Generation(bytes)
    }

    #[test]
    fn what_was_replaced_stays_gone() {
        let generations = Generations::default();
        for number in 0..10 {
            assert!(generations.learn(generation(number), generations.now()));
            assert_eq!(generations.latest(), Some(generation(number)));
            assert!((0..number).all(|old| !generations.learn(generation(old), generations.now())));
        }
        generations.retire(generation(10));
        generations.retire_latest();
        assert_eq!(generations.latest(), None);
        assert!((0..11).all(|old| !generations.learn(generation(old), generations.now())));
        assert!(generations.learn(generation(11), generations.now()));
    }

    #[test]
    fn answers_that_crossed_retire_nothing() {
        let (asked, old, new) = (Moment::default(), generation(1), generation(2));
        for (first, second) in [(new, old), (old, new)] {
            let generations = Generations::default();
            assert!(generations.learn(first, asked));
            assert!(generations.learn(second, asked));
            assert_eq!(generations.latest(), Some(first));
            // Who asks now hears of the new one.
            assert!(generations.learn(new, generations.now()));
            assert_eq!(generations.latest(), Some(new));
        }
    }

    #[test]
    fn the_last_ones_are_remembered() {
        let generations = Generations::default();
        for number in 0..=GONE_MAX + 1 {
            assert!(generations.learn(generation(number), generations.now()));
        }
        assert!((1..=GONE_MAX).all(|old| !generations.learn(generation(old), generations.now())));
        assert_eq!(generations.0.lock().gone.len(), GONE_MAX);
    }
}
