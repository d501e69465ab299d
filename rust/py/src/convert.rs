//! What crosses the border: numbers, number arrays and times.

use std::time::Duration;

use pyo3::buffer::{Element, PyBuffer, PyUntypedBuffer};
use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::{InvalidArgumentError, guarded};

/// What `close` waits when no time is given.
pub const CLOSE_DEFAULT: Duration = Duration::from_secs(5);

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
            return Err(invalid(format!(
                "{seconds} is no time (timeout_s and the like): give seconds, 0 or more"
            )));
        }
        Ok(Self(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)))
    }
}

/// Row, block or chunk numbers: see `integers`.
pub struct Numbers(pub Vec<u32>);

impl<'a, 'py> FromPyObject<'a, 'py> for Numbers {
    type Error = PyErr;

    fn extract(array: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        integers(&array, "arrays of numbers").map(Self)
    }
}

/// A one-dimensional buffer of native unsigned 32-bit integers, or `bytes` of that layout. `name` is for messages.
pub fn integers(array: &Bound<'_, PyAny>, name: &str) -> PyResult<Vec<u32>> {
    if let Ok(bytes) = array.cast::<PyBytes>() {
        let bytes = bytes.as_bytes();
        let (numbers, rest) = bytes.as_chunks();
        if !rest.is_empty() {
            let length = bytes.len();
            let message = format!("{name}: {length} bytes are no whole number of unsigned 32-bit integers");
            return Err(invalid(message));
        }
        return Ok(numbers.iter().map(|&number| u32::from_ne_bytes(number)).collect());
    }
    let refused = |why: &str| {
        invalid(format!(
            "{name} are bytes or one-dimensional contiguous buffers of numpy.uint32, not {} ({why})",
            array.get_type()
        ))
    };
    let buffer = PyUntypedBuffer::get(array).map_err(|error| refused(&error.to_string()))?;
    // `PyBuffer` insists on alignment, which an empty `array.array` has no reason to have.
    if buffer.item_count() == 0 && u32::is_compatible_format(buffer.format()) {
        return Ok(Vec::new());
    }
    let buffer: PyBuffer<u32> = buffer.into_typed().map_err(|error| refused(&error.to_string()))?;
    if buffer.dimensions() != 1 || !buffer.is_c_contiguous() {
        return Err(refused(&format!("{} dimensions, not contiguous or not one", buffer.dimensions())));
    }
    buffer.to_vec(array.py())
}
