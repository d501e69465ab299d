//! The storage engine of `lmcache_rs`: which KV blocks are kept, where they lie, and how they move.

mod block_hash;
mod copy;
mod cuda;
mod error;
mod evict;
mod index;
mod key;
mod pool;
mod sync;
mod tier;

pub use block_hash::sha256_block_hashes;
pub use copy::{Direction, KvLayers, Layer, Mover, Outcome};
pub use cuda::{GpuLayer, GpuMover, GpuMoverConfig, LoadOrder, Staging, Streams, cuda_available};
pub use error::{Error, ErrorKind, Result};
pub use index::{Chain, Counters, Departure, Hashes, Index, Lease, Match, Reservation, Stats, chunk_ends};
pub use key::{Key, KeySpace, TokenHashes, hash_tokens};
pub use pool::{HostPool, HostPoolConfig, pool_rows};
pub use tier::{
    Chunk, Counted, DiskConfig, DiskDirectory, DiskTier, Ended, Namespace, Reason, RedisConfig, RedisTier,
    Refusal, RowMemory, Seal, Segment, Space, Stored, Tier, TierCounters, TierOutcome, TierQueue,
    TierQueueConfig,
};
