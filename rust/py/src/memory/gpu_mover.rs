//! `GpuMover` for Python.

use std::mem;

use lmcache_core::{GpuLayer, GpuMoverConfig, LoadOrder, Staging, Streams};
use pyo3::prelude::*;

use super::host_pool::HostPool;
use super::mover::told;
use crate::convert::{CLOSE_DEFAULT, Count, Numbers, Timeout, detached, invalid};
use crate::error::{guarded_py, to_python};

#[pyfunction]
pub fn cuda_available() -> bool {
    lmcache_core::cuda_available()
}

#[pyclass(frozen, module = "lmcache_rs._core")]
pub struct GpuMover {
    /// Always there, but in drop.
    mover: Option<lmcache_core::GpuMover>,
    /// What the GPU uses, until it is done.
    keep: Option<Py<PyAny>>,
}

/// Address, bytes.
type Buffer = (Count<u64>, Count<usize>);

/// Copies into staging, scatter, gather, copies out of staging.
type StreamHandles = ((Count<u64>, Count<u64>), Count<u64>, Count<u64>, (Count<u64>, Count<u64>));

#[pymethods]
impl GpuMover {
    #[new]
    #[pyo3(signature = (pool, layers, blocks, device, streams, load_staging, store_staging, load_parts, store_parts, keep = None))]
    #[expect(clippy::too_many_arguments, reason = "Python names them")]
    fn new(
        py: Python<'_>,
        pool: &HostPool,
        layers: Vec<(Count<u64>, Count<usize>, Count<usize>)>,
        blocks: Count<usize>,
        device: Count<usize>,
        streams: StreamHandles,
        load_staging: Vec<Buffer>,
        store_staging: Vec<Buffer>,
        load_parts: Vec<Count<u32>>,
        store_parts: Vec<Count<u32>>,
        keep: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let layer = |(address, stride, page): (Count<u64>, Count<usize>, Count<usize>)| GpuLayer {
            address: address.0,
            block_stride: stride.0,
            page_bytes: page.0,
        };
        let shares = |parts: Vec<Count<u32>>| parts.into_iter().map(|share| share.0).collect();
        let buffers = |staging: Vec<Buffer>| {
            staging
                .into_iter()
                .map(|(address, bytes)| Staging { address: address.0, bytes: bytes.0 })
                .collect()
        };
        let (load_copy, load_scatter, store_gather, store_copy) = streams;
        let config = GpuMoverConfig {
            layers: layers.into_iter().map(layer).collect(),
            blocks: blocks.0,
            device: device.0,
            streams: Streams {
                load_copy: [load_copy.0.0, load_copy.1.0],
                load_scatter: load_scatter.0,
                store_gather: store_gather.0,
                store_copy: [store_copy.0.0, store_copy.1.0],
            },
            load_staging: buffers(load_staging),
            store_staging: buffers(store_staging),
            load_parts: shares(load_parts),
            store_parts: shares(store_parts),
        };
        let pool = pool.pool.clone();
        // SAFETY: Python cannot promise it to the compiler; the stub asks it of the caller.
        detached(py, move || unsafe { lmcache_core::GpuMover::new(pool, &config) })
            .map(|mover| Self { mover: Some(mover), keep })
    }

    #[getter]
    fn load_parts(&self) -> PyResult<Vec<usize>> {
        Ok(self.get()?.load_parts().collect())
    }

    #[getter]
    fn store_parts(&self) -> PyResult<Vec<usize>> {
        Ok(self.get()?.store_parts().collect())
    }

    #[pyo3(signature = (job, rows, blocks, stream = None, by_layers = false))]
    fn submit_load(
        &self,
        py: Python<'_>,
        job: Count<u64>,
        rows: Numbers,
        blocks: Numbers,
        stream: Option<Count<u64>>,
        by_layers: bool,
    ) -> PyResult<()> {
        let order = if by_layers { LoadOrder::ByLayers } else { LoadOrder::ByRows };
        let (mover, stream) = (self.get()?, stream.map(|stream| stream.0));
        let (rows, blocks) = (rows.0, blocks.0);
        detached(py, move || mover.submit_load(job.0, rows, blocks, order, stream))
    }

    #[pyo3(signature = (job, rows, blocks, stream, part = None))]
    fn submit_store(
        &self,
        py: Python<'_>,
        job: Count<u64>,
        rows: Numbers,
        blocks: Numbers,
        stream: Count<u64>,
        part: Option<Count<usize>>,
    ) -> PyResult<()> {
        let (mover, part) = (self.get()?, part.map(|part| part.0));
        let (rows, blocks) = (rows.0, blocks.0);
        detached(py, move || mover.submit_store(job.0, rows, blocks, part, stream.0))
    }

    #[pyo3(signature = (job, stream, layer = None))]
    fn join_load(
        &self,
        py: Python<'_>,
        job: Count<u64>,
        stream: Count<u64>,
        layer: Option<Count<usize>>,
    ) -> PyResult<()> {
        let (mover, layer) = (self.get()?, layer.map(|layer| layer.0));
        detached(py, move || mover.join_load(job.0, layer, stream.0))
    }

    fn settle_loads(&self, py: Python<'_>, limit_s: Timeout, by_layers_s: Timeout) -> PyResult<Vec<u64>> {
        let mover = self.get()?;
        detached(py, move || mover.settle_loads(limit_s.0, by_layers_s.0))
    }

    fn poll(&self) -> PyResult<Vec<(u64, i64, f64)>> {
        guarded_py(|| Ok(told(&self.get()?.poll().map_err(|error| to_python(&error))?)))
    }

    fn drain(&self, py: Python<'_>, timeout_s: Timeout) -> PyResult<bool> {
        let mover = self.get()?;
        detached(py, || mover.drain(timeout_s.0))
    }

    #[pyo3(signature = (timeout_s = Timeout(CLOSE_DEFAULT)), text_signature = "($self, timeout_s=5.0)")]
    fn close(&self, py: Python<'_>, timeout_s: Timeout) -> PyResult<bool> {
        let mover = self.get()?;
        detached(py, || mover.close(timeout_s.0))
    }
}

impl GpuMover {
    fn get(&self) -> PyResult<&lmcache_core::GpuMover> {
        self.mover.as_ref().ok_or_else(|| invalid("this GpuMover is being dropped"))
    }
}

impl Drop for GpuMover {
    fn drop(&mut self) {
        let Some(mover) = self.mover.take() else { return };
        // Waits for the GPU: without the GIL.
        let close = || mover.close(CLOSE_DEFAULT).is_ok_and(|ended| ended);
        let ended = guarded_py(|| Ok(Python::attach(|py| py.detach(close))));
        if !ended.is_ok_and(|ended| ended) {
            // The GPU may still be at work there: nobody else must ever get that memory.
            mem::forget(self.keep.take());
        }
    }
}
