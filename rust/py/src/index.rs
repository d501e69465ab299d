//! The index classes: `hash_tokens`, `KeySpace`, `Index`, `Match`, `Lease`, `Reservation`, `Departure`.
//!
//! The GIL and the index's lock. Both may be held at once, in this order only: GIL, then lock. Whoever holds the lock
//! never waits for the GIL: it either came without and calls no Python (`detach`), or it came with it and keeps it until
//! the lock is released. The latter is why `Sequence::key`, which runs under the lock, does nothing that could run other
//! Python code or give the GIL away: it reads an element of an exact list or tuple type and borrows the bytes. It makes
//! no Python object either, exceptions included, since that may run the garbage collector, which may drop a `Lease`,
//! which takes the lock. So waiting for the lock with the GIL held ends as soon as a detached call ends (about a
//! millisecond for ten thousand blocks), and nothing waits in a circle.

mod chain;
mod departure;

use lmcache_core as core;
use lmcache_core::Chain;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use self::chain::{ChunkBlocks, KeySpace, PyChain};
use self::departure::Departure;
use crate::convert::{Count, detached};
use crate::error::guarded;

/// Work on more blocks than this releases the GIL: it takes over 10 µs, and releasing costs well below 1 µs.
const ATTACHED_BLOCKS_MAX: usize = 64;

pub fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(chain::hash_tokens, module)?)?;
    module.add_function(wrap_pyfunction!(chain::sha256_block_hashes, module)?)?;
    module.add_class::<KeySpace>()?;
    module.add_class::<Index>()?;
    module.add_class::<Match>()?;
    module.add_class::<Lease>()?;
    module.add_class::<Reservation>()?;
    module.add_class::<Departure>()
}

/// Runs `work`, which touches about `blocks` blocks and no Python object.
fn run<T: Send>(py: Python<'_>, blocks: usize, work: impl FnOnce() -> core::Result<T> + Send) -> PyResult<T> {
    if blocks > ATTACHED_BLOCKS_MAX { py.detach(|| guarded(work)) } else { guarded(work) }
}

/// Row and other numbers as the contract wants them: native unsigned 32-bit integers.
fn number_bytes<'py>(py: Python<'py>, rows: &[u32]) -> PyResult<Bound<'py, PyBytes>> {
    PyBytes::new_with(py, size_of_val(rows), |bytes| {
        for (slot, row) in bytes.chunks_exact_mut(size_of::<u32>()).zip(rows) {
            slot.copy_from_slice(&row.to_ne_bytes());
        }
        Ok(())
    })
}

#[pyclass(frozen, module = "lmcache_rs._core")]
struct Index(core::Index);

#[pymethods]
impl Index {
    #[new]
    fn new(py: Python<'_>, rows: usize) -> PyResult<Self> {
        py.detach(|| guarded(|| core::Index::new(rows))).map(Self)
    }

    #[getter]
    fn rows(&self) -> PyResult<usize> {
        guarded(|| self.0.rows())
    }

    #[getter]
    fn epoch(&self) -> u64 {
        self.0.epoch()
    }

    #[pyo3(name = "match", signature = (space, hashes, tail = None))]
    fn lookup(
        &self,
        space: &KeySpace,
        hashes: &Bound<'_, PyAny>,
        tail: Option<&Bound<'_, PyBytes>>,
    ) -> PyResult<Match> {
        let chain = PyChain::new(space, hashes, tail)?;
        let found = guarded(|| self.0.lookup(&chain))?;
        Ok(Match { found, full: chain.full })
    }

    #[pyo3(signature = (space, hashes, tail = None))]
    fn reserve(
        &self,
        py: Python<'_>,
        space: &KeySpace,
        hashes: &Bound<'_, PyAny>,
        tail: Option<&Bound<'_, PyBytes>>,
    ) -> PyResult<Reservation> {
        let chain = PyChain::new(space, hashes, tail)?;
        let full = chain.full;
        let blocks = chain.blocks();
        let is_small = blocks <= ATTACHED_BLOCKS_MAX
            || blocks - guarded(|| self.0.present(&chain))? <= ATTACHED_BLOCKS_MAX;
        let taken = if is_small {
            guarded(|| self.0.reserve(&chain))?
        } else {
            chain.detached(py, |hashes| self.0.reserve(hashes))?
        };
        Ok(Reservation { taken, full })
    }

    fn take_unsaved(
        &self,
        py: Python<'_>,
        space: &KeySpace,
        hashes: &Bound<'_, PyAny>,
        tail: Option<&Bound<'_, PyBytes>>,
        chunk_blocks: ChunkBlocks,
    ) -> PyResult<Option<Departure>> {
        let chain = PyChain::new(space, hashes, tail)?;
        let taken = if chain.blocks() <= ATTACHED_BLOCKS_MAX {
            guarded(|| self.0.take_unsaved(&chain, chunk_blocks.0))?
        } else {
            chain.detached(py, |hashes| self.0.take_unsaved(hashes, chunk_blocks.0))?
        };
        Ok(taken.map(Departure))
    }

    fn take_coldest(
        &self,
        py: Python<'_>,
        chunk_blocks: ChunkBlocks,
        rows_max: Count<usize>,
        chunks_max: Count<usize>,
    ) -> PyResult<Vec<Departure>> {
        let taken = detached(py, || self.0.take_coldest(chunk_blocks.0, rows_max.0, chunks_max.0))?;
        Ok(taken.into_iter().map(Departure).collect())
    }

    fn clear(&self, py: Python<'_>) -> PyResult<u64> {
        py.detach(|| guarded(|| self.0.clear()))
    }

    fn shrink(&self, py: Python<'_>, rows: usize) -> PyResult<u64> {
        py.detach(|| guarded(|| self.0.shrink(rows)))
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = guarded(|| self.0.stats())?;
        let counters = stats.counters;
        let dict = PyDict::new(py);
        for (name, value) in [
            ("rows", stats.rows),
            ("free", stats.free),
            ("visible", stats.visible),
            ("reserved", stats.reserved),
            ("leaving", stats.leaving),
            ("leases", stats.leases),
            ("lookups", counters.lookups),
            ("hits", counters.hits),
            ("committed", counters.committed),
            ("aborted", counters.aborted),
            ("evictions", counters.evictions),
            ("unsaved_evictions", counters.unsaved_evictions),
            ("removed", counters.removed),
            ("dropped", counters.dropped),
            ("mismatches", counters.mismatches),
        ] {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }
}

#[pyclass(frozen, module = "lmcache_rs._core")]
struct Match {
    found: core::Match,
    /// Full blocks that were asked for.
    full: usize,
}

#[pymethods]
impl Match {
    #[getter]
    fn blocks(&self) -> usize {
        self.found.blocks().min(self.full)
    }

    #[getter]
    fn tail(&self) -> bool {
        self.found.blocks() > self.full
    }

    #[getter]
    fn pending(&self) -> bool {
        self.found.pending()
    }

    fn lease(&self) -> PyResult<Option<Lease>> {
        Ok(guarded(|| self.found.lease())?.map(Lease))
    }
}

#[pyclass(frozen, module = "lmcache_rs._core")]
struct Lease(core::Lease);

#[pymethods]
impl Lease {
    fn __len__(&self) -> usize {
        self.0.blocks()
    }

    #[pyo3(signature = (first = 0))]
    fn rows<'py>(&self, py: Python<'py>, first: usize) -> PyResult<Bound<'py, PyBytes>> {
        let rows = run(py, self.0.blocks(), || self.0.rows(first))?;
        number_bytes(py, &rows)
    }

    fn discard(&self, py: Python<'_>, first: usize) -> PyResult<u64> {
        run(py, self.0.blocks(), || self.0.discard(first))
    }

    fn release(&self) -> PyResult<()> {
        guarded(|| {
            self.0.release();
            Ok(())
        })
    }
}

#[pyclass(frozen, module = "lmcache_rs._core")]
struct Reservation {
    taken: core::Reservation,
    /// Full blocks that were asked for.
    full: usize,
}

#[pymethods]
impl Reservation {
    #[getter]
    fn first(&self) -> usize {
        self.taken.first()
    }

    #[getter]
    fn rows<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        number_bytes(py, self.taken.rows())
    }

    #[getter]
    fn tail(&self) -> bool {
        let rows = self.taken.rows().len();
        rows > 0 && self.taken.first() + rows > self.full
    }

    #[getter]
    fn dropped(&self) -> usize {
        self.taken.dropped()
    }

    fn __len__(&self) -> usize {
        self.taken.rows().len()
    }

    #[pyo3(signature = (saved = false))]
    fn commit(&self, py: Python<'_>, saved: bool) -> PyResult<u64> {
        let commit = || if saved { self.taken.commit_saved() } else { self.taken.commit() };
        run(py, self.taken.rows().len(), commit)
    }

    fn abort(&self, py: Python<'_>) -> PyResult<u64> {
        run(py, self.taken.rows().len(), || self.taken.abort())
    }

    fn discard(&self, py: Python<'_>) -> PyResult<u64> {
        run(py, self.taken.rows().len(), || self.taken.discard())
    }
}
