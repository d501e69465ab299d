//! The exception tree, and how an error or a panic of the core becomes one of its members.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use lmcache_core::{Error, ErrorKind};
use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

create_exception!(lmcache_rs, LMCacheRsError, PyException, "Root of every error raised by lmcache_rs.");
create_exception!(
    lmcache_rs,
    InvalidArgumentError,
    LMCacheRsError,
    "An argument is out of range or of the wrong shape."
);
create_exception!(
    lmcache_rs,
    OutOfMemoryError,
    LMCacheRsError,
    "The machine did not give the memory asked for."
);
create_exception!(
    lmcache_rs,
    ClosedError,
    LMCacheRsError,
    "The object was closed, or belongs to another process (after a fork)."
);
create_exception!(
    lmcache_rs,
    DeviceError,
    LMCacheRsError,
    "The GPU's driver refused a call, or there is none."
);
create_exception!(
    lmcache_rs,
    TierError,
    LMCacheRsError,
    "A place beyond RAM did not do what it was asked for."
);
create_exception!(
    lmcache_rs,
    InternalError,
    LMCacheRsError,
    "A bug in lmcache_rs: a panic or a broken invariant."
);

pub fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("LMCacheRsError", py.get_type::<LMCacheRsError>())?;
    module.add("InvalidArgumentError", py.get_type::<InvalidArgumentError>())?;
    module.add("OutOfMemoryError", py.get_type::<OutOfMemoryError>())?;
    module.add("ClosedError", py.get_type::<ClosedError>())?;
    module.add("DeviceError", py.get_type::<DeviceError>())?;
    module.add("TierError", py.get_type::<TierError>())?;
    module.add("InternalError", py.get_type::<InternalError>())
}

/// The exception of an error of the core.
pub fn to_python(error: &Error) -> PyErr {
    let message = error.to_string();
    match error.kind() {
        ErrorKind::InvalidArgument => InvalidArgumentError::new_err(message),
        ErrorKind::OutOfMemory => OutOfMemoryError::new_err(message),
        ErrorKind::Closed => ClosedError::new_err(message),
        ErrorKind::Device => DeviceError::new_err(message),
        ErrorKind::Internal => InternalError::new_err(message),
    }
}

/// Runs a call of the core. A panic becomes an `InternalError`: pyo3 would make it a `PanicException`, which is no
/// `Exception`, passes every barrier of the connector and ends the engine.
pub fn guarded<T>(work: impl FnOnce() -> lmcache_core::Result<T>) -> PyResult<T> {
    guarded_py(|| work().map_err(|error| to_python(&error)))
}

/// As `guarded`, for work that raises Python's own exceptions.
pub fn guarded_py<T>(work: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    // What a panic may leave half-done is the core's affair: an index refuses to be used afterwards.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let message = panic_message(panic.as_ref());
        Err(InternalError::new_err(format!("a panic in lmcache_rs, please report it: {message}")))
    })
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("(no message)")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn a_panic_does_not_pass() {
        assert!(guarded::<()>(|| panic!("on purpose")).is_err());
        assert_eq!(guarded(|| Ok(1)).ok(), Some(1));
    }

    #[test]
    fn a_panic_keeps_its_message() {
        let message = |work: fn()| panic_message(catch_unwind(work).unwrap_err().as_ref()).to_owned();
        assert_eq!(message(|| panic!("fixed")), "fixed");
        assert_eq!(message(|| panic!("made of {}", 2)), "made of 2");
        assert_eq!(message(|| std::panic::panic_any(1)), "(no message)");
    }
}
