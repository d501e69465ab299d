//! The Redis tier: values in parts, read straight into the rows and written straight from them.

mod cursor;
mod generations;
mod nodes;
mod record;
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

use generations::Generations;
use nodes::Nodes;
use record::Present;
use servers::{Fault, unexpected};
use url::Target;
use values::Useless;
use wire::{Connection, Reply, command};

use super::breaker::Breaker;
use super::space::{Generation, hex};
use super::{Chunk, Reason, Refusal, Space, Stored, Tier};
use crate::{Key, Result};

/// How long a server rests that failed: at most as long as it may take to be served again.
const REST: Duration = Duration::from_secs(1);

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
    generations: Generations,
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
            generations: Generations::default(),
            must_reset: AtomicBool::new(false),
        })
    }

    /// Runs `work` on the server that has `name`, unless it rests.
    fn run<T>(
        &self,
        name: &str,
        work: impl Fn(&mut Connection, Present) -> std::result::Result<T, Fault>,
    ) -> std::result::Result<T, Refusal> {
        self.breaker.run(|| self.run_awake(name, work))
    }

    /// The same, as a part of an attempt.
    fn run_awake<T>(
        &self,
        name: &str,
        work: impl Fn(&mut Connection, Present) -> std::result::Result<T, Fault>,
    ) -> std::result::Result<T, Refusal> {
        if self.must_reset.load(Ordering::SeqCst) {
            self.nodes.run(&self.record_name(), |connection| self.reset_on(connection))?;
        }
        let mut present = Present::OnThisServer;
        if self.nodes.are_many() {
            // The record is on a node of its own, so it takes a round trip of its own.
            let asked = self.nodes.run(&self.record_name(), |connection| self.ask_record(connection))?;
            present = Present::Asked(asked);
        }
        self.nodes.run(name, |connection| work(connection, present))
    }

    fn part_name(&self, generation: Generation, key: &Key, rank: u32, part: usize) -> String {
        let (home, generation, key) = (&self.home, hex(&generation.0), hex(key.as_bytes()));
        format!("{home}{generation}:{{{key}}}:{rank}:{part}")
    }

    /// A name that is where all values of the key are, of any generation.
    fn name_of(&self, key: &Key) -> String {
        self.part_name(Generation([0; 16]), key, 0, 0)
    }

    /// Which of the keys with these numbers have the parts of all ranks.
    fn present_on(
        &self,
        connection: &mut Connection,
        present: Present,
        keys: &[Key],
        numbers: &[usize],
    ) -> std::result::Result<Vec<bool>, Fault> {
        let asked = self.ask(connection, present, (numbers.len(), 0), |generation, commands| {
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
}

impl Tier for RedisTier {
    fn put(&self, chunk: &Chunk) -> std::result::Result<Stored, Refusal> {
        let name = self.name_of(&chunk.key);
        let put = || self.run(&name, |connection, present| self.put_on(connection, present, chunk));
        put().or_else(|refusal| {
            if refusal.reason != Reason::Absent {
                return Err(refusal);
            }
            // Nobody has stored anything yet.
            self.run(&self.record_name(), |connection, _| self.write_record(connection, false))?;
            put().map_err(|refusal| match refusal.reason {
                // And somebody took the record away again.
                Reason::Absent => Reason::Io.into(),
                _ => refusal,
            })
        })
    }

    fn get(&self, chunk: &Chunk) -> std::result::Result<(), Refusal> {
        self.breaker.run(|| {
            let name = self.name_of(&chunk.key);
            let read =
                self.run_awake(&name, |connection, present| self.get_on(connection, present, chunk))?;
            read.map_err(|Useless { generation, refusal }| {
                self.discard(generation, chunk);
                refusal
            })
        })
    }

    fn present(&self, keys: &[Key]) -> std::result::Result<Vec<bool>, Refusal> {
        let names: Vec<String> = keys.iter().map(|key| self.name_of(key)).collect();
        let mut present = vec![false; keys.len()];
        self.breaker.run(|| {
            for group in self.nodes.groups(&names)? {
                let Some(&first) = group.first() else { continue };
                let found = self.run_awake(&names[first], |connection, present| {
                    self.present_on(connection, present, keys, &group)
                })?;
                group.into_iter().zip(found).for_each(|(number, found)| present[number] = found);
            }
            Ok(())
        })?;
        Ok(present)
    }

    fn check(&self) -> std::result::Result<(), Refusal> {
        self.run(&self.record_name(), |connection, _| self.ask_record(connection).map(drop))
    }

    fn rests(&self) -> bool {
        self.breaker.rests()
    }

    fn reset(&self) -> std::result::Result<(), Refusal> {
        self.must_reset.store(true, Ordering::SeqCst);
        self.run(&self.record_name(), |_, _| Ok(()))
    }
}
