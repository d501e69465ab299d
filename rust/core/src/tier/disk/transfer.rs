//! A value between rows and a file: in pieces, several in flight, the checksum computed beside them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use super::files::Files;
use super::lane::{DEPTH, Lane, Transfer, Way};
use crate::tier::format::{HEADER_BYTES, Header};
use crate::tier::space::{Space, Sum};
use crate::tier::{RowMemory, Segment};

/// Bytes of a piece that is read. Larger ones leave more of the checksum to be computed when the last has ended.
const READ_BYTES: usize = 4 << 20;

/// Bytes of a piece that is written. Smaller ones wait for one another: file systems let one writer at a time add to a
/// file. Their checksum is computed while they are written.
const WRITE_BYTES: usize = 16 << 20;

/// Segments of a piece: what the kernel takes in one call.
const PIECE_SEGMENTS: usize = 1024;

/// How often a piece is tried again that was interrupted or came short.
const RETRIES_MAX: u32 = 64;

/// Part of the value that is moved by one call.
#[derive(Debug)]
struct Piece {
    memory: Vec<Segment>,
    offset: u64,
    bytes: usize,
    /// Bytes moved.
    done: usize,
    retries: u32,
    /// What is in flight of it.
    vectors: Vec<libc::iovec>,
}

impl Piece {
    fn new(offset: u64) -> Self {
        Self { memory: Vec::new(), offset, bytes: 0, done: 0, retries: 0, vectors: Vec::new() }
    }

    fn push(&mut self, segment: Segment) {
        self.memory.push(segment);
        self.bytes += segment.bytes;
    }

    /// Makes `vectors` of what was not moved.
    fn prepare(&mut self) {
        let mut skip = self.done;
        self.vectors.clear();
        for segment in &self.memory {
            let skipped = skip.min(segment.bytes);
            skip -= skipped;
            if skipped < segment.bytes {
                // SAFETY: inside of the segment.
                let base = unsafe { segment.base.add(skipped) };
                let iov_len = segment.bytes - skipped;
                self.vectors.push(libc::iovec { iov_base: base.as_ptr().cast(), iov_len });
            }
        }
    }

    fn add_to(&self, sum: &mut Sum) {
        for segment in &self.memory {
            // SAFETY: the rows are the value's as long as it is moved, and nothing of this piece writes to them now:
            // a store never does, and of a load the piece has ended.
            sum.update(unsafe { segment.as_slice() });
        }
    }
}

/// The pieces of the payload, as they lie in the file.
fn pieces(memory: &RowMemory, piece_bytes: usize) -> Vec<Piece> {
    let mut offset = HEADER_BYTES as u64;
    let mut pieces = Vec::new();
    let mut piece = Piece::new(offset);
    for &segment in memory.segments() {
        let mut at = 0;
        while at < segment.bytes {
            if piece.bytes == piece_bytes || piece.memory.len() == PIECE_SEGMENTS {
                offset += piece.bytes as u64;
                pieces.push(std::mem::replace(&mut piece, Piece::new(offset)));
            }
            let bytes = (segment.bytes - at).min(piece_bytes - piece.bytes);
            // SAFETY: inside of the segment.
            piece.push(Segment { base: unsafe { segment.base.add(at) }, bytes });
            at += bytes;
        }
    }
    pieces.push(piece);
    pieces
}

fn header_piece(header: &mut Header) -> Piece {
    let mut piece = Piece::new(0);
    piece.push(Segment { base: NonNull::from(&mut header.0).cast(), bytes: HEADER_BYTES });
    piece
}

/// Pieces on their way. Dropped, it waits for what is in flight, since that uses the memory.
struct Transfers<'a> {
    lane: &'a mut dyn Lane,
    files: &'a Files,
    file: &'a File,
    way: Way,
    pieces: &'a mut [Piece],
    in_flight: usize,
}

impl<'a> Transfers<'a> {
    fn new(
        lane: &'a mut dyn Lane,
        files: &'a Files,
        file: &'a File,
        way: Way,
        pieces: &'a mut [Piece],
    ) -> Self {
        Self { lane, files, file, way, pieces, in_flight: 0 }
    }

    fn has_room(&self) -> bool {
        self.in_flight < DEPTH
    }

    fn has_moved(&self, number: usize) -> bool {
        self.pieces.get(number).is_some_and(|piece| piece.done == piece.bytes)
    }

    fn begin(&mut self, number: usize) {
        let piece = &mut self.pieces[number];
        piece.prepare();
        let transfer = Transfer {
            file: self.file.as_raw_fd(),
            way: self.way,
            memory: piece.vectors.as_ptr(),
            memory_count: u32::try_from(piece.vectors.len()).expect("at most PIECE_SEGMENTS"),
            offset: piece.offset + piece.done as u64,
        };
        self.in_flight += 1;
        // SAFETY: `self` borrows file and pieces, and waits for the transfer before it gives them back; the rows are
        // kept by the `RowMemory` that the pieces were made of, which the callers of `read` and `write` borrow.
        unsafe { self.lane.begin(number, transfer) };
    }

    /// The next piece that was moved as a whole; None when none is in flight, or none has ended and `wait` is false.
    fn ended(&mut self, wait: bool) -> io::Result<Option<usize>> {
        while let Some((number, result)) = self.lane.ended(wait) {
            self.in_flight -= 1;
            let piece = &mut self.pieces[number];
            match self.files.transferred(result) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => piece.done += bytes,
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                Err(error) => return Err(error),
            }
            if piece.done >= piece.bytes {
                return Ok(Some(number));
            }
            piece.retries += 1;
            if piece.retries > RETRIES_MAX {
                return Err(io::Error::other("too many interrupted transfers"));
            }
            self.begin(number);
        }
        Ok(None)
    }
}

impl Drop for Transfers<'_> {
    fn drop(&mut self) {
        while self.in_flight > 0 && self.lane.ended(true).is_some() {
            self.in_flight -= 1;
        }
    }
}

/// Writes the value of `memory`: the payload, then the header, with the payload's checksum in it.
pub(super) fn write(
    lane: &mut dyn Lane,
    files: &Files,
    file: &File,
    space: &Space,
    header: &mut Header,
    memory: &RowMemory,
) -> io::Result<()> {
    let mut pieces = pieces(memory, WRITE_BYTES);
    let mut sum = space.seal.start();
    let mut transfers = Transfers::new(lane, files, file, Way::ToFile, &mut pieces);
    for number in 0..transfers.pieces.len() {
        while !transfers.has_room() {
            transfers.ended(true)?;
        }
        transfers.begin(number);
        transfers.pieces[number].add_to(&mut sum);
    }
    while transfers.ended(true)?.is_some() {}
    drop(transfers);
    header.seal(space, &sum.finish());
    let mut pieces = [header_piece(header)];
    let mut transfers = Transfers::new(lane, files, file, Way::ToFile, &mut pieces);
    transfers.begin(0);
    transfers.ended(true).map(drop)
}

/// Reads a value: its header, and its payload into `memory`. Returns the payload's checksum.
pub(super) fn read(
    lane: &mut dyn Lane,
    files: &Files,
    file: &File,
    space: &Space,
    header: &mut Header,
    memory: &RowMemory,
) -> io::Result<[u8; 32]> {
    let mut pieces: Vec<Piece> =
        std::iter::once(header_piece(header)).chain(pieces(memory, READ_BYTES)).collect();
    let count = pieces.len();
    let mut sum = space.seal.start();
    let mut transfers = Transfers::new(lane, files, file, Way::FromFile, &mut pieces);
    // Number 0 is the header, which is not under the payload's checksum.
    let (mut begun, mut summed) = (0, 1);
    while summed < count || transfers.in_flight > 0 {
        while begun < count && transfers.has_room() {
            transfers.begin(begun);
            begun += 1;
        }
        if transfers.has_moved(summed) {
            transfers.pieces[summed].add_to(&mut sum);
            summed += 1;
        }
        transfers.ended(!transfers.has_moved(summed))?;
    }
    Ok(sum.finish())
}
