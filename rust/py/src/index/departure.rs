//! `Departure` for Python.

use lmcache_core::Key;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::number_bytes;
use crate::error::guarded;

#[pyclass(frozen, module = "lmcache_rs._core")]
pub struct Departure(pub lmcache_core::Departure);

#[pymethods]
impl Departure {
    #[getter]
    fn keys<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let keys: Vec<[u8; 32]> = self.0.keys().iter().map(Key::as_bytes).copied().collect();
        PyBytes::new(py, keys.as_flattened())
    }

    #[getter]
    fn positions<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        number_bytes(py, self.0.positions())
    }

    #[getter]
    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        number_bytes(py, self.0.counts())
    }

    #[getter]
    fn rows<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        number_bytes(py, self.0.rows())
    }

    fn __len__(&self) -> usize {
        self.0.keys().len()
    }

    #[pyo3(signature = (saved = true))]
    fn release(&self, saved: bool) -> PyResult<()> {
        guarded(|| {
            if saved {
                self.0.release();
            } else {
                self.0.release_unsaved();
            }
            Ok(())
        })
    }
}
