//! Which process made an object: threads, locks and mappings do not survive a fork.

use std::process;

use crate::{Error, ErrorKind, Result};

/// The process that made an object. A forked child has neither its threads nor its memory, and its locks may be
/// held for ever: every call checks this first, before it takes a lock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner {
    process: u32,
}

impl Owner {
    /// The calling process.
    pub(crate) fn this_process() -> Self {
        Self { process: process::id() }
    }

    /// Whether the caller runs in the process that made the object.
    pub(crate) fn is_here(self) -> bool {
        self.process == process::id()
    }

    /// Refuses a call on `what` from another process than its own.
    pub(crate) fn check(self, what: &str) -> Result<()> {
        if self.is_here() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Closed,
            format!(
                "this {what} belongs to process {}, not to its fork {}: make a new one after the fork",
                self.process,
                process::id()
            ),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_process_is_refused_with_both_numbers() {
        assert!(Owner::this_process().check("pool").is_ok());
        let error = Owner { process: 1 }.check("pool").expect_err("not here");
        assert_eq!(error.kind(), ErrorKind::Closed);
        assert!(error.to_string().contains("process 1,"), "{error}");
    }
}
