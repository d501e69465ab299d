//! `HostPool` for Python, and its export by `DLPack`.

use dlpark::ffi::{DLDataType, DLDevice, DLManagedTensor, DLManagedTensorVersioned};
use dlpark::metadata::Fixed;
use dlpark::python::{DlpackExporter, ExportRequest, export_dlpack};
use dlpark::{DlpackFlags, Managed, ManagedTensorBase};
use lmcache_core::HostPoolConfig;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;

use crate::convert::{Count, Timeout, detached};
use crate::error::{guarded, guarded_py, to_python};

#[pyfunction]
pub fn pool_rows(size_bytes: Count<usize>, row_bytes: Count<usize>) -> usize {
    lmcache_core::pool_rows(size_bytes.0, row_bytes.0)
}

#[pyclass(frozen, module = "lmcache_rs._core")]
pub struct HostPool {
    pub(crate) pool: lmcache_core::HostPool,
}

#[pymethods]
impl HostPool {
    #[new]
    #[pyo3(
        signature = (size_bytes, row_bytes, prefault_threads = Count(1), huge_pages = true),
        text_signature = "(size_bytes, row_bytes, prefault_threads=1, huge_pages=True)"
    )]
    fn new(
        py: Python<'_>,
        size_bytes: Count<usize>,
        row_bytes: Count<usize>,
        prefault_threads: Count<usize>,
        huge_pages: bool,
    ) -> PyResult<Self> {
        let config = HostPoolConfig {
            size_bytes: size_bytes.0,
            row_bytes: row_bytes.0,
            prefault_threads: prefault_threads.0,
            huge_pages,
        };
        detached(py, || lmcache_core::HostPool::new(&config)).map(|pool| Self { pool })
    }

    #[getter]
    fn rows(&self) -> u32 {
        self.pool.rows()
    }

    #[getter]
    fn row_bytes(&self) -> usize {
        self.pool.row_bytes()
    }

    #[getter]
    fn row_stride(&self) -> usize {
        self.pool.row_stride()
    }

    #[getter]
    fn size_bytes(&self) -> usize {
        self.pool.size_bytes()
    }

    #[getter]
    fn prefaulted_bytes(&self) -> usize {
        self.pool.prefaulted_bytes()
    }

    #[getter]
    fn prefault_error(&self) -> PyResult<Option<String>> {
        guarded(|| self.pool.prefault_error())
    }

    fn wait_prefaulted(&self, py: Python<'_>, timeout_s: Timeout) -> PyResult<bool> {
        detached(py, || self.pool.wait_prefaulted(timeout_s.0))
    }

    fn pin(&self, py: Python<'_>, device: Count<usize>) -> PyResult<()> {
        detached(py, || self.pool.pin(device.0))
    }

    #[getter]
    fn pinned_bytes(&self) -> usize {
        self.pool.pinned_bytes()
    }

    #[getter]
    fn pin_error(&self) -> PyResult<Option<String>> {
        guarded(|| self.pool.pin_error())
    }

    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__(
        &self,
        py: Python<'_>,
        stream: Option<&Bound<'_, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(u32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        guarded_py(|| {
            self.pool.check_process().map_err(|error| to_python(&error))?;
            export_dlpack(self, py, ExportRequest::parse(stream, max_version, dl_device, copy)?)
        })
    }

    #[expect(clippy::unused_self, reason = "a method of the DLPack protocol")]
    fn __dlpack_device__(&self) -> (u32, i32) {
        DLDevice::CPU.into()
    }

    fn __repr__(&self) -> String {
        format!("<HostPool of {} rows of {} bytes>", self.pool.rows(), self.pool.row_bytes())
    }
}

/// What cannot be had is a `BufferError`, as the protocol asks.
impl DlpackExporter for HostPool {
    fn device(&self) -> DLDevice {
        DLDevice::CPU
    }

    fn flags(&self) -> DlpackFlags {
        DlpackFlags::empty()
    }

    fn prepare_export(&self, _py: Python<'_>, request: &ExportRequest<'_>) -> PyResult<()> {
        if request.stream().is_some() {
            return Err(PyBufferError::new_err("a tensor on the CPU has no streams: pass stream=None"));
        }
        Ok(())
    }

    fn export_legacy(&self, _py: Python<'_>) -> PyResult<Managed<DLManagedTensor>> {
        self.export()
    }

    fn export_versioned(&self, _py: Python<'_>) -> PyResult<Managed<DLManagedTensorVersioned>> {
        self.export()
    }
}

impl HostPool {
    /// The whole mapping as uint8 `[rows, row_stride]`. The tensor holds a clone of the pool, whose drop needs no GIL
    /// and no certain thread.
    fn export<M: ManagedTensorBase>(&self) -> PyResult<Managed<M>> {
        let metadata =
            Fixed::new([self.pool.rows() as usize, self.pool.row_stride()], [self.pool.row_stride(), 1]);
        let prepared =
            metadata.prepare_as::<M>().map_err(|error| PyBufferError::new_err(error.to_string()))?;
        let mut tensor = prepared.initialize(Box::new(self.pool.clone()));
        tensor.set_data(self.pool.base().as_ptr().cast()).set_device(DLDevice::CPU).set_dtype(DLDataType::U8);
        // SAFETY: shape times stride is exactly the mapping, which the clone inside keeps until the deleter runs.
        Ok(unsafe { tensor.finish() })
    }
}
