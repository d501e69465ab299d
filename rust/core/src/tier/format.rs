//! The bytes of a value's header and of a namespace's record, as `docs/format.md` has them.

use super::space::{Generation, Namespace, Space};
use super::{Chunk, Reason};

/// Bytes of a header: what `O_DIRECT` can move.
pub(super) const HEADER_BYTES: usize = 4096;

/// Bytes of a record.
pub(super) const RECORD_BYTES: usize = 96;

const VERSION: u32 = 1;
const VALUE_MAGIC: &[u8; 8] = b"LMCRSKV1";
const RECORD_MAGIC: &[u8; 8] = b"LMCRSNS1";

/// Rows are the engine's blocks as they are.
const CODEC_PLAIN: u32 = 0;

const VERSION_AT: usize = 8;
const IDENTITY_AT: usize = 12;
const PAYLOAD_SUM_AT: usize = 144;
const PAYLOAD_SUM_END: usize = PAYLOAD_SUM_AT + 32;
const HEADER_SUM_AT: usize = HEADER_BYTES - 32;
const RECORD_SUM_AT: usize = RECORD_BYTES - 32;

/// A header's bytes, in memory that `O_DIRECT` takes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(4096))]
pub(super) struct Header(pub(super) [u8; HEADER_BYTES]);

impl Header {
    /// The header of `chunk` as `space` stores it, but for the checksums.
    pub(super) fn new(space: &Space, generation: Generation, chunk: &Chunk) -> Box<Self> {
        let memory = &chunk.memory;
        let mut header = Box::new(Self([0; HEADER_BYTES]));
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            header.0[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(VALUE_MAGIC);
        put(&VERSION.to_le_bytes());
        put(&4096_u32.to_le_bytes());
        put(space.namespace.as_bytes());
        put(&generation.0);
        put(chunk.key.as_bytes());
        put(&space.rank.to_le_bytes());
        put(&space.ranks.to_le_bytes());
        put(&memory.rows().to_le_bytes());
        put(&CODEC_PLAIN.to_le_bytes());
        put(&(memory.row_bytes() as u64).to_le_bytes());
        put(&(memory.row_stride() as u64).to_le_bytes());
        put(&(memory.bytes() as u64).to_le_bytes());
        put(&space.seal.kind().to_le_bytes());
        put(&[0; 4]);
        debug_assert_eq!(at, PAYLOAD_SUM_AT);
        header
    }

    /// Enters the payload's checksum and seals the header.
    pub(super) fn seal(&mut self, space: &Space, payload_sum: &[u8; 32]) {
        self.0[PAYLOAD_SUM_AT..PAYLOAD_SUM_END].copy_from_slice(payload_sum);
        let sum = space.seal.of(&self.0[..HEADER_SUM_AT]);
        self.0[HEADER_SUM_AT..].copy_from_slice(&sum);
    }

    /// The payload's checksum, if `self`, as read, is the header of the value that `expected` describes.
    pub(super) fn verify(&self, space: &Space, expected: &Self) -> Result<[u8; 32], Reason> {
        if self.0[..VERSION_AT] != expected.0[..VERSION_AT] {
            return Err(Reason::Corrupt);
        }
        // Before the checksum: a newer version may seal in another way.
        if number_at(&self.0, VERSION_AT) > VERSION {
            return Err(Reason::Newer);
        }
        if self.0[HEADER_SUM_AT..] != space.seal.of(&self.0[..HEADER_SUM_AT]) {
            return Err(Reason::Corrupt);
        }
        let same = |from: usize, to: usize| self.0[from..to] == expected.0[from..to];
        if !same(VERSION_AT, IDENTITY_AT)
            || !same(IDENTITY_AT, PAYLOAD_SUM_AT)
            || !same(PAYLOAD_SUM_END, HEADER_SUM_AT)
        {
            return Err(Reason::Foreign);
        }
        let sum = self.0[PAYLOAD_SUM_AT..PAYLOAD_SUM_END].try_into();
        sum.map_err(|_| Reason::Internal)
    }
}

fn number_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |number, &byte| number << 8 | u32::from(byte))
}

/// The record that says which generation of the namespace is the present one.
pub(super) fn encode_record(space: &Space, generation: Generation) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    record[..8].copy_from_slice(RECORD_MAGIC);
    record[8..12].copy_from_slice(&VERSION.to_le_bytes());
    record[16..48].copy_from_slice(space.namespace.as_bytes());
    record[48..64].copy_from_slice(&generation.0);
    let sum = space.seal.of(&record[..RECORD_SUM_AT]);
    record[RECORD_SUM_AT..].copy_from_slice(&sum);
    record
}

/// The generation in `record`; None when it is not one of this space.
pub(super) fn decode_record(space: &Space, record: &[u8]) -> Option<Generation> {
    let generation = Generation(record.get(48..64)?.try_into().ok()?);
    (record == encode_record(space, generation)).then_some(generation)
}

/// The namespace and generation that `record` names, sealed by whomever.
pub(super) fn peek_record(record: &[u8]) -> Option<(Namespace, Generation)> {
    if record.len() != RECORD_BYTES || record[..8] != RECORD_MAGIC[..] {
        return None;
    }
    Some((Namespace(record[16..48].try_into().ok()?), Generation(record[48..64].try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier::{RowMemory, Seal};
    use crate::{HostPool, HostPoolConfig, Key};

    fn space(rank: u32, seal: Seal) -> Space {
        Space::new(Namespace([1; 32]), rank, 3, seal).expect("valid")
    }

    fn chunk(key: u8, rows: &[u32], row_bytes: usize) -> Chunk {
        let config =
            HostPoolConfig { size_bytes: 1 << 16, row_bytes, prefault_threads: 0, huge_pages: false };
        let pool = HostPool::new(&config).expect("memory");
        Chunk {
            key: Key::from_bytes([key; 32]),
            position: 0,
            memory: RowMemory::new(&pool, rows).expect("valid"),
        }
    }

    fn sealed(space: &Space, generation: Generation, chunk: &Chunk) -> Box<Header> {
        let mut header = Header::new(space, generation, chunk);
        header.seal(space, &[7; 32]);
        header
    }

    #[test]
    fn every_field_is_compared() {
        let (space_0, generation, chunk_0) =
            (space(0, Seal::Checksum), Generation([2; 16]), chunk(3, &[0, 1], 4096));
        let expected = Header::new(&space_0, generation, &chunk_0);
        assert_eq!(sealed(&space_0, generation, &chunk_0).verify(&space_0, &expected), Ok([7; 32]));
        let other_namespace = Space { namespace: Namespace([9; 32]), ..space_0 };
        let other_ranks = Space { ranks: 4, ..space_0 };
        for foreign in [
            sealed(&other_namespace, generation, &chunk_0),
            sealed(&other_ranks, generation, &chunk_0),
            sealed(&space(1, Seal::Checksum), generation, &chunk_0),
            sealed(&space_0, Generation([3; 16]), &chunk_0),
            sealed(&space_0, generation, &chunk(4, &[0, 1], 4096)),
            sealed(&space_0, generation, &chunk(3, &[0], 4096)),
            sealed(&space_0, generation, &chunk(3, &[0, 1], 4095)),
            sealed(&space_0, generation, &chunk(3, &[0], 8192)),
        ] {
            assert_eq!(foreign.verify(&space_0, &expected), Err(Reason::Foreign));
        }
        // Any byte outside of the checksums, sealed anew: even one without a meaning.
        for at in (8..HEADER_SUM_AT).filter(|at| !(PAYLOAD_SUM_AT..PAYLOAD_SUM_END).contains(at)) {
            let mut other = sealed(&space_0, generation, &chunk_0);
            other.0[at] ^= 0x80;
            other.seal(&space_0, &[7; 32]);
            let reason = other.verify(&space_0, &expected).expect_err("another value");
            assert_eq!(reason == Reason::Newer, (8..12).contains(&at), "byte {at}: {reason:?}");
        }
    }

    #[test]
    fn flipped_headers_are_refused() {
        for seal in [Seal::Checksum, Seal::from_secret(b"secret")] {
            let (space, generation, chunk) = (space(0, seal), Generation([2; 16]), chunk(3, &[0, 1], 4096));
            let expected = Header::new(&space, generation, &chunk);
            let mut header = sealed(&space, generation, &chunk);
            for bit in 0..HEADER_BYTES * 8 {
                header.0[bit / 8] ^= 1 << (bit % 8);
                assert!(header.verify(&space, &expected).is_err(), "bit {bit}");
                header.0[bit / 8] ^= 1 << (bit % 8);
            }
            assert!(header.verify(&space, &expected).is_ok());
        }
    }

    #[test]
    fn without_the_secret_nothing_can_be_sealed() {
        let (ours, generation, chunk) =
            (space(0, Seal::from_secret(b"ours")), Generation([2; 16]), chunk(3, &[0], 4096));
        let expected = Header::new(&ours, generation, &chunk);
        for seal in [Seal::Checksum, Seal::from_secret(b"theirs")] {
            let mut forged = expected.clone();
            forged.seal(&space(0, seal), &[7; 32]);
            assert_eq!(forged.verify(&ours, &expected), Err(Reason::Corrupt));
            assert_eq!(decode_record(&ours, &encode_record(&space(0, seal), generation)), None);
        }
        assert!(!format!("{ours:?}").contains("111"), "{ours:?}");
    }

    #[test]
    fn records_are_of_one_namespace_and_whole() {
        let (ours, generation) = (space(0, Seal::Checksum), Generation([5; 16]));
        let record = encode_record(&ours, generation);
        assert_eq!(decode_record(&space(2, Seal::Checksum), &record), Some(generation));
        assert_eq!(decode_record(&Space { namespace: Namespace([9; 32]), ..ours }, &record), None);
        for bit in 0..RECORD_BYTES * 8 {
            let mut flipped = record;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_record(&ours, &flipped), None, "bit {bit}");
        }
        for length in [0, 63, 64, RECORD_BYTES - 1] {
            assert_eq!(decode_record(&ours, &record[..length]), None);
        }
    }

    /// Values outlive the process: these bytes may change only with the version.
    #[test]
    fn the_format_stays() {
        let (space, generation) = (space(1, Seal::Checksum), Generation([2; 16]));
        let header = sealed(&space, generation, &chunk(3, &[0, 1], 5000));
        let sums = |bytes: &[u8]| blake3::hash(bytes).to_hex()[..16].to_owned();
        assert_eq!(sums(&header.0), "c7f11a31614efa97");
        assert_eq!(sums(&encode_record(&space, generation)), "14f8f3f71ce7343c");
        let properties = [("model".to_owned(), "m".to_owned()), ("dtype".to_owned(), "bf16".to_owned())];
        assert_eq!(sums(Namespace::new(&properties).as_bytes()), "f75ea4146c7921d2");
        assert_eq!(sums(&Seal::from_secret(b"secret").of(b"bytes")), "b97340d8821f0bbd");
    }
}
