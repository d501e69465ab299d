//! The exception tree, and how an error of the core becomes one of its members.

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
    "The object was closed, or belongs to another process."
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
    module.add("InternalError", py.get_type::<InternalError>())
}
