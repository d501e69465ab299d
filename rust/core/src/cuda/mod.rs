//! The GPU side: the driver, found at run time, and the mover of KV between the GPU and the pool.

mod batches;
mod driver;
mod events;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers, and addresses of this machine")]
pub(crate) mod fake;
mod kernels;
mod layout;
mod libcuda;
mod mover;

pub(crate) use driver::{Driver, DriverResult, Entered};
pub use layout::GpuLayer;
pub(crate) use libcuda::LibCuda;
pub use libcuda::cuda_available;
pub use mover::{GpuMover, GpuMoverConfig, LoadOrder, Staging, Streams};
