//! Who goes first: loads, stores that waited long enough, and rows that are pinned.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::super::LoadOrder;
use super::super::queue::Limits;
use super::rig::*;
use crate::cuda::fake::Fake;

fn numbers(count: u32) -> Vec<u32> {
    (0..count).collect()
}

#[test]
fn a_load_overtakes_a_store_that_was_submitted_before() {
    for seed in 0..20 {
        let limits = Limits { store_stages: 2, loads_first: LONG, ..LIMITS };
        let mut rig = Rig::new(&Shape { limits, stage: 1, ..Shape::small(seed) });
        STREAMS.store_copy.iter().for_each(|&stream| rig.fake.freeze(stream, true));
        rig.store(1, &numbers(20), &numbers(20)).expect("open");
        rig.load(2, &[20, 21, 22], &[22, 21, 20], false).expect("open");
        assert_eq!(rig.wait(1), [(2, true)]);
        STREAMS.store_copy.iter().for_each(|&stream| rig.fake.freeze(stream, false));
        assert_eq!(rig.wait(1), [(1, true)]);
        rig.finish();
    }
}

#[test]
fn while_a_load_is_in_flight_a_store_waits_but_not_for_ever() {
    let limits = Limits { loads_first: Duration::from_millis(300), ..LIMITS };
    let mut rig = Rig::new(&Shape { limits, ..Shape::small(1) });
    rig.fake.freeze(STREAMS.load_scatter, true);
    rig.load(1, &[0, 1], &[0, 1], false).expect("open");
    rig.store(2, &[2, 3], &[2, 3]).expect("open");
    let start = Instant::now();
    assert_eq!(rig.wait(1), [(2, true)]);
    assert!(start.elapsed() >= Duration::from_millis(290), "{:?}", start.elapsed());
    rig.fake.freeze(STREAMS.load_scatter, false);
    assert_eq!(rig.wait(1), [(1, true)]);
    rig.finish();
}

#[test]
fn few_stages_are_submitted_ahead() {
    let limits = Limits { load_stages: 3, store_stages: 2, ..LIMITS };
    for (kernels, loads, stages) in [(STREAMS.load_scatter, true, 3), (STREAMS.store_gather, false, 2)] {
        let mut rig = Rig::new(&Shape { limits, stage: 1, ..Shape::small(3) });
        rig.fake.freeze(kernels, true);
        if loads {
            rig.load(1, &numbers(12), &numbers(12), false).expect("open");
        } else {
            rig.store(1, &numbers(12), &numbers(12)).expect("open");
        }
        std::thread::sleep(Duration::from_millis(30));
        let queue = rig.mover.shared.queue.lock();
        assert_eq!(queue.stages_in_flight(), stages);
        drop(queue);
        rig.fake.freeze(kernels, false);
        assert_eq!(rig.wait(1), [(1, true)]);
        rig.finish();
    }
}

#[test]
fn a_store_waits_for_its_rows_to_be_pinned_and_a_load_does_not() {
    let shape = Shape::small(5);
    let fake = Arc::new(Fake::new(5));
    fake.open_gate(false);
    let mut rig = Rig::with(&shape, fake).expect("valid");
    rig.store(1, &[3, 4], &[0, 1]).expect("open");
    rig.load(2, &[5], &[5], false).expect("open");
    assert_eq!(rig.wait(1), [(2, true)]);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((rig.poll(), rig.pool.pinned_bytes()), (vec![], 0));
    rig.fake.open_gate(true);
    assert_eq!(rig.wait(1), [(1, true)]);
    assert!(rig.pool.pinned_bytes() >= 5 * rig.pool.row_stride());
    rig.finish();
}

/// A rig that pins nothing before its gate is opened, and a store that waits for that as long as it says.
fn with_a_waiting_store(pinning: Duration) -> Rig {
    let limits = Limits { pinning, ..LIMITS };
    let fake = Arc::new(Fake::new(6));
    fake.open_gate(false);
    let mut rig = Rig::with(&Shape { limits, ..Shape::small(6) }, fake).expect("valid");
    rig.store(1, &[3, 4], &[0, 1]).expect("open");
    rig
}

#[test]
fn a_store_whose_rows_are_never_pinned_fails_in_the_end() {
    let mut rig = with_a_waiting_store(Duration::from_millis(50));
    assert_eq!(rig.wait(1), [(1, false)]);
    rig.fake.open_gate(true);
    rig.finish();
}

#[test]
fn a_drain_that_takes_too_long_leaves_nothing_that_would_still_be_submitted() {
    let mut rig = with_a_waiting_store(LONG);
    assert!(!rig.mover.drain(Duration::from_millis(20)).expect("open"));
    assert_eq!(rig.poll(), [(1, false)]);
    rig.fake.open_gate(true);
    rig.store(2, &[3, 4], &[0, 1]).expect("open");
    assert_eq!(rig.wait(1), [(2, true)]);
    rig.finish();
}

#[test]
fn who_drains_hears_of_a_store_whose_rows_are_never_pinned() {
    let mut rig = with_a_waiting_store(Duration::from_millis(50));
    let began = Instant::now();
    assert!(rig.mover.drain(LONG).expect("open") && began.elapsed() < LONG / 2);
    assert_eq!(rig.poll(), [(1, false)]);
    rig.fake.open_gate(true);
    rig.finish();
}

#[test]
fn without_pinning_everything_works_too() {
    let mut rig = Rig::new(&Shape { piece: 0, ..Shape::small(7) });
    rig.store(1, &numbers(9), &numbers(9)).expect("open");
    assert_eq!(rig.wait(1), [(1, true)]);
    rig.load(2, &numbers(9), &[9, 8, 7, 6, 5, 4, 3, 2, 1], true).expect("open");
    assert_eq!(rig.wait(1), [(2, true)]);
    assert_eq!(rig.pool.pinned_bytes(), 0);
    rig.finish();
}

#[test]
fn joining_submits_the_rest_and_only_the_part_is_waited_for() {
    let limits = Limits { load_stages: 1, ..LIMITS };
    for order in [LoadOrder::ByRows, LoadOrder::ByLayers] {
        let layers = vec![(64, 0), (64, 0), (64, 0)];
        let mut rig = Rig::new(&Shape { limits, layers, stage: 1, ..Shape::small(8) });
        rig.fake.freeze(STREAMS.load_scatter, true);
        rig.load_joined(1, (&numbers(9), &numbers(9)), order, true).expect("open");
        // All was submitted, although one stage may be in flight: the queue has nothing left of it.
        assert!(!rig.mover.shared.queue.lock().is_any_waiting());
        assert!(!rig.fake.is_finished(COMPUTE) && rig.poll().is_empty());
        rig.fake.freeze(STREAMS.load_scatter, false);
        assert_eq!(rig.wait(1), [(1, true)]);
        rig.mover.join_load(1, None, COMPUTE).expect("ended long ago");
        rig.finish();
    }
}

#[test]
fn parts_of_a_store_hold_what_was_computed_before_each() {
    for seed in 0..30 {
        let layers = vec![(64, 0), (48, 16), (64, 0)];
        let mut rig = Rig::new(&Shape { layers, seed, stage: 2, ..Shape::small(seed) });
        assert_eq!(rig.mover.store_parts().collect::<Vec<_>>(), [0, 2]);
        rig.store_by_parts(&numbers(9), &[9, 8, 7, 6, 5, 4, 3, 2, 1]);
        rig.finish();
    }
    let rig = Rig::new(&Shape::small(9));
    let error = rig.mover.submit_store(1, vec![0], vec![0], Some(2), COMPUTE).expect_err("2 parts");
    assert!(error.to_string().contains("part 2 of 2"), "{error}");
}

#[test]
fn a_layer_that_is_not_there_cannot_be_joined() {
    let rig = Rig::new(&Shape::small(9));
    let error = rig.mover.join_load(1, Some(2), COMPUTE).expect_err("2 layers");
    assert!(error.to_string().contains("layer 2 of 2"), "{error}");
}

#[test]
fn a_load_half_done_tells_when_it_will_end() {
    let limits = Limits { load_stages: 1, ..LIMITS };
    let mut rig = Rig::new(&Shape { limits, stage: 1, ..Shape::small(10) });
    let soon = |rig: &Rig, limit| rig.mover.settle_loads(limit, Duration::ZERO).expect("open");
    rig.fake.freeze(STREAMS.load_scatter, true);
    rig.load(1, &numbers(24), &numbers(24), false).expect("open");
    thread::sleep(Duration::from_millis(20));
    assert_eq!(soon(&rig, LONG), [], "nobody knows yet");
    // The fake runs a little with each question; the GPU is stopped again as soon as a stage is done.
    rig.fake.freeze(STREAMS.load_scatter, false);
    while rig.mover.shared.queue.lock().stages_done(1).is_some_and(|done| done < 2) {
        thread::yield_now();
    }
    let told = soon(&rig, LONG);
    assert!(told == [1] || rig.mover.shared.queue.lock().is_idle());
    assert!(!rig.mover.shared.queue.lock().is_any_waiting(), "all of it was submitted");
    assert_eq!(rig.wait(1), [(1, true)]);
    assert_eq!(soon(&rig, LONG), []);
    rig.finish();
}
