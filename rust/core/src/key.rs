//! What KV is called: keys, the spaces that keep them apart, and hash chains over tokens.

use crate::error::{Error, ErrorKind, Result};

// Contexts are part of the format: another string names other keys. The date keeps them globally unique, as blake3
// asks of `derive_key`.
const SPACE_CONTEXT: &str = "lmcache_rs 2026-11-24 key space v1";
const ROOT_CONTEXT: &str = "lmcache_rs 2026-11-24 token chain root v1";

/// Ends the hashed bytes of a partial block. It makes their length odd, while full blocks are whole 4-byte tokens.
const TAIL_MARK: u8 = b't';

/// The name of the KV of a prefix, up to a block's end: 32 bytes that nothing else shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    /// The key that consists of `bytes`.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes of the key.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Everything beside a block's hash that names its KV: two spaces never share a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySpace([u8; 32]);

impl KeySpace {
    /// The space of the block-hash `algorithm`, the cache `group` and the `tags` (name and value, in any order).
    #[must_use]
    pub fn new(algorithm: &str, group: u32, tags: &[(String, String)]) -> Self {
        let mut tags: Vec<_> = tags.iter().collect();
        tags.sort();
        let mut hasher = blake3::Hasher::new_derive_key(SPACE_CONTEXT);
        // Every text has its length in front, so that no two descriptions have the same bytes.
        let mut text = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        text(algorithm);
        for (name, value) in tags {
            text(name);
            text(value);
        }
        // Texts come first and the number last: the total length tells where it is.
        hasher.update(&group.to_le_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// The key of a block hash in this space.
    #[must_use]
    pub fn key(&self, block_hash: &[u8]) -> Key {
        Key(*blake3::keyed_hash(&self.0, block_hash).as_bytes())
    }
}

/// Hashes of a token sequence, chained: each names the whole prefix up to the end of its block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenHashes {
    /// One for each full block.
    pub blocks: Vec<[u8; 32]>,
    /// That of the partial last block, if there is one.
    pub tail: Option<[u8; 32]>,
}

/// Hashes `tokens` in blocks of `block_size`, from a `root` that names everything but the tokens that decides their KV.
pub fn hash_tokens(root: &[u8], tokens: &[u32], block_size: usize) -> Result<TokenHashes> {
    if block_size == 0 {
        return Err(Error::new(ErrorKind::InvalidArgument, "block_size is 0, it must be at least 1"));
    }
    let mut parent = blake3::derive_key(ROOT_CONTEXT, root);
    let mut blocks = Vec::with_capacity(tokens.len() / block_size);
    let full = tokens.chunks_exact(block_size);
    let rest = full.remainder();
    let mut bytes = Vec::new();
    for block in full {
        bytes.clear();
        bytes.extend(block.iter().flat_map(|token| token.to_le_bytes()));
        parent = *blake3::keyed_hash(&parent, &bytes).as_bytes();
        blocks.push(parent);
    }
    let tail = (!rest.is_empty()).then(|| {
        bytes.clear();
        bytes.extend(rest.iter().flat_map(|token| token.to_le_bytes()));
        bytes.extend((rest.len() as u64).to_le_bytes());
        bytes.push(TAIL_MARK);
        *blake3::keyed_hash(&parent, &bytes).as_bytes()
    });
    Ok(TokenHashes { blocks, tail })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Description = (String, u32, Vec<(String, String)>);

    fn description() -> impl Strategy<Value = Description> {
        let tags = prop::collection::vec(("[ab]{0,2}", "[ab]{0,2}"), 0..3);
        ("[ab]{0,3}", 0..3_u32, tags)
    }

    fn space((algorithm, group, tags): &Description) -> KeySpace {
        KeySpace::new(algorithm, *group, tags)
    }

    fn canonical(mut description: Description) -> Description {
        description.2.sort();
        description
    }

    proptest! {
        #[test]
        fn spaces_are_equal_exactly_when_their_descriptions_are(one in description(), two in description()) {
            prop_assert_eq!(canonical(one.clone()) == canonical(two.clone()), space(&one) == space(&two));
        }

        #[test]
        fn every_field_changes_the_key(one in description(), hash in any::<[u8; 32]>(), bit in 0..256_usize) {
            let key = space(&one).key(&hash);
            let (algorithm, group, tags) = &one;
            prop_assert_ne!(key, KeySpace::new(&format!("{algorithm}x"), *group, tags).key(&hash));
            prop_assert_ne!(key, KeySpace::new(algorithm, group + 1, tags).key(&hash));
            let more = [tags.clone(), vec![(String::new(), String::new())]].concat();
            prop_assert_ne!(key, KeySpace::new(algorithm, *group, &more).key(&hash));
            let mut other = hash;
            other[bit / 8] ^= 1 << (bit % 8);
            prop_assert_ne!(key, space(&one).key(&other));
            prop_assert_ne!(key, space(&one).key(&hash[..31]));
        }

        #[test]
        fn one_token_changes_its_block_and_all_after_it(
            tokens in prop::collection::vec(any::<u32>(), 1..40), block_size in 1..6_usize, at: prop::sample::Index,
        ) {
            let at = at.index(tokens.len());
            let before = hash_tokens(b"root", &tokens, block_size).unwrap();
            let mut changed = tokens.clone();
            changed[at] ^= 0x8000_0001;
            let after = hash_tokens(b"root", &changed, block_size).unwrap();
            for (i, (x, y)) in before.blocks.iter().zip(&after.blocks).enumerate() {
                prop_assert_eq!(x == y, i < at / block_size);
            }
            prop_assert!(before.tail.is_none() || before.tail != after.tail);
            let elsewhere = hash_tokens(b"roo", &tokens, block_size).unwrap();
            prop_assert!(before.blocks.iter().zip(&elsewhere.blocks).all(|(x, y)| x != y));
        }

        #[test]
        fn a_tail_never_equals_a_full_block(tokens in prop::collection::vec(any::<u32>(), 1..8)) {
            let full = hash_tokens(b"root", &tokens, tokens.len()).unwrap();
            let tail = hash_tokens(b"root", &tokens, tokens.len() + 1).unwrap();
            prop_assert_eq!((full.blocks.len(), full.tail), (1, None));
            prop_assert!(tail.blocks.is_empty() && tail.tail.is_some());
            prop_assert_ne!(Some(full.blocks[0]), tail.tail);
        }
    }

    #[test]
    fn a_block_size_of_zero_is_refused() {
        assert_eq!(hash_tokens(b"", &[1], 0).unwrap_err().kind(), ErrorKind::InvalidArgument);
    }

    /// Keys outlive the process in later tiers: these bytes may change only with the contexts' version.
    #[test]
    fn the_format_stays() {
        let space = KeySpace::new("sha256_cbor", 1, &[("user".into(), "a".into())]);
        assert_eq!(start(space.key(b"hash").as_bytes()), 0x17d1_b594_5170_e2d0);
        let hashes = hash_tokens(b"model", &[1, 2, 3], 2).unwrap();
        assert_eq!(start(&hashes.blocks[0]), 0x30be_00b7_0409_ffa1);
        assert_eq!(start(&hashes.tail.unwrap()), 0xd206_4d20_9aa3_060a);
    }

    fn start(bytes: &[u8; 32]) -> u64 {
        u64::from_be_bytes(*bytes.first_chunk().unwrap())
    }
}
