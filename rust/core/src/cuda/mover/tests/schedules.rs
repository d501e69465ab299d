//! The mover, its thread and the pinning thread under random schedules, over streams that run in random orders.

use shuttle::rand::{Rng, thread_rng};

use super::super::LoadOrder;
use super::rig::*;
use crate::sync::try_schedules;

/// A few jobs of each kind; rows and blocks are used again once all have ended.
fn life() {
    let mut shape = Shape::small(thread_rng().r#gen());
    shape.piece = thread_rng().gen_range(0..4);
    let mut rig = Rig::new(&shape);
    let mut job = 0;
    for _ in 0..2 {
        let (mut rows_taken, mut blocks_taken, mut open) = (Vec::new(), Vec::new(), 0);
        for _ in 0..thread_rng().gen_range(1..5) {
            let count = thread_rng().gen_range(0..5);
            let rows = rig.draw(count, shape.rows, &mut rows_taken, thread_rng().r#gen());
            let blocks = rig.draw(rows.len(), shape.blocks, &mut blocks_taken, false);
            match thread_rng().gen_range(0..4) {
                0 => rig.store(job, &rows, &blocks).expect("valid"),
                1 => rig.load(job, &rows, &blocks, false).expect("valid"),
                2 => rig.load(job, &rows, &blocks, true).expect("valid"),
                _ => {
                    let order = if thread_rng().r#gen() { LoadOrder::ByLayers } else { LoadOrder::ByRows };
                    let by_layer = thread_rng().r#gen();
                    rig.load_joined(job, (&rows, &blocks), order, by_layer).expect("valid");
                }
            }
            (job, open) = (job + 1, open + 1);
        }
        if thread_rng().gen_bool(0.3) {
            // Closed at work: every job was done, or the mover says that the GPU may still be at it, for ever.
            let closed = rig.mover.close(LONG).expect("here");
            assert_eq!(rig.fake.violations(), Vec::<String>::new());
            if closed {
                rig.fake.finish();
            } else {
                std::mem::forget(rig);
            }
            return;
        }
        assert!(rig.wait(open).iter().all(|(_, succeeded)| *succeeded));
        rig.finish();
    }
}

#[test]
fn schedules_of_the_gpu_mover() {
    try_schedules("GPU mover over the fake driver", 500, life);
}
