//! The storage engine of `lmcache_rs`: which KV blocks are kept, where they lie, and how they move.


mod error;

pub use error::{Error, ErrorKind, Result};
