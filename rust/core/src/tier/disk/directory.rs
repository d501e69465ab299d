//! One directory with its quota: values as files, and the records of namespaces.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use super::files::Files;
use super::lane::Lanes;
use super::quota::{Quota, RECORD_NAME, TEMPORARY_SUFFIX, VALUE_SUFFIX};
use super::transfer;
use crate::Key;
use crate::tier::breaker::Breaker;
use crate::tier::format::{HEADER_BYTES, Header, RECORD_BYTES, decode_record, encode_record};
use crate::tier::space::{Generation, Space, hex, random};
use crate::tier::{Chunk, Reason, Refusal, Stored};

/// What there is of the format's version 1 in the user's directory.
const ROOT_NAME: &str = "lmcache_rs-1";

/// For how long a reset removes files; what is left then goes first when room is needed.
const SWEEP_LIMIT: Duration = Duration::from_secs(1);

/// How a directory is used.
#[derive(Clone, Debug)]
pub(super) struct Manner {
    pub(super) files: Files,
    /// Try `O_DIRECT`.
    pub(super) direct: bool,
    /// After faults.
    pub(super) rest: Duration,
}

/// Values in one directory.
#[derive(Debug)]
pub(super) struct Directory {
    space: Space,
    files: Files,
    quota: Quota,
    /// Where everything of the namespace is.
    home: PathBuf,
    /// Whether files are opened with `O_DIRECT`: until the file system refuses.
    direct: AtomicBool,
    /// A reset was asked for and not done: nothing may be found until it is.
    must_reset: AtomicBool,
    reads: Breaker,
    writes: Breaker,
}

impl Directory {
    pub(super) fn new(path: &Path, quota_bytes: u64, space: Space, manner: Manner) -> Self {
        let Manner { files, direct, rest } = manner;
        let root = path.join(ROOT_NAME);
        Self {
            space,
            home: root.join(hex(space.namespace.as_bytes())),
            quota: Quota::new(root, quota_bytes, files.clone()),
            files,
            direct: AtomicBool::new(direct),
            must_reset: AtomicBool::new(false),
            reads: Breaker::new(rest),
            writes: Breaker::new(rest),
        }
    }

    pub(super) fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }

    pub(super) fn put(&self, chunk: &Chunk, lanes: &Lanes) -> Result<Stored, Refusal> {
        self.writes.run(|| {
            let attempt = || self.also_without_direct(|| self.try_put(chunk, lanes));
            let ended = attempt().or_else(|refusal| {
                if refusal.reason != Reason::NoSpace {
                    return Err(refusal);
                }
                self.quota.lock()?.make_room(value_bytes(chunk))?;
                attempt()
            });
            // Somebody took the directory away in the middle of it.
            ended.map_err(|refusal| match refusal.reason {
                Reason::Absent => Refusal::new(Reason::Io, refusal.cause),
                _ => refusal,
            })
        })
    }

    pub(super) fn get(&self, chunk: &Chunk, lanes: &Lanes) -> Result<(), Refusal> {
        self.reads.run(|| self.also_without_direct(|| self.try_get(chunk, lanes)))
    }

    /// Whether the values of all ranks are there.
    pub(super) fn has(&self, keys: &[&Key]) -> Result<Vec<bool>, Refusal> {
        self.reads.run(|| {
            let Some(generation) = self.generation()? else { return Ok(vec![false; keys.len()]) };
            let has = |key: &&Key| {
                let mut paths = (0..self.space.ranks).map(|rank| self.value_path(generation, key, rank));
                // A power loss may leave files with nothing in them.
                paths.all(|path| self.files.stat(&path).is_ok_and(|stat| stat.bytes > HEADER_BYTES as u64))
            };
            Ok(keys.iter().map(has).collect())
        })
    }

    /// Makes the directory, if it is not there, and locks it for a moment.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        self.quota.lock().map(drop)
    }

    /// Begins a new generation. As long as it fails, this process finds nothing here.
    pub(super) fn reset(&self) -> Result<(), Refusal> {
        self.must_reset.store(true, Ordering::SeqCst);
        let locked = self.quota.lock()?;
        self.write_record()?;
        self.must_reset.store(false, Ordering::SeqCst);
        // The values are out of reach; that their space is free too is no promise.
        let _ = locked.sweep(Instant::now() + SWEEP_LIMIT);
        Ok(())
    }

    fn try_put(&self, chunk: &Chunk, lanes: &Lanes) -> Result<Stored, Refusal> {
        let generation = self.generation_or_first()?;
        let path = self.value_path(generation, &chunk.key, self.space.rank);
        if self.is_whole(&path, chunk) {
            // It was of use: as if it were loaded.
            if let Ok(file) = self.files.open_to_read(&path, false) {
                self.touch(&file, chunk);
            }
            return Ok(Stored::Present);
        }
        let mut temporary = self.create(&path, value_bytes(chunk))?;
        let mut header = Header::new(&self.space, generation, chunk);
        let mut lane = lanes.take();
        let file = &temporary.file;
        transfer::write(&mut *lane, &self.files, file, &self.space, &mut header, &chunk.memory)
            .map_err(|error| self.refused(&error, &path))?;
        self.touch(file, chunk);
        self.files.rename(&temporary.path, &path).map_err(|error| self.refused(&error, &path))?;
        temporary.is_renamed = true;
        Ok(Stored::Written(chunk.memory.bytes() as u64))
    }

    fn try_get(&self, chunk: &Chunk, lanes: &Lanes) -> Result<(), Refusal> {
        let generation = self.generation()?.ok_or(Reason::Absent)?;
        let path = self.value_path(generation, &chunk.key, self.space.rank);
        let opened = self.files.open_to_read(&path, self.is_direct());
        let file = opened.map_err(|error| self.refused(&error, &path))?;
        let read = self.read_verified(&file, generation, chunk, lanes, &path);
        match &read {
            Ok(()) => self.touch(&file, chunk),
            Err(refusal)
                if matches!(refusal.reason, Reason::Truncated | Reason::Corrupt | Reason::Foreign) =>
            {
                self.discard(&path);
            }
            Err(_) => {}
        }
        read
    }

    fn read_verified(
        &self,
        file: &File,
        generation: Generation,
        chunk: &Chunk,
        lanes: &Lanes,
        path: &Path,
    ) -> Result<(), Refusal> {
        let because = |reason| Refusal::new(reason, path.display().to_string());
        let bytes = self.files.length(file).map_err(|error| self.refused(&error, path))?;
        if bytes != value_bytes(chunk) {
            return Err(because(Reason::Truncated));
        }
        let expected = Header::new(&self.space, generation, chunk);
        let mut header = Box::new(Header([0; HEADER_BYTES]));
        let mut lane = lanes.take();
        let sum = transfer::read(&mut *lane, &self.files, file, &self.space, &mut header, &chunk.memory)
            .map_err(|error| self.refused(&error, path))?;
        let promised = header.verify(&self.space, &expected).map_err(because)?;
        if sum == promised { Ok(()) } else { Err(because(Reason::Corrupt)) }
    }

    /// The present generation; None where nobody stored anything.
    fn generation(&self) -> Result<Option<Generation>, Refusal> {
        if self.must_reset.load(Ordering::SeqCst) {
            self.reset()?;
        }
        let path = self.home.join(RECORD_NAME);
        match self.files.read_small(&path, RECORD_BYTES) {
            Ok(record) => Ok(decode_record(&self.space, &record)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.refused(&error, &path)),
        }
    }

    fn generation_or_first(&self) -> Result<Generation, Refusal> {
        if let Some(generation) = self.generation()? {
            return Ok(generation);
        }
        let _locked = self.quota.lock()?;
        // Somebody may have been quicker.
        match self.generation()? {
            Some(generation) => Ok(generation),
            None => self.write_record(),
        }
    }

    /// Draws a generation and writes it down for good, under the directory's lock.
    fn write_record(&self) -> Result<Generation, Refusal> {
        let generation = Generation::draw()?;
        let written = || {
            self.files.create_directories(&self.home)?;
            let temporary = self.home.join(RECORD_NAME).with_extension("tmp");
            // Left by somebody who died here.
            let _ = self.files.remove(&temporary);
            let file = self.files.create(&temporary, false)?;
            self.files.write_at_start(&file, &encode_record(&self.space, generation))?;
            self.files.sync(&file)?;
            self.files.rename(&temporary, &self.home.join(RECORD_NAME))?;
            self.files.sync(&self.files.open_to_read(&self.home, false)?)
        };
        written().map_err(|error| Refusal::from_io(&error, self.home.display()))?;
        Ok(generation)
    }

    /// Whether the value at `path` has its length; what has another is removed.
    fn is_whole(&self, path: &Path, chunk: &Chunk) -> bool {
        match self.files.stat(path) {
            Ok(stat) if stat.bytes == value_bytes(chunk) => true,
            Ok(_) => {
                self.discard(path);
                false
            }
            Err(_) => false,
        }
    }

    /// A temporary file for the value at `path`, locked, with room for it.
    fn create(&self, path: &Path, bytes: u64) -> Result<Temporary<'_>, Refusal> {
        let locked = self.quota.lock()?;
        locked.reserve(bytes)?;
        let temporary = path.with_extension(format!("{}{TEMPORARY_SUFFIX}", hex(&random::<8>()?)));
        // Under the directory's lock: who counts the files finds this one, and finds it locked.
        let created = self.create_file(&temporary).and_then(|file| {
            let made = self.files.try_lock(&file).and_then(|_| self.files.allocate(&file, bytes));
            made.map(|()| file).inspect_err(|_| drop(self.files.remove(&temporary)))
        });
        match created {
            Ok(file) => Ok(Temporary { directory: self, path: temporary, file, is_renamed: false }),
            Err(error) => {
                locked.release(bytes);
                Err(self.refused(&error, &temporary))
            }
        }
    }

    fn create_file(&self, path: &Path) -> io::Result<File> {
        let create = || self.files.create(path, self.is_direct());
        create().or_else(|error| match (error.kind(), path.parent()) {
            (io::ErrorKind::NotFound, Some(parent)) => {
                self.files.create_directories(parent)?;
                create()
            }
            _ => Err(error),
        })
    }

    /// Removes what no one can use.
    fn discard(&self, path: &Path) {
        // First: who counts the files after it is gone must not find its bytes subtracted once more.
        let locked = self.quota.lock();
        let bytes = self.files.stat(path).map_or(0, |stat| stat.bytes);
        // What cannot be removed is still there, and stays counted; without the lock its bytes do, until the next eviction.
        if self.files.remove(path).is_ok()
            && let Ok(locked) = locked
        {
            locked.release(bytes);
        }
    }

    /// Makes the value the most recently used one of its place in the prefix. No matter if it fails.
    fn touch(&self, file: &File, chunk: &Chunk) {
        let age = Duration::from_secs(u64::from(chunk.position));
        if let Some(time) = SystemTime::now().checked_sub(age) {
            let _ = self.files.set_modified(file, time);
        }
    }

    fn value_path(&self, generation: Generation, key: &Key, rank: u32) -> PathBuf {
        let key = hex(key.as_bytes());
        let fan = self.home.join(hex(&generation.0)).join(&key[..2]);
        fan.join(format!("{key}-{rank}{VALUE_SUFFIX}"))
    }

    /// What `error` means; `EINVAL` where `O_DIRECT` was tried means that it is not to be had.
    fn refused(&self, error: &io::Error, path: &Path) -> Refusal {
        if error.raw_os_error() == Some(libc::EINVAL) {
            self.direct.store(false, Ordering::Relaxed);
        }
        Refusal::from_io(error, path.display())
    }

    /// Tries again when the attempt has shown that `O_DIRECT` is not to be had.
    fn also_without_direct<T>(&self, attempt: impl Fn() -> Result<T, Refusal>) -> Result<T, Refusal> {
        let was_direct = self.is_direct();
        attempt().or_else(|refusal| if was_direct && !self.is_direct() { attempt() } else { Err(refusal) })
    }
}

/// A value that is being written: gone when it is dropped and was not renamed.
struct Temporary<'a> {
    directory: &'a Directory,
    path: PathBuf,
    file: File,
    is_renamed: bool,
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if !self.is_renamed {
            self.directory.discard(&self.path);
        }
    }
}

/// Bytes of the chunk's file.
fn value_bytes(chunk: &Chunk) -> u64 {
    (HEADER_BYTES + chunk.memory.bytes()) as u64
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use super::*;
    use crate::tier::fake::space;

    /// Of each of two files.
    const BYTES: u64 = 8192;

    /// More than anything takes on a loaded machine.
    const LONG: Duration = Duration::from_secs(30);

    /// `remove` removes the file that it gets, while somebody else has the directory locked and counts.
    fn check_counted(remove: impl FnOnce(Temporary) + Send) {
        let medium = tempfile::tempdir().expect("a directory");
        let manner = Manner { files: Files::default(), direct: false, rest: Duration::ZERO };
        let directory = Directory::new(medium.path(), u64::MAX, space("a"), manner);
        let fan = directory.home.join("0/0");
        let create = |name: &str| directory.create(&fan.join(name), BYTES).expect("room");
        let (_stays, goes) = (create("stays"), create("goes"));
        let path = goes.path.clone();
        let locked = directory.quota.lock().expect("free");
        thread::scope(|scope| {
            let removing = scope.spawn(|| remove(goes));
            let end = Instant::now() + LONG;
            while path.exists() {
                assert!(Instant::now() < end, "removed also where the lock is not to be had");
                thread::yield_now();
            }
            locked.make_room(0).expect("counted");
            drop(locked);
            removing.join().expect("removed");
        });
        let usage = fs::read(medium.path().join(ROOT_NAME).join("usage")).expect("there");
        assert_eq!(usage, BYTES.to_le_bytes(), "what stays");
    }

    #[test]
    fn what_is_given_up_is_subtracted_once() {
        check_counted(|temporary| drop(temporary));
    }

    #[test]
    fn what_is_useless_is_subtracted_once() {
        check_counted(|mut temporary| {
            temporary.is_renamed = true;
            temporary.directory.discard(&temporary.path);
        });
    }
}
