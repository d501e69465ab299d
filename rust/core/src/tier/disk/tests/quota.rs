//! Who leaves when room is needed.

use std::fs;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};

use super::super::quota::Quota;
use super::rig::Medium;
use crate::tier::fake::{Rows, space};
use crate::tier::{Chunk, Reason, Stored, Tier};

/// Of a chunk of one small row.
const VALUE_BYTES: u64 = 8192;

/// Later than what was touched before by more than the clock's grain.
fn tick() {
    thread::sleep(Duration::from_millis(5));
}

fn store(tier: &dyn Tier, chunk: &Chunk) {
    assert_eq!(tier.put(chunk), Ok(Stored::Written(4096)));
    tick();
}

fn found(tier: &dyn Tier, rows: &Rows, names: &[u64]) -> Vec<u64> {
    let there = |name: &&u64| tier.present(&[rows.chunk(**name, &[0]).key]) == Ok(vec![true]);
    names.iter().filter(there).copied().collect()
}

#[test]
fn the_least_recently_used_leaves_first() {
    let (medium, rows) = (Medium::new(1), Rows::new(1, 4096));
    let tier = medium.tier(space("a"), 4 * VALUE_BYTES);
    let chunk = |name| rows.chunk(name, &[0]);
    (1..=4).for_each(|name| store(&tier, &chunk(name)));
    // Loaded, and stored again: both are uses.
    tier.get(&chunk(1)).expect("there");
    tick();
    assert_eq!(tier.put(&chunk(2)), Ok(Stored::Present));
    tick();
    store(&tier, &chunk(5));
    assert_eq!(found(&tier, &rows, &[1, 2, 3, 4, 5]), [1, 2, 4, 5]);
    store(&tier, &chunk(6));
    assert_eq!(found(&tier, &rows, &[1, 2, 4, 5, 6]), [1, 2, 5, 6]);
    store(&tier, &chunk(7));
    assert_eq!(found(&tier, &rows, &[1, 2, 5, 6, 7]), [2, 5, 6, 7]);
    assert_eq!((medium.bytes(), medium.usage()), (4 * VALUE_BYTES, Some(4 * VALUE_BYTES)));
}

#[test]
fn a_prefix_outlives_its_extensions() {
    let (medium, rows) = (Medium::new(1), Rows::new(1, 4096));
    let tier = medium.tier(space("a"), 6 * VALUE_BYTES);
    let chunk = |name: u64| Chunk { position: u32::try_from(name).expect("small"), ..rows.chunk(name, &[0]) };
    (0..6).for_each(|name| store(&tier, &chunk(name)));
    (0..6).for_each(|name| tier.get(&chunk(name)).expect("there"));
    for name in 6..9 {
        store(&tier, &rows.chunk(name, &[0]));
    }
    assert_eq!(found(&tier, &rows, &[0, 1, 2, 3, 4, 5]), [0, 1, 2]);
}

#[test]
fn the_quota_is_the_directorys() {
    let (medium, rows) = (Medium::new(1), Rows::new(1, 4096));
    let quota = 10 * VALUE_BYTES;
    let tiers: Vec<_> = ["a", "a", "b", "c"].map(|name| medium.tier(space(name), quota)).into();
    thread::scope(|scope| {
        for (number, tier) in tiers.iter().enumerate() {
            let medium = &medium;
            scope.spawn(move || {
                let rows = Rows::new(1, 4096);
                for name in 0..40 {
                    let ended = tier.put(&rows.chunk(name * 10 + number as u64, &[0]));
                    assert!(
                        ended.is_ok() || ended.as_ref().is_err_and(|r| r.reason == Reason::Quota),
                        "{ended:?}"
                    );
                    // Counted one after the other while others write and rename: what is there for sure is less.
                    assert!(medium.bytes() <= quota + 4 * VALUE_BYTES);
                }
            });
        }
    });
    assert!(medium.bytes() <= quota, "{}", medium.bytes());
    assert_eq!(medium.usage(), Some(medium.bytes()));
    assert!(medium.temporaries().is_empty());
    assert_eq!(tiers[0].put(&rows.chunk(1, &[0])), Ok(Stored::Written(4096)));
}

#[test]
fn the_dead_and_the_stale_leave_first_and_writers_stay() {
    let (medium, rows) = (Medium::new(1), Rows::new(1, 4096));
    let tier = medium.tier(space("a"), 5 * VALUE_BYTES);
    let chunk = |name| rows.chunk(name, &[0]);
    (1..=2).for_each(|name| store(&tier, &chunk(name)));
    let path = medium.values().pop().expect("stored");
    let leave = |name: &str| {
        let path = path.with_file_name(name);
        fs::write(&path, [0; 8192]).expect("written");
        fs::File::options().write(true).open(path).expect("there")
    };
    let alive = leave("alive.tmp");
    flock(alive.as_fd(), FlockOperation::NonBlockingLockExclusive).expect("free");
    let dead = leave("dead.tmp");
    dead.set_modified(SystemTime::now() + Duration::from_secs(1000)).expect("set");
    drop(dead);
    let other = medium.tier(space("b"), 5 * VALUE_BYTES);
    store(&other, &chunk(1));
    let stale = medium.values().into_iter().find(|other| other.parent() != path.parent()).expect("stored");
    // A value of a generation that is none any more, and not swept: as after a kill.
    let elsewhere = stale.ancestors().nth(3).expect("a namespace").join("0123/45").join("value.kv");
    fs::create_dir_all(elsewhere.parent().expect("one")).expect("made");
    fs::rename(&stale, &elsewhere).expect("renamed");
    fs::write(medium.path(0).join("lmcache_rs-1/usage"), "").expect("written");
    // Five are there of at most five: the dead one leaves, then the stale one, then the oldest.
    store(&tier, &chunk(3));
    assert_eq!(medium.temporaries().len(), 1);
    assert!(elsewhere.exists());
    store(&tier, &chunk(4));
    assert!(!elsewhere.exists());
    assert_eq!(found(&tier, &rows, &[1, 2, 3, 4]), [1, 2, 3, 4]);
    store(&tier, &chunk(5));
    assert_eq!(found(&tier, &rows, &[1, 2, 3, 4, 5]), [2, 3, 4, 5]);
    assert_eq!(medium.temporaries().len(), 1, "somebody writes it");
}

#[test]
fn a_value_larger_than_the_quota_moves_nobody() {
    let (medium, rows) = (Medium::new(1), Rows::new(3, 4096));
    let tier = medium.tier(space("a"), 2 * VALUE_BYTES);
    (1..=2).for_each(|name| store(&tier, &rows.chunk(name, &[0])));
    let large = Rows::new(8, 4096).chunk(3, &[0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(tier.put(&large).expect_err("too large").reason, Reason::Quota);
    assert_eq!(found(&tier, &rows, &[1, 2]), [1, 2]);
}

#[test]
fn a_wrong_count_is_corrected() {
    let (medium, rows) = (Medium::new(1), Rows::new(1, 4096));
    let tier = medium.tier(space("a"), 3 * VALUE_BYTES);
    (1..=2).for_each(|name| store(&tier, &rows.chunk(name, &[0])));
    for usage in [&b""[..], &[1, 2, 3], &u64::MAX.to_le_bytes(), &(3 * VALUE_BYTES).to_le_bytes()] {
        fs::write(medium.path(0).join("lmcache_rs-1/usage"), usage).expect("written");
        assert!(tier.get(&rows.chunk(1, &[0])).is_ok());
        store(&tier, &rows.chunk(3, &[0]));
        assert_eq!(medium.usage(), Some(3 * VALUE_BYTES));
        assert_eq!(found(&tier, &rows, &[1, 2, 3]), [1, 2, 3]);
        let path =
            medium.values().into_iter().max_by_key(|path| fs::metadata(path).expect("there").modified().ok());
        fs::remove_file(path.expect("stored")).expect("removed");
    }
}

#[test]
fn who_holds_the_lock_for_long_costs_a_store() {
    let (medium, rows) = (Medium::new(1), Rows::new(1, 4096));
    let tier = medium.tier(space("a"), u64::MAX);
    store(&tier, &rows.chunk(1, &[0]));
    let usage = fs::File::open(medium.path(0).join("lmcache_rs-1/usage")).expect("there");
    flock(usage.as_fd(), FlockOperation::NonBlockingLockExclusive).expect("free");
    assert_eq!(tier.put(&rows.chunk(2, &[0])).expect_err("locked").reason, Reason::Locked);
    // Readers need no lock.
    assert_eq!(tier.get(&rows.chunk(1, &[0])), Ok(()));
    drop(usage);
    store(&tier, &rows.chunk(2, &[0]));
}

#[test]
fn a_process_that_was_forked_under_the_lock_does_not_keep_it() {
    let (medium, rows) = (Medium::new(1), Rows::new(1, 4096));
    let tier = medium.tier(space("a"), u64::MAX);
    let quota = Quota::new(medium.path(0).join("lmcache_rs-1"), u64::MAX, medium.files.clone());
    let locked = quota.lock().expect("free");
    let forked = locked.forked();
    drop(locked);
    store(&tier, &rows.chunk(1, &[0]));
    drop(forked);
}
