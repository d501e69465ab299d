//! The mover over the fake driver: bytes against an oracle, order, failures, ends.

mod failures;
mod life;
mod order;
mod random;
mod rig;
#[cfg(feature = "shuttle")]
mod schedules;
mod shape;
