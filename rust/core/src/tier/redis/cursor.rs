//! A way through the memory of a chunk's rows, some bytes at a time.

use std::io::{IoSlice, IoSliceMut};
use std::slice;

use crate::tier::space::Sum;
use crate::tier::{RowMemory, Segment};

/// Pieces of memory in one call: more rows than that in a span are moved by several.
const SLICES_MAX: usize = 64;

/// A place in the rows. It borrows them: whoever made the `RowMemory` sees to it that nobody else uses them.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    segments: &'a [Segment],
    at: usize,
}

/// Some memory of the rows, in their order.
#[derive(Clone, Debug)]
pub(super) struct Span<'a> {
    segments: Vec<Segment>,
    rows: std::marker::PhantomData<&'a RowMemory>,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(memory: &'a RowMemory) -> Self {
        Self { segments: memory.segments(), at: 0 }
    }

    /// The next `bytes`, or fewer where they are in many pieces; at least one, as long as there are any.
    pub(super) fn take(&mut self, mut bytes: usize) -> Span<'a> {
        let mut segments = Vec::new();
        while bytes > 0 && segments.len() < SLICES_MAX {
            let Some((first, rest)) = self.segments.split_first() else { break };
            let taken = bytes.min(first.bytes - self.at);
            // SAFETY: inside of the segment.
            segments.push(Segment { base: unsafe { first.base.add(self.at) }, bytes: taken });
            self.at += taken;
            bytes -= taken;
            if self.at == first.bytes {
                (self.segments, self.at) = (rest, 0);
            }
        }
        Span { segments, rows: std::marker::PhantomData }
    }
}

impl Span<'_> {
    pub(super) fn bytes(&self) -> usize {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }

    pub(super) fn slices(&self) -> Vec<IoSlice<'_>> {
        // SAFETY: the rows are the chunk's as long as it is stored, and nobody writes to them.
        self.segments.iter().map(|segment| IoSlice::new(unsafe { segment.as_slice() })).collect()
    }

    pub(super) fn slices_mut(&mut self) -> Vec<IoSliceMut<'_>> {
        let slice = |segment: &Segment| {
            // SAFETY: the rows are the chunk's as long as it is loaded, and no row is in it twice but where its maker
            // does not care for what is in it then; nobody else reads or writes them.
            IoSliceMut::new(unsafe { slice::from_raw_parts_mut(segment.base.as_ptr(), segment.bytes) })
        };
        self.segments.iter().map(slice).collect()
    }

    /// Leaves out the first `bytes`.
    pub(super) fn skip(&mut self, mut bytes: usize) {
        self.segments.retain_mut(|segment| {
            let skipped = bytes.min(segment.bytes);
            bytes -= skipped;
            // SAFETY: inside of the segment, or just behind it when nothing is left of it.
            segment.base = unsafe { segment.base.add(skipped) };
            segment.bytes -= skipped;
            segment.bytes > 0
        });
    }

    pub(super) fn add_to(&self, sum: &mut Sum) {
        for segment in &self.segments {
            // SAFETY: nobody writes to the rows now: they are stored, or were just read.
            sum.update(unsafe { segment.as_slice() });
        }
    }
}
