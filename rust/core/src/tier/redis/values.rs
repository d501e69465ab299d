//! Values and their parts: written header last, read with some asked for in advance.

use std::io;

use super::RedisTier;
use super::cursor::Cursor;
use super::record::Present;
use super::servers::{Fault, expect_ok, unexpected};
use super::wire::{Connection, Part, Reply, begin_command, begin_word, command, end_word};
use crate::tier::format::{HEADER_BYTES, Header};
use crate::tier::space::Generation;
use crate::tier::{Chunk, Reason, Refusal, Stored};

/// A part of a value. From 8 MiB on Redis reads values at a third of the speed.
pub(super) const PART_BYTES: usize = 4 << 20;

/// Parts that are asked for in advance: the server works on the next while one is on its way, and its buffers stay
/// small.
const PARTS_AHEAD: usize = 3;

/// A value that is there and that nobody can use.
pub(super) struct Useless {
    /// The one that it was found under.
    pub(super) generation: Generation,
    pub(super) refusal: Refusal,
}

impl RedisTier {
    pub(super) fn put_on(
        &self,
        connection: &mut Connection,
        present: Present,
        chunk: &Chunk,
    ) -> Result<Stored, Fault> {
        let header_name = |generation| self.part_name(generation, &chunk.key, self.space.rank, 0);
        let exists = |generation, commands: &mut Vec<u8>| {
            command(commands, &[b"EXISTS", header_name(generation).as_bytes()]);
        };
        match self.ask(connection, present, (1, 0), exists)?.ok_or(Reason::Absent)? {
            (_, replies) if replies == [Reply::Integer(1)] => Ok(Stored::Present),
            (generation, replies) if replies == [Reply::Integer(0)] => {
                self.write(connection, generation, chunk)?;
                Ok(Stored::Written(chunk.memory.bytes() as u64))
            }
            (_, replies) => Err(replies.into_iter().next().map_or(Reason::Io.into(), unexpected)),
        }
    }

    pub(super) fn get_on(
        &self,
        connection: &mut Connection,
        present: Present,
        chunk: &Chunk,
    ) -> Result<Result<(), Useless>, Fault> {
        let name = |generation, part| self.part_name(generation, &chunk.key, self.space.rank, part);
        let ahead = parts_of(chunk).min(PARTS_AHEAD);
        let asked = self.ask(connection, present, (1, ahead), |generation, commands| {
            (0..=ahead).for_each(|part| command(commands, &[b"GET", name(generation, part).as_bytes()]));
        })?;
        let (generation, mut replies) = asked.ok_or(Reason::Absent)?;
        match self.read(connection, generation, chunk, replies.pop()) {
            Err(Fault::Refused(refusal))
                if matches!(refusal.reason, Reason::Truncated | Reason::Corrupt | Reason::Foreign) =>
            {
                Ok(Err(Useless { generation, refusal }))
            }
            read => read.map(Ok),
        }
    }

    /// Reads a value whose header came in `reply`, and whose first parts are on their way.
    fn read(
        &self,
        connection: &mut Connection,
        generation: Generation,
        chunk: &Chunk,
        reply: Option<Reply>,
    ) -> Result<(), Fault> {
        let ahead = parts_of(chunk).min(PARTS_AHEAD);
        let promised = match self.verify_header(reply, generation, chunk) {
            Ok(promised) => promised,
            Err(fault) => {
                skip_parts(connection, ahead)?;
                return Err(fault);
            }
        };
        let name = |part| self.part_name(generation, &chunk.key, self.space.rank, part);
        let sum = self.read_parts(connection, chunk, ahead, name)?;
        if sum == promised { Ok(()) } else { Err(Reason::Corrupt.into()) }
    }

    /// Removes the header of a value that nobody can use, so that it can be stored again.
    pub(super) fn discard(&self, generation: Generation, chunk: &Chunk) {
        let name = self.part_name(generation, &chunk.key, self.space.rank, 0);
        let removed = self.nodes.run(&name, |connection| {
            let mut text = Vec::new();
            command(&mut text, &[b"UNLINK", name.as_bytes()]);
            connection.send(&text, 1)?;
            Ok(connection.reply()?)
        });
        // Otherwise the next reader does.
        drop(removed);
    }

    fn write(&self, connection: &mut Connection, generation: Generation, chunk: &Chunk) -> Result<(), Fault> {
        let (mut cursor, mut sum) = (Cursor::new(&chunk.memory), self.space.seal.start());
        let mut parts = 0;
        let mut left = chunk.memory.bytes();
        while left > 0 {
            let bytes = left.min(PART_BYTES);
            (left, parts) = (left - bytes, parts + 1);
            let mut text = Vec::new();
            self.begin_set(&mut text, &self.part_name(generation, &chunk.key, self.space.rank, parts), bytes);
            connection.send(&text, 1)?;
            connection.send_rows(&mut cursor, bytes, &mut sum)?;
            text.clear();
            self.end_set(&mut text);
            connection.send(&text, 0)?;
        }
        let ended: io::Result<Vec<Reply>> = (0..parts).map(|_| connection.reply()).collect();
        ended?.into_iter().try_for_each(expect_ok)?;
        // Last, and only after all parts: who finds the header finds the value.
        let mut header = Header::new(&self.space, generation, chunk);
        header.seal(&self.space, &sum.finish());
        let mut text = Vec::new();
        self.begin_set(&mut text, &self.part_name(generation, &chunk.key, self.space.rank, 0), HEADER_BYTES);
        text.extend_from_slice(&header.0);
        self.end_set(&mut text);
        connection.send(&text, 1)?;
        expect_ok(connection.reply()?)
    }

    fn begin_set(&self, text: &mut Vec<u8>, name: &str, bytes: usize) {
        begin_command(text, if self.ttl.is_some() { 5 } else { 3 });
        for word in [&b"SET"[..], name.as_bytes()] {
            begin_word(text, word.len());
            text.extend_from_slice(word);
            end_word(text);
        }
        begin_word(text, bytes);
    }

    fn end_set(&self, text: &mut Vec<u8>) {
        end_word(text);
        if let Some(ttl) = &self.ttl {
            for word in [&b"PX"[..], ttl.as_bytes()] {
                begin_word(text, word.len());
                text.extend_from_slice(word);
                end_word(text);
            }
        }
    }

    /// The payload's checksum that the header in `reply` promises.
    fn verify_header(
        &self,
        reply: Option<Reply>,
        generation: Generation,
        chunk: &Chunk,
    ) -> Result<[u8; 32], Fault> {
        let bytes = match reply {
            Some(Reply::Bulk(Some(bytes))) => bytes,
            Some(Reply::Bulk(None)) => return Err(Reason::Absent.into()),
            Some(other) => return Err(unexpected(other)),
            None => return Err(Reason::Internal.into()),
        };
        let expected = Header::new(&self.space, generation, chunk);
        let header = Header(bytes.try_into().map_err(|_| Reason::Truncated)?);
        Ok(header.verify(&self.space, &expected)?)
    }

    /// Reads the payload, whose first `asked` parts are on their way. Returns its checksum.
    fn read_parts(
        &self,
        connection: &mut Connection,
        chunk: &Chunk,
        mut asked: usize,
        name: impl Fn(usize) -> String,
    ) -> Result<[u8; 32], Fault> {
        let parts = parts_of(chunk);
        let (mut cursor, mut sum) = (Cursor::new(&chunk.memory), self.space.seal.start());
        for part in 0..parts {
            let mut text = Vec::new();
            let until = parts.min(part + PARTS_AHEAD);
            (asked + 1..=until).for_each(|part| command(&mut text, &[b"GET", name(part).as_bytes()]));
            connection.send(&text, until - asked)?;
            asked = until;
            let bytes = PART_BYTES.min(chunk.memory.bytes() - part * PART_BYTES);
            match connection.reply_into_rows(&mut cursor, bytes, &mut sum)? {
                Part::Read => {}
                // A part that was evicted, or another one than the header promised.
                Part::Missing | Part::OtherLength => return Err(Reason::Truncated.into()),
            }
        }
        Ok(sum.finish())
    }
}

/// Parts of the chunk's payload.
fn parts_of(chunk: &Chunk) -> usize {
    chunk.memory.bytes().div_ceil(PART_BYTES)
}

/// Reads over the replies to `count` parts that are not wanted.
pub(super) fn skip_parts(connection: &mut Connection, count: usize) -> io::Result<()> {
    (0..count).try_for_each(|_| connection.skip(PART_BYTES))
}
