//! Transfers of bytes between memory and a file, some at a time: by `io_uring`, or one after the other.

mod plain;
mod uring;

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::RawFd;

use parking_lot::Mutex;
pub(super) use plain::PlainLane;
pub(super) use uring::UringLane;

/// Transfers in flight in a lane.
pub(super) const DEPTH: usize = 8;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    ToFile,
    FromFile,
}

/// One transfer: memory and the place in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    pub(super) file: RawFd,
    pub(super) way: Way,
    pub(super) memory: *const libc::iovec,
    pub(super) memory_count: u32,
    pub(super) offset: u64,
}

/// Where transfers are done; used by one thread at a time.
pub(super) trait Lane: Send {
    /// Begins a transfer; at most `DEPTH` are in flight.
    ///
    /// # Safety
    /// File and memory stay, and are used by nobody else where they are written to, until `ended` told `number`.
    unsafe fn begin(&mut self, number: usize, transfer: Transfer);

    /// The number and the result of some transfer that ended. If none has, waits for one that is in flight, or not.
    fn ended(&mut self, wait: bool) -> Option<(usize, io::Result<usize>)>;
}

/// Lanes that are kept for the next caller.
#[derive(Default)]
pub(super) struct Lanes {
    uring: bool,
    idle: Mutex<Vec<Box<dyn Lane>>>,
}

impl std::fmt::Debug for Lanes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lanes").field("uring", &self.uring).finish_non_exhaustive()
    }
}

impl Lanes {
    /// Lanes of `io_uring` where the system allows it and `uring` is set, else plain ones.
    pub(super) fn new(uring: bool) -> Self {
        let uring = uring && UringLane::new().is_ok_and(|mut lane| works(&mut lane));
        Self { uring, idle: Mutex::default() }
    }

    pub(super) fn are_uring(&self) -> bool {
        self.uring
    }

    /// A lane of the caller's own.
    pub(super) fn take(&self) -> LaneGuard<'_> {
        let idle = self.idle.lock().pop();
        let lane = idle.unwrap_or_else(|| match self.uring.then(UringLane::new) {
            Some(Ok(lane)) => Box::new(lane),
            // Memory for rings or file numbers may be short now and not before.
            _ => Box::new(PlainLane::default()),
        });
        LaneGuard { lanes: self, lane: Some(lane) }
    }
}

/// A lane that goes back when it is dropped. Nothing is in flight then.
pub(super) struct LaneGuard<'a> {
    lanes: &'a Lanes,
    lane: Option<Box<dyn Lane>>,
}

impl Deref for LaneGuard<'_> {
    type Target = dyn Lane;

    fn deref(&self) -> &Self::Target {
        self.lane.as_deref().expect("taken by drop only")
    }
}

impl DerefMut for LaneGuard<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.lane.as_deref_mut().expect("taken by drop only")
    }
}

impl Drop for LaneGuard<'_> {
    fn drop(&mut self) {
        self.lanes.idle.lock().extend(self.lane.take());
    }
}

/// Whether a lane can read: a ring may be there and its operations forbidden.
fn works(lane: &mut dyn Lane) -> bool {
    use std::os::fd::AsRawFd;
    let Ok(file) = File::open("/dev/zero") else { return false };
    let mut bytes = [1_u8; 8];
    let memory = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
    let transfer = Transfer {
        file: file.as_raw_fd(),
        way: Way::FromFile,
        memory: memory.as_ptr(),
        memory_count: 1,
        offset: 0,
    };
    // SAFETY: file and memory outlive the wait that follows.
    unsafe { lane.begin(0, transfer) };
    matches!(lane.ended(true), Some((0, Ok(8)))) && bytes == [0; 8]
}
