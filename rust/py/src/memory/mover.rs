//! `Mover` for Python.

use std::sync::Arc;

use lmcache_core::{Direction, Outcome};
use pyo3::prelude::*;

use super::host_pool::HostPool;
use super::kv_layers::KvLayers;
use crate::convert::{CLOSE_DEFAULT, Count, Numbers, Timeout, detached, invalid};
use crate::error::{guarded_py, to_python};

#[pyclass(frozen, module = "lmcache_rs._core")]
pub struct Mover {
    /// Always there, but in drop.
    mover: Option<lmcache_core::Mover>,
}

#[pymethods]
impl Mover {
    #[new]
    #[pyo3(signature = (pool, layers, threads = Count(1)), text_signature = "(pool, layers, threads=1)")]
    fn new(py: Python<'_>, pool: &HostPool, layers: &KvLayers, threads: Count<usize>) -> PyResult<Self> {
        let (pool, layers) = (pool.pool.clone(), Arc::clone(&layers.layers));
        detached(py, || lmcache_core::Mover::new(pool, layers, threads.0))
            .map(|mover| Self { mover: Some(mover) })
    }

    fn copy(&self, py: Python<'_>, direction: &str, rows: Numbers, blocks: Numbers) -> PyResult<u64> {
        let (mover, direction) = (self.get()?, parse(direction)?);
        let (rows, blocks) = (rows.0, blocks.0);
        detached(py, move || mover.copy(direction, &rows, &blocks))
    }

    fn submit(
        &self,
        py: Python<'_>,
        direction: &str,
        job: Count<u64>,
        rows: Numbers,
        blocks: Numbers,
    ) -> PyResult<()> {
        let (mover, direction) = (self.get()?, parse(direction)?);
        let (rows, blocks) = (rows.0, blocks.0);
        detached(py, move || mover.submit(direction, job.0, &rows, &blocks))
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

impl Mover {
    fn get(&self) -> PyResult<&lmcache_core::Mover> {
        self.mover.as_ref().ok_or_else(|| invalid("this Mover is being dropped"))
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        // Waits for threads: without the GIL, which the end of a tensor may need.
        let mover = self.mover.take();
        let _ = guarded_py(|| {
            Python::attach(|py| py.detach(|| drop(mover)));
            Ok(())
        });
    }
}

/// Outcomes as Python gets them: job, bytes or -1, seconds.
pub fn told(ended: &[Outcome]) -> Vec<(u64, i64, f64)> {
    let bytes = |outcome: &Outcome| {
        outcome.bytes.as_ref().ok().and_then(|&bytes| i64::try_from(bytes).ok()).unwrap_or(-1)
    };
    ended.iter().map(|outcome| (outcome.job, bytes(outcome), outcome.seconds)).collect()
}

fn parse(direction: &str) -> PyResult<Direction> {
    match direction {
        "store" => Ok(Direction::Store),
        "load" => Ok(Direction::Load),
        other => Err(invalid(format!("direction is {other:?}: \"store\" or \"load\""))),
    }
}
