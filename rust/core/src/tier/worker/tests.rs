//! The queue over a tier that fails, hangs and panics on demand.

use std::collections::BTreeMap;

use super::*;
use crate::tier::fake::{Fault, FaultyTier, Medium, MemoryTier, Rows, key, space};
use crate::tier::{Ended, Stored};

const LONG: Duration = Duration::from_secs(60);

const CONFIG: TierQueueConfig = TierQueueConfig { threads: 3, stores_max: 100, loads_max: 100, wait: LONG };

type Faulty = FaultyTier<MemoryTier>;

fn queue(config: &TierQueueConfig) -> (TierQueue, Faulty) {
    let tier = FaultyTier::new(MemoryTier::new(space("queue"), Medium::default()));
    (TierQueue::new(Arc::new(tier.clone()), config).expect("valid"), tier)
}

/// Everything that ended, by job and index; a task that is told twice fails the test.
fn poll(queue: &TierQueue, ended: &mut BTreeMap<(u64, usize), Ended>) {
    for outcome in queue.poll().expect("open") {
        assert!(outcome.seconds >= 0.0);
        let before = ended.insert((outcome.job, outcome.index), outcome.ended);
        assert!(before.is_none(), "job {} told twice", outcome.job);
    }
}

fn drained(queue: &TierQueue) -> BTreeMap<(u64, usize), Ended> {
    assert!(queue.drain(LONG).expect("open"));
    let mut ended = BTreeMap::new();
    poll(queue, &mut ended);
    ended
}

fn refused(ended: &Ended) -> Option<Reason> {
    match ended {
        Ended::Stored(Err(refusal)) | Ended::Loaded(Err(refusal)) | Ended::Found(Err(refusal)) => {
            Some(refusal.reason)
        }
        _ => None,
    }
}

#[test]
fn each_chunk_ends_by_itself_and_is_counted() {
    let (queue, _) = queue(&CONFIG);
    let rows = Rows::new(8, 4096);
    rows.fill(&[0, 1], 1);
    let chunk = |name: u64, row: u32| rows.chunk(name, &[row]);
    queue.store(1, vec![chunk(1, 0), chunk(2, 1)]).expect("open");
    let ended = drained(&queue);
    assert_eq!(ended[&(1, 0)], Ended::Stored(Ok(Stored::Written(4096))));
    assert_eq!(ended[&(1, 1)], Ended::Stored(Ok(Stored::Written(4096))));
    queue.store(2, vec![chunk(1, 0)]).expect("open");
    queue.find(3, vec![key(1), key(9), key(2)]).expect("open");
    queue.load(4, vec![chunk(1, 2), chunk(2, 3), chunk(9, 4)]).expect("open");
    queue.load(5, vec![]).expect("open");
    let ended = drained(&queue);
    assert_eq!(ended[&(2, 0)], Ended::Stored(Ok(Stored::Present)));
    assert_eq!(ended[&(3, 0)], Ended::Found(Ok(vec![true, false, true])));
    assert_eq!(ended[&(4, 0)], Ended::Loaded(Ok(4096)));
    assert_eq!(refused(&ended[&(4, 2)]), Some(Reason::Absent));
    assert_eq!(ended.len(), 5);
    assert!(rows.read(&[2, 3]) == rows.read(&[0, 1]));
    let counters = queue.counters().expect("here");
    assert_eq!((counters.stores.chunks, counters.stores.bytes, counters.present), (2, 8192, 1));
    assert_eq!((counters.loads.chunks, counters.loads.bytes), (2, 8192));
    assert_eq!((counters.loads.refused(Reason::Absent), counters.finds.chunks), (1, 1));
}

#[test]
fn loads_go_first_and_stores_leave_them_a_thread() {
    let (several, tier) = queue(&CONFIG);
    let rows = Rows::new(8, 4096);
    tier.set(Fault::Hang);
    several.store(1, (0..5).map(|name| rows.chunk(name, &[0])).collect()).expect("open");
    tier.wait_hanging(2);
    several.load(2, vec![rows.chunk(9, &[1])]).expect("open");
    tier.wait_hanging(3);
    assert_eq!(tier.calls(), 3, "a third store would be the fourth");
    tier.set(Fault::None);
    let (one, tier) = queue(&TierQueueConfig { threads: 1, ..CONFIG });
    tier.set(Fault::Hang);
    one.store(1, vec![rows.chunk(1, &[0]), rows.chunk(2, &[0])]).expect("open");
    tier.wait_hanging(1);
    one.load(2, vec![rows.chunk(1, &[1])]).expect("open");
    one.find(3, vec![key(1)]).expect("open");
    tier.set(Fault::None);
    assert!(one.drain(LONG).expect("open"));
    let order: Vec<u64> = one.poll().expect("open").iter().map(|outcome| outcome.job).collect();
    assert_eq!(order, [1, 3, 2, 1]);
}

#[test]
fn what_finds_no_room_is_dropped() {
    let (queue, tier) = queue(&TierQueueConfig { threads: 1, stores_max: 2, loads_max: 1, wait: LONG });
    let rows = Rows::new(2, 4096);
    tier.set(Fault::Hang);
    queue.store(1, vec![rows.chunk(1, &[0])]).expect("open");
    tier.wait_hanging(1);
    // The same value in flight, two that wait, one too many.
    queue.store(2, [1, 2, 3, 4].map(|name| rows.chunk(name, &[0])).into()).expect("open");
    queue.load(3, vec![rows.chunk(1, &[1]), rows.chunk(2, &[1])]).expect("open");
    let mut ended = BTreeMap::new();
    poll(&queue, &mut ended);
    let reasons: Vec<_> =
        ended.iter().map(|(&name, ended)| (name, refused(ended).expect("refused"))).collect();
    assert_eq!(reasons, [((2, 0), Reason::InFlight), ((2, 3), Reason::Full), ((3, 1), Reason::Full)]);
    tier.set(Fault::None);
    let ended = drained(&queue);
    assert_eq!(ended.keys().copied().collect::<Vec<_>>(), [(1, 0), (2, 1), (2, 2), (3, 0)]);
    queue.store(4, vec![rows.chunk(4, &[0])]).expect("open");
    assert_eq!(drained(&queue)[&(4, 0)], Ended::Stored(Ok(Stored::Written(4096))));
    assert_eq!(queue.counters().expect("here").stores.refused(Reason::Full), 1);
}

#[test]
fn what_waits_too_long_ends_although_every_thread_hangs() {
    let (queue, tier) = queue(&TierQueueConfig { threads: 1, wait: Duration::from_millis(30), ..CONFIG });
    let rows = Rows::new(2, 4096);
    tier.set(Fault::Hang);
    queue.store(1, vec![rows.chunk(1, &[0])]).expect("open");
    tier.wait_hanging(1);
    queue.load(2, vec![rows.chunk(2, &[1]), rows.chunk(3, &[1])]).expect("open");
    queue.store(3, vec![rows.chunk(2, &[0])]).expect("open");
    let mut ended = BTreeMap::new();
    while ended.len() < 3 {
        thread::sleep(Duration::from_millis(1));
        poll(&queue, &mut ended);
    }
    assert!(ended.values().all(|ended| refused(ended) == Some(Reason::Late)), "{ended:?}");
    assert!(!ended.contains_key(&(1, 0)), "its row is in use");
    tier.set(Fault::None);
    assert_eq!(drained(&queue)[&(1, 0)], Ended::Stored(Ok(Stored::Written(4096))));
}

#[test]
fn after_a_miss_the_rest_of_the_prefix_is_not_loaded() {
    let (queue, tier) = queue(&TierQueueConfig { threads: 1, ..CONFIG });
    let rows = Rows::new(4, 4096);
    queue.store(1, [1, 3, 4].map(|name| rows.chunk(name, &[0])).into()).expect("open");
    drained(&queue);
    tier.set(Fault::Hang);
    queue.find(1, vec![]).expect("open");
    tier.wait_hanging(1);
    // Two loads of the same name: only the one with the hole ends.
    queue.load(7, [1, 2, 3, 4].map(|name| rows.chunk(name, &[1])).into()).expect("open");
    queue.load(8, vec![rows.chunk(3, &[2])]).expect("open");
    let calls = tier.calls();
    tier.set(Fault::None);
    let ended = drained(&queue);
    let reasons: Vec<_> =
        ended.iter().filter(|(name, _)| name.0 > 1).map(|(_, ended)| refused(ended)).collect();
    assert_eq!(reasons, [None, Some(Reason::Absent), Some(Reason::Broken), Some(Reason::Broken), None]);
    assert_eq!(tier.calls() - calls, 3);
}

#[test]
fn a_panic_is_a_refusal() {
    let (queue, tier) = queue(&CONFIG);
    let rows = Rows::new(1, 4096);
    tier.set(Fault::Panic);
    for job in 0..6 {
        queue.store(job, vec![rows.chunk(job, &[0])]).expect("open");
    }
    assert!(drained(&queue).values().all(|ended| refused(ended) == Some(Reason::Internal)));
    tier.set(Fault::Refuse(Reason::Io));
    queue.find(1, vec![key(1)]).expect("open");
    assert_eq!(refused(&drained(&queue)[&(1, 0)]), Some(Reason::Io));
    tier.set(Fault::None);
    queue.store(1, vec![rows.chunk(1, &[0])]).expect("open");
    assert_eq!(drained(&queue)[&(1, 0)], Ended::Stored(Ok(Stored::Written(4096))));
}

#[test]
fn closing_ends_in_time() {
    let (well, tier) = queue(&TierQueueConfig { threads: 2, ..CONFIG });
    let rows = Rows::new(1, 4096);
    well.store(1, (0..20).map(|name| rows.chunk(name, &[0])).collect()).expect("open");
    assert!(well.close(LONG).expect("here"));
    assert_eq!(tier.calls(), 20, "what was submitted was done");
    assert_eq!(well.store(2, vec![]).expect_err("closed").kind(), ErrorKind::Closed);
    assert!(well.close(LONG).expect("here"));

    let (queue, tier) = queue(&TierQueueConfig { threads: 2, ..CONFIG });
    tier.set(Fault::Hang);
    queue.store(1, (0..20).map(|name| rows.chunk(name, &[0])).collect()).expect("open");
    tier.wait_hanging(1);
    assert!(!queue.close(Duration::from_millis(50)).expect("here"));
    let counters = queue.counters().expect("here");
    assert_eq!(counters.stores.refused(Reason::Closed), 19);
    tier.set(Fault::None);
    assert!(queue.close(LONG).is_ok());
    assert_eq!(queue.counters().expect("here").stores.chunks, 1, "what was begun ended by itself");
}

#[test]
fn whatever_happens_every_task_ends_once() {
    let (queue, tier) = queue(&TierQueueConfig { stores_max: 4, loads_max: 6, ..CONFIG });
    let mut ended = BTreeMap::new();
    let mut tasks = 0;
    thread::scope(|scope| {
        let running = scope.spawn(|| {
            for round in 0..300 {
                let fault = [Fault::None, Fault::Refuse(Reason::Io), Fault::Hang, Fault::Panic][round % 4];
                tier.set(fault);
                thread::sleep(Duration::from_micros(200));
            }
            tier.set(Fault::None);
        });
        let rows = Rows::new(4, 4096);
        let mut job = 0;
        while !running.is_finished() {
            job += 1;
            let chunks: Vec<_> = (0..job % 4).map(|index| rows.chunk(job % 11 + index, &[0])).collect();
            tasks += if job % 3 == 0 { 1 } else { chunks.len() };
            match job % 3 {
                0 => queue.find(job, vec![key(job)]).expect("open"),
                1 => queue.store(job, chunks).expect("open"),
                _ => queue.load(job, chunks).expect("open"),
            }
            poll(&queue, &mut ended);
            queue.wait(Duration::from_micros(50)).expect("open");
        }
    });
    ended.extend(drained(&queue));
    assert_eq!(ended.len(), tasks);
    let counters = queue.counters().expect("here");
    let counted = |counted: &crate::tier::Counted| {
        let refused = Reason::ALL.iter().map(|&reason| counted.refused(reason)).sum::<u64>();
        counted.chunks + refused
    };
    let all =
        counted(&counters.stores) + counted(&counters.loads) + counted(&counters.finds) + counters.present;
    assert_eq!(all, ended.len() as u64);
}

#[test]
fn threads_are_limited() {
    let tier = Arc::new(MemoryTier::new(space("queue"), Medium::default()));
    for threads in [0, THREADS_MAX + 1] {
        let config = TierQueueConfig { threads, ..CONFIG };
        assert_eq!(
            TierQueue::new(tier.clone(), &config).expect_err("refused").kind(),
            ErrorKind::InvalidArgument
        );
    }
}
