//! In what order rows leave; which rows may leave is the index's affair.

mod lru;

pub(crate) use lru::Lru;
