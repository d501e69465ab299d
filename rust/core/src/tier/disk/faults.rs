//! Faults on demand: the n-th call of a test's files fails, once or from then on.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

/// In the place of an error: the transfer comes short.
pub(super) const SHORT: i32 = -1;

/// Shared by all who use the same files.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct Faults(Arc<Plan>);

#[derive(Debug, Default)]
struct Plan {
    calls: AtomicU64,
    /// 0: none.
    fails_at: AtomicU64,
    error: AtomicI32,
    lasts: AtomicBool,
}

impl Faults {
    /// The call after `calls` more fails with `error`; `lasts` says whether all later ones do.
    pub(super) fn plan(&self, calls: u64, error: i32, lasts: bool) {
        self.0.calls.store(0, Ordering::SeqCst);
        self.0.error.store(error, Ordering::SeqCst);
        self.0.lasts.store(lasts, Ordering::SeqCst);
        self.0.fails_at.store(calls + 1, Ordering::SeqCst);
    }

    /// No more faults; whether any call had failed, or would have, since `plan`.
    pub(super) fn end(&self) -> bool {
        let fails_at = self.0.fails_at.swap(0, Ordering::SeqCst);
        self.0.calls.load(Ordering::SeqCst) >= fails_at
    }

    fn is_due(&self) -> bool {
        let call = self.0.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let fails_at = self.0.fails_at.load(Ordering::SeqCst);
        fails_at > 0 && (call == fails_at || (call > fails_at && self.0.lasts.load(Ordering::SeqCst)))
    }

    pub(super) fn before_call(&self) -> io::Result<()> {
        let error = self.0.error.load(Ordering::SeqCst);
        if self.is_due() && error != SHORT {
            return Err(io::Error::from_raw_os_error(error));
        }
        Ok(())
    }

    pub(super) fn transferred(&self, result: io::Result<usize>) -> io::Result<usize> {
        if !self.is_due() {
            return result;
        }
        match self.0.error.load(Ordering::SeqCst) {
            // Where O_DIRECT can go on.
            SHORT => {
                result.map(|bytes| if bytes > 4096 { (bytes / 2).next_multiple_of(4096) } else { bytes })
            }
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}
