//! Placeholder for the memory classes.

use pyo3::prelude::*;

pub fn add_to(_module: &Bound<'_, PyModule>) -> PyResult<()> {
    Ok(())
}
