//! Every system call fails once, in every way, and then for good: misses and dropped stores, nothing else.

use super::super::DiskTier;
use super::super::faults::SHORT;
use super::rig::Medium;
use crate::tier::fake::{Rows, space};
use crate::tier::{Reason, Refusal, Stored, Tier};

const ERRORS: [i32; 7] =
    [libc::EIO, libc::ENOSPC, libc::EACCES, libc::EROFS, libc::EINTR, libc::EINVAL, SHORT];

/// More calls than anything here makes.
const CALLS_MAX: u64 = 200;

/// Fresh directories with value 1 stored, and room for three.
struct Scene {
    medium: Medium,
    rows: Rows,
    tier: DiskTier,
}

impl Scene {
    fn new() -> Self {
        let (medium, rows) = (Medium::in_memory(), Rows::new(4, 12_288));
        let tier = medium.tier(space("a"), 3 * (4096 + 2 * 12_288));
        let scene = Self { medium, rows, tier };
        assert!(matches!(scene.put(1), Ok(Stored::Written(_))));
        scene
    }

    fn put(&self, name: u64) -> Result<Stored, Refusal> {
        self.rows.fill(&[0, 2], name);
        self.tier.put(&self.rows.chunk(name, &[0, 2]))
    }

    /// Whether the value is there; other bytes than its own fail the test.
    fn get(&self, name: u64) -> Result<(), Refusal> {
        self.rows.fill(&[0, 2], name);
        let expected = self.rows.read(&[0, 2]);
        self.tier.get(&self.rows.chunk(name, &[3, 1]))?;
        assert!(self.rows.read(&[3, 1]) == expected, "other bytes of {name}");
        Ok(())
    }

    /// Nothing was left that is not counted, and all works.
    fn check_well(&self, what: &str) {
        let usage = self.medium.usage();
        assert!(usage.is_none_or(|usage| usage >= self.medium.bytes()), "{what}: {usage:?}");
        for name in 10..14 {
            self.put(name).unwrap_or_else(|refusal| panic!("{what}: {refusal}"));
            self.get(name).unwrap_or_else(|refusal| panic!("{what}: {refusal}"));
        }
        assert!(self.medium.temporaries().is_empty(), "{what}: eviction removes what was left");
        assert_eq!(self.medium.usage(), Some(self.medium.bytes()), "{what}");
    }
}

/// Runs `act` with its n-th call failing, for each n until all succeed. `undone` says that one failure leaves no trace.
fn for_every_call(undone: bool, act: impl Fn(&Scene) -> Result<(), Refusal>) {
    for lasts in [false, true] {
        for error in ERRORS {
            let mut n = 0;
            loop {
                let what = format!("call {n} fails with {error}, for good: {lasts}");
                let scene = Scene::new();
                scene.medium.files.faults.plan(n, error, lasts);
                let ended = act(&scene);
                let had_failed = scene.medium.files.faults.end();
                if let Err(refusal) = &ended {
                    let (usage, bytes) = (scene.medium.usage(), scene.medium.bytes());
                    assert!(
                        lasts || !undone || usage == Some(bytes),
                        "{what}: what was begun is undone: {usage:?}, {bytes}"
                    );
                    assert!(had_failed, "{what}: {refusal} for no reason");
                    assert_ne!(refusal.reason, Reason::Internal, "{what}");
                }
                for name in 1..4 {
                    let _ = scene.get(name);
                }
                scene.check_well(&what);
                if !had_failed {
                    break;
                }
                n += 1;
                assert!(n < CALLS_MAX, "calls without an end");
            }
            assert!(n > 3, "{n} calls");
        }
    }
}

#[test]
fn of_a_store() {
    for_every_call(true, |scene| scene.put(2).map(drop));
}

#[test]
fn of_a_store_that_evicts() {
    for_every_call(false, |scene| {
        scene.put(2)?;
        scene.put(3)?;
        scene.put(4).map(drop)
    });
}

#[test]
fn of_a_load() {
    for_every_call(true, |scene| {
        let ended = scene.get(1);
        // What was read in part is no sign of a bad file.
        assert!(!ended.as_ref().is_err_and(|r| r.reason == Reason::Corrupt), "{ended:?}");
        ended
    });
}

#[test]
fn of_a_reset() {
    for_every_call(true, |scene| {
        let ended = scene.tier.reset();
        let keys = [scene.rows.chunk(1, &[0]).key];
        if ended.is_ok() {
            assert_ne!(scene.tier.present(&keys), Ok(vec![true]));
            assert!(scene.get(1).is_err());
        } else {
            // Not done, so nothing is found here before it is.
            assert!(scene.get(1).is_err());
            assert_ne!(scene.tier.present(&keys), Ok(vec![true]));
        }
        ended
    });
}

#[test]
fn without_direct_io_it_works_through_the_page_cache() {
    let scene = Scene::new();
    // The first call that is refused as O_DIRECT is where there is none: the value is stored all the same.
    assert!(scene.tier.is_direct());
    for n in 0..CALLS_MAX {
        let scene = Scene::new();
        scene.medium.files.faults.plan(n, libc::EINVAL, false);
        let stored = scene.put(2);
        scene.medium.files.faults.end();
        if !scene.tier.is_direct() {
            assert!(matches!(stored, Ok(Stored::Written(_))), "{stored:?}");
            assert_eq!(scene.get(2), Ok(()));
            return;
        }
    }
    panic!("O_DIRECT was never given up");
}
