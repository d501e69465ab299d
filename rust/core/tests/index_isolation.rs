//! Keys are compared whole, and a miss costs the same whether or not somebody else holds the same tokens.

use std::cell::Cell;

use lmcache_core::{Chain, Index, Key, KeySpace, Result};

/// All its keys share the first `same` bytes, so with 8 or more they meet in one place of the table of keys.
fn keys(same: usize, name: u32, blocks: u8) -> Vec<Key> {
    let random = KeySpace::new("isolation", 0, &[]);
    (0..blocks)
        .map(|block| {
            let mut bytes = [0xA5; 32];
            let key = random.key(&[&name.to_le_bytes()[..], &[block]].concat());
            bytes[same..].copy_from_slice(&key.as_bytes()[same..]);
            Key::from_bytes(bytes)
        })
        .collect()
}

fn found(index: &Index, keys: &[Key]) -> usize {
    index.lookup(keys).expect("lookup").blocks()
}

#[test]
fn keys_that_collide_in_all_but_their_last_bytes_are_told_apart() {
    const STORED: u32 = 40;
    // The shorter the rest, the likelier two keys are equal by chance: 6 bytes are enough for none to be.
    for same in [0, 8, 16, 26] {
        let index = Index::new(8 * STORED as usize).expect("an index");
        for name in 0..STORED {
            let reservation = index.reserve(&keys(same, name, 8)[..]).expect("reserve");
            assert_eq!(reservation.commit().expect("commit"), 8);
        }
        let mut looked_up = 0;
        for name in 0..50 * STORED {
            let chain = keys(same, name, 8);
            assert_eq!(found(&index, &chain), if name < STORED { 8 } else { 0 }, "{name} of {same} bytes");
            looked_up += chain.len();
        }
        assert!(looked_up >= 16_000);
        index.check_integrity().expect("sound");
    }
}

#[test]
fn a_key_with_any_one_bit_flipped_is_not_found() {
    let index = Index::new(16).expect("an index");
    let chain = keys(0, 1, 4);
    index.reserve(&chain[..]).expect("reserve").commit().expect("commit");
    for position in 0..4 {
        for bit in 0..256 {
            let mut bytes = *chain[position].as_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            // Keys name all before them: a chain that goes on after another key has other keys from there on.
            let flipped = [&chain[..position], &[Key::from_bytes(bytes)]].concat();
            assert_eq!(found(&index, &flipped), position, "bit {bit} of key {position}");
        }
    }
    assert_eq!(found(&index, &chain), 4);
}

/// Counts how often it is asked for a key.
struct Counted<'a> {
    keys: &'a [Key],
    asked: Cell<usize>,
}

impl Chain for Counted<'_> {
    fn blocks(&self) -> usize {
        self.keys.len()
    }

    fn key(&self, position: usize) -> Result<Key> {
        self.asked.set(self.asked.get() + 1);
        Ok(self.keys[position])
    }
}

#[test]
fn a_miss_asks_for_as_many_keys_whatever_another_tenant_has_stored() {
    let tenant = |name: &str| KeySpace::new("sha256", 0, &[("salt".to_owned(), name.to_owned())]);
    let chain = |space: &KeySpace, document: u8| -> Vec<Key> {
        (0..200_u8).map(|block| space.key(&[document, block])).collect()
    };
    let (one, other) = (tenant("a"), tenant("b"));
    let index = Index::new(1000).expect("an index");
    index.reserve(&chain(&one, 1)[..]).expect("reserve").commit().expect("commit");
    let cost = |keys: &[Key]| {
        let counted = Counted { keys, asked: Cell::new(0) };
        assert_eq!(index.lookup(&counted).expect("lookup").blocks(), 0);
        counted.asked.get()
    };
    // The document that is stored for the first tenant, and one that nobody has stored.
    assert_eq!(cost(&chain(&other, 1)), cost(&chain(&other, 2)));
    assert_eq!(found(&index, &chain(&one, 1)), 200);
}
