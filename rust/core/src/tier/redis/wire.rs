//! One connection to a Redis: commands out, replies in, values between the socket and the rows.
//!
//! A client of our own for RESP2, since those there are make a fresh copy of every value that they read.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::time::{Duration, Instant};

use super::cursor::Cursor;
use super::stream::Stream;
use crate::tier::space::Sum;

/// Bytes moved by one call, and then summed while the cache has them.
const SPAN_BYTES: usize = 256 << 10;

/// The longest line of a reply: numbers and texts of errors.
const LINE_BYTES_MAX: usize = 4096;

/// The longest value that is no part of a payload: a header, a record, a host name.
const SMALL_BYTES_MAX: usize = 8192;

/// Elements of an array: a cluster has at most 16,384 ranges of slots.
const ARRAY_MAX: usize = 16_384;

/// Elements of a reply, in all its arrays.
const ELEMENTS_MAX: usize = 16 * ARRAY_MAX;

/// Arrays in one another: ranges, each with nodes, each with properties.
const DEPTH_MAX: usize = 4;

const INPUT_BYTES: usize = 64 << 10;

/// A reply.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Simple(String),
    Error(String),
    Integer(i64),
    Bulk(Option<Vec<u8>>),
    Array(Vec<Reply>),
}

/// Whether the bytes of a part came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Read,
    Missing,
    OtherLength,
}

/// A connection. What went wrong in the middle of a command leaves it useless; see `is_clean`.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    input: Box<[u8]>,
    begin: usize,
    end: usize,
    deadline: Instant,
    /// Replies that are still to come.
    expected: usize,
    is_broken: bool,
}

impl Connection {
    /// Talks over `stream`.
    pub(super) fn new(stream: Stream) -> Self {
        let input = vec![0; INPUT_BYTES].into_boxed_slice();
        let deadline = Instant::now();
        Self { stream, input, begin: 0, end: 0, deadline, expected: 0, is_broken: false }
    }

    /// What follows may take so long.
    pub(super) fn limit(&mut self, limit: Duration) -> io::Result<()> {
        self.deadline = Instant::now() + limit;
        // Each call has the whole limit: the deadline is looked at after each, so that nothing takes twice as long.
        self.stream.limit_calls(limit)
    }

    /// Whether every reply came, so that another may use it.
    pub(super) fn is_clean(&self) -> bool {
        !self.is_broken && self.expected == 0 && self.begin == self.end
    }

    /// Sends `commands` whose `count` replies are to be read.
    pub(super) fn send(&mut self, commands: &[u8], count: usize) -> io::Result<()> {
        self.expected += count;
        let mut rest = commands;
        while !rest.is_empty() {
            let sent = self.write(&[IoSlice::new(rest)])?;
            rest = &rest[sent..];
        }
        Ok(())
    }

    /// Sends the next `bytes` of `cursor`, between what was and what will be sent of a command.
    pub(super) fn send_rows(
        &mut self,
        cursor: &mut Cursor,
        mut bytes: usize,
        sum: &mut Sum,
    ) -> io::Result<()> {
        while bytes > 0 {
            let mut span = cursor.take(bytes.min(SPAN_BYTES));
            bytes -= span.bytes();
            span.add_to(sum);
            while span.bytes() > 0 {
                let sent = self.write(&span.slices())?;
                span.skip(sent);
            }
        }
        Ok(())
    }

    /// The next reply, with no value longer than a header.
    pub(super) fn reply(&mut self) -> io::Result<Reply> {
        let reply = self.element(&mut 0, 0)?;
        self.expected = self.expected.saturating_sub(1);
        Ok(reply)
    }

    /// The next reply: the next `bytes` of `cursor`. Another reply than a value is an error.
    pub(super) fn reply_into_rows(
        &mut self,
        cursor: &mut Cursor,
        bytes: usize,
        sum: &mut Sum,
    ) -> io::Result<Part> {
        let line = self.line()?;
        let length = line.strip_prefix('$').and_then(|length| length.parse::<i64>().ok());
        let length = length.ok_or_else(|| nonsense(&format!("{line:.60} for a value")))?;
        if length == -1 {
            self.expected = self.expected.saturating_sub(1);
            return Ok(Part::Missing);
        }
        if usize::try_from(length) != Ok(bytes) {
            // Not worth to be read.
            self.is_broken = true;
            return Ok(Part::OtherLength);
        }
        let mut left = bytes;
        while left > 0 {
            let mut span = cursor.take(left.min(SPAN_BYTES));
            left -= span.bytes();
            let whole = span.clone();
            while span.bytes() > 0 {
                let read = self.read_into(&mut span.slices_mut())?;
                span.skip(read);
            }
            whole.add_to(sum);
        }
        self.end_of_bulk()?;
        self.expected = self.expected.saturating_sub(1);
        Ok(Part::Read)
    }

    /// The next reply, of which nothing is wanted: a value of at most `bytes_max`, or no value.
    pub(super) fn skip(&mut self, bytes_max: usize) -> io::Result<()> {
        let line = self.line()?;
        let length = line.strip_prefix('$').map(str::parse::<usize>);
        if let Some(Ok(length)) = length {
            if length > bytes_max {
                return Err(nonsense(&format!("a value of {length} bytes")));
            }
            let mut left = length;
            while left > 0 {
                if self.begin == self.end {
                    self.fill()?;
                }
                let skipped = left.min(self.end - self.begin);
                self.begin += skipped;
                left -= skipped;
            }
            self.end_of_bulk()?;
        }
        self.expected = self.expected.saturating_sub(1);
        Ok(())
    }

    fn element(&mut self, elements: &mut usize, depth: usize) -> io::Result<Reply> {
        *elements += 1;
        if *elements > ELEMENTS_MAX {
            return Err(nonsense("more than anybody asked for"));
        }
        let line = self.line()?;
        let (kind, rest) = line.split_at_checked(1).ok_or_else(|| nonsense("an empty line"))?;
        let number = || rest.parse::<i64>().map_err(|_| nonsense("no number"));
        match kind {
            "+" => Ok(Reply::Simple(rest.to_owned())),
            "-" => Ok(Reply::Error(rest.to_owned())),
            ":" => Ok(Reply::Integer(number()?)),
            "$" => match usize::try_from(number()?) {
                Err(_) => Ok(Reply::Bulk(None)),
                Ok(length) if length <= SMALL_BYTES_MAX => Ok(Reply::Bulk(Some(self.bulk(length)?))),
                Ok(length) => Err(nonsense(&format!("a value of {length} bytes"))),
            },
            "*" if depth < DEPTH_MAX => match usize::try_from(number()?) {
                Err(_) => Ok(Reply::Bulk(None)),
                Ok(length) if length <= ARRAY_MAX => {
                    let element = |_| self.element(elements, depth + 1);
                    (0..length).map(element).collect::<io::Result<_>>().map(Reply::Array)
                }
                Ok(length) => Err(nonsense(&format!("an array of {length}"))),
            },
            _ => Err(nonsense("no reply")),
        }
    }

    fn bulk(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let mut at = 0;
        while at < length {
            at += self.read_into(&mut [IoSliceMut::new(&mut bytes[at..])])?;
        }
        self.end_of_bulk()?;
        Ok(bytes)
    }

    fn end_of_bulk(&mut self) -> io::Result<()> {
        if self.line()?.is_empty() { Ok(()) } else { Err(nonsense("a value longer than it said")) }
    }

    /// The next line, without its end.
    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        loop {
            while self.begin < self.end {
                let byte = self.input[self.begin];
                self.begin += 1;
                line.push(byte);
                if line.ends_with(b"\r\n") {
                    line.truncate(line.len() - 2);
                    return String::from_utf8(line).map_err(|_| nonsense("no text"));
                }
                if line.len() > LINE_BYTES_MAX {
                    return Err(nonsense("a line without an end"));
                }
            }
            self.fill()?;
        }
    }

    /// Bytes from the input, or from the socket straight to their place.
    fn read_into(&mut self, slices: &mut [IoSliceMut]) -> io::Result<usize> {
        if self.begin == self.end {
            return self.read(Some(slices));
        }
        let first = slices.iter_mut().find(|slice| !slice.is_empty());
        let Some(first) = first else { return Ok(0) };
        let bytes = first.len().min(self.end - self.begin);
        first[..bytes].copy_from_slice(&self.input[self.begin..self.begin + bytes]);
        self.begin += bytes;
        Ok(bytes)
    }

    fn fill(&mut self) -> io::Result<()> {
        self.begin = 0;
        self.end = 0;
        self.end = self.read(None)?;
        Ok(())
    }

    /// Reads from the socket: into `slices`, or into the input.
    fn read(&mut self, slices: Option<&mut [IoSliceMut]>) -> io::Result<usize> {
        let read = match slices {
            Some(slices) => self.stream.read_vectored(slices),
            None => self.stream.read(&mut self.input),
        };
        self.moved(read)
    }

    fn write(&mut self, slices: &[IoSlice]) -> io::Result<usize> {
        let written = self.stream.write_vectored(slices);
        self.moved(written)
    }

    /// What a call moved: 0 when it was interrupted, an error when nothing will come any more.
    fn moved(&mut self, moved: io::Result<usize>) -> io::Result<usize> {
        let moved = match moved {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            // What a limit of a socket's ends with.
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(ErrorKind::TimedOut.into()),
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(0),
            moved => moved,
        };
        let moved = if Instant::now() > self.deadline { Err(ErrorKind::TimedOut.into()) } else { moved };
        self.is_broken |= moved.is_err();
        moved
    }
}

/// A reply that no Redis gives.
fn nonsense(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("it answered {what}"))
}

/// Appends a command to `commands`.
pub(super) fn command(commands: &mut Vec<u8>, words: &[&[u8]]) {
    begin_command(commands, words.len());
    for word in words {
        begin_word(commands, word.len());
        commands.extend_from_slice(word);
        end_word(commands);
    }
}

/// Begins a command of so many words.
pub(super) fn begin_command(commands: &mut Vec<u8>, words: usize) {
    commands.extend_from_slice(format!("*{words}\r\n").as_bytes());
}

/// Begins a word whose bytes follow.
pub(super) fn begin_word(commands: &mut Vec<u8>, bytes: usize) {
    commands.extend_from_slice(format!("${bytes}\r\n").as_bytes());
}

/// Ends a word.
pub(super) fn end_word(commands: &mut Vec<u8>) {
    commands.extend_from_slice(b"\r\n");
}
