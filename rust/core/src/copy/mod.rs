//! Copies of whole blocks between the pool's rows and KV tensors on the CPU.

mod layers;
mod mover;
mod queue;
mod route;
mod tiling;

pub use layers::{KvLayers, Layer};
pub use mover::Mover;
pub(crate) use queue::JOBS_MAX;
pub use queue::Outcome;
pub use route::Direction;
pub(crate) use route::check_numbers;
