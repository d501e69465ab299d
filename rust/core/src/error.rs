//! The one error type of the core: a kind to act on, and a message for a person.

use std::fmt;

/// What went wrong, coarse enough for a caller to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// An argument is out of range or of the wrong shape.
    InvalidArgument,
    /// The machine did not give the memory asked for.
    OutOfMemory,
    /// The object was closed, or belongs to another process (after a fork).
    Closed,
    /// The GPU's driver refused a call, or there is none.
    Device,
    /// A broken invariant of this crate.
    Internal,
}

/// An error: kind and message. The message names the value and the remedy.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

/// The result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
