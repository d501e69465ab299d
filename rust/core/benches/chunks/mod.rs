//! What the benchmarks of tiers share: memory of some chunks of Qwen3-8B, with bytes that say where they are.

use std::slice;
use std::time::Duration;

use lmcache_core::{Chunk, HostPool, HostPoolConfig, Key, RowMemory};

/// A block of 16 tokens.
pub const ROW_BYTES: usize = 36 * 2 * 16 * 8 * 128 * 2;

/// A chunk of 256 tokens.
pub const CHUNK_ROWS: usize = 16;

pub const CHUNKS: usize = 8;

/// What a benchmark waits for anything.
pub const WAIT: Duration = Duration::from_secs(600);

/// A pool that holds the chunks.
pub fn pool() -> HostPool {
    let size_bytes = CHUNKS * CHUNK_ROWS * ROW_BYTES;
    let config = HostPoolConfig { size_bytes, row_bytes: ROW_BYTES, prefault_threads: 2, huge_pages: true };
    let pool = HostPool::new(&config).expect("memory");
    assert!(pool.wait_prefaulted(WAIT).expect("here"), "{:?}", pool.prefault_error());
    for (number, word) in bytes(&pool).chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    pool
}

#[expect(clippy::mut_from_ref, reason = "one user at a time, as the benchmarks go")]
pub fn bytes(pool: &HostPool) -> &mut [u8] {
    // SAFETY: the whole mapping; no other slice of it is used meanwhile.
    unsafe { slice::from_raw_parts_mut(pool.base().as_ptr(), pool.size_bytes()) }
}

/// The key of chunk `number`.
pub fn key(number: usize) -> Key {
    Key::from_bytes([u8::try_from(number).expect("few"); 32])
}

/// The chunks, each under its key.
pub fn chunks(pool: &HostPool) -> Vec<Chunk> {
    let chunk = |number: usize| {
        let rows = (0..CHUNK_ROWS).map(|row| u32::try_from(number * CHUNK_ROWS + row).expect("few"));
        // Not neighbours: each row is a piece of memory of its own.
        let rows: Vec<u32> = rows.rev().collect();
        Chunk { key: key(number), position: 0, memory: RowMemory::new(pool, &rows).expect("valid") }
    };
    (0..CHUNKS).map(chunk).collect()
}
