//! The disk tier: one file a value, in one or several directories that survive the process.

mod directory;
#[cfg(test)]
mod faults;
mod files;
mod lane;
mod quota;
#[cfg(test)]
mod tests;
mod transfer;

use std::path::PathBuf;
use std::time::Duration;

use directory::{Directory, Manner};
use files::Files;
use lane::Lanes;
use twox_hash::XxHash3_64;

use super::breaker::REST;
use super::{Chunk, Refusal, Space, Stored, Tier};
use crate::{Error, ErrorKind, Key, Result};

/// A directory and how much may be in it, all namespaces and processes together.
#[derive(Clone, Debug)]
pub struct DiskDirectory {
    /// Made when something is stored, if it is not there.
    pub path: PathBuf,
    /// Bytes of all files.
    pub quota_bytes: u64,
}

/// How a disk tier is made.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// Each key belongs to one of them.
    pub directories: Vec<DiskDirectory>,
    /// Go past the page cache where the file system allows it.
    pub direct: bool,
    /// Use `io_uring` where the system allows it.
    pub io_uring: bool,
}

/// Values as files. Any number of processes may use the same directories.
#[derive(Debug)]
pub struct DiskTier {
    directories: Vec<Place>,
    lanes: Lanes,
}

#[derive(Debug)]
struct Place {
    seed: u64,
    directory: Directory,
}

impl DiskTier {
    /// A tier for the values of `space`. Touches no directory: one that is missing or cannot be written to costs
    /// misses and dropped stores, for as long as it is so.
    pub fn new(space: Space, config: &DiskConfig) -> Result<Self> {
        Self::with(space, config, &Files::default(), REST)
    }

    fn with(space: Space, config: &DiskConfig, files: &Files, rest: Duration) -> Result<Self> {
        if config.directories.is_empty() {
            return Err(Error::new(ErrorKind::InvalidArgument, "a disk tier needs at least one directory"));
        }
        let place = |DiskDirectory { path, quota_bytes }: &DiskDirectory| {
            let manner = Manner { files: files.clone(), direct: config.direct, rest };
            Place {
                seed: XxHash3_64::oneshot(path.as_os_str().as_encoded_bytes()),
                directory: Directory::new(path, *quota_bytes, space, manner),
            }
        };
        let directories = config.directories.iter().map(place).collect();
        Ok(Self { directories, lanes: Lanes::new(config.io_uring) })
    }

    /// Whether bytes are moved by `io_uring`.
    #[must_use]
    pub fn uses_io_uring(&self) -> bool {
        self.lanes.are_uring()
    }

    /// Whether every directory is still used without the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.directories.iter().all(|place| place.directory.is_direct())
    }

    /// Which directory has the key: the one with the highest hash, so that another one more takes keys over and moves
    /// none between the old ones.
    fn place_of(&self, key: &Key) -> usize {
        let score = |place: &Place| XxHash3_64::oneshot_with_seed(place.seed, key.as_bytes());
        let scores = self.directories.iter().map(score).enumerate();
        scores.max_by_key(|&(_, score)| score).map_or(0, |(number, _)| number)
    }

    fn directory_of(&self, key: &Key) -> &Directory {
        &self.directories[self.place_of(key)].directory
    }
}

impl Tier for DiskTier {
    fn put(&self, chunk: &Chunk) -> std::result::Result<Stored, Refusal> {
        self.directory_of(&chunk.key).put(chunk, &self.lanes)
    }

    fn get(&self, chunk: &Chunk) -> std::result::Result<(), Refusal> {
        self.directory_of(&chunk.key).get(chunk, &self.lanes)
    }

    fn present(&self, keys: &[Key]) -> std::result::Result<Vec<bool>, Refusal> {
        let mut present = vec![false; keys.len()];
        for (number, place) in self.directories.iter().enumerate() {
            let here: Vec<usize> = (0..keys.len()).filter(|&i| self.place_of(&keys[i]) == number).collect();
            let keys: Vec<&Key> = here.iter().map(|&i| &keys[i]).collect();
            // A directory that fails takes its own keys away, no others.
            if let Ok(found) = place.directory.has(&keys) {
                here.into_iter().zip(found).for_each(|(i, found)| present[i] = found);
            }
        }
        Ok(present)
    }

    fn check(&self) -> std::result::Result<(), Refusal> {
        self.directories.iter().try_for_each(|place| place.directory.check())
    }

    fn reset(&self) -> std::result::Result<(), Refusal> {
        // Every one of them, whatever happens in the others.
        let ended: Vec<_> = self.directories.iter().map(|place| place.directory.reset()).collect();
        ended.into_iter().collect()
    }
}
