//! One direction's streams and staging buffers: submits stages so that the GPU keeps their order by itself.
//!
//! Load: copies into staging; the scatter kernel waits for them. The next copies into the same buffer wait for that
//! kernel. Store: the gather kernel waits for the caller's point and for the copies that last read the buffer; the
//! copies out of it wait for the kernel.

use std::sync::Arc;

use super::super::driver::{DeviceAddress, Driver, DriverResult, Stream};
use super::super::events::{Event, EventPool};
use super::super::kernels::Kernels;
use crate::HostPool;
use crate::copy::Direction;

/// What both directions use.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) driver: Arc<dyn Driver>,
    pub(super) events: Arc<EventPool>,
    pub(super) kernels: Kernels,
    pub(super) pool: HostPool,
}

/// One direction.
#[derive(Debug)]
pub(super) struct Lane {
    direction: Direction,
    copy_stream: Stream,
    kernel_stream: Stream,
    buffers: Vec<Buffer>,
    /// The buffer of the next stage.
    next: usize,
}

/// A staging buffer: rows one after the other, as in the pool.
#[derive(Debug)]
struct Buffer {
    address: DeviceAddress,
    /// Who touches it until when.
    busy: Vec<Event>,
}

impl Lane {
    pub(super) fn new(
        direction: Direction,
        copy_stream: Stream,
        kernel_stream: Stream,
        buffers: &[DeviceAddress],
    ) -> Self {
        let buffers = buffers.iter().map(|&address| Buffer { address, busy: Vec::new() }).collect();
        Self { direction, copy_stream, kernel_stream, buffers, next: 0 }
    }

    /// Submits one stage; the event is its end. `after` is what the kernel, which touches the blocks, waits for.
    /// After an error parts of the stage may run: `fence` tells until when.
    ///
    /// # Safety
    ///
    /// Rows and blocks are pairs within their ends, not more than a buffer holds, and nobody else uses them (writes,
    /// where they are read) from `after` until the stage is done.
    pub(super) unsafe fn submit(
        &mut self,
        ends: &Ends,
        rows: &[u32],
        blocks: &[u32],
        after: Option<&Event>,
    ) -> DriverResult<Event> {
        let buffer = &self.buffers[self.next];
        let first = if self.direction == Direction::Load { self.copy_stream } else { self.kernel_stream };
        for event in &buffer.busy {
            event.hold_back(first)?;
        }
        // SAFETY: the caller's promise; the buffer is ours, and free once `busy` is over.
        let done = unsafe {
            match self.direction {
                Direction::Load => self.load(ends, buffer.address, rows, blocks, after),
                Direction::Store => self.store(ends, buffer.address, rows, blocks, after),
            }?
        };
        self.buffers[self.next].busy = vec![done.clone()];
        self.next = (self.next + 1) % self.buffers.len();
        Ok(done)
    }

    /// Points by which everything submitted so far is done. A stage that failed may still use its buffer together with
    /// the next one there; that spoils only what the failed stage moves.
    pub(super) fn fence(&self, ends: &Ends) -> DriverResult<Vec<Event>> {
        Ok(vec![ends.events.record(self.copy_stream)?, ends.events.record(self.kernel_stream)?])
    }

    /// # Safety
    ///
    /// As of `submit`, with a buffer that is free on the copy stream.
    unsafe fn load(
        &self,
        ends: &Ends,
        buffer: DeviceAddress,
        rows: &[u32],
        blocks: &[u32],
        after: Option<&Event>,
    ) -> DriverResult<Event> {
        for run in Runs::new(rows, ends.pool.rows_per_piece()) {
            let (host, staging, len) = run.place(&ends.pool, buffer);
            // SAFETY: `Run::place`; the caller keeps others off the rows.
            unsafe { ends.driver.copy_to_device(staging, host, len, self.copy_stream)? };
        }
        ends.events.record(self.copy_stream)?.hold_back(self.kernel_stream)?;
        if let Some(after) = after {
            after.hold_back(self.kernel_stream)?;
        }
        // SAFETY: the caller's promise; the rows are in staging.
        unsafe { ends.kernels.launch(Direction::Load, buffer, blocks, self.kernel_stream)? };
        ends.events.record(self.kernel_stream)
    }

    /// # Safety
    ///
    /// As of `submit`, with a buffer that is free on the kernel stream.
    unsafe fn store(
        &self,
        ends: &Ends,
        buffer: DeviceAddress,
        rows: &[u32],
        blocks: &[u32],
        after: Option<&Event>,
    ) -> DriverResult<Event> {
        if let Some(after) = after {
            after.hold_back(self.kernel_stream)?;
        }
        // SAFETY: the caller's promise.
        unsafe { ends.kernels.launch(Direction::Store, buffer, blocks, self.kernel_stream)? };
        ends.events.record(self.kernel_stream)?.hold_back(self.copy_stream)?;
        for run in Runs::new(rows, ends.pool.rows_per_piece()) {
            let (host, staging, len) = run.place(&ends.pool, buffer);
            // SAFETY: `Run::place`; the caller keeps others off the rows.
            unsafe { ends.driver.copy_to_host(host, staging, len, self.copy_stream)? };
        }
        ends.events.record(self.copy_stream)
    }
}

/// Rows one after the other, in the pool as in staging: one copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    row: u32,
    /// The position of its first row in the stage.
    position: usize,
    rows: usize,
}

impl Run {
    /// Where it is on the host and in a staging buffer, and its bytes: within the pool, and within one registration.
    fn place(&self, pool: &HostPool, buffer: DeviceAddress) -> (*mut u8, DeviceAddress, usize) {
        let stride = pool.row_stride();
        let start = self.row as usize * stride;
        let len = (self.rows - 1) * stride + pool.row_bytes();
        assert!(start + len <= pool.size_bytes(), "{self:?} is outside of the pool");
        (pool.base().as_ptr().wrapping_add(start), buffer + (self.position * stride) as u64, len)
    }
}

/// Cuts rows into runs that lie within one piece of the pool each.
struct Runs<'a> {
    rows: &'a [u32],
    per_piece: usize,
    position: usize,
}

impl<'a> Runs<'a> {
    fn new(rows: &'a [u32], per_piece: usize) -> Self {
        Self { rows, per_piece, position: 0 }
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let position = self.position;
        let rest = &self.rows[position..];
        let row = *rest.first()?;
        let follows = |pair: &&[u32]| {
            pair[0].checked_add(1) == Some(pair[1]) && !(pair[1] as usize).is_multiple_of(self.per_piece)
        };
        let rows = 1 + rest.windows(2).take_while(follows).count();
        self.position += rows;
        Some(Run { row, position, rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(rows: &[u32], per_piece: usize) -> Vec<(u32, usize, usize)> {
        Runs::new(rows, per_piece).map(|run| (run.row, run.position, run.rows)).collect()
    }

    #[test]
    fn consecutive_rows_are_one_run_within_a_piece() {
        assert_eq!(runs(&[], 4), []);
        assert_eq!(runs(&[5, 6, 9, 2, 3], 100), [(5, 0, 2), (9, 2, 1), (2, 3, 2)]);
        assert_eq!(runs(&[2, 3, 4, 5, 8, 9], 4), [(2, 0, 2), (4, 2, 2), (8, 4, 2)]);
        assert_eq!(runs(&[3, 2, 1], 4), [(3, 0, 1), (2, 1, 1), (1, 2, 1)]);
        assert_eq!(runs(&[0, 1, 2], 1), [(0, 0, 1), (1, 1, 1), (2, 2, 1)]);
        assert_eq!(runs(&[u32::MAX, 0], 8), [(u32::MAX, 0, 1), (0, 1, 1)]);
    }
}
