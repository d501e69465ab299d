//! Host memory: one mapping a pool, cut into rows, touched and pinned in the background.

mod affinity;
mod host;
mod mapping;
mod owner;
mod pin;
mod prefault;

use std::time::{Duration, Instant};

pub(crate) use affinity::{prefer_node, use_every_cpu, yield_to_others};
pub use host::{HostPool, HostPoolConfig, pool_rows};
pub(crate) use owner::Owner;

/// The longest wait that anybody can ask for.
const WAIT_MAX: Duration = Duration::from_secs(86_400);

/// When a wait of `timeout`, a day at most, ends.
pub(crate) fn deadline(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(WAIT_MAX)
}
