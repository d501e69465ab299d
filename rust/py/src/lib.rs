//! `lmcache_rs._core`: the Rust core as Python sees it; conversions and GIL handling, no decisions.

mod convert;
mod error;
mod index;
mod memory;
mod tier;

use pyo3::prelude::*;

/// The extension module; its documentation is in `python/lmcache_rs/_core.pyi`. It needs the GIL, also of a Python that can do
/// without: `index` says why.
#[pymodule(gil_used = true)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("build_profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    error::add_to(module)?;
    index::add_to(module)?;
    memory::add_to(module)?;
    tier::add_to(module)
}
