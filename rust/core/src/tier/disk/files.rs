//! The system calls of the disk tier, each in one place, so that tests can make any of them fail.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::SystemTime;

use rustix::fs::{FallocateFlags, FlockOperation, OFlags};

/// The file system.
#[derive(Clone, Debug, Default)]
pub(super) struct Files {
    #[cfg(test)]
    pub(super) faults: super::faults::Faults,
}

/// What is known of a file without opening it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stat {
    pub(super) bytes: u64,
    pub(super) modified: SystemTime,
    pub(super) is_directory: bool,
}

impl Files {
    /// Every call goes through here first.
    #[cfg_attr(
        not(test),
        expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests let it fail")
    )]
    fn before_call(&self) -> io::Result<()> {
        #[cfg(test)]
        self.faults.before_call()?;
        Ok(())
    }

    /// What a transfer of bytes is taken to have returned.
    #[cfg_attr(not(test), expect(clippy::unused_self, reason = "tests change it"))]
    pub(super) fn transferred(&self, result: io::Result<usize>) -> io::Result<usize> {
        #[cfg(test)]
        let result = self.faults.transferred(result);
        result
    }

    pub(super) fn open_to_read(&self, path: &Path, direct: bool) -> io::Result<File> {
        self.before_call()?;
        may_wait(OpenOptions::new().read(true).custom_flags(flags(direct)).open(path)?)
    }

    /// A new file, which nobody else may read.
    pub(super) fn create(&self, path: &Path, direct: bool) -> io::Result<File> {
        self.before_call()?;
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600).custom_flags(flags(direct));
        may_wait(options.open(path)?)
    }

    /// A file to read and write, made if need be.
    pub(super) fn open_or_create(&self, path: &Path) -> io::Result<File> {
        self.before_call()?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(flags(false));
        options.open(path)
    }

    /// A directory with all above it, which nobody else may enter.
    pub(super) fn create_directories(&self, path: &Path) -> io::Result<()> {
        self.before_call()?;
        DirBuilder::new().recursive(true).mode(0o700).create(path)
    }

    /// Gives a new file its length, and room on the medium where the file system can.
    pub(super) fn allocate(&self, file: &File, bytes: u64) -> io::Result<()> {
        self.before_call()?;
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => file.set_len(bytes),
            ended => Ok(ended?),
        }
    }

    pub(super) fn length(&self, file: &File) -> io::Result<u64> {
        self.before_call()?;
        Ok(file.metadata()?.len())
    }

    pub(super) fn stat(&self, path: &Path) -> io::Result<Stat> {
        self.before_call()?;
        let metadata = fs::symlink_metadata(path)?;
        Ok(Stat { bytes: metadata.len(), modified: metadata.modified()?, is_directory: metadata.is_dir() })
    }

    pub(super) fn set_modified(&self, file: &File, time: SystemTime) -> io::Result<()> {
        self.before_call()?;
        file.set_modified(time)
    }

    pub(super) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.before_call()?;
        fs::rename(from, to)
    }

    pub(super) fn remove(&self, path: &Path) -> io::Result<()> {
        self.before_call()?;
        fs::remove_file(path)
    }

    /// Removes a directory if nothing is in it.
    pub(super) fn remove_directory(&self, path: &Path) -> io::Result<()> {
        self.before_call()?;
        fs::remove_dir(path)
    }

    pub(super) fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        self.before_call()?;
        fs::read_dir(path)?.map(|entry| Ok(entry?.file_name())).collect()
    }

    /// All of a file that is not longer than `bytes_max`; of a longer one no more than one byte above.
    pub(super) fn read_small(&self, path: &Path, bytes_max: usize) -> io::Result<Vec<u8>> {
        use io::Read;
        self.before_call()?;
        let mut bytes = Vec::new();
        let file = OpenOptions::new().read(true).custom_flags(flags(false)).open(path)?;
        file.take(bytes_max as u64 + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn read_at_start(&self, file: &File, bytes: &mut [u8]) -> io::Result<()> {
        self.before_call()?;
        file.read_exact_at(bytes, 0)
    }

    pub(super) fn write_at_start(&self, file: &File, bytes: &[u8]) -> io::Result<()> {
        self.before_call()?;
        file.write_all_at(bytes, 0)
    }

    /// Brings a file, or the names in a directory, to the medium.
    pub(super) fn sync(&self, file: &File) -> io::Result<()> {
        self.before_call()?;
        file.sync_all()
    }

    /// Locks until it is unlocked or nobody has the file open any more; false when somebody else has it.
    pub(super) fn try_lock(&self, file: &File) -> io::Result<bool> {
        self.before_call()?;
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(error) if io::Error::from(error).kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn unlock(&self, file: &File) -> io::Result<()> {
        self.before_call()?;
        Ok(rustix::fs::flock(file, FlockOperation::Unlock)?)
    }
}

/// No link is followed, and a FIFO that lies in the place of a file hangs nobody.
fn flags(direct: bool) -> i32 {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    if direct { flags | libc::O_DIRECT } else { flags }
}

/// Opening must not wait, transfers must: on kernels and devices that cannot tell in advance whether they would, `io_uring`
/// refuses every transfer of a file with `O_NONBLOCK`.
fn may_wait(file: File) -> io::Result<File> {
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK)?;
    Ok(file)
}
