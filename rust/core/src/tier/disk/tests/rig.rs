//! Directories of the tests' own, and the contract's view of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use super::super::files::Files;
use super::super::{DiskConfig, DiskDirectory, DiskTier};
use crate::tier::fake::contract::Rig;
use crate::tier::{Space, Tier};

/// Some directories.
pub(super) struct Medium {
    directory: TempDir,
    count: usize,
    pub(super) files: Files,
    direct: bool,
    uring: bool,
}

impl Medium {
    pub(super) fn new(count: usize) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        Self { directory, count, files: Files::default(), direct: true, uring: true }
    }

    /// In memory where there is such a place, for tests that make thousands: a disk takes milliseconds to sync a record.
    pub(super) fn in_memory() -> Self {
        match tempfile::tempdir_in("/dev/shm") {
            Ok(directory) => Self { directory, ..Self::new(1) },
            Err(_) => Self::new(1),
        }
    }

    pub(super) fn path(&self, number: usize) -> PathBuf {
        self.directory.path().join(number.to_string())
    }

    /// As a new process makes it. It rests for no time, so that tests need not wait.
    pub(super) fn tier(&self, space: Space, quota_bytes: u64) -> DiskTier {
        self.tier_of((0..self.count).collect(), space, quota_bytes)
    }

    pub(super) fn shuffled_tier(&self, space: Space) -> DiskTier {
        self.tier_of((0..self.count).rev().collect(), space, u64::MAX)
    }

    fn tier_of(&self, numbers: Vec<usize>, space: Space, quota_bytes: u64) -> DiskTier {
        let directory = |number| DiskDirectory { path: self.path(number), quota_bytes };
        let directories = numbers.into_iter().map(directory).collect();
        let config = DiskConfig { directories, direct: self.direct, io_uring: self.uring };
        DiskTier::with(space, &config, &self.files, Duration::ZERO).expect("valid")
    }

    /// All files and directories of ours, without links followed.
    pub(super) fn everything(&self) -> Vec<PathBuf> {
        (0..self.count).flat_map(|number| everything(&self.path(number))).collect()
    }

    pub(super) fn values(&self) -> Vec<PathBuf> {
        with_suffix(self.everything(), "kv")
    }

    pub(super) fn values_in(&self, number: usize) -> Vec<PathBuf> {
        with_suffix(everything(&self.path(number)), "kv")
    }

    pub(super) fn temporaries(&self) -> Vec<PathBuf> {
        with_suffix(self.everything(), "tmp")
    }

    /// Bytes of all values, and of those that are being written or were left.
    pub(super) fn bytes(&self) -> u64 {
        let paths = self.values().into_iter().chain(self.temporaries());
        paths.filter_map(|path| fs::symlink_metadata(path).ok()).map(|metadata| metadata.len()).sum()
    }

    /// What the first directory says is used; None where it says nothing.
    pub(super) fn usage(&self) -> Option<u64> {
        let bytes = fs::read(self.path(0).join("lmcache_rs-1/usage")).ok()?;
        Some(u64::from_le_bytes(*bytes.first_chunk()?))
    }
}

fn everything(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("readable").path()).collect();
    paths.sort();
    paths.into_iter().flat_map(|path| [vec![path.clone()], everything(&path)].concat()).collect()
}

fn with_suffix(paths: Vec<PathBuf>, suffix: &str) -> Vec<PathBuf> {
    paths.into_iter().filter(|path| path.extension().is_some_and(|end| end == suffix)).collect()
}

/// The contract on a disk.
pub(super) struct DiskRig(Medium);

impl DiskRig {
    pub(super) fn new(direct: bool, uring: bool, directories: usize) -> Self {
        Self(Medium { direct, uring, ..Medium::new(directories) })
    }
}

impl Rig for DiskRig {
    fn open(&self, space: Space) -> Box<dyn Tier> {
        let tier = self.0.tier(space, u64::MAX);
        assert!(self.0.uring || !tier.uses_io_uring());
        Box::new(tier)
    }

    fn values(&self) -> Vec<String> {
        self.0.values().into_iter().map(|path| path.to_str().expect("a text").to_owned()).collect()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(name).expect("there")
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::create_dir_all(Path::new(name).parent().expect("one")).expect("made");
        fs::write(name, bytes).expect("written");
    }

    fn lose_records(&self) {
        for path in
            self.0.everything().into_iter().filter(|path| path.is_file() && path.ends_with("generation"))
        {
            fs::remove_file(path).expect("removed");
        }
    }
}
