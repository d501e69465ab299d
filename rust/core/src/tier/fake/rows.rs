//! Rows with content: a small pool whose bytes tests write and compare.

use crate::tier::{Chunk, RowMemory};
use crate::{HostPool, HostPoolConfig, Key};

/// A pool of rows.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    pool: HostPool,
}

impl Rows {
    pub(crate) fn new(rows: usize, row_bytes: usize) -> Self {
        let size_bytes = rows * row_bytes.next_multiple_of(4096);
        let config = HostPoolConfig { size_bytes, row_bytes, prefault_threads: 0, huge_pages: false };
        Self { pool: HostPool::new(&config).expect("memory") }
    }

    /// The chunk called `name` in `rows`.
    pub(crate) fn chunk(&self, name: u64, rows: &[u32]) -> Chunk {
        Chunk { key: key(name), position: 0, memory: RowMemory::new(&self.pool, rows).expect("valid") }
    }

    /// Fills `rows` with bytes that `seed` and the place in the chunk decide.
    pub(crate) fn fill(&self, rows: &[u32], seed: u64) {
        let mut state = seed ^ 0x5851_f42d_4c95_7f2d;
        for &row in rows {
            for word in self.bytes(row).chunks_exact_mut(8) {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                word.copy_from_slice(&state.to_be_bytes());
            }
        }
    }

    /// The bytes of `rows`, in their order.
    pub(crate) fn read(&self, rows: &[u32]) -> Vec<u8> {
        rows.iter().map(|&row| &*self.bytes(row)).collect::<Vec<&[u8]>>().concat()
    }

    #[expect(clippy::mut_from_ref, reason = "rows of a test are used by its one thread")]
    fn bytes(&self, row: u32) -> &mut [u8] {
        let stride = self.pool.row_stride();
        // SAFETY: inside of the pool; a test neither holds two of these nor uses a row that a tier works on.
        unsafe {
            std::slice::from_raw_parts_mut(self.pool.base().as_ptr().add(row as usize * stride), stride)
        }
    }
}

/// The key called `name`.
pub(crate) fn key(name: u64) -> Key {
    Key::from_bytes(*blake3::hash(&name.to_le_bytes()).as_bytes())
}
