//! The quota of a directory: how much is there, who leaves for what comes, and the lock under which this changes.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use super::files::Files;
use crate::tier::format::{RECORD_BYTES, peek_record};
use crate::tier::space::hex;
use crate::tier::{Reason, Refusal};

/// For how long somebody else may hold the lock: others count and remove files under it.
const LOCK_WAIT: Duration = Duration::from_secs(2);

const LOCK_RETRY: Duration = Duration::from_millis(1);

/// Eviction makes room for more than one value at a time, up to this part of the quota, since it counts all files.
const SLACK_PART: u64 = 32;

/// And up to so many values: others wait for the lock meanwhile.
const SLACK_VALUES_MAX: u64 = 64;

pub(super) const VALUE_SUFFIX: &str = ".kv";
pub(super) const TEMPORARY_SUFFIX: &str = ".tmp";
pub(super) const RECORD_NAME: &str = "generation";
const USAGE_NAME: &str = "usage";

/// A directory's quota. Held by value; what is used is in the directory.
#[derive(Debug)]
pub(super) struct Quota {
    root: PathBuf,
    bytes: u64,
    files: Files,
}

/// The lock on the directory, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Locked<'a> {
    quota: &'a Quota,
    usage: File,
}

/// Who leaves before whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    /// Left by a process that died while it wrote.
    Dead,
    /// Of an older generation.
    Stale,
    Value,
    /// Being written: does not leave.
    Alive,
}

#[derive(Debug)]
struct Entry {
    path: PathBuf,
    bytes: u64,
    rank: (Class, SystemTime),
}

impl Quota {
    pub(super) fn new(root: PathBuf, bytes: u64, files: Files) -> Self {
        Self { root, bytes, files }
    }

    /// Locks the directory, which is made if it is not there.
    pub(super) fn lock(&self) -> Result<Locked<'_>, Refusal> {
        let path = self.root.join(USAGE_NAME);
        let opened = self.files.open_or_create(&path).or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                return Err(error);
            }
            self.files.create_directories(&self.root)?;
            self.files.open_or_create(&path)
        });
        let denied = |error: &io::Error| Refusal::from_io(error, path.display());
        let usage = opened.map_err(|error| denied(&error))?;
        let deadline = Instant::now() + LOCK_WAIT;
        while !self.files.try_lock(&usage).map_err(|error| denied(&error))? {
            if Instant::now() > deadline {
                return Err(Refusal::new(Reason::Locked, format!("{} stayed locked", path.display())));
            }
            thread::sleep(LOCK_RETRY);
        }
        Ok(Locked { quota: self, usage })
    }
}

/// Closing the file is not enough: a process that was forked meanwhile has it open too, for as long as it lives.
impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let _ = self.quota.files.unlock(&self.usage);
    }
}

impl Locked<'_> {
    /// Notes that `bytes` come, having made room for them.
    pub(super) fn reserve(&self, bytes: u64) -> Result<(), Refusal> {
        let quota = self.quota.bytes;
        let refused = |used| {
            let cause = format!("{bytes} bytes beside {used} of {quota} in {}", self.quota.root.display());
            Err(Refusal::new(Reason::Quota, cause))
        };
        let Some(target) = quota.checked_sub(bytes) else { return refused(0) };
        let used = match self.used() {
            Some(used) if used <= target => used,
            _ => {
                let values = (quota / SLACK_PART).checked_div(bytes).unwrap_or(0);
                self.evict(target, values.min(SLACK_VALUES_MAX) * bytes)?
            }
        };
        if used > target { refused(used) } else { self.set_used(used + bytes) }
    }

    /// Notes that `bytes` are gone, or will not come.
    pub(super) fn release(&self, bytes: u64) {
        if let Some(used) = self.used() {
            let _ = self.set_used(used.saturating_sub(bytes));
        }
    }

    /// Removes as many bytes as come, since the medium is fuller than the quota knows.
    pub(super) fn make_room(&self, bytes: u64) -> Result<(), Refusal> {
        let (_, used) = self.contents()?;
        self.evict(used.saturating_sub(bytes), 0).map(drop)
    }

    /// Removes what nobody will find any more, until `deadline`.
    pub(super) fn sweep(&self, deadline: Instant) -> Result<(), Refusal> {
        let (entries, mut used) = self.contents()?;
        for entry in entries.iter().filter(|entry| entry.rank.0 <= Class::Stale) {
            if Instant::now() > deadline {
                break;
            }
            used -= self.remove(entry);
        }
        self.set_used(used)
    }

    /// Counts the files, and where they are more than `target` bytes, removes some until `slack` bytes below that are
    /// free. Returns the bytes that are left.
    fn evict(&self, target: u64, slack: u64) -> Result<u64, Refusal> {
        let (mut entries, mut used) = self.contents()?;
        if used > target {
            entries.sort_by_key(|entry| entry.rank);
            for entry in entries.iter().filter(|entry| entry.rank.0 != Class::Alive) {
                if used.saturating_add(slack) <= target {
                    break;
                }
                used -= self.remove(entry);
            }
        }
        self.set_used(used)?;
        Ok(used)
    }

    /// Bytes that the entry gave back.
    fn remove(&self, entry: &Entry) -> u64 {
        match self.quota.files.remove(&entry.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => 0,
            _ => entry.bytes,
        }
    }

    /// What a process has that was forked while the directory was locked.
    #[cfg(test)]
    pub(super) fn forked(&self) -> File {
        self.usage.try_clone().expect("open")
    }

    fn used(&self) -> Option<u64> {
        let mut bytes = [0; 8];
        self.quota.files.read_at_start(&self.usage, &mut bytes).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    fn set_used(&self, used: u64) -> Result<(), Refusal> {
        let written = self.quota.files.write_at_start(&self.usage, &used.to_le_bytes());
        written.map_err(|error| Refusal::from_io(&error, self.quota.root.join(USAGE_NAME).display()))
    }

    /// Every file of the format, and the bytes of all.
    fn contents(&self) -> Result<(Vec<Entry>, u64), Refusal> {
        let mut entries = Vec::new();
        for namespace in self.list(&self.quota.root)? {
            let record = self.quota.files.read_small(&namespace.join(RECORD_NAME), RECORD_BYTES);
            let present = record.ok().and_then(|record| peek_record(&record));
            for generation in self.list(&namespace)? {
                // Without a record nobody knows: they leave by their age.
                let is_stale = present.is_some_and(|(_, present)| !generation.ends_with(hex(&present.0)));
                for fan in self.list(&generation)? {
                    let files = self.list(&fan)?;
                    if files.is_empty() && is_stale {
                        let _ = self.quota.files.remove_directory(&fan);
                        let _ = self.quota.files.remove_directory(&generation);
                    }
                    for path in files {
                        entries.extend(self.entry(path, is_stale)?);
                    }
                }
            }
        }
        let used = entries.iter().map(|entry| entry.bytes).sum();
        Ok((entries, used))
    }

    /// What is in a directory; nothing where there is none (any more), or where it is a file.
    fn list(&self, path: &Path) -> Result<Vec<PathBuf>, Refusal> {
        match self.quota.files.list(path) {
            Ok(names) => Ok(names.into_iter().map(|name| path.join(name)).collect()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                Ok(Vec::new())
            }
            Err(error) => Err(Refusal::from_io(&error, path.display())),
        }
    }

    /// The file at `path`, if it is one of the format and was not removed meanwhile.
    fn entry(&self, path: PathBuf, is_stale: bool) -> Result<Option<Entry>, Refusal> {
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let is_temporary = name.ends_with(TEMPORARY_SUFFIX);
        if !is_temporary && !name.ends_with(VALUE_SUFFIX) {
            return Ok(None);
        }
        let stat = match self.quota.files.stat(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            // Who left it out would count too little.
            stat => stat.map_err(|error| Refusal::from_io(&error, path.display()))?,
        };
        let class = match (is_temporary, is_stale) {
            (true, _) if self.has_writer(&path) => Class::Alive,
            (true, _) => Class::Dead,
            (false, true) => Class::Stale,
            (false, false) => Class::Value,
        };
        let rank = (class, stat.modified);
        Ok((!stat.is_directory).then_some(Entry { path, bytes: stat.bytes, rank }))
    }

    /// Whether somebody has the temporary file locked; who cannot tell says yes.
    fn has_writer(&self, path: &Path) -> bool {
        let file = self.quota.files.open_to_read(path, false);
        file.and_then(|file| self.quota.files.try_lock(&file)).map_or(true, |got| !got)
    }
}
