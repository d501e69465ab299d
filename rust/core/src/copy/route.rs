//! The two ends of a copy: checks row and block numbers once, then moves bytes between them.

use std::sync::Arc;

use super::KvLayers;
use super::tiling::{Segment, Tiling};
use crate::{Error, ErrorKind, HostPool, Result};

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From KV tensors into rows.
    Store,
    /// From rows into KV tensors.
    Load,
}

/// A row and its block, both checked against the ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair {
    row: u32,
    block: u32,
}

/// A pool and the KV tensors whose blocks fill its rows; keeps both.
#[derive(Debug)]
pub(super) struct Route {
    pool: HostPool,
    layers: Arc<KvLayers>,
    tiling: Tiling,
}

impl Route {
    pub(super) fn new(pool: HostPool, layers: Arc<KvLayers>) -> Result<Self> {
        if pool.row_bytes() != layers.row_bytes() {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "the pool's rows have {} bytes, a block of the KV tensors has {}: make the pool with row_bytes={}",
                    pool.row_bytes(),
                    layers.row_bytes(),
                    layers.row_bytes()
                ),
            ));
        }
        let tiling = Tiling::new(&layers);
        Ok(Self { pool, layers, tiling })
    }

    pub(super) fn pool(&self) -> &HostPool {
        &self.pool
    }

    /// Bytes of one row.
    pub(super) fn row_bytes(&self) -> usize {
        self.layers.row_bytes()
    }

    /// The i-th row with the i-th block, all of them within bounds.
    pub(super) fn pairs(&self, rows: &[u32], blocks: &[u32]) -> Result<Vec<Pair>> {
        check_numbers(&self.pool, self.layers.blocks(), rows, blocks)?;
        Ok(rows.iter().zip(blocks).map(|(&row, &block)| Pair { row, block }).collect())
    }

    /// Claims of a copy of `pairs` rows.
    pub(super) fn claims(&self, pairs: usize) -> usize {
        self.tiling.claims(pairs)
    }

    /// Copies what claim number `claim` covers.
    pub(super) fn copy(&self, direction: Direction, pairs: &[Pair], claim: usize) {
        let (range, segments) = self.tiling.claim(claim, pairs.len());
        for pair in &pairs[range] {
            for segment in segments {
                self.copy_segment(direction, *pair, segment);
            }
        }
    }

    fn copy_segment(&self, direction: Direction, pair: Pair, segment: &Segment) {
        debug_assert!(pair.row < self.pool.rows() && pair.block < self.layers.blocks());
        let row_start = pair.row as usize * self.pool.row_stride() + segment.row_offset;
        // SAFETY: `pairs` checked row and block against both ends, which `self` keeps; the segment lies within
        // `row_bytes` of the row and within its page. Rows and tensors are different memory, and whoever orders a
        // copy lets nobody else use its rows and blocks meanwhile (`KvLayers::new`).
        unsafe {
            let row = self.pool.base().as_ptr().add(row_start);
            let page = segment.base.add(pair.block as usize * segment.block_stride);
            match direction {
                Direction::Store => row.copy_from_nonoverlapping(page, segment.len),
                Direction::Load => page.copy_from_nonoverlapping(row, segment.len),
            }
        }
    }
}

/// Refuses rows and blocks that are no pairs or outside of their ends.
pub(crate) fn check_numbers(pool: &HostPool, kv_blocks: u32, rows: &[u32], blocks: &[u32]) -> Result<()> {
    let invalid = |message: String| Error::new(ErrorKind::InvalidArgument, message);
    if rows.len() != blocks.len() {
        return Err(invalid(format!(
            "{} rows for {} blocks: the i-th row goes with the i-th block",
            rows.len(),
            blocks.len()
        )));
    }
    if let Some(row) = rows.iter().find(|&&row| row >= pool.rows()) {
        return Err(invalid(format!("row {row} is outside of the pool's {} rows", pool.rows())));
    }
    if let Some(block) = blocks.iter().find(|&&block| block >= kv_blocks) {
        return Err(invalid(format!("block {block} is outside of the KV's {kv_blocks} blocks")));
    }
    Ok(())
}
