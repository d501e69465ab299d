//! Places beyond RAM that hold chunks: one trait, its tiers, and the queue that works on them in the background.

mod breaker;
mod counters;
mod disk;
#[cfg(test)]
pub(crate) mod fake;
mod format;
mod queue;
mod redis;
mod refusal;
mod rows;
mod space;
mod worker;

use std::fmt::Debug;

pub use counters::{Counted, TierCounters};
pub use disk::{DiskConfig, DiskDirectory, DiskTier};
pub use queue::{Ended, TierOutcome};
pub use redis::{RedisConfig, RedisTier};
pub use refusal::{Reason, Refusal};
pub use rows::{RowMemory, Segment};
pub use space::{Namespace, Seal, Space};
pub use worker::{TierQueue, TierQueueConfig};

use crate::Key;

/// One value to store or to load: a chunk's rows on this rank.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Names the prefix that ends with the chunk.
    pub key: Key,
    /// Chunks before it in its prefix: those further from the beginning leave first.
    pub position: u32,
    /// Where its bytes are, or go to.
    pub memory: RowMemory,
}

/// What became of a store that was not dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// So many bytes of rows were written.
    Written(u64),
    /// It was there; no byte was moved.
    Present,
}

/// A place that holds values of one `Space`. Calls block, may come from many threads, and move bytes straight between
/// the medium and the rows. A refusal is never more than a miss or a dropped store.
pub trait Tier: Send + Sync + Debug {
    /// Stores a value, unless it is there. Found by others only when it is complete.
    fn put(&self, chunk: &Chunk) -> Result<Stored, Refusal>;

    /// Loads a value into the chunk's rows and verifies it. After a refusal the rows hold anything.
    fn get(&self, chunk: &Chunk) -> Result<(), Refusal>;

    /// For each key, whether the values of all ranks seem to be there. They may be gone, or refused, when loaded.
    fn present(&self, keys: &[Key]) -> Result<Vec<bool>, Refusal>;

    /// Whether the last attempts failed, so that the next one may take as long as they did.
    fn rests(&self) -> bool {
        false
    }

    /// Whether it can be reached and written to, as far as that shows without a value.
    fn check(&self) -> Result<(), Refusal>;

    /// Forgets every value of the namespace, of all ranks and for all processes: once this returned without an
    /// error, what was stored before is never found again.
    fn reset(&self) -> Result<(), Refusal>;
}
