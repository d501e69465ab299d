//! The n-th call of the driver fails, for every n: jobs end once, and nothing touches what was given back.

use std::sync::Arc;

use super::super::*;
use super::rig::*;
use crate::cuda::fake::{Failing, Fake};

/// Interleavings in which each call fails.
const SEEDS: usize = 4;

/// Two stores, two loads and a synchronous load, of three stages each. Returns how many jobs were taken in.
fn submit_everything(rig: &mut Rig) -> usize {
    let rows = |first: u32| (first..first + 4).collect::<Vec<u32>>();
    let mut taken = 0;
    taken += usize::from(rig.store(1, &rows(0), &rows(4)).is_ok());
    taken += usize::from(rig.load(2, &[7, 9, 4], &[0, 3, 1], true).is_ok());
    // What the engine does with an error of the join is up to it; the job is told of all the same.
    let joined = rig.load_joined(5, (&rows(12), &rows(8)), LoadOrder::ByLayers, true);
    taken += usize::from(joined.is_ok() || rig.is_expected(5));
    taken += usize::from(rig.store(3, &[23, 21, 22], &rows(16)[..3]).is_ok());
    taken += usize::from(rig.load(4, &rows(16), &rows(20), false).is_ok());
    taken
}

/// Jobs told of in the end; they all are unless the mover gave up.
fn run(rig: &mut Rig) -> usize {
    let taken = submit_everything(rig);
    let deadline = Instant::now() + LONG;
    let mut told = 0;
    while told < taken {
        told += rig.poll().len();
        let broken = rig.mover.open().is_err();
        if broken {
            // Whatever can still end does so soon.
            let _ = rig.mover.close(Duration::from_secs(2));
            break;
        }
        assert!(Instant::now() < deadline, "{told} of {taken} jobs ended");
        thread::sleep(Duration::from_micros(50));
    }
    taken - told
}

fn rig(fake: &Arc<Fake>, seed: u64) -> Rig {
    let rig = Rig::with(&Shape::small(seed), Arc::clone(fake)).expect("valid");
    while rig.pool.pinned_bytes() < rig.pool.size_bytes() {
        thread::yield_now();
    }
    rig
}

fn fail_each_call(calls: usize, in_vain: bool) {
    let mut lost_once = false;
    for round in 0.. {
        let n = round / SEEDS;
        let fake = Arc::new(Fake::new(round as u64 * 7 + 1));
        let mut rig = rig(&fake, round as u64);
        let first = fake.calls() + n;
        fake.fail(Failing { first, calls, in_vain });
        let lost = run(&mut rig);
        // Nothing fails from here on.
        fake.fail(Failing { first: 0, calls: 0, in_vain });
        lost_once |= lost > 0;
        let broken = rig.mover.open().is_err();
        assert!(lost == 0 || broken, "{lost} jobs were never told of, call {n}");
        if !broken {
            assert!(rig.mover.drain(LONG).expect("open"));
        }
        rig.finish();
        if fake.calls() < first {
            assert!(lost_once, "no failure made the mover give up");
            return;
        }
    }
}

#[test]
fn any_single_call_may_fail() {
    fail_each_call(1, false);
}

#[test]
fn any_single_call_may_fail_after_its_work() {
    fail_each_call(1, true);
}

#[test]
fn any_two_calls_may_fail() {
    fail_each_call(2, false);
}

#[test]
fn the_driver_may_fail_for_good() {
    fail_each_call(usize::MAX, false);
}

#[test]
fn a_mover_that_cannot_be_made_leaves_nothing_behind() {
    for n in 0..100 {
        let fake = Arc::new(Fake::new(n as u64));
        fake.fail(Failing { first: n, calls: 1, in_vain: false });
        let shape = Shape { piece: 0, ..Shape::small(1) };
        match Rig::with(&shape, Arc::clone(&fake)) {
            Err(error) => assert_eq!(error.kind(), ErrorKind::Device),
            // The thread's own first call is the last one.
            Ok(rig) => {
                assert!(n > 5);
                drop(rig);
                return;
            }
        }
        assert_eq!(fake.violations(), Vec::<String>::new());
    }
    panic!("making a mover never ends");
}

#[test]
fn a_mover_that_gave_up_refuses_and_says_why() {
    let fake = Arc::new(Fake::new(1));
    let mut rig = rig(&fake, 1);
    rig.fake.freeze(STREAMS.load_scatter, true);
    rig.load(1, &[0], &[0], false).expect("open");
    while rig.mover.shared.queue.lock().stages_in_flight() == 0 {
        thread::yield_now();
    }
    fake.fail(Failing { first: fake.calls(), calls: usize::MAX, in_vain: false });
    let deadline = Instant::now() + LONG;
    while rig.mover.open().is_ok() {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
    let refusals = [
        rig.mover.submit_load(2, vec![0], vec![0], LoadOrder::ByRows, None),
        rig.mover.submit_store(2, vec![0], vec![0], None, COMPUTE),
        rig.mover.join_load(1, None, COMPUTE),
        rig.mover.drain(Duration::ZERO).map(drop),
    ];
    for refusal in refusals {
        let error = refusal.expect_err("gave up");
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().contains("CUDA_ERROR_ON_PURPOSE"), "{error}");
    }
    assert_eq!(rig.poll(), []);
    assert!(!rig.mover.close(Duration::ZERO).expect("here"));
}
