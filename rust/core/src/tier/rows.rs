//! The rows of a pool that hold a chunk: where a tier reads from and writes to.

use std::ptr::NonNull;
use std::slice;

use crate::{Error, ErrorKind, HostPool, Result};

/// Rows of a pool, in the order of their chunk, whole strides. It keeps the pool mapped; that nobody else writes to
/// the rows (or reads, when they are loaded into) as long as a tier works on them is for its maker to see to.
#[derive(Clone, Debug)]
pub struct RowMemory {
    pool: HostPool,
    rows: u32,
    segments: Vec<Segment>,
}

/// Memory in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its first byte, at a multiple of 4 KiB.
    pub base: NonNull<u8>,
    /// Its length, a multiple of 4 KiB.
    pub bytes: usize,
}

// SAFETY: addresses in a mapping that the value keeps; see the promise of `RowMemory` on who uses them.
unsafe impl Send for RowMemory {}
// SAFETY: as above.
unsafe impl Sync for RowMemory {}

impl RowMemory {
    /// The rows numbered `rows` of `pool`, in this order; neighbours are joined.
    pub fn new(pool: &HostPool, rows: &[u32]) -> Result<Self> {
        pool.check_process()?;
        let invalid = |message| Err(Error::new(ErrorKind::InvalidArgument, message));
        let Ok(count) = u32::try_from(rows.len()) else {
            return invalid(format!("a chunk of {} rows", rows.len()));
        };
        if count == 0 {
            return invalid("a chunk has at least one row".to_owned());
        }
        let stride = pool.row_stride();
        let mut segments: Vec<Segment> = Vec::new();
        let mut next = None;
        for &row in rows {
            if row >= pool.rows() {
                return invalid(format!("row {row}: the pool has {}", pool.rows()));
            }
            if let Some(segment) = segments.last_mut().filter(|_| next == Some(row)) {
                segment.bytes += stride;
            } else {
                // SAFETY: the row is inside of the mapping, as just checked.
                let base = unsafe { pool.base().add(row as usize * stride) };
                segments.push(Segment { base, bytes: stride });
            }
            next = row.checked_add(1);
        }
        Ok(Self { pool: pool.clone(), rows: count, segments })
    }

    /// The rows' memory: addresses stay valid as long as this lives.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> u32 {
        self.rows
    }

    /// Bytes of a row that are used.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.pool.row_bytes()
    }

    /// Bytes of a row.
    #[must_use]
    pub fn row_stride(&self) -> usize {
        self.pool.row_stride()
    }

    /// Bytes of all rows.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.rows as usize * self.row_stride()
    }
}

impl Segment {
    /// Its bytes.
    ///
    /// # Safety
    /// The mapping lives, and nobody writes to the segment, as long as the slice is used.
    pub(super) unsafe fn as_slice<'a>(self) -> &'a [u8] {
        // SAFETY: as the caller promises.
        unsafe { slice::from_raw_parts(self.base.as_ptr(), self.bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HostPoolConfig;

    fn pool() -> HostPool {
        let config =
            HostPoolConfig { size_bytes: 8 * 8192, row_bytes: 5000, prefault_threads: 0, huge_pages: false };
        HostPool::new(&config).expect("memory")
    }

    #[test]
    fn neighbours_are_joined_in_the_order_given() {
        let pool = pool();
        let memory = RowMemory::new(&pool, &[6, 7, 0, 2, 1, 2, 3]).expect("valid");
        let base = pool.base().as_ptr() as usize;
        let segments: Vec<(usize, usize)> = memory
            .segments()
            .iter()
            .map(|segment| ((segment.base.as_ptr() as usize - base) / 8192, segment.bytes / 8192))
            .collect();
        assert_eq!(segments, [(6, 2), (0, 1), (2, 1), (1, 3)]);
        assert_eq!((memory.rows(), memory.bytes(), memory.row_bytes()), (7, 7 * 8192, 5000));
    }

    #[test]
    fn rows_that_are_not_there_are_refused() {
        for rows in [&[8][..], &[], &[0, u32::MAX]] {
            assert_eq!(
                RowMemory::new(&pool(), rows).expect_err("refused").kind(),
                ErrorKind::InvalidArgument
            );
        }
    }
}
