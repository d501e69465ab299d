//! What crosses the border into the memory classes: numbers, number arrays and times.

use std::time::Duration;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::{InvalidArgumentError, guarded};

pub fn invalid(message: impl Into<String>) -> PyErr {
    InvalidArgumentError::new_err(message.into())
}

/// Runs a call of the core without the GIL.
pub fn detached<T: Send>(
    py: Python<'_>,
    body: impl FnOnce() -> lmcache_core::Result<T> + Send,
) -> PyResult<T> {
    py.detach(|| guarded(body))
}

/// A number that is not negative; others are an `InvalidArgumentError` instead of an `OverflowError`.
#[derive(Clone, Copy)]
pub struct Count<T>(pub T);

impl<'a, 'py, T> FromPyObject<'a, 'py> for Count<T>
where
    T: FromPyObject<'a, 'py>,
    T::Error: Into<PyErr>,
{
    type Error = PyErr;

    fn extract(number: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        T::extract(number).map(Self).map_err(|error| {
            let error = error.into();
            if error.is_instance_of::<PyOverflowError>(number.py()) {
                return invalid(format!(
                    "{} is outside of the numbers that can be taken here",
                    number.as_any()
                ));
            }
            error
        })
    }
}

/// A time limit in seconds; infinity is a long time.
#[derive(Clone, Copy)]
pub struct Timeout(pub Duration);

impl<'a, 'py> FromPyObject<'a, 'py> for Timeout {
    type Error = PyErr;

    fn extract(seconds: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let seconds: f64 = seconds.extract()?;
        if seconds.is_nan() || seconds < 0.0 {
            return Err(invalid(format!("timeout_s is {seconds}: give seconds, 0 or more")));
        }
        Ok(Self(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)))
    }
}

/// Row or block numbers: a one-dimensional buffer of native unsigned 32-bit integers, or `bytes` of that layout.
pub struct Numbers(pub Vec<u32>);

impl<'a, 'py> FromPyObject<'a, 'py> for Numbers {
    type Error = PyErr;

    fn extract(array: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(bytes) = array.cast::<PyBytes>() {
            let bytes = bytes.as_bytes();
            if bytes.len() % size_of::<u32>() != 0 {
                return Err(invalid(format!(
                    "{} bytes are no whole number of unsigned 32-bit integers",
                    bytes.len()
                )));
            }
            let native = |number: &[u8]| u32::from_ne_bytes([number[0], number[1], number[2], number[3]]);
            return Ok(Self(bytes.chunks_exact(size_of::<u32>()).map(native).collect()));
        }
        let refused = |why: &str| {
            invalid(format!(
                "rows and blocks are bytes or one-dimensional contiguous buffers of numpy.uint32, not {} ({why})",
                array.get_type()
            ))
        };
        let buffer = PyBuffer::<u32>::get(&array).map_err(|error| refused(&error.to_string()))?;
        if buffer.dimensions() != 1 || !buffer.is_c_contiguous() {
            return Err(refused(&format!("{} dimensions, not contiguous or not one", buffer.dimensions())));
        }
        Ok(Self(buffer.to_vec(array.py())?))
    }
}
