//! Servers that come back with what they had before a reset.

use super::server::Server;
use super::{RedisRig, config, tier};
use crate::tier::fake::{Rows, key, space};
use crate::tier::redis::RedisTier;
use crate::tier::{Reason, Stored, Tier};

/// What an engine is made of: one stores and loads, one searches and resets.
struct Engine {
    worker: RedisTier,
    scheduler: RedisTier,
    rows: Rows,
}

impl Engine {
    /// One that has stored chunk 1, and found it.
    fn start(url: &str) -> Self {
        let open = || tier(space("a"), &config(url.to_owned()));
        let engine = Self { worker: open(), scheduler: open(), rows: Rows::new(2, 4096) };
        engine.worker.put(&engine.rows.chunk(1, &[0])).expect("stored");
        assert_eq!(engine.scheduler.present(&[key(1)]), Ok(vec![true]));
        engine
    }

    /// Nothing is found of what was stored before, by any of the tiers, until it is stored again.
    fn check_forgotten(&self, all: &[&RedisTier]) {
        for tier in all {
            assert_eq!(tier.present(&[key(1)]), Ok(vec![false]), "found after a reset");
            assert_eq!(tier.get(&self.rows.chunk(1, &[1])).expect_err("gone").reason, Reason::Absent);
        }
        assert_eq!(self.worker.put(&self.rows.chunk(1, &[0])), Ok(Stored::Written(4096)));
        for tier in all {
            assert_eq!(tier.present(&[key(1)]), Ok(vec![true]));
            assert_eq!(tier.get(&self.rows.chunk(1, &[1])), Ok(()));
        }
    }
}

#[test]
fn a_snapshot_from_before_a_reset_brings_nothing_back() {
    let mut server = Server::start(&[]);
    let engine = Engine::start(&server.url());
    // As an ordinary Redis does from time to time.
    server.text(&["SAVE"]);
    engine.scheduler.reset().expect("reset");
    assert_eq!(engine.worker.get(&engine.rows.chunk(1, &[1])).expect_err("gone").reason, Reason::Absent);
    server.kill();
    server.restart();
    assert!(server.names().len() > 2, "the old values are there again");
    engine.check_forgotten(&[&engine.scheduler, &engine.worker]);
}

/// A record from before the reset comes back; who saw that it was replaced comes first, whoever it is, or who stores.
fn check_old_record(rig: &RedisRig) {
    let engine = Engine::start(&rig.url);
    let name = rig.record();
    for round in 0..4 {
        let old = rig.owner(&name).get(&name).expect("there");
        engine.scheduler.reset().expect("reset");
        if round % 2 == 0 {
            assert_eq!(engine.worker.present(&[key(1)]), Ok(vec![false]));
        }
        rig.owner(&name).set(&name, &old);
        // This one was not there at the reset, and cannot know.
        let late = tier(space("a"), &config(rig.url.clone()));
        if round == 2 {
            assert_eq!(engine.worker.put(&engine.rows.chunk(2, &[0])), Ok(Stored::Written(4096)));
        }
        engine.check_forgotten(&[&engine.scheduler, &engine.worker, &late]);
    }
}

#[test]
fn an_old_record_is_not_believed_and_replaced() {
    check_old_record(&RedisRig::one());
}

#[test]
fn an_old_record_in_a_cluster_is_not_believed_and_replaced() {
    check_old_record(&RedisRig::cluster());
}

/// An engine on one server, the name of its record, and what that says.
fn with_record() -> (RedisRig, Engine, String, Vec<u8>) {
    let rig = RedisRig::one();
    let engine = Engine::start(&rig.url);
    let name = rig.record();
    let record = rig.owner(&name).get(&name).expect("there");
    (rig, engine, name, record)
}

#[test]
fn who_resets_remembers_what_it_had_never_read() {
    let (rig, engine, name, old) = with_record();
    let other = tier(space("a"), &config(rig.url.clone()));
    other.reset().expect("reset");
    rig.owner(&name).set(&name, &old);
    engine.check_forgotten(&[&other, &engine.worker]);
}

#[test]
fn a_record_that_is_only_missing_for_a_while_is_believed_again() {
    let (rig, engine, name, record) = with_record();
    rig.owner(&name).remove(&name);
    assert_eq!(engine.scheduler.present(&[key(1)]), Ok(vec![false]));
    rig.owner(&name).set(&name, &record);
    assert_eq!(engine.scheduler.present(&[key(1)]), Ok(vec![true]), "nobody has reset it");
}
