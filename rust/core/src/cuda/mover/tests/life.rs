//! Arguments, closing and dropping.

use std::sync::Arc;

use super::super::*;
use super::rig::*;
use crate::cuda::fake::Fake;

#[test]
fn wrong_arguments_are_refused_and_copy_nothing() {
    let mut rig = Rig::new(&Shape::small(1));
    for (rows, blocks, part) in [
        (vec![0], vec![], "1 rows for 0 blocks"),
        (vec![24], vec![0], "row 24"),
        (vec![0], vec![24], "block 24"),
    ] {
        let refusals = [
            rig.mover.submit_load(1, rows.clone(), blocks.clone(), LoadOrder::ByRows, None),
            rig.mover.submit_store(1, rows.clone(), blocks.clone(), None, COMPUTE),
        ];
        for refusal in refusals {
            let error = refusal.expect_err(part);
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().contains(part), "{error}");
        }
    }
    assert!(rig.mover.drain(LONG).expect("open") && rig.poll().is_empty());
    rig.finish();
}

#[test]
fn unpolled_jobs_are_limited() {
    let rig = Rig::new(&Shape::small(1));
    let mut refused = None;
    for job in 0..=crate::copy::JOBS_MAX as u64 {
        refused = rig.mover.submit_load(job, vec![], vec![], LoadOrder::ByRows, None).err();
        if refused.is_some() {
            break;
        }
    }
    assert!(refused.expect("a limit").to_string().contains("poll before"));
    assert_eq!(rig.mover.poll().expect("open").len(), crate::copy::JOBS_MAX);
    rig.mover.submit_load(1, vec![], vec![], LoadOrder::ByLayers, None).expect("room again");
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |shape: &Shape| {
        let error = Rig::with(shape, Arc::new(Fake::new(1))).map(drop).expect_err("does not fit");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        error.to_string()
    };
    assert!(refused(&Shape { layers: vec![(34, 0)], ..Shape::small(1) }).contains("multiples of 4"));
    assert!(refused(&Shape { stage: 0, ..Shape::small(1) }).contains("staging"));
}

#[test]
fn a_closed_mover_refuses_and_says_so_again() {
    let mut rig = Rig::new(&Shape::small(2));
    rig.store(1, &[0, 1, 2], &[3, 4, 5]).expect("open");
    assert!(rig.mover.close(LONG).expect("here"));
    assert!(rig.mover.close(Duration::ZERO).expect("idempotent"));
    let refusals = [
        rig.mover.submit_load(1, vec![], vec![], LoadOrder::ByLayers, None),
        rig.mover.submit_store(1, vec![], vec![], None, COMPUTE),
        rig.mover.settle_loads(LONG, LONG).map(drop),
        rig.mover.poll().map(drop),
        rig.mover.drain(LONG).map(drop),
    ];
    assert!(
        refusals.iter().all(|result| result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Closed))
    );
}

#[test]
fn closing_in_vain_gives_up_the_rest_and_keeps_what_the_gpu_may_use() {
    let shape = Shape { stage: 1, ..Shape::small(3) };
    let mut rig = Rig::new(&shape);
    rig.fake.freeze(STREAMS.load_scatter, true);
    rig.load(1, &(0..20).collect::<Vec<u32>>(), &(0..20).collect::<Vec<u32>>(), false).expect("open");
    thread::sleep(Duration::from_millis(20));
    assert!(!rig.mover.close(Duration::from_millis(10)).expect("here"));
    let shared = Arc::downgrade(&rig.mover.shared);
    while rig.mover.shared.queue.lock().thread_runs {
        thread::yield_now();
    }
    rig.fake.freeze(STREAMS.load_scatter, false);
    rig.fake.finish();
    drop(rig);
    assert!(shared.upgrade().is_some(), "kernels, events and the pool end under a GPU at work");
}

#[test]
fn a_job_given_up_half_way_ends_with_its_last_stage() {
    let mut rig = Rig::new(&Shape { stage: 1, ..Shape::small(4) });
    rig.fake.freeze(STREAMS.load_scatter, true);
    rig.load(1, &(0..20).collect::<Vec<u32>>(), &(0..20).collect::<Vec<u32>>(), false).expect("open");
    rig.store(2, &[20], &[20]).expect("open");
    thread::sleep(Duration::from_millis(20));
    thread::scope(|scope| {
        let closing = scope.spawn(|| rig.mover.close(Duration::from_millis(10)));
        thread::sleep(Duration::from_millis(100));
        rig.fake.freeze(STREAMS.load_scatter, false);
        assert!(!closing.join().expect("no panic").expect("here"));
    });
    let shared = Arc::downgrade(&rig.mover.shared);
    drop(rig);
    assert!(shared.upgrade().is_none());
}

#[test]
fn dropping_waits_for_jobs_in_flight_and_frees_everything() {
    for seed in 0..20 {
        let shape = Shape::small(seed);
        let fake = Arc::new(Fake::new(seed));
        let mut rig = Rig::with(&shape, Arc::clone(&fake)).expect("valid");
        rig.store(1, &[0, 1, 2, 3, 4], &[3, 4, 5, 6, 7]).expect("open");
        let Rig { mover, pool, .. } = &rig;
        assert!(pool.rows() == 24 && mover.drain(LONG).expect("open"));
        drop(rig);
        assert_eq!(fake.violations(), Vec::<String>::new());
        assert_eq!(fake.pinned(), []);
        assert!(STREAMS.store_copy.iter().all(|&stream| fake.is_finished(stream)));
    }
}
