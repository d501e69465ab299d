//! Which server has which names: one has all, or the nodes of a cluster share them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::servers::{Fault, Servers, unexpected};
use super::url::{Address, Route, Target};
use super::wire::{Connection, Reply, command};
use crate::Result;
use crate::tier::{Reason, Refusal};

/// Slots of a cluster.
const SLOTS: u16 = 16_384;

/// One server, or a cluster.
#[derive(Debug)]
pub(super) enum Nodes {
    One(Servers),
    Cluster(Cluster),
}

/// A cluster, which is asked again who has what whenever something fails.
#[derive(Debug)]
pub(super) struct Cluster {
    login: Target,
    seeds: Vec<Address>,
    limit: Duration,
    map: Mutex<Map>,
}

#[derive(Debug, Default)]
struct Map {
    /// First and last slot of each range, and who has it. Empty: not known.
    ranges: Vec<(u16, u16, Address)>,
    /// Kept when the ranges are forgotten, with their connections.
    nodes: HashMap<Address, Arc<Servers>>,
}

impl Nodes {
    pub(super) fn new(target: Target, limit: Duration) -> Result<Self> {
        match target.route.clone() {
            Route::Cluster(seeds) => {
                Ok(Self::Cluster(Cluster { login: target, seeds, limit, map: Mutex::default() }))
            }
            _ => Servers::new(target, limit).map(Self::One),
        }
    }

    /// Whether names are on several servers.
    pub(super) fn are_many(&self) -> bool {
        matches!(self, Self::Cluster(_))
    }

    /// Runs `work` on the server that has `name`.
    pub(super) fn run<T>(
        &self,
        name: &str,
        work: impl Fn(&mut Connection) -> std::result::Result<T, Fault>,
    ) -> std::result::Result<T, Refusal> {
        match self {
            Self::One(servers) => servers.run(work),
            Self::Cluster(cluster) => {
                let ended = cluster.node_of(name).and_then(|(_, servers)| servers.run(work));
                if ended.as_ref().is_err_and(Refusal::is_fault) {
                    // It may be another node's by now.
                    cluster.map.lock().ranges.clear();
                }
                ended
            }
        }
    }

    /// The numbers of `names` that are on the same server, for each server.
    pub(super) fn groups(&self, names: &[String]) -> std::result::Result<Vec<Vec<usize>>, Refusal> {
        let Self::Cluster(cluster) = self else { return Ok(vec![(0..names.len()).collect()]) };
        let mut groups: HashMap<Address, Vec<usize>> = HashMap::new();
        for (number, name) in names.iter().enumerate() {
            groups.entry(cluster.node_of(name)?.0).or_default().push(number);
        }
        Ok(groups.into_values().collect())
    }
}

impl Cluster {
    fn node_of(&self, name: &str) -> std::result::Result<(Address, Arc<Servers>), Refusal> {
        let slot = slot_of(name);
        if self.map.lock().ranges.is_empty() {
            let ranges = self.ask_ranges()?;
            self.map.lock().ranges = ranges;
        }
        let mut map = self.map.lock();
        let range = map.ranges.iter().find(|(first, last, _)| (*first..=*last).contains(&slot));
        let Some((_, _, address)) = range.cloned() else {
            return Err(Refusal::new(Reason::Io, format!("no node of the cluster has slot {slot}")));
        };
        let servers = map.servers(&address, self)?;
        Ok((address, servers))
    }

    /// Who has which slots, by the first node to answer: those that were, then those of the URL.
    fn ask_ranges(&self) -> std::result::Result<Vec<(u16, u16, Address)>, Refusal> {
        let known: Vec<Address> = self.map.lock().nodes.keys().cloned().collect();
        let mut refused = Refusal::from(Reason::Io);
        for address in known.iter().chain(&self.seeds) {
            let servers = self.map.lock().servers(address, self)?;
            let asked = servers.run(|connection| {
                let mut text = Vec::new();
                command(&mut text, &[b"CLUSTER", b"SLOTS"]);
                connection.send(&text, 1)?;
                match connection.reply()? {
                    Reply::Array(ranges) => Ok(ranges),
                    other => Err(unexpected(other)),
                }
            });
            match asked {
                Ok(ranges) if !ranges.is_empty() => {
                    return Ok(ranges.iter().filter_map(|range| range_of(range, address)).collect());
                }
                Ok(_) => {}
                Err(refusal) => refused = refusal,
            }
        }
        Err(refused)
    }
}

impl Map {
    fn servers(
        &mut self,
        address: &Address,
        cluster: &Cluster,
    ) -> std::result::Result<Arc<Servers>, Refusal> {
        if let Some(servers) = self.nodes.get(address) {
            return Ok(Arc::clone(servers));
        }
        let target = Target { route: Route::Tcp(address.clone()), ..cluster.login.clone() };
        let servers = Servers::new(target, cluster.limit);
        let servers = Arc::new(servers.map_err(|error| Refusal::new(Reason::Internal, error.to_string()))?);
        self.nodes.insert(address.clone(), Arc::clone(&servers));
        Ok(servers)
    }
}

/// First and last slot and their master, of one element of the answer of the node at `asked`.
fn range_of(range: &Reply, asked: &Address) -> Option<(u16, u16, Address)> {
    let Reply::Array(words) = range else { return None };
    let [Reply::Integer(first), Reply::Integer(last), Reply::Array(master), ..] = &words[..] else {
        return None;
    };
    let [host, Reply::Integer(port), ..] = &master[..] else { return None };
    let host = match host {
        Reply::Bulk(Some(host)) if !host.is_empty() => String::from_utf8(host.clone()).ok()?,
        // The one that was asked.
        _ => asked.0.clone(),
    };
    let number = |number: &i64| u16::try_from(*number).ok();
    Some((number(first)?, number(last)?, (host, number(port)?)))
}

/// The slot of a name: of what is in its first braces, if there is something.
fn slot_of(name: &str) -> u16 {
    let tag = name.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    let hashed = tag.filter(|tag| !tag.is_empty()).unwrap_or(name);
    // CRC-16/XMODEM.
    let crc = hashed.bytes().fold(0_u16, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(byte) << 8), |crc, _| {
            if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 }
        })
    });
    crc % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slots that the cluster specification and `CLUSTER KEYSLOT` give.
    #[test]
    fn slots_are_those_of_redis() {
        for (name, slot) in
            [("123456789", 0x31c3), ("foo", 12_182), ("{foo}bar", 12_182), ("a{foo}{bar}", 12_182), ("", 0)]
        {
            assert_eq!(slot_of(name), slot, "{name}");
        }
        assert_ne!(slot_of("{}foo"), slot_of("foo"));
        assert_eq!(slot_of("foo{"), slot_of("foo{"));
    }
}
