//! The Redis tier: values in parts, read straight into the rows and written straight from them.

mod cursor;
mod servers;
mod stream;
#[cfg(test)]
mod tests;
mod url;
mod wire;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cursor::Cursor;
use parking_lot::Mutex;
use servers::{Fault, Servers, expect_ok, unexpected};
use url::Target;
use wire::{Connection, Part, Reply, begin_command, begin_word, command, end_word};

use super::breaker::Breaker;
use super::format::{HEADER_BYTES, Header, decode_record, encode_record};
use super::space::{Generation, hex};
use super::{Chunk, Reason, Refusal, Space, Stored, Tier};
use crate::{Key, Result};

/// A part of a value. From 8 MiB on Redis reads values at a third of the speed.
const PART_BYTES: usize = 4 << 20;

/// Parts that are asked for in advance: the server works on the next while one is on its way, and its buffers stay
/// small.
const PARTS_AHEAD: usize = 3;

/// How long a server rests that failed: at most as long as it may take to be served again.
const REST: Duration = Duration::from_secs(1);

/// Rounds until a generation is agreed on; more means that others reset all the time.
const ROUNDS_MAX: usize = 4;

/// How a Redis tier is made.
#[derive(Clone)]
pub struct RedisConfig {
    /// `redis://[[user]:password@]host[:port][/database]` (also written `resp` or `valkey`), `rediss://` the same over
    /// TLS (`?ssl_ca_certs=` a file of certificates to trust, else the system's),
    /// `unix://[[user]:password@]/path[?db=database]` or
    /// `redis-sentinel://[[user]:password@]host[:port][,…][/master[/database]]`.
    pub url: String,
    /// In front of every name.
    pub prefix: String,
    /// How long values stay; None: until Redis evicts them.
    pub ttl: Option<Duration>,
    /// How long one operation on one chunk may take.
    pub timeout: Duration,
}

/// Without the URL, which may hold a password.
impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { prefix, ttl, timeout, .. } = self;
        f.debug_struct("RedisConfig")
            .field("prefix", prefix)
            .field("ttl", ttl)
            .field("timeout", timeout)
            .finish_non_exhaustive()
    }
}

/// Values in a Redis.
#[derive(Debug)]
pub struct RedisTier {
    space: Space,
    servers: Servers,
    breaker: Breaker,
    /// In front of the names of everything of the namespace.
    home: String,
    ttl: Option<String>,
    /// The generation that was the present one when it was last asked for.
    generation: Mutex<Option<Generation>>,
    /// A reset was asked for and not done: nothing may be found until it is.
    must_reset: AtomicBool,
}

impl RedisTier {
    /// A tier for the values of `space`. Connects to nothing: a server that is not there costs misses and dropped
    /// stores, for as long as it is so.
    pub fn new(space: Space, config: &RedisConfig) -> Result<Self> {
        Self::with(space, config, REST)
    }

    fn with(space: Space, config: &RedisConfig, rest: Duration) -> Result<Self> {
        let target = Target::parse(&config.url)?;
        // 0 is no time in Redis, and no limit in sockets.
        let timeout = config.timeout.max(Duration::from_millis(1));
        Ok(Self {
            space,
            servers: Servers::new(target, timeout)?,
            breaker: Breaker::new(rest),
            home: format!("{}lmcache_rs:1:{}:", config.prefix, hex(space.namespace.as_bytes())),
            ttl: config.ttl.map(|ttl| ttl.as_millis().max(1).to_string()),
            generation: Mutex::new(None),
            must_reset: AtomicBool::new(false),
        })
    }

    fn run<T>(
        &self,
        work: impl Fn(&mut Connection) -> std::result::Result<T, Fault>,
    ) -> std::result::Result<T, Refusal> {
        self.breaker.run(|| {
            self.servers.run(|connection| {
                if self.must_reset.load(Ordering::SeqCst) {
                    self.reset_on(connection)?;
                }
                work(connection)
            })
        })
    }

    fn record_name(&self) -> String {
        format!("{}generation", self.home)
    }

    fn part_name(&self, generation: Generation, key: &Key, rank: u32, part: usize) -> String {
        let (home, generation, key) = (&self.home, hex(&generation.0), hex(key.as_bytes()));
        format!("{home}{generation}:{{{key}}}:{rank}:{part}")
    }

    /// Sends the commands that `commands` makes for the present generation, in one round trip with the question which
    /// one that is. Returns the first `count` replies; `parts` more, of a value each, are for the caller to read.
    /// None where nobody stored anything.
    fn ask(
        &self,
        connection: &mut Connection,
        count: usize,
        parts: usize,
        commands: impl Fn(Generation, &mut Vec<u8>),
    ) -> std::result::Result<Option<(Generation, Vec<Reply>)>, Fault> {
        for _ in 0..ROUNDS_MAX {
            let known = *self.generation.lock();
            let mut text = Vec::new();
            command(&mut text, &[b"GET", self.record_name().as_bytes()]);
            if let Some(known) = known {
                commands(known, &mut text);
            }
            let (count, parts) = if known.is_some() { (count, parts) } else { (0, 0) };
            connection.send(&text, 1 + count + parts)?;
            let present = match connection.reply()? {
                Reply::Bulk(record) => record.and_then(|record| decode_record(&self.space, &record)),
                other => return Err(unexpected(other)),
            };
            let replies: std::io::Result<Vec<Reply>> = (0..count).map(|_| connection.reply()).collect();
            let replies = replies?;
            *self.generation.lock() = present;
            if let Some(present) = present.filter(|&present| known == Some(present)) {
                return Ok(Some((present, replies)));
            }
            skip_parts(connection, parts)?;
            if present.is_none() {
                return Ok(None);
            }
        }
        Err(Fault::Refused(Refusal::new(Reason::Io, "the namespace is reset all the time")))
    }

    fn put_on(&self, connection: &mut Connection, chunk: &Chunk) -> std::result::Result<Stored, Fault> {
        let header_name = |generation| self.part_name(generation, &chunk.key, self.space.rank, 0);
        let exists = |generation, commands: &mut Vec<u8>| {
            command(commands, &[b"EXISTS", header_name(generation).as_bytes()]);
        };
        let mut asked = self.ask(connection, 1, 0, exists)?;
        if asked.is_none() {
            self.write_record(connection, false)?;
            asked = self.ask(connection, 1, 0, exists)?;
        }
        match asked.ok_or(Reason::Io)? {
            (_, replies) if replies == [Reply::Integer(1)] => Ok(Stored::Present),
            (generation, replies) if replies == [Reply::Integer(0)] => {
                self.write(connection, generation, chunk)?;
                Ok(Stored::Written(chunk.memory.bytes() as u64))
            }
            (_, replies) => Err(replies.into_iter().next().map_or(Reason::Io.into(), unexpected)),
        }
    }

    fn write(
        &self,
        connection: &mut Connection,
        generation: Generation,
        chunk: &Chunk,
    ) -> std::result::Result<(), Fault> {
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
        let ended: std::io::Result<Vec<Reply>> = (0..parts).map(|_| connection.reply()).collect();
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

    fn get_on(&self, connection: &mut Connection, chunk: &Chunk) -> std::result::Result<(), Fault> {
        let name = |generation, part| self.part_name(generation, &chunk.key, self.space.rank, part);
        let ahead = parts_of(chunk).min(PARTS_AHEAD);
        let asked = self.ask(connection, 1, ahead, |generation, commands| {
            (0..=ahead).for_each(|part| command(commands, &[b"GET", name(generation, part).as_bytes()]));
        })?;
        let (generation, mut replies) = asked.ok_or(Reason::Absent)?;
        let promised = match self.verify_header(replies.pop(), generation, chunk) {
            Ok(promised) => promised,
            Err(fault) => {
                skip_parts(connection, ahead)?;
                return Err(fault);
            }
        };
        let sum = self.read_parts(connection, chunk, ahead, |part| name(generation, part))?;
        if sum == promised { Ok(()) } else { Err(Reason::Corrupt.into()) }
    }

    /// The payload's checksum that the header in `reply` promises.
    fn verify_header(
        &self,
        reply: Option<Reply>,
        generation: Generation,
        chunk: &Chunk,
    ) -> std::result::Result<[u8; 32], Fault> {
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
    ) -> std::result::Result<[u8; 32], Fault> {
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

    /// Removes the header of a value that nobody can use, so that it can be stored again.
    fn discard(&self, chunk: &Chunk) {
        let Some(generation) = *self.generation.lock() else { return };
        let name = self.part_name(generation, &chunk.key, self.space.rank, 0);
        let removed = self.servers.run(|connection| {
            let mut text = Vec::new();
            command(&mut text, &[b"UNLINK", name.as_bytes()]);
            connection.send(&text, 1)?;
            Ok(connection.reply()?)
        });
        // Otherwise the next reader does.
        drop(removed);
    }

    /// Writes down a new generation: in the place of another one only if `replace`, or if that cannot be read.
    fn write_record(&self, connection: &mut Connection, replace: bool) -> std::result::Result<(), Fault> {
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

    fn reset_on(&self, connection: &mut Connection) -> std::result::Result<(), Fault> {
        self.write_record(connection, true)?;
        *self.generation.lock() = None;
        self.must_reset.store(false, Ordering::SeqCst);
        Ok(())
    }
}

fn parts_of(chunk: &Chunk) -> usize {
    chunk.memory.bytes().div_ceil(PART_BYTES)
}

fn skip_parts(connection: &mut Connection, count: usize) -> std::io::Result<()> {
    (0..count).try_for_each(|_| connection.skip(PART_BYTES))
}

impl Tier for RedisTier {
    fn put(&self, chunk: &Chunk) -> std::result::Result<Stored, Refusal> {
        self.run(|connection| self.put_on(connection, chunk))
    }

    fn get(&self, chunk: &Chunk) -> std::result::Result<(), Refusal> {
        let ended = self.run(|connection| self.get_on(connection, chunk));
        if let Err(refusal) = &ended
            && matches!(refusal.reason, Reason::Truncated | Reason::Corrupt | Reason::Foreign)
        {
            self.discard(chunk);
        }
        ended
    }

    fn present(&self, keys: &[Key]) -> std::result::Result<Vec<bool>, Refusal> {
        let ranks = i64::from(self.space.ranks);
        self.run(|connection| {
            let asked = self.ask(connection, keys.len(), 0, |generation, commands| {
                for key in keys {
                    let names = (0..self.space.ranks).map(|rank| self.part_name(generation, key, rank, 0));
                    let names: Vec<String> = names.collect();
                    let words = std::iter::once(&b"EXISTS"[..]).chain(names.iter().map(String::as_bytes));
                    command(commands, &words.collect::<Vec<_>>());
                }
            })?;
            let Some((_, replies)) = asked else { return Ok(vec![false; keys.len()]) };
            Ok(replies.into_iter().map(|reply| reply == Reply::Integer(ranks)).collect())
        })
    }

    fn reset(&self) -> std::result::Result<(), Refusal> {
        self.must_reset.store(true, Ordering::SeqCst);
        self.run(|_| Ok(()))
    }
}
