//! The Redis tier on a real `redis-server`, and on servers that answer as none should.

mod cluster;
mod failures;
mod rollback;
mod server;
mod strange;
mod tls;

use std::time::Duration;

use server::Server;

use super::{RedisConfig, RedisTier};
use crate::tier::fake::contract::Rig;
use crate::tier::fake::{Rows, contract, key, space};
use crate::tier::format::HEADER_BYTES;
use crate::tier::{Reason, Space, Stored, Tier};

/// More than any answer takes on a loaded machine.
const LONG: Duration = Duration::from_secs(30);

fn config(url: String) -> RedisConfig {
    RedisConfig { url, prefix: String::new(), ttl: None, timeout: LONG }
}

/// A tier that rests for no time, so that tests need not wait.
fn tier(space: Space, config: &RedisConfig) -> RedisTier {
    RedisTier::with(space, config, Duration::ZERO).expect("valid")
}

/// The contract on servers of its own.
struct RedisRig {
    servers: Vec<Server>,
    url: String,
}

impl RedisRig {
    fn one() -> Self {
        let server = Server::start(&[]);
        Self { url: server.url(), servers: vec![server] }
    }

    fn cluster() -> Self {
        let servers = cluster::start();
        let addresses: Vec<String> = servers.iter().map(Server::address).collect();
        Self { url: format!("redis-cluster://{}", addresses.join(",")), servers }
    }

    /// The server that has, or would have, the value.
    fn owner(&self, name: &str) -> &Server {
        self.servers.iter().find(|server| server.is_owner(name)).expect("one of them")
    }

    /// The parts of a value's payload, in their order.
    fn parts(&self, name: &str) -> Vec<String> {
        let parts = (1..).map(|part| part_of(name, part));
        parts.take_while(|part| self.owner(part).get(part).is_some()).collect()
    }

    /// The name of the only namespace's record.
    fn record(&self) -> String {
        self.names().into_iter().find(|name| name.ends_with("generation")).expect("there")
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.servers.iter().flat_map(Server::names).collect();
        names.sort();
        names
    }
}

/// A part of the value whose header has this name.
fn part_of(name: &str, part: usize) -> String {
    format!("{}{part}", name.strip_suffix('0').expect("a header"))
}

impl Rig for RedisRig {
    fn open(&self, space: Space) -> Box<dyn Tier> {
        Box::new(tier(space, &config(self.url.clone())))
    }

    fn values(&self) -> Vec<String> {
        let mut names = self.names();
        names.retain(|name| name.ends_with(":0"));
        names
    }

    fn read(&self, name: &str) -> Vec<u8> {
        let parts = self.parts(name);
        let names = std::iter::once(name).chain(parts.iter().map(String::as_str));
        names.map(|name| self.owner(name).get(name).expect("there")).collect::<Vec<_>>().concat()
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        self.parts(name).iter().for_each(|part| self.owner(part).remove(part));
        let (header, payload) = bytes.split_at(bytes.len().min(HEADER_BYTES));
        self.owner(name).set(name, header);
        for (number, bytes) in payload.chunks(super::values::PART_BYTES).enumerate() {
            let part = part_of(name, number + 1);
            self.owner(&part).set(&part, bytes);
        }
    }

    fn lose_records(&self) {
        for name in self.names().into_iter().filter(|name| name.ends_with("generation")) {
            self.owner(&name).remove(&name);
        }
    }
}

mod one_server {
    super::contract::tests!(super::RedisRig::one());
}

mod two_nodes {
    super::contract::tests!(super::RedisRig::cluster());
}

#[test]
fn values_are_cut_named_and_expire_as_documented() {
    let server = Server::start(&[]);
    let rows = Rows::new(3, 3 << 20);
    let config = RedisConfig {
        prefix: "mine:".to_owned(),
        ttl: Some(Duration::from_secs(1000)),
        ..config(server.url())
    };
    let tier = tier(space("a"), &config);
    let chunk = rows.chunk(1, &[2, 0, 1]);
    tier.put(&chunk).expect("stored");
    let lengths: Vec<(String, usize, bool)> = {
        let mut names = server.names();
        names.sort_by_key(|name| name.rsplit(':').next().map(str::to_owned));
        let length = |name: &String| server.get(name).expect("there").len();
        let ends = |name: &String| server.ttl_ms(name) > 900_000;
        names.iter().map(|name| (name.clone(), length(name), ends(name))).collect()
    };
    let shown: Vec<(&str, usize, bool)> = lengths
        .iter()
        .map(|(name, length, ends)| (name.rsplit(':').next().expect("one"), *length, *ends))
        .collect();
    assert_eq!(
        shown,
        [
            ("0", 4096, true),
            ("1", 4 << 20, true),
            ("2", 4 << 20, true),
            ("3", 1 << 20, true),
            ("generation", 96, false)
        ]
    );
    let home = format!("mine:lmcache_rs:1:{}:", crate::tier::space::hex(space("a").namespace.as_bytes()));
    assert!(lengths.iter().all(|(name, ..)| name.starts_with(&home)), "{lengths:?}");
    let braced = format!(":{{{}}}:0:", crate::tier::space::hex(key(1).as_bytes()));
    assert!(lengths[..4].iter().all(|(name, ..)| name.contains(&braced)), "{lengths:?}");
}

#[test]
fn users_passwords_databases_and_sockets_are_honoured() {
    let server = Server::start(&["--requirepass", "sec:ret", "--user", "me", "on", ">mine", "~*", "+@all"]);
    let rows = Rows::new(1, 4096);
    let chunk = rows.chunk(1, &[0]);
    let at = server.address();
    for (url, works) in [
        (format!("redis://:sec%3Aret@{at}"), true),
        (format!("valkey://me:mine@{at}/3"), true),
        (format!("unix://:sec:ret@{}?db=4", server.socket()), true),
        (format!("redis://{at}"), false),
        (format!("redis://me:sec:ret@{at}"), false),
        (format!("redis://:sec:ret@{at}/99"), false),
    ] {
        let tier = tier(space("a"), &config(url.clone()));
        match tier.put(&chunk) {
            // Each database has values of its own.
            Ok(stored) => assert!(works && matches!(stored, Stored::Written(_)), "{url}: {stored:?}"),
            Err(refusal) => {
                assert!(!works, "{url}: {refusal}");
                assert!(matches!(refusal.reason, Reason::Denied | Reason::Io), "{refusal}");
                assert!(!format!("{refusal:?} {tier:?}").contains("ret"), "{refusal:?}");
            }
        }
    }
}

#[test]
fn a_missing_part_is_a_miss_and_can_be_stored_again() {
    let server = Server::start(&[]);
    let rows = Rows::new(6, 3 << 20);
    let tier = tier(space("a"), &config(server.url()));
    let chunk = rows.chunk(1, &[0, 1, 2]);
    rows.fill(&[0, 1, 2], 1);
    let stored = rows.read(&[0, 1, 2]);
    tier.put(&chunk).expect("stored");
    for part in 1..4 {
        let name =
            server.names().into_iter().find(|name| name.ends_with(&format!(":{part}"))).expect("there");
        server.remove(&name);
        assert_eq!(tier.present(&[key(1)]), Ok(vec![true]), "as it seems");
        assert_eq!(tier.get(&rows.chunk(1, &[3, 4, 5])).expect_err("refused").reason, Reason::Truncated);
        assert_eq!(tier.present(&[key(1)]), Ok(vec![false]));
        assert!(matches!(tier.put(&chunk), Ok(Stored::Written(_))));
        assert_eq!(tier.get(&rows.chunk(1, &[3, 4, 5])), Ok(()));
        assert!(rows.read(&[3, 4, 5]) == stored);
    }
}
