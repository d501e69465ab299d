//! One direction's streams and staging buffers: submits stages so that the GPU keeps their order by itself.
//!
//! Load: copies into staging; the scatter kernel waits for them. The next copies into the same buffer wait for that
//! kernel. Store: the gather kernel waits for the caller's point and for the copies that last read the buffer; the
//! copies out of it wait for the kernel.
//!
//! Stages take turns on two copy streams, and the copies of each wait for those of the stage before. A GPU's copy
//! engine stays with a stream as long as there is work on it: on one stream, copies of 1.4 GB kept every small copy of
//! the engine's own steps waiting for 26 ms. Between two streams it turns to others first: they wait for one stage.

use std::sync::Arc;

use super::super::driver::{Copy, DeviceAddress, Driver, DriverResult, Stream};
use super::super::events::{Event, EventPool};
use super::super::kernels::Kernels;
use super::super::layout::Part;
use crate::HostPool;
use crate::copy::Direction;

/// Copies of parts of fewer consecutive rows than this are quicker as many small ones in one call.
const STRIDED_MIN: usize = 8;

/// What both directions use.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) driver: Arc<dyn Driver>,
    pub(super) events: Arc<EventPool>,
    pub(super) kernels: Kernels,
    pub(super) pool: HostPool,
}

/// What one stage moves: a part of the bytes of some rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stage<'a> {
    pub(super) rows: &'a [u32],
    pub(super) blocks: &'a [u32],
    pub(super) part: &'a Part,
}

/// One direction.
#[derive(Debug)]
pub(super) struct Lane {
    direction: Direction,
    copy_streams: [Stream; 2],
    kernel_stream: Stream,
    buffers: Vec<Buffer>,
    /// The buffer of the next stage.
    next: usize,
    /// The copy stream of the next stage.
    turn: usize,
    /// The end of the last stage's copies.
    copied: Option<Event>,
    copies: Vec<Copy>,
}

/// A staging buffer: bytes of rows one after the other, whole rows as far apart as in the pool.
#[derive(Debug)]
struct Buffer {
    address: DeviceAddress,
    /// Who touches it until when.
    busy: Option<Event>,
}

impl Lane {
    pub(super) fn new(
        direction: Direction,
        copy_streams: [Stream; 2],
        kernel_stream: Stream,
        buffers: &[DeviceAddress],
    ) -> Self {
        let buffers = buffers.iter().map(|&address| Buffer { address, busy: None }).collect();
        Self {
            direction,
            copy_streams,
            kernel_stream,
            buffers,
            next: 0,
            turn: 0,
            copied: None,
            copies: Vec::new(),
        }
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
        stage: Stage<'_>,
        after: Option<&Event>,
    ) -> DriverResult<Event> {
        let copy_stream = self.copy_streams[self.turn];
        let buffer = &self.buffers[self.next];
        let (address, first) = match self.direction {
            Direction::Load => (buffer.address, copy_stream),
            Direction::Store => (buffer.address, self.kernel_stream),
        };
        if let Some(event) = &buffer.busy {
            event.hold_back(first)?;
        }
        // SAFETY: the caller's promise; the buffer is ours, and free once `busy` is over.
        let done = unsafe {
            match self.direction {
                Direction::Load => self.load(ends, address, stage, after, copy_stream),
                Direction::Store => self.store(ends, address, stage, after, copy_stream),
            }?
        };
        self.buffers[self.next].busy = Some(done.clone());
        self.next = (self.next + 1) % self.buffers.len();
        self.turn = 1 - self.turn;
        Ok(done)
    }

    /// Points by which everything submitted so far is done. A stage that failed may still use its buffer together with
    /// the next one there, whose copies go on the same stream; that spoils only what the failed stage moves.
    pub(super) fn fence(&self, ends: &Ends) -> DriverResult<Vec<Event>> {
        let [one, other] = self.copy_streams;
        [one, other, self.kernel_stream].into_iter().map(|stream| ends.events.record(stream)).collect()
    }

    /// # Safety
    ///
    /// As of `submit`, with a buffer that is free on the copy stream.
    unsafe fn load(
        &mut self,
        ends: &Ends,
        buffer: DeviceAddress,
        stage: Stage<'_>,
        after: Option<&Event>,
        copy_stream: Stream,
    ) -> DriverResult<Event> {
        if let Some(copied) = &self.copied {
            copied.hold_back(copy_stream)?;
        }
        let pitch = self.place(&ends.pool, buffer, stage);
        // SAFETY: `place`; the caller keeps others off the rows.
        unsafe { ends.driver.copy_to_device(&self.copies, copy_stream)? };
        let copied = ends.events.record(copy_stream)?;
        copied.hold_back(self.kernel_stream)?;
        self.copied = Some(copied);
        if let Some(after) = after {
            after.hold_back(self.kernel_stream)?;
        }
        let (kernels, place, stream) = (&ends.kernels, (buffer, pitch), self.kernel_stream);
        // SAFETY: the caller's promise; the rows are in staging.
        unsafe { kernels.launch(Direction::Load, stage.part, place, stage.blocks, stream)? };
        ends.events.record(self.kernel_stream)
    }

    /// # Safety
    ///
    /// As of `submit`, with a buffer that is free on the kernel stream.
    unsafe fn store(
        &mut self,
        ends: &Ends,
        buffer: DeviceAddress,
        stage: Stage<'_>,
        after: Option<&Event>,
        copy_stream: Stream,
    ) -> DriverResult<Event> {
        if let Some(after) = after {
            after.hold_back(self.kernel_stream)?;
        }
        let pitch = self.place(&ends.pool, buffer, stage);
        let (kernels, place, stream) = (&ends.kernels, (buffer, pitch), self.kernel_stream);
        // SAFETY: the caller's promise.
        unsafe { kernels.launch(Direction::Store, stage.part, place, stage.blocks, stream)? };
        ends.events.record(self.kernel_stream)?.hold_back(copy_stream)?;
        if let Some(copied) = &self.copied {
            copied.hold_back(copy_stream)?;
        }
        // SAFETY: `place`; the caller keeps others off the rows.
        unsafe { ends.driver.copy_to_host(&self.copies, copy_stream)? };
        let copied = ends.events.record(copy_stream)?;
        self.copied = Some(copied.clone());
        Ok(copied)
    }

    /// Sets `copies` to those between the stage's rows and a buffer: within the pool, and each within one registration.
    /// Returns the bytes from one row to the next in the buffer.
    fn place(&mut self, pool: &HostPool, buffer: DeviceAddress, stage: Stage<'_>) -> usize {
        let Stage { rows, part, .. } = stage;
        let (stride, whole) = (pool.row_stride(), part.bytes == pool.row_bytes());
        let pitch = if whole { stride } else { part.bytes };
        self.copies.clear();
        for run in Runs::new(rows, pool.rows_per_piece()) {
            let host = run.row as usize * stride + part.offset;
            let end = host + (run.rows - 1) * stride + part.bytes;
            assert!(end <= pool.size_bytes(), "{run:?} is outside of the pool");
            let copy = |first: usize, rows: usize, len: usize| Copy {
                host: pool.base().as_ptr().wrapping_add(host + first * stride),
                device: buffer + ((run.position + first) * pitch) as u64,
                len,
                rows,
                host_pitch: stride,
                device_pitch: pitch,
            };
            if whole {
                self.copies.push(copy(0, 1, end - host));
            } else if run.rows >= STRIDED_MIN {
                self.copies.push(copy(0, run.rows, part.bytes));
            } else {
                self.copies.extend((0..run.rows).map(|row| copy(row, 1, part.bytes)));
            }
        }
        pitch
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
