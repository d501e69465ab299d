//! The index classes: `hash_tokens`, `KeySpace`, `Index`, `Match`, `Lease`, `Reservation`.
//!
//! The GIL and the index's lock. Both may be held at once, in this order only: GIL, then lock. Whoever holds the lock
//! never waits for the GIL: it either came without and calls no Python (`detach`), or it came with it and keeps it until
//! the lock is released. The latter is why `Sequence::key`, which runs under the lock, does nothing that could run other
//! Python code or give the GIL away: it reads an element of an exact list or tuple type and borrows the bytes. It makes
//! no Python object either, exceptions included, since that may run the garbage collector, which may drop a `Lease`,
//! which takes the lock. So waiting for the lock with the GIL held ends as soon as a detached call ends (about a
//! millisecond for ten thousand blocks), and nothing waits in a circle.

use std::num::NonZeroU32;

use lmcache_core as core;
use lmcache_core::{Chain, Error, ErrorKind, Hashes, Key};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};

use crate::convert::{Count, integers, invalid};
use crate::error::guarded;

/// Work on more blocks than this releases the GIL: it takes over 10 µs, and releasing costs well below 1 µs.
const ATTACHED_BLOCKS_MAX: usize = 64;

pub fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(hash_tokens, module)?)?;
    module.add_class::<KeySpace>()?;
    module.add_class::<Index>()?;
    module.add_class::<Match>()?;
    module.add_class::<Lease>()?;
    module.add_class::<Reservation>()
}

/// Runs `work`, which touches about `blocks` blocks and no Python object.
fn run<T: Send>(py: Python<'_>, blocks: usize, work: impl FnOnce() -> core::Result<T> + Send) -> PyResult<T> {
    if blocks > ATTACHED_BLOCKS_MAX { py.detach(|| guarded(work)) } else { guarded(work) }
}

/// Row numbers as the contract wants them: native unsigned 32-bit integers.
fn row_bytes<'py>(py: Python<'py>, rows: &[u32]) -> PyResult<Bound<'py, PyBytes>> {
    PyBytes::new_with(py, size_of_val(rows), |bytes| {
        for (slot, row) in bytes.chunks_exact_mut(size_of::<u32>()).zip(rows) {
            slot.copy_from_slice(&row.to_ne_bytes());
        }
        Ok(())
    })
}

#[pyfunction]
fn hash_tokens<'py>(
    py: Python<'py>,
    root: &[u8],
    tokens: &Bound<'py, PyAny>,
    block_size: usize,
) -> PyResult<(Bound<'py, PyList>, Option<Bound<'py, PyBytes>>)> {
    let tokens = integers(tokens, "tokens")?;
    let hashes = py.detach(|| guarded(|| core::hash_tokens(root, &tokens, block_size)))?;
    let blocks = PyList::new(py, hashes.blocks.iter().map(|hash| PyBytes::new(py, hash)))?;
    Ok((blocks, hashes.tail.map(|hash| PyBytes::new(py, &hash))))
}

#[pyclass(frozen, module = "lmcache_rs._core")]
struct KeySpace(core::KeySpace);

#[pymethods]
impl KeySpace {
    #[new]
    #[pyo3(
        signature = (algorithm, group = 0, tags = Vec::new()),
        text_signature = "(algorithm, group=0, tags=())"
    )]
    #[expect(clippy::needless_pass_by_value, reason = "pyo3 extracts owned values")]
    fn new(algorithm: &str, group: u32, tags: Vec<(String, String)>) -> Self {
        Self(core::KeySpace::new(algorithm, group, &tags))
    }

    fn key<'py>(&self, py: Python<'py>, block_hash: &[u8]) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.key(block_hash).as_bytes())
    }

    #[pyo3(
        signature = (hashes, tail, chunk_blocks, first_chunk = Count(0)),
        text_signature = "($self, hashes, tail, chunk_blocks, first_chunk=0)"
    )]
    fn chunk_keys<'py>(
        &self,
        py: Python<'py>,
        hashes: &Bound<'py, PyAny>,
        tail: Option<&Bound<'py, PyBytes>>,
        chunk_blocks: ChunkBlocks,
        first_chunk: Count<usize>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let chain = PyChain::new(self, hashes, tail)?;
        let ends = core::chunk_ends(chain.blocks(), chunk_blocks.0, first_chunk.0);
        let hashes = guarded(|| ends.map(|end| chain.hash(end)).collect::<core::Result<Vec<_>>>())?;
        let hashes: Vec<&[u8]> = hashes.iter().map(PyBytesMethods::as_bytes).collect();
        let key = |hash: &&[u8]| *self.0.key(hash).as_bytes();
        let keys = run(py, hashes.len(), || Ok(hashes.iter().map(key).collect::<Vec<_>>()))?;
        Ok(PyBytes::new(py, keys.as_flattened()))
    }
}

/// How many blocks make a chunk: 1 or more.
#[derive(Clone, Copy)]
struct ChunkBlocks(NonZeroU32);

impl<'a, 'py> FromPyObject<'a, 'py> for ChunkBlocks {
    type Error = PyErr;

    fn extract(number: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let Count(blocks) = number.extract()?;
        NonZeroU32::new(blocks).map(Self).ok_or_else(|| invalid("chunk_blocks is 0, it must be at least 1"))
    }
}

/// Block hashes as Python has them, each read only when it is needed.
enum Sequence<'a, 'py> {
    List(&'a Bound<'py, PyList>),
    Tuple(&'a Bound<'py, PyTuple>),
}

/// The chain of `hashes`, with `tail` as its last block.
struct PyChain<'a, 'py> {
    space: &'a core::KeySpace,
    hashes: Sequence<'a, 'py>,
    /// Full blocks: the length of `hashes`.
    full: usize,
    tail: Option<&'a Bound<'py, PyBytes>>,
}

impl<'a, 'py> PyChain<'a, 'py> {
    fn new(
        space: &'a KeySpace,
        hashes: &'a Bound<'py, PyAny>,
        tail: Option<&'a Bound<'py, PyBytes>>,
    ) -> PyResult<Self> {
        let (hashes, full) = if let Ok(list) = hashes.cast::<PyList>() {
            (Sequence::List(list), list.len())
        } else if let Ok(tuple) = hashes.cast::<PyTuple>() {
            (Sequence::Tuple(tuple), tuple.len())
        } else {
            return Err(invalid("hashes is neither a list nor a tuple"));
        };
        Ok(Self { space: &space.0, hashes, full, tail })
    }

    /// The hash at `position`. Runs under the index's lock, see the top of this file.
    fn hash(&self, position: usize) -> core::Result<Bound<'py, PyBytes>> {
        let item = match (&self.hashes, self.tail) {
            (_, Some(tail)) if position == self.full => return Ok(tail.clone()),
            (Sequence::List(list), _) => list.get_item(position),
            (Sequence::Tuple(tuple), _) => tuple.get_item(position),
        };
        let bytes = item.ok().and_then(|item| item.cast_into::<PyBytes>().ok());
        bytes
            .ok_or_else(|| Error::new(ErrorKind::InvalidArgument, format!("hashes[{position}] is not bytes")))
    }
}

impl Chain for PyChain<'_, '_> {
    fn blocks(&self) -> usize {
        self.full + usize::from(self.tail.is_some())
    }

    fn key(&self, position: usize) -> core::Result<Key> {
        Ok(self.space.key(self.hash(position)?.as_bytes()))
    }
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
            let hashes = (0..blocks).map(|at| chain.hash(at));
            let hashes = guarded(|| hashes.collect::<core::Result<Vec<_>>>())?;
            let hashes: Vec<&[u8]> = hashes.iter().map(PyBytesMethods::as_bytes).collect();
            py.detach(|| guarded(|| self.0.reserve(&Hashes { space: &space.0, hashes: &hashes })))?
        };
        Ok(Reservation { taken, full })
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
        row_bytes(py, &rows)
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
        row_bytes(py, self.taken.rows())
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

    fn commit(&self, py: Python<'_>) -> PyResult<u64> {
        run(py, self.taken.rows().len(), || self.taken.commit())
    }

    fn abort(&self, py: Python<'_>) -> PyResult<u64> {
        run(py, self.taken.rows().len(), || self.taken.abort())
    }

    fn discard(&self, py: Python<'_>) -> PyResult<u64> {
        run(py, self.taken.rows().len(), || self.taken.discard())
    }
}
