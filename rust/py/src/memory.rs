//! `HostPool`, `KvLayers`, `Mover` and `GpuMover` for Python.

mod gpu_mover;
pub mod host_pool;
mod kv_layers;
mod mover;

use pyo3::prelude::*;

pub fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(host_pool::pool_rows, module)?)?;
    module.add_function(wrap_pyfunction!(gpu_mover::cuda_available, module)?)?;
    module.add_class::<host_pool::HostPool>()?;
    module.add_class::<kv_layers::KvLayers>()?;
    module.add_class::<mover::Mover>()?;
    module.add_class::<gpu_mover::GpuMover>()
}
