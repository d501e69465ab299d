//! Random jobs over random layouts in random interleavings of the streams.

use proptest::prelude::*;

use super::super::LoadOrder;
use super::rig::*;

fn shape() -> impl Strategy<Value = Shape> {
    let layer = (1_usize..40, 0_usize..3).prop_map(|(page, gap)| (page * 4, gap * 4));
    let wide = (1_usize..20, 0_usize..3).prop_map(|(page, gap)| (page * 16, gap * 16));
    let large = (1_usize..3, 0_usize..2).prop_map(|(page, gap)| (page * 4_112, gap * 16));
    let layers = prop_oneof![
        2 => prop::collection::vec(layer, 1..5),
        2 => prop::collection::vec(wide, 1..5),
        1 => prop::collection::vec(large, 1..4),
    ];
    (layers, any::<bool>(), 16_usize..40, 16_usize..40, 1_usize..5, 0_usize..6, any::<u64>()).prop_map(
        |(layers, block_outer, rows, blocks, stage, piece, seed)| Shape {
            layers,
            block_outer,
            rows,
            blocks,
            stage,
            piece,
            seed,
            limits: LIMITS,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_job_moves_its_bytes_and_nobody_sees_others(
        shape in shape(), steps in prop::collection::vec((0_usize..8, 0_usize..9, any::<bool>()), 1..10)
    ) {
        let mut rig = Rig::new(&shape);
        let gaps = rig.gaps();
        let (mut rows_taken, mut blocks_taken) = (Vec::new(), Vec::new());
        let mut open = 0;
        for (number, (kind, count, runs)) in steps.into_iter().enumerate() {
            let count = count.min(shape.rows - rows_taken.len()).min(shape.blocks - blocks_taken.len());
            let rows = rig.draw(count, shape.rows, &mut rows_taken, runs);
            let blocks = rig.draw(count, shape.blocks, &mut blocks_taken, false);
            let job = number as u64;
            match kind {
                0 | 1 => rig.store(job, &rows, &blocks).expect("valid"),
                2 => rig.load(job, &rows, &blocks, false).expect("valid"),
                3 => rig.load(job, &rows, &blocks, true).expect("valid"),
                _ => {
                    let order = if kind < 6 { LoadOrder::ByLayers } else { LoadOrder::ByRows };
                    rig.load_joined(job, (&rows, &blocks), order, kind % 2 == 0).expect("valid");
                }
            }
            open += 1;
            // Now and then the world waits, and rows and blocks are used again.
            if count % 4 == 3 {
                prop_assert!(rig.wait(open).iter().all(|(_, succeeded)| *succeeded));
                open = 0;
                rig.finish();
                (rows_taken, blocks_taken) = (Vec::new(), Vec::new());
            }
        }
        prop_assert!(rig.wait(open).iter().all(|(_, succeeded)| *succeeded));
        prop_assert!(rig.mover.drain(LONG).expect("open"));
        rig.finish();
        prop_assert!(rig.zeros() >= gaps);
        prop_assert!(rig.mover.close(LONG).expect("here"));
    }
}
