//! The index does what a simple oracle does, whatever is done to it in whatever order.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod model;

use std::num::NonZeroU32;

use lmcache_core::{Departure, Index, Key, KeySpace, Lease, Match, Reservation};
use model::{Gauges, Id, Model, Taken};
use proptest::prelude::*;
use proptest::sample;
use proptest::test_runner::TestCaseError;

#[derive(Clone, Debug)]
enum Step {
    Reserve(Vec<u8>),
    /// Of a reservation that is open.
    Commit(sample::Index),
    CommitSaved(sample::Index),
    Abort(sample::Index),
    /// Of any.
    CommitAgain(sample::Index),
    /// Drops a reservation or a lease.
    Drop(sample::Index),
    Discard(sample::Index),
    Lookup(Vec<u8>),
    Lease(sample::Index),
    LeaseDiscard(sample::Index, usize),
    Release(sample::Index),
    TakeUnsaved(Vec<u8>, usize),
    TakeColdest(usize, usize, usize),
    ReleaseDeparture(sample::Index),
    Clear,
    Shrink(usize),
}

fn step() -> impl Strategy<Value = Step> {
    // Few different blocks, so that chains share prefixes.
    let path = || prop::collection::vec(prop_oneof![5 => Just(0_u8), 3 => Just(1), 1 => Just(2)], 0..6);
    let pick = any::<sample::Index>;
    prop_oneof![
        20 => path().prop_map(Step::Reserve),
        16 => pick().prop_map(Step::Commit),
        4 => pick().prop_map(Step::CommitSaved),
        2 => pick().prop_map(Step::Abort),
        1 => pick().prop_map(Step::CommitAgain),
        2 => pick().prop_map(Step::Drop),
        1 => pick().prop_map(Step::Discard),
        12 => path().prop_map(Step::Lookup),
        8 => pick().prop_map(Step::Lease),
        1 => (pick(), 0..6_usize).prop_map(|(at, first)| Step::LeaseDiscard(at, first)),
        6 => pick().prop_map(Step::Release),
        6 => (path(), 1..4_usize).prop_map(|(path, size)| Step::TakeUnsaved(path, size)),
        6 => (1..4_usize, 0..6_usize, 0..5_usize)
            .prop_map(|(size, rows, chunks)| Step::TakeColdest(size, rows, chunks)),
        8 => pick().prop_map(Step::ReleaseDeparture),
        1 => Just(Step::Clear),
        1 => (0..10_usize).prop_map(Step::Shrink),
    ]
}

fn chain(path: &[u8]) -> Vec<Key> {
    let space = KeySpace::new("test", 0, &[]);
    (1..=path.len()).map(|end| space.key(&path[..end])).collect()
}

fn chunk_blocks(blocks: usize) -> NonZeroU32 {
    NonZeroU32::new(u32::try_from(blocks).unwrap()).unwrap()
}

struct Held<T> {
    real: T,
    ids: Vec<Id>,
    open: bool,
}

struct Leased {
    real: Lease,
    id: Id,
    rows: Vec<u32>,
}

/// The index and its oracle, with everything callers hold of both.
struct World {
    index: Index,
    model: Model,
    reservations: Vec<Held<Reservation>>,
    matches: Vec<(Match, Option<Id>)>,
    leases: Vec<Leased>,
    departures: Vec<(Departure, Id)>,
    lookups: u64,
    hits: u64,
    committed: u64,
    aborted: u64,
    removed: u64,
    dropped: u64,
}

type Outcome = Result<(), TestCaseError>;

impl World {
    fn new(rows: usize) -> Self {
        Self {
            index: Index::new(rows).unwrap(),
            model: Model::new(rows),
            reservations: Vec::new(),
            matches: Vec::new(),
            leases: Vec::new(),
            departures: Vec::new(),
            lookups: 0,
            hits: 0,
            committed: 0,
            aborted: 0,
            removed: 0,
            dropped: 0,
        }
    }

    fn step(&mut self, step: &Step) -> Outcome {
        match step {
            Step::Reserve(path) => self.reserve(path)?,
            Step::Lookup(path) => self.lookup(path)?,
            Step::Commit(at) => self.open_reservation(*at).map_or(Ok(()), |at| self.commit(at, false))?,
            Step::CommitSaved(at) => self.open_reservation(*at).map_or(Ok(()), |at| self.commit(at, true))?,
            Step::Abort(at) => self.open_reservation(*at).map_or(Ok(()), |at| self.abort(at))?,
            Step::CommitAgain(at) if !self.reservations.is_empty() => {
                self.commit(at.index(self.reservations.len()), false)?;
            }
            Step::Drop(at) if !self.reservations.is_empty() => {
                let held = self.reservations.swap_remove(at.index(self.reservations.len()));
                drop(held.real);
                self.aborted += if held.open { self.model.abort(&held.ids) } else { 0 };
            }
            Step::Discard(at) if !self.reservations.is_empty() => {
                let held = &self.reservations[at.index(self.reservations.len())];
                let removed = held.ids.first().map_or(0, |&id| self.model.remove(id));
                prop_assert_eq!(held.real.discard().unwrap(), removed);
                self.removed += removed;
            }
            Step::Lease(at) if !self.matches.is_empty() => self.lease(at.index(self.matches.len()))?,
            Step::LeaseDiscard(at, first) if !self.leases.is_empty() => {
                let leased = &self.leases[at.index(self.leases.len())];
                let removed = self.model.chain(leased.id).get(*first).map_or(0, |&id| self.model.remove(id));
                prop_assert_eq!(leased.real.discard(*first).unwrap(), removed);
                self.removed += removed;
            }
            Step::Release(at) if !self.leases.is_empty() => self.release(at.index(self.leases.len()))?,
            Step::TakeUnsaved(path, size) => {
                let real = self.index.take_unsaved(&chain(path)[..], chunk_blocks(*size)).unwrap();
                let expected = self.model.take_unsaved(path, *size);
                prop_assert_eq!(real.is_some(), !expected.is_empty());
                real.map_or(Ok(()), |real| self.depart(real, &expected))?;
            }
            Step::TakeColdest(size, rows, chunks) => {
                let real = self.index.take_coldest(chunk_blocks(*size), *rows, *chunks).unwrap();
                let expected = self.model.take_coldest(*size, *rows, *chunks);
                prop_assert_eq!(real.len(), expected.len());
                real.into_iter().zip(&expected).try_for_each(|(real, taken)| self.depart(real, taken))?;
            }
            Step::ReleaseDeparture(at) if !self.departures.is_empty() => {
                self.release_departure(at.index(self.departures.len()));
            }
            Step::Clear => {
                let removed = self.model.remove_from(0);
                prop_assert_eq!(self.index.clear().unwrap(), removed);
                self.removed += removed;
            }
            Step::Shrink(rows) if *rows < self.model.limit => {
                self.model.limit = *rows;
                let removed = self.model.remove_from(*rows);
                prop_assert_eq!(self.index.shrink(*rows).unwrap(), removed);
                self.removed += removed;
            }
            _ => {}
        }
        self.compare()
    }

    fn open_reservation(&self, pick: sample::Index) -> Option<usize> {
        let open = self.reservations.iter().enumerate().filter(|(_, held)| held.open && !held.ids.is_empty());
        let open: Vec<usize> = open.map(|(at, _)| at).collect();
        (!open.is_empty()).then(|| *pick.get(&open))
    }

    fn reserve(&mut self, path: &[u8]) -> Outcome {
        let real = self.index.reserve(&chain(path)[..]).unwrap();
        let (first, given, dropped) = self.model.make_room(path);
        prop_assert_eq!((real.first(), real.rows().len(), real.dropped()), (first, given, dropped));
        prop_assert!(real.rows().is_sorted());
        self.dropped += dropped as u64;
        let ids = self.model.reserve(path, first, real.rows());
        self.reservations.push(Held { real, ids, open: true });
        Ok(())
    }

    fn commit(&mut self, at: usize, saved: bool) -> Outcome {
        let held = &mut self.reservations[at];
        let open = std::mem::replace(&mut held.open, false);
        let wanted = if open { self.model.commit(&held.ids, saved) } else { 0 };
        let real = if saved { held.real.commit_saved() } else { held.real.commit() };
        prop_assert_eq!(real.unwrap(), wanted);
        self.committed += wanted;
        Ok(())
    }

    fn abort(&mut self, at: usize) -> Outcome {
        let held = &mut self.reservations[at];
        let open = std::mem::replace(&mut held.open, false);
        let forgotten = if open { self.model.abort(&held.ids) } else { 0 };
        prop_assert_eq!(held.real.abort().unwrap(), forgotten);
        self.aborted += forgotten;
        Ok(())
    }

    fn lookup(&mut self, path: &[u8]) -> Outcome {
        let real = self.index.lookup(&chain(path)[..]).unwrap();
        let (blocks, last, pending) = self.model.lookup(path);
        prop_assert_eq!((real.blocks(), real.pending()), (blocks, pending));
        self.lookups += 1;
        self.hits += u64::from(blocks > 0);
        self.matches.push((real, last));
        Ok(())
    }

    fn lease(&mut self, at: usize) -> Outcome {
        let (real, id) = &self.matches[at];
        let id = id.filter(|&id| self.model.lease(id));
        let lease = real.lease().unwrap();
        prop_assert_eq!(lease.is_some(), id.is_some());
        if let (Some(real), Some(id)) = (lease, id) {
            let rows = real.rows(0).unwrap();
            let expected: Vec<u32> = self.model.chain(id).iter().map(|id| self.model.nodes[id].row).collect();
            prop_assert_eq!(&rows, &expected);
            self.leases.push(Leased { real, id, rows });
        }
        Ok(())
    }

    fn release(&mut self, at: usize) -> Outcome {
        let leased = self.leases.swap_remove(at);
        leased.real.release();
        leased.real.release();
        self.model.release(leased.id);
        prop_assert_eq!(leased.real.blocks(), 0);
        prop_assert!(leased.real.rows(0).is_err());
        Ok(())
    }

    fn depart(&mut self, real: Departure, expected: &Taken) -> Outcome {
        let nodes = &self.model.nodes;
        let keys =
            expected.iter().map(|(_, chunk)| *chain(&nodes[chunk.last().unwrap()].path).last().unwrap());
        prop_assert_eq!(real.keys(), keys.collect::<Vec<_>>());
        let narrow = |number: usize| u32::try_from(number).unwrap();
        let positions = expected.iter().map(|(number, _)| narrow(*number));
        prop_assert_eq!(real.positions(), positions.collect::<Vec<_>>());
        let counts = expected.iter().map(|(_, chunk)| narrow(chunk.len()));
        prop_assert_eq!(real.counts(), counts.collect::<Vec<_>>());
        let rows = expected.iter().flat_map(|(_, chunk)| chunk).map(|id| nodes[id].row);
        prop_assert_eq!(real.rows(), rows.collect::<Vec<_>>());
        let last = expected.last().and_then(|(_, chunk)| chunk.last()).unwrap();
        self.departures.push((real, *last));
        Ok(())
    }

    fn release_departure(&mut self, at: usize) {
        let (real, id) = self.departures.swap_remove(at);
        real.release();
        real.release();
        self.model.release_departure(id);
    }

    fn compare(&self) -> Outcome {
        if let Err(error) = self.index.check_integrity() {
            return Err(TestCaseError::fail(error.to_string()));
        }
        let stats = self.index.stats().unwrap();
        let (rows, free) = (stats.rows, stats.free);
        let gauges =
            Gauges { rows, free, visible: stats.visible, reserved: stats.reserved, leaving: stats.leaving };
        prop_assert_eq!(gauges, self.model.gauges());
        prop_assert_eq!(stats.leases, (self.leases.len() + self.departures.len()) as u64);
        let counted = stats.counters;
        prop_assert_eq!((counted.lookups, counted.hits), (self.lookups, self.hits));
        prop_assert_eq!((counted.committed, counted.aborted), (self.committed, self.aborted));
        prop_assert_eq!((counted.evictions, counted.removed), (self.model.evictions, self.removed));
        prop_assert_eq!(counted.unsaved_evictions, self.model.unsaved_evictions);
        prop_assert_eq!((counted.dropped, counted.mismatches), (self.dropped, 0));
        for node in self.model.nodes.values() {
            let found = self.index.present(&chain(&node.path)[..]).unwrap();
            prop_assert_eq!(found, self.model.present(&node.path), "of {:?}", node.path);
        }
        for leased in &self.leases {
            prop_assert_eq!(&leased.real.rows(0).unwrap(), &leased.rows);
        }
        Ok(())
    }

    /// Once nothing is held, all rows can be had again, one eviction after the other.
    fn finish(&mut self) -> Outcome {
        self.matches.clear();
        while !self.leases.is_empty() {
            self.release(0)?;
            self.compare()?;
        }
        while !self.departures.is_empty() {
            self.release_departure(0);
            self.compare()?;
        }
        while let Some(held) = self.reservations.pop() {
            drop(held.real);
            self.aborted += if held.open { self.model.abort(&held.ids) } else { 0 };
            self.compare()?;
        }
        prop_assert_eq!(self.index.stats().unwrap().leaving, 0);
        for blocks in 1..=self.model.limit {
            // Block 9 occurs in no other chain: each of these takes one row more, and keeps it.
            self.reserve(&vec![9; blocks])?;
            self.compare()?;
        }
        prop_assert_eq!(self.index.stats().unwrap().visible, 0);
        Ok(())
    }
}

fn cases(default: u32) -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(default)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(4096)))]
    #[test]
    fn behaves_like_the_model(rows in 1..10_usize, steps in prop::collection::vec(step(), 1..60)) {
        let mut world = World::new(rows);
        for step in &steps {
            world.step(step)?;
        }
        world.finish()?;
    }
}
