//! Chains of block hashes, and the keys that they have: `hash_tokens`, `sha256_block_hashes`, `KeySpace`.

use std::num::NonZeroU32;

use lmcache_core as core;
use lmcache_core::{Chain, Error, ErrorKind, Hashes, Key};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyInt, PyList, PyTuple};

use super::run;
use crate::convert::{Count, integers, invalid};
use crate::error::guarded;

#[pyfunction]
pub fn hash_tokens<'py>(
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

#[pyfunction]
pub fn sha256_block_hashes<'py>(
    py: Python<'py>,
    parent: &[u8],
    tokens: &Bound<'py, PyList>,
    block_size: Count<usize>,
) -> PyResult<Bound<'py, PyList>> {
    // Only what is an `int` itself is pickled like one.
    let token = |item: Bound<'py, PyAny>| match item.cast_exact::<PyInt>() {
        Ok(number) => number.extract::<u32>().ok(),
        Err(_) => None,
    };
    let tokens: Option<Vec<u32>> = tokens.iter().map(token).collect();
    let tokens = tokens.ok_or_else(|| invalid("tokens are ints of at most 31 bits, not negative"))?;
    let blocks = tokens.len() / block_size.0.max(1);
    let hashes = run(py, blocks, || core::sha256_block_hashes(parent, &tokens, block_size.0))?;
    PyList::new(py, hashes.iter().map(|hash| PyBytes::new(py, hash)))
}

#[pyclass(frozen, module = "lmcache_rs._core")]
pub struct KeySpace(pub core::KeySpace);

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
pub struct ChunkBlocks(pub NonZeroU32);

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
pub struct PyChain<'a, 'py> {
    space: &'a core::KeySpace,
    hashes: Sequence<'a, 'py>,
    /// Full blocks: the length of `hashes`.
    pub full: usize,
    tail: Option<&'a Bound<'py, PyBytes>>,
}

impl<'a, 'py> PyChain<'a, 'py> {
    pub fn new(
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

    /// The hash at `position`. Runs under the index's lock, see the top of `index.rs`.
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

impl PyChain<'_, '_> {
    /// Runs `work` on the chain without the GIL.
    pub fn detached<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&Hashes<'_>) -> core::Result<T> + Send,
    ) -> PyResult<T> {
        let hashes = (0..self.blocks()).map(|at| self.hash(at));
        let hashes = guarded(|| hashes.collect::<core::Result<Vec<_>>>())?;
        let hashes: Vec<&[u8]> = hashes.iter().map(PyBytesMethods::as_bytes).collect();
        py.detach(|| guarded(|| work(&Hashes { space: self.space, hashes: &hashes })))
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
