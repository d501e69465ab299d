//! Why a tier did not do what it was asked for: a reason to count, and a cause for a person.

use std::fmt;
use std::io;

macro_rules! reasons {
    ($($(#[doc = $doc:literal])* $variant:ident = $name:literal,)*) => {
        /// Why a load was a miss or a store was dropped.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[doc = $doc])* $variant,)* }

        impl Reason {
            /// Every reason.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The name it is counted under.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

reasons! {
    /// There is no such value.
    Absent = "absent",
    /// The value is shorter or longer than it must be.
    Truncated = "truncated",
    /// A checksum does not fit.
    Corrupt = "corrupt",
    /// A whole value, but not the one asked for.
    Foreign = "foreign",
    /// Written by a newer version.
    Newer = "newer",
    /// The medium failed.
    Io = "io_error",
    /// No room could be made.
    NoSpace = "no_space",
    /// The quota is smaller than the value, or taken by what cannot leave.
    Quota = "quota",
    /// Permission is missing, or the medium is read-only.
    Denied = "denied",
    /// Another process held the lock for too long.
    Locked = "locked",
    /// The tier failed a moment ago and rests.
    Paused = "paused",
    /// Too much waits already.
    Full = "queue_full",
    /// The same value is being stored.
    InFlight = "in_flight",
    /// It was not begun, or not answered, in time.
    Late = "late",
    /// An earlier chunk of the same load was a miss.
    Broken = "prefix_broken",
    /// The queue was closed before it was begun.
    Closed = "closed",
    /// A broken invariant of this crate.
    Internal = "internal",
}

/// A miss or a dropped store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// To be counted.
    pub reason: Reason,
    /// What happened, with the path or the address; empty where the reason says all.
    pub cause: String,
}

impl Refusal {
    /// A refusal for `reason`, because of `cause`.
    pub fn new(reason: Reason, cause: impl Into<String>) -> Self {
        Self { reason, cause: cause.into() }
    }

    /// What the system's `error` on `what` means.
    pub(super) fn from_io(error: &io::Error, what: impl fmt::Display) -> Self {
        let reason = match error.raw_os_error() {
            Some(libc::ENOENT) => Reason::Absent,
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Reason::NoSpace,
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => Reason::Denied,
            _ if error.kind() == io::ErrorKind::UnexpectedEof => Reason::Truncated,
            _ => Reason::Io,
        };
        Self::new(reason, format!("{what}: {error}"))
    }

    /// Whether the medium is to blame, and the next attempt will likely fail too.
    pub(super) fn is_fault(&self) -> bool {
        matches!(self.reason, Reason::Io | Reason::NoSpace | Reason::Denied | Reason::Locked | Reason::Late)
    }
}

impl From<Reason> for Refusal {
    fn from(reason: Reason) -> Self {
        Self::new(reason, "")
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason.name())?;
        if self.cause.is_empty() { Ok(()) } else { write!(f, " ({})", self.cause) }
    }
}

impl std::error::Error for Refusal {}
