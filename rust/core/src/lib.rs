//! The storage engine of `lmcache_rs`: which KV blocks are kept, where they lie, and how they move.

mod error;
mod evict;
mod index;
mod key;

pub use error::{Error, ErrorKind, Result};
pub use index::{Chain, Counters, Hashes, Index, Lease, Match, Reservation, Stats};
pub use key::{Key, KeySpace, TokenHashes, hash_tokens};
