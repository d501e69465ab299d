//! What the tests of tiers share: a tier in memory, one that fails on demand, and the contract that all tiers keep.

pub(crate) mod contract;
mod faulty;
mod memory;
mod rows;

pub(crate) use faulty::{Fault, FaultyTier};
pub(crate) use memory::{Medium, MemoryTier};
pub(crate) use rows::{Rows, key};

use super::{Namespace, Seal, Space};
use contract::Rig;

/// A space of its own for each `name`.
pub(crate) fn space(name: &str) -> Space {
    let namespace = Namespace::new(&[("name".to_owned(), name.to_owned())]);
    Space::new(namespace, 0, 1, Seal::Checksum).expect("valid")
}

/// The tier in memory, and the same with a decorator that does nothing yet.
struct MemoryRig {
    medium: Medium,
    decorated: bool,
}

impl Rig for MemoryRig {
    fn open(&self, space: Space) -> Box<dyn super::Tier> {
        let tier = MemoryTier::new(space, self.medium.clone());
        if self.decorated { Box::new(FaultyTier::new(tier)) } else { Box::new(tier) }
    }

    fn values(&self) -> Vec<String> {
        self.medium.values()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        self.medium.read(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        self.medium.write(name, bytes);
    }

    fn lose_records(&self) {
        self.medium.lose_records();
    }
}

mod memory_tier {
    super::contract::tests!(super::MemoryRig { medium: super::Medium::default(), decorated: false });
}

mod faulty_tier {
    super::contract::tests!(super::MemoryRig { medium: super::Medium::default(), decorated: true });
}
