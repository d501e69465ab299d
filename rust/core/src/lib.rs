//! The storage engine of `lmcache_rs`: which KV blocks are kept, where they lie, and how they move.

mod copy;
mod error;
mod pool;

pub use copy::{Direction, KvLayers, Layer, Mover, Outcome};
pub use error::{Error, ErrorKind, Result};
pub use pool::{HostPool, HostPoolConfig};
