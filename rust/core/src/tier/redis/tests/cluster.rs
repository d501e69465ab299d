//! A cluster of two nodes, and what happens when its slots move.

use std::thread;
use std::time::{Duration, Instant};

use super::server::Server;
use super::{LONG, RedisRig, config, tier};
use crate::tier::fake::contract::Rig;
use crate::tier::fake::{Rows, key, space};
use crate::tier::space::Generation;
use crate::tier::{Stored, Tier};

const SLOTS: usize = 16_384;

/// Two nodes that share the slots and know of each other.
pub(super) fn start() -> Vec<Server> {
    let servers: Vec<Server> = (0..2).map(|_| Server::start(&["--cluster-enabled", "yes"])).collect();
    for (number, server) in servers.iter().enumerate() {
        let slots = (number * SLOTS / 2..(number + 1) * SLOTS / 2).map(|slot| slot.to_string());
        let slots: Vec<String> = slots.collect();
        let words = ["CLUSTER", "ADDSLOTS"].into_iter().chain(slots.iter().map(String::as_str));
        assert_eq!(server.text(&words.collect::<Vec<_>>()), "OK");
    }
    let address = servers[1].address();
    let (host, port) = address.split_once(':').expect("both");
    assert_eq!(servers[0].text(&["CLUSTER", "MEET", host, port]), "OK");
    let end = Instant::now() + LONG;
    let knows_all = |server: &Server| {
        let info = server.text(&["CLUSTER", "INFO"]);
        info.contains("cluster_state:ok") && info.contains("cluster_slots_ok:16384")
    };
    while !servers.iter().all(knows_all) {
        assert!(Instant::now() < end, "the nodes do not find each other");
        thread::sleep(Duration::from_millis(20));
    }
    servers
}

#[test]
fn keys_are_shared_and_found_after_slots_moved() {
    let rig = RedisRig::cluster();
    let tier = tier(space("a"), &config(rig.url.clone()));
    let rows = Rows::new(2, 4096);
    let keys: Vec<_> = (0..40).map(key).collect();
    for name in 0..40 {
        assert!(matches!(tier.put(&rows.chunk(name, &[0])), Ok(Stored::Written(_))));
    }
    assert_eq!(tier.present(&keys), Ok(vec![true; 40]));
    let on_each: Vec<usize> = rig.servers.iter().map(|server| server.names().len()).collect();
    assert!(on_each.iter().all(|&count| count >= 20), "{on_each:?}");
    // All slots of a value without one go to the other node, as after a failover to an empty one.
    let name = rig.values().into_iter().find(|name| rig.servers[0].is_owner(name)).expect("some");
    let slot = rig.servers[0].slot(&name);
    for name in rig.servers[0].names() {
        if rig.servers[0].slot(&name) == slot {
            rig.servers[0].remove(&name);
        }
    }
    let (new, slot) = (rig.servers[1].text(&["CLUSTER", "MYID"]), slot.to_string());
    for server in rig.servers.iter().rev() {
        assert_eq!(server.text(&["CLUSTER", "SETSLOT", &slot, "NODE", &new]), "OK");
    }
    // One failure shows that something has changed; then the new owner is asked.
    let end = Instant::now() + LONG;
    while tier.present(&keys).map(|found| found.iter().filter(|&&found| found).count()) != Ok(39) {
        assert!(Instant::now() < end, "{:?}", tier.present(&keys));
    }
    let lost = (0..40).find(|&name| tier.present(&[key(name)]) == Ok(vec![false])).expect("one");
    assert!(matches!(tier.put(&rows.chunk(lost, &[0])), Ok(Stored::Written(_))));
    assert_eq!(tier.get(&rows.chunk(lost, &[1])), Ok(()));
    assert_eq!(tier.present(&keys), Ok(vec![true; 40]));
}

#[test]
fn what_another_thread_read_changes_no_answer() {
    let rig = RedisRig::cluster();
    let tier = tier(space("a"), &config(rig.url.clone()));
    tier.put(&Rows::new(1, 4096).chunk(1, &[0])).expect("stored");
    let found = tier.run(&tier.name_of(&key(1)), |connection, present| {
        // Whatever it is that another thread comes with: this call has asked for itself.
        assert!(tier.generations.learn(Generation([1; 16]), tier.generations.now()));
        tier.present_on(connection, present, &[key(1)], &[0])
    });
    assert_eq!(found, Ok(vec![true]));
}
