//! The block hashes that vLLM computes by default, to the byte.

use ring::digest::{SHA256, digest};

use crate::error::{Error, ErrorKind, Result};

/// A frame of pickle holds up to 64 KiB before another begins; 5 bytes a token stay well below it.
const BLOCK_SIZE_MAX: usize = 8192;

/// Opcodes of pickle, protocol 5 (Python's `pickletools`).
mod op {
    pub const PROTO_5: [u8; 2] = [0x80, 5];
    pub const FRAME: u8 = 0x95;
    pub const SHORT_BINBYTES: u8 = b'C';
    pub const MARK: u8 = b'(';
    pub const BININT1: u8 = b'K';
    pub const BININT2: u8 = b'M';
    pub const BININT: u8 = b'J';
    pub const TUPLE: u8 = b't';
    pub const TUPLE1: u8 = 0x85;
    pub const TUPLE2: u8 = 0x86;
    pub const TUPLE3: u8 = 0x87;
    pub const MEMOIZE: u8 = 0x94;
    pub const NONE: u8 = b'N';
    pub const STOP: u8 = b'.';
}

/// The hashes of the full blocks of `tokens`, each over the one before; `parent` comes before the first.
///
/// What vLLM's `hash_block_tokens` gives with its hash function `sha256` for blocks without extra keys:
/// SHA-256 of `pickle.dumps((parent, (token, ...), None), protocol=5)`.
pub fn sha256_block_hashes(parent: &[u8], tokens: &[u32], block_size: usize) -> Result<Vec<[u8; 32]>> {
    let invalid = |message: String| Err(Error::new(ErrorKind::InvalidArgument, message));
    if !(1..=BLOCK_SIZE_MAX).contains(&block_size) {
        return invalid(format!("block_size is {block_size}, it must be from 1 to {BLOCK_SIZE_MAX}"));
    }
    if u8::try_from(parent.len()).is_err() {
        return invalid(format!("parent has {} bytes, at most 255 can be pickled here", parent.len()));
    }
    // A larger one is written in another form.
    if let Some(token) = tokens.iter().find(|&&token| i32::try_from(token).is_err()) {
        return invalid(format!("token {token} does not fit into 31 bits"));
    }
    let mut pickle = Vec::with_capacity(64 + parent.len().max(32) + 5 * block_size);
    let mut hashes: Vec<[u8; 32]> = Vec::with_capacity(tokens.len() / block_size);
    for block in tokens.chunks_exact(block_size) {
        write_pickle(&mut pickle, hashes.last().map_or(parent, |hash| hash), block);
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, &pickle).as_ref());
        hashes.push(hash);
    }
    Ok(hashes)
}

/// `pickle.dumps((parent, tuple(tokens), None), protocol=5)`.
#[expect(clippy::cast_possible_truncation, reason = "the caller and the arms have looked at the sizes")]
fn write_pickle(pickle: &mut Vec<u8>, parent: &[u8], tokens: &[u32]) {
    pickle.clear();
    pickle.extend(op::PROTO_5);
    pickle.push(op::FRAME);
    let length_at = pickle.len();
    pickle.extend([0; 8]);
    pickle.extend([op::SHORT_BINBYTES, parent.len() as u8]);
    pickle.extend(parent);
    pickle.push(op::MEMOIZE);
    if tokens.len() > 3 {
        pickle.push(op::MARK);
    }
    for &token in tokens {
        match token {
            0..=0xff => pickle.extend([op::BININT1, token as u8]),
            0x100..=0xffff => {
                pickle.push(op::BININT2);
                pickle.extend((token as u16).to_le_bytes());
            }
            _ => {
                pickle.push(op::BININT);
                pickle.extend(token.to_le_bytes());
            }
        }
    }
    pickle.push(match tokens.len() {
        1 => op::TUPLE1,
        2 => op::TUPLE2,
        3 => op::TUPLE3,
        _ => op::TUPLE,
    });
    pickle.extend([op::MEMOIZE, op::NONE, op::TUPLE3, op::MEMOIZE, op::STOP]);
    let framed = (pickle.len() - length_at - 8) as u64;
    pickle[length_at..length_at + 8].copy_from_slice(&framed.to_le_bytes());
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    /// `pickle.dumps((b"\1\2", (7, 256, 65536, 1), None), protocol=5)` of Python 3.11.
    const PICKLED: &[u8] =
        b"\x80\x05\x95\x18\0\0\0\0\0\0\0C\x02\x01\x02\x94(K\x07M\0\x01J\0\0\x01\0K\x01t\x94N\x87\x94.";

    #[test]
    fn a_block_is_pickled_as_python_does() {
        let mut pickle = vec![1];
        write_pickle(&mut pickle, &[1, 2], &[7, 256, 65536, 1]);
        assert_eq!(pickle, PICKLED);
    }

    #[test]
    fn each_hash_is_the_parent_of_the_next() {
        let whole = sha256_block_hashes(b"root", &[1, 2, 3, 4, 5, 6, 7], 2).unwrap();
        assert_eq!(whole.len(), 3);
        assert_eq!(sha256_block_hashes(&whole[0], &[3, 4, 5, 6], 2).unwrap(), whole[1..]);
    }

    #[test]
    fn what_would_be_pickled_otherwise_is_refused() {
        for (parent, token, block_size) in
            [(&b"root"[..], 1 << 31, 1), (&[0; 256], 1, 1), (b"root", 1, 0), (b"root", 1, BLOCK_SIZE_MAX + 1)]
        {
            let refused = sha256_block_hashes(parent, &[token], block_size).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::InvalidArgument);
        }
    }
}
