//! What crosses the border: numbers, number arrays and times in; errors and panics out.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use lmcache_core::ErrorKind;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::{ClosedError, InternalError, InvalidArgumentError, OutOfMemoryError};

/// The exception of a core error.
pub fn to_py(error: &lmcache_core::Error) -> PyErr {
    let message = error.to_string();
    match error.kind() {
        ErrorKind::InvalidArgument => InvalidArgumentError::new_err(message),
        ErrorKind::OutOfMemory => OutOfMemoryError::new_err(message),
        ErrorKind::Closed => ClosedError::new_err(message),
        ErrorKind::Internal => InternalError::new_err(message),
    }
}

pub fn invalid(message: impl Into<String>) -> PyErr {
    InvalidArgumentError::new_err(message.into())
}

/// Runs a method's body; a panic becomes an `InternalError`, which `except Exception` sees.
pub fn guard<T>(body: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        Err(InternalError::new_err(format!(
            "a panic in lmcache_rs, please report it: {}",
            panic_message(&*panic)
        )))
    })
}

/// As `guard`, without the GIL.
pub fn detached<T: Send>(
    py: Python<'_>,
    body: impl FnOnce() -> lmcache_core::Result<T> + Send,
) -> PyResult<T> {
    guard(|| py.detach(body).map_err(|error| to_py(&error)))
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
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
