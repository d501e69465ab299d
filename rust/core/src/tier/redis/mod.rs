//! The Redis tier: values in parts, read straight into the rows and written straight from them.

mod cursor;
mod nodes;
mod servers;
mod stream;
#[cfg(test)]
mod tests;
mod url;
mod values;
mod wire;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nodes::Nodes;
use parking_lot::Mutex;
use servers::{Fault, expect_ok, unexpected};
use url::Target;
use values::{PARTS_AHEAD, parts_of, skip_parts};
use wire::{Connection, Reply, command};

use super::breaker::Breaker;
use super::format::{decode_record, encode_record};
use super::space::{Generation, hex};
use super::{Chunk, Reason, Refusal, Space, Stored, Tier};
use crate::{Key, Result};

/// How long a server rests that failed: at most as long as it may take to be served again.
const REST: Duration = Duration::from_secs(1);

/// Rounds until a generation is agreed on; more means that others reset all the time.
const ROUNDS_MAX: usize = 4;

/// How a Redis tier is made.
#[derive(Clone)]
pub struct RedisConfig {
    /// `redis://[[user]:password@]host[:port][/database]` (also written `resp` or `valkey`), `rediss://` the same over
    /// TLS (`?ssl_ca_certs=` a file of certificates to trust, else the system's),
    /// `unix://[[user]:password@]/path[?db=database]`,
    /// `redis-sentinel://[[user]:password@]host[:port][,…][/master[/database]]`, or
    /// `redis-cluster://[[user]:password@]host[:port][,…]`.
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
    nodes: Nodes,
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
            nodes: Nodes::new(target, timeout)?,
            breaker: Breaker::new(rest),
            home: format!("{}lmcache_rs:1:{}:", config.prefix, hex(space.namespace.as_bytes())),
            ttl: config.ttl.map(|ttl| ttl.as_millis().max(1).to_string()),
            generation: Mutex::new(None),
            must_reset: AtomicBool::new(false),
        })
    }

    /// Runs `work` on the server that has `name`, unless it rests.
    fn run<T>(
        &self,
        name: &str,
        work: impl Fn(&mut Connection) -> std::result::Result<T, Fault>,
    ) -> std::result::Result<T, Refusal> {
        self.breaker.run(|| self.run_awake(name, work))
    }

    /// The same, as a part of an attempt.
    fn run_awake<T>(
        &self,
        name: &str,
        work: impl Fn(&mut Connection) -> std::result::Result<T, Fault>,
    ) -> std::result::Result<T, Refusal> {
        if self.must_reset.load(Ordering::SeqCst) {
            self.nodes.run(&self.record_name(), |connection| self.reset_on(connection))?;
        }
        if self.nodes.are_many() {
            // The record is on a node of its own, so it takes a round trip of its own.
            let present = self.nodes.run(&self.record_name(), |connection| self.ask_record(connection))?;
            *self.generation.lock() = present;
        }
        self.nodes.run(name, &work)
    }

    /// The generation in the record.
    fn ask_record(&self, connection: &mut Connection) -> std::result::Result<Option<Generation>, Fault> {
        let mut text = Vec::new();
        command(&mut text, &[b"GET", self.record_name().as_bytes()]);
        connection.send(&text, 1)?;
        self.read_record(connection)
    }

    /// The generation in the record that is the next reply.
    fn read_record(&self, connection: &mut Connection) -> std::result::Result<Option<Generation>, Fault> {
        match connection.reply()? {
            Reply::Bulk(record) => Ok(record.and_then(|record| decode_record(&self.space, &record))),
            other => Err(unexpected(other)),
        }
    }

    fn record_name(&self) -> String {
        format!("{}generation", self.home)
    }

    fn part_name(&self, generation: Generation, key: &Key, rank: u32, part: usize) -> String {
        let (home, generation, key) = (&self.home, hex(&generation.0), hex(key.as_bytes()));
        format!("{home}{generation}:{{{key}}}:{rank}:{part}")
    }

    /// A name that is where all values of the key are, of any generation.
    fn name_of(&self, key: &Key) -> String {
        self.part_name(Generation([0; 16]), key, 0, 0)
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
        if self.nodes.are_many() {
            // `run` has just asked.
            let Some(present) = *self.generation.lock() else { return Ok(None) };
            let mut text = Vec::new();
            commands(present, &mut text);
            connection.send(&text, count + parts)?;
            let replies: std::io::Result<Vec<Reply>> = (0..count).map(|_| connection.reply()).collect();
            return Ok(Some((present, replies?)));
        }
        for _ in 0..ROUNDS_MAX {
            let known = *self.generation.lock();
            let mut text = Vec::new();
            command(&mut text, &[b"GET", self.record_name().as_bytes()]);
            if let Some(known) = known {
                commands(known, &mut text);
            }
            let (count, parts) = if known.is_some() { (count, parts) } else { (0, 0) };
            connection.send(&text, 1 + count + parts)?;
            let present = self.read_record(connection)?;
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
        match self.ask(connection, 1, 0, exists)?.ok_or(Reason::Absent)? {
            (_, replies) if replies == [Reply::Integer(1)] => Ok(Stored::Present),
            (generation, replies) if replies == [Reply::Integer(0)] => {
                self.write(connection, generation, chunk)?;
                Ok(Stored::Written(chunk.memory.bytes() as u64))
            }
            (_, replies) => Err(replies.into_iter().next().map_or(Reason::Io.into(), unexpected)),
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

    /// Which of the keys with these numbers have the parts of all ranks.
    fn present_on(
        &self,
        connection: &mut Connection,
        keys: &[Key],
        numbers: &[usize],
    ) -> std::result::Result<Vec<bool>, Fault> {
        let asked = self.ask(connection, numbers.len(), 0, |generation, commands| {
            for &number in numbers {
                let names =
                    (0..self.space.ranks).map(|rank| self.part_name(generation, &keys[number], rank, 0));
                let names: Vec<String> = names.collect();
                let words = std::iter::once(&b"EXISTS"[..]).chain(names.iter().map(String::as_bytes));
                command(commands, &words.collect::<Vec<_>>());
            }
        })?;
        let Some((_, replies)) = asked else { return Ok(vec![false; numbers.len()]) };
        let ranks = i64::from(self.space.ranks);
        let exists = |reply| match reply {
            Reply::Integer(count) => Ok(count == ranks),
            other => Err(unexpected(other)),
        };
        replies.into_iter().map(exists).collect()
    }

    /// Removes the header of a value that nobody can use, so that it can be stored again.
    fn discard(&self, chunk: &Chunk) {
        let Some(generation) = *self.generation.lock() else { return };
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

impl Tier for RedisTier {
    fn put(&self, chunk: &Chunk) -> std::result::Result<Stored, Refusal> {
        let name = self.name_of(&chunk.key);
        let put = || self.run(&name, |connection| self.put_on(connection, chunk));
        put().or_else(|refusal| {
            if refusal.reason != Reason::Absent {
                return Err(refusal);
            }
            // Nobody has stored anything yet.
            self.run(&self.record_name(), |connection| self.write_record(connection, false))?;
            put().map_err(|refusal| match refusal.reason {
                // And somebody took the record away again.
                Reason::Absent => Reason::Io.into(),
                _ => refusal,
            })
        })
    }

    fn get(&self, chunk: &Chunk) -> std::result::Result<(), Refusal> {
        let ended = self.run(&self.name_of(&chunk.key), |connection| self.get_on(connection, chunk));
        if let Err(refusal) = &ended
            && matches!(refusal.reason, Reason::Truncated | Reason::Corrupt | Reason::Foreign)
        {
            self.discard(chunk);
        }
        ended
    }

    fn present(&self, keys: &[Key]) -> std::result::Result<Vec<bool>, Refusal> {
        let names: Vec<String> = keys.iter().map(|key| self.name_of(key)).collect();
        let mut present = vec![false; keys.len()];
        self.breaker.run(|| {
            for group in self.nodes.groups(&names)? {
                let Some(&first) = group.first() else { continue };
                let found =
                    self.run_awake(&names[first], |connection| self.present_on(connection, keys, &group))?;
                group.into_iter().zip(found).for_each(|(number, found)| present[number] = found);
            }
            Ok(())
        })?;
        Ok(present)
    }

    fn check(&self) -> std::result::Result<(), Refusal> {
        self.run(&self.record_name(), |connection| self.ask_record(connection).map(drop))
    }

    fn rests(&self) -> bool {
        self.breaker.rests()
    }

    fn reset(&self) -> std::result::Result<(), Refusal> {
        self.must_reset.store(true, Ordering::SeqCst);
        self.run(&self.record_name(), |_| Ok(()))
    }
}
