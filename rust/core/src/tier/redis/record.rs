//! The namespace's record: asked for with everything that is asked, and replaced by a reset.

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
        let mut text = Vec::new();
        command(&mut text, &[b"GET", self.record_name().as_bytes()]);
        connection.send(&text, 1)?;
        self.read_record(connection)
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
        let mut guess = *self.guess.lock();
        for _ in 0..ROUNDS_MAX {
            let mut text = Vec::new();
            command(&mut text, &[b"GET", self.record_name().as_bytes()]);
            if let Some(guess) = guess {
                commands(guess, &mut text);
            }
            let (count, parts) = if guess.is_some() { (count, parts) } else { (0, 0) };
            connection.send(&text, 1 + count + parts)?;
            let present = self.read_record(connection)?;
            let replies = replies(connection, count)?;
            *self.guess.lock() = present;
            if let Some(present) = present.filter(|&present| guess == Some(present)) {
                return Ok(Some((present, replies)));
            }
            skip_parts(connection, parts)?;
            if present.is_none() {
                return Ok(None);
            }
            guess = present;
        }
        Err(Fault::Refused(Refusal::new(Reason::Io, "the namespace is reset all the time")))
    }

    /// Writes down a new generation: in the place of another one only if `replace`, or if that cannot be read.
    pub(super) fn write_record(&self, connection: &mut Connection, replace: bool) -> Result<(), Fault> {
        let generation = Generation::draw().map_err(Fault::Refused)?;
        let record = encode_record(&self.space, generation);
        let name = self.record_name();
        let mut text = Vec::new();
        command(&mut text, &[b"SET", name.as_bytes(), &record, b"NX"]);
        command(&mut text, &[b"GET", name.as_bytes()]);
        connection.send(&text, 2)?;
        let set = connection.reply()?;
        let found = connection.reply()?;
        if !replace
            && matches!(&found, Reply::Bulk(Some(record)) if decode_record(&self.space, record).is_some())
        {
            return Ok(());
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
        *self.guess.lock() = None;
        self.must_reset.store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// The next `count` replies.
fn replies(connection: &mut Connection, count: usize) -> io::Result<Vec<Reply>> {
    (0..count).map(|_| connection.reply()).collect()
}
