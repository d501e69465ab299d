//! Whose values a tier holds: namespace, generation, ranks, and the checksum or secret that seals them.

use std::fmt;

use super::{Reason, Refusal};
use crate::{Error, ErrorKind, Result};

// Contexts are part of the format, as in `key`.
const NAMESPACE_CONTEXT: &str = "lmcache_rs 2026-11-24 namespace v1";
const SECRET_CONTEXT: &str = "lmcache_rs 2026-11-24 value mac v1";

/// The digest of everything that changes the bytes of KV: values of two namespaces never meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace(pub(super) [u8; 32]);

impl Namespace {
    /// The namespace of these properties (name and value, in any order).
    #[must_use]
    pub fn new(properties: &[(String, String)]) -> Self {
        let mut properties: Vec<_> = properties.iter().collect();
        properties.sort();
        let mut hasher = blake3::Hasher::new_derive_key(NAMESPACE_CONTEXT);
        for text in properties.into_iter().flat_map(|(name, value)| [name, value]) {
            // Its length in front, so that no two descriptions have the same bytes.
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// The namespace that consists of `bytes`.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes of the namespace.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// What a reset draws anew: values of another generation are never found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Generation(pub(super) [u8; 16]);

impl Generation {
    /// One that nobody has drawn before.
    pub(super) fn draw() -> std::result::Result<Self, Refusal> {
        random().map(Self)
    }
}

/// Random bytes of the system.
pub(super) fn random<const N: usize>() -> std::result::Result<[u8; N], Refusal> {
    let mut bytes = [0; N];
    // Short of 256 bytes the kernel gives all or an error.
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        Ok(count) if count == N => Ok(bytes),
        _ => Err(Refusal::new(Reason::Io, "the system gave no random bytes")),
    }
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// How values are made tamper-evident.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Seal {
    /// XXH3-128: finds accidents.
    Checksum,
    /// blake3 keyed with a secret: finds forgery too, at about a third of the speed.
    Mac([u8; 32]),
}

impl Seal {
    /// A MAC by a key made of `secret`, of any length.
    #[must_use]
    pub fn from_secret(secret: &[u8]) -> Self {
        Self::Mac(blake3::derive_key(SECRET_CONTEXT, secret))
    }

    /// Its number in headers.
    pub(super) fn kind(self) -> u32 {
        match self {
            Self::Checksum => 1,
            Self::Mac(_) => 2,
        }
    }

    pub(super) fn start(self) -> Sum {
        match self {
            Self::Checksum => Sum::Xxh3(Box::new(twox_hash::XxHash3_128::new())),
            Self::Mac(key) => Sum::Blake3(Box::new(blake3::Hasher::new_keyed(&key))),
        }
    }

    pub(super) fn of(self, bytes: &[u8]) -> [u8; 32] {
        let mut sum = self.start();
        sum.update(bytes);
        sum.finish()
    }
}

/// Without the key.
impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Checksum => "Checksum",
            Self::Mac(_) => "Mac(..)",
        })
    }
}

/// A checksum that is being computed.
pub(super) enum Sum {
    Xxh3(Box<twox_hash::XxHash3_128>),
    Blake3(Box<blake3::Hasher>),
}

impl Sum {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Xxh3(hasher) => hasher.write(bytes),
            Self::Blake3(hasher) => {
                hasher.update(bytes);
            }
        }
    }

    pub(super) fn finish(self) -> [u8; 32] {
        match self {
            Self::Xxh3(hasher) => {
                let mut sum = [0; 32];
                sum[..16].copy_from_slice(&hasher.finish_128().to_le_bytes());
                sum
            }
            Self::Blake3(hasher) => *hasher.finalize().as_bytes(),
        }
    }
}

/// Whose values a tier holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub(super) namespace: Namespace,
    pub(super) rank: u32,
    pub(super) ranks: u32,
    pub(super) seal: Seal,
}

impl Space {
    /// Values of `namespace`: this process stores and loads those of `rank`, and a chunk is there when the values of
    /// all `ranks` are.
    pub fn new(namespace: Namespace, rank: u32, ranks: u32, seal: Seal) -> Result<Self> {
        if rank >= ranks {
            let message = format!("rank {rank} of {ranks}: ranks count from 0");
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        Ok(Self { namespace, rank, ranks, seal })
    }
}
