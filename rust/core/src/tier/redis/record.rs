//! The namespace's record: asked for with everything that is asked, and replaced by a reset, or when it came back.

use std::io;
use std::sync::atomic::Ordering;

use super::RedisTier;
use super::servers::{Fault, expect_ok, unexpected};
use super::values::skip_parts;
use super::wire::{Connection, Reply, command};
use crate::tier::format::{decode_record, encode_record};
use crate::tier::space::Generation;
use crate::tier::{Reason, Refusal};

/// Rounds until a generation is agreed on; more means that others reset all the time.
const ROUNDS_MAX: usize = 4;

/// How work on a connection learns of the present generation.
#[derive(Clone, Copy, Debug)]
pub(super) enum Present {
    /// It asks, since the record is on the same server.
    OnThisServer,
    /// It was asked for just now; None where nobody stored anything.
    Asked(Option<Generation>),
}

impl RedisTier {
    pub(super) fn record_name(&self) -> String {
        format!("{}generation", self.home)
    }

    /// Asks for the present generation alone, in a round trip of its own.
    pub(super) fn ask_record(&self, connection: &mut Connection) -> Result<Option<Generation>, Fault> {
        let asked = self.generations.now();
        let mut text = Vec::new();
        command(&mut text, &[b"GET", self.record_name().as_bytes()]);
        connection.send(&text, 1)?;
        let found = self.read_record(connection)?;
        let present = found.filter(|&found| self.generations.learn(found, asked));
        self.replace_if_retired(connection, found, present)?;
        Ok(present)
    }

    /// Whoever sees that the server went back behind a reset ends it: one who only stores and one who only searches have
    /// to agree on what comes next.
    fn replace_if_retired(
        &self,
        connection: &mut Connection,
        found: Option<Generation>,
        present: Option<Generation>,
    ) -> Result<(), Fault> {
        if found == present { Ok(()) } else { self.write_record(connection, false) }
    }

    /// The generation in the record that is the next reply.
    fn read_record(&self, connection: &mut Connection) -> Result<Option<Generation>, Fault> {
        match connection.reply()? {
            Reply::Bulk(record) => Ok(record.and_then(|record| decode_record(&self.space, &record))),
            other => Err(unexpected(other)),
        }
    }

    /// Sends the commands that `commands` makes for the present generation, in one round trip with the question which
    /// one that is. Returns the first `count` replies; `parts` more, of a value each, are for the caller to read.
    /// None where nobody stored anything.
    pub(super) fn ask(
        &self,
        connection: &mut Connection,
        present: Present,
        (count, parts): (usize, usize),
        commands: impl Fn(Generation, &mut Vec<u8>),
    ) -> Result<Option<(Generation, Vec<Reply>)>, Fault> {
        if let Present::Asked(present) = present {
            let Some(present) = present else { return Ok(None) };
            let mut text = Vec::new();
            commands(present, &mut text);
            connection.send(&text, count + parts)?;
            return Ok(Some((present, replies(connection, count)?)));
        }
        let mut guess = self.generations.latest();
        for _ in 0..ROUNDS_MAX {
            let asked = self.generations.now();
            let mut text = Vec::new();
            command(&mut text, &[b"GET", self.record_name().as_bytes()]);
            if let Some(guess) = guess {
                commands(guess, &mut text);
            }
            let (count, parts) = if guess.is_some() { (count, parts) } else { (0, 0) };
            connection.send(&text, 1 + count + parts)?;
            let found = self.read_record(connection)?;
            let replies = replies(connection, count)?;
            let present = found.filter(|&found| self.generations.learn(found, asked));
            if let Some(present) = present.filter(|&present| guess == Some(present)) {
                return Ok(Some((present, replies)));
            }
            skip_parts(connection, parts)?;
            self.replace_if_retired(connection, found, present)?;
            if present.is_none() {
                return Ok(None);
            }
            guess = present;
        }
        Err(Fault::Refused(Refusal::new(Reason::Io, "the namespace is reset all the time")))
    }

    /// Writes down a new generation: in the place of another one only if `replace`, or if that cannot be read or is gone
    /// for good.
    pub(super) fn write_record(&self, connection: &mut Connection, replace: bool) -> Result<(), Fault> {
        let generation = Generation::draw().map_err(Fault::Refused)?;
        let record = encode_record(&self.space, generation);
        let name = self.record_name();
        if replace {
            // What others learn from here on may be the new one.
            self.generations.retire_latest();
        }
        let asked = self.generations.now();
        let mut text = Vec::new();
        command(&mut text, &[b"SET", name.as_bytes(), &record, b"NX"]);
        command(&mut text, &[b"GET", name.as_bytes()]);
        connection.send(&text, 2)?;
        let set = connection.reply()?;
        let found = match connection.reply()? {
            Reply::Bulk(Some(record)) => decode_record(&self.space, &record),
            _ => None,
        };
        match found {
            Some(found) if replace && found != generation => self.generations.retire(found),
            // The one that was just written, or one that stays.
            Some(found) if self.generations.learn(found, asked) => return Ok(()),
            _ => {}
        }
        if let refused @ Reply::Error(_) = set {
            return Err(unexpected(refused));
        }
        text.clear();
        command(&mut text, &[b"SET", name.as_bytes(), &record]);
        connection.send(&text, 1)?;
        expect_ok(connection.reply()?)
    }

    pub(super) fn reset_on(&self, connection: &mut Connection) -> Result<(), Fault> {
        self.write_record(connection, true)?;
        self.must_reset.store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// The next `count` replies.
fn replies(connection: &mut Connection, count: usize) -> io::Result<Vec<Reply>> {
    (0..count).map(|_| connection.reply()).collect()
}
