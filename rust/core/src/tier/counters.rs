//! What a tier did and why it did not, in plain numbers.

use super::{Reason, Refusal};

/// Stores, loads or searches that ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Chunks stored or loaded, or searches answered.
    pub chunks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Chunks refused, in the order of `Reason::ALL`.
    refused: Vec<u64>,
    /// The cause of the latest refusal that had one.
    pub last_cause: String,
}

impl Default for Counted {
    fn default() -> Self {
        Self { chunks: 0, bytes: 0, refused: vec![0; Reason::ALL.len()], last_cause: String::new() }
    }
}

impl Counted {
    pub(super) fn add(&mut self, bytes: u64) {
        self.chunks += 1;
        self.bytes += bytes;
    }

    pub(super) fn refuse(&mut self, refusal: &Refusal) {
        self.refused[refusal.reason as usize] += 1;
        if !refusal.cause.is_empty() {
            self.last_cause.clone_from(&refusal.cause);
        }
    }

    /// How many were refused for `reason`.
    #[must_use]
    pub fn refused(&self, reason: Reason) -> u64 {
        self.refused[reason as usize]
    }
}

/// All that a queue's tier did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TierCounters {
    /// Stores that wrote, and those dropped.
    pub stores: Counted,
    /// Stores of what was there.
    pub present: u64,
    /// Loads, and misses.
    pub loads: Counted,
    /// Searches answered, and those without an answer.
    pub finds: Counted,
}
