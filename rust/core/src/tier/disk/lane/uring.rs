//! Transfers by `io_uring`: the medium works on several while this thread does something else.

use std::io;
use std::thread;
use std::time::Duration;

use io_uring::{IoUring, opcode, types};

use super::{DEPTH, Lane, Transfer, Way};

/// Before the kernel is asked once more to take what it could not take.
const RETRY_AFTER: Duration = Duration::from_millis(1);

/// A ring of its own.
pub(in super::super) struct UringLane {
    ring: IoUring,
    in_flight: usize,
}

impl UringLane {
    pub(in super::super) fn new() -> io::Result<Self> {
        // `in_flight` never exceeds `DEPTH`, so neither of the ring's queues overflows.
        Ok(Self { ring: IoUring::new(u32::try_from(DEPTH).map_err(io::Error::other)?)?, in_flight: 0 })
    }

    fn next_ended(&mut self) -> Option<(usize, io::Result<usize>)> {
        let entry = self.ring.completion().next()?;
        self.in_flight -= 1;
        let result = entry.result();
        let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        Some((usize::try_from(entry.user_data()).expect("a number that `begin` got"), result))
    }
}

impl Lane for UringLane {
    unsafe fn begin(&mut self, number: usize, transfer: Transfer) {
        let Transfer { file, way, memory, memory_count, offset } = transfer;
        let file = types::Fd(file);
        let entry = match way {
            Way::ToFile => opcode::Writev::new(file, memory, memory_count).offset(offset).build(),
            Way::FromFile => opcode::Readv::new(file, memory, memory_count).offset(offset).build(),
        };
        let entry = entry.user_data(number as u64);
        // SAFETY: file and memory stay until the entry's end was told, as the caller promises.
        unsafe { self.ring.submission().push(&entry) }.expect("at most DEPTH are in flight");
        self.in_flight += 1;
        // What the kernel does not take now it takes when it is waited for.
        let _ = self.ring.submit();
    }

    fn ended(&mut self, wait: bool) -> Option<(usize, io::Result<usize>)> {
        loop {
            let ended = self.next_ended();
            if ended.is_some() || !wait || self.in_flight == 0 {
                return ended;
            }
            // Without a limit: the kernel uses the memory until it says that it does not.
            if let Err(error) = self.ring.submit_and_wait(1)
                && error.raw_os_error() != Some(libc::EINTR)
            {
                thread::sleep(RETRY_AFTER);
            }
        }
    }
}

impl Drop for UringLane {
    fn drop(&mut self) {
        while self.ended(true).is_some() {}
    }
}
