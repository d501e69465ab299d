//! How rows are cut into claims: pieces of work of about equal size that threads take one by one.

use std::ops::Range;

use super::KvLayers;

/// A claim's size: large enough that taking it costs nothing beside copying it (about 50 µs), small enough that two
/// threads end together even on a single row.
const CLAIM_BYTES: usize = 512 << 10;

/// Bytes that lie together in the row and in the block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    /// Where the bytes are in block 0.
    pub(super) base: *mut u8,
    /// Bytes from one block to the next.
    pub(super) block_stride: usize,
    /// Where the bytes begin in the row.
    pub(super) row_offset: usize,
    pub(super) len: usize,
}

/// A row's segments in groups, and how many rows a claim takes.
#[derive(Debug)]
pub(super) struct Tiling {
    segments: Vec<Segment>,
    groups: Vec<Range<usize>>,
    rows_per_claim: usize,
}

// SAFETY: the pointers are those of `KvLayers`, whose promise covers every thread.
unsafe impl Send for Tiling {}
// SAFETY: as above.
unsafe impl Sync for Tiling {}

impl Tiling {
    pub(super) fn new(layers: &KvLayers) -> Self {
        let segments = segments(layers);
        let mut groups: Vec<Range<usize>> = Vec::new();
        let mut group_bytes = usize::MAX;
        for (number, segment) in segments.iter().enumerate() {
            if group_bytes.saturating_add(segment.len) > CLAIM_BYTES {
                groups.push(number..number);
                group_bytes = 0;
            }
            group_bytes += segment.len;
            if let Some(group) = groups.last_mut() {
                group.end = number + 1;
            }
        }
        let rows_per_claim = (CLAIM_BYTES / layers.row_bytes()).max(1);
        Self { segments, groups, rows_per_claim }
    }

    /// Claims of a copy of `rows` rows.
    pub(super) fn claims(&self, rows: usize) -> usize {
        rows.div_ceil(self.rows_per_claim) * self.groups.len()
    }

    /// What claim number `claim` of a copy of `rows` rows covers: some of its rows, and these bytes of each.
    pub(super) fn claim(&self, claim: usize, rows: usize) -> (Range<usize>, &[Segment]) {
        let first = claim / self.groups.len() * self.rows_per_claim;
        let group = self.groups[claim % self.groups.len()].clone();
        (first..rows.min(first + self.rows_per_claim), &self.segments[group])
    }
}

/// The pages of a row, large ones cut.
fn segments(layers: &KvLayers) -> Vec<Segment> {
    let mut segments = Vec::with_capacity(layers.layers().len());
    let mut row_offset = 0;
    for layer in layers.layers() {
        for page_offset in (0..layer.page_bytes).step_by(CLAIM_BYTES) {
            let len = CLAIM_BYTES.min(layer.page_bytes - page_offset);
            let base = layer.base.wrapping_add(page_offset);
            segments.push(Segment { base, block_stride: layer.block_stride, row_offset, len });
            row_offset += len;
        }
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::Layer;

    fn tiling(pages: &[usize]) -> (Tiling, usize) {
        let base = std::ptr::NonNull::<u8>::dangling().as_ptr();
        let layers: Vec<Layer> =
            pages.iter().map(|&page_bytes| Layer { base, block_stride: page_bytes, page_bytes }).collect();
        // SAFETY: nothing is copied in these tests.
        let layers = unsafe { KvLayers::new(layers, 4, Box::new(())) }.expect("valid");
        (Tiling::new(&layers), layers.row_bytes())
    }

    #[test]
    fn claims_cover_every_byte_of_every_row_once_and_are_bounded() {
        for pages in [
            vec![98_304; 30],
            vec![65_536; 30],
            vec![16_384; 4],
            vec![3 << 20, 1, 700_000, 5],
            vec![1],
            vec![CLAIM_BYTES],
        ] {
            let (tiling, row_bytes) = tiling(&pages);
            for rows in [0, 1, 2, 7, 100] {
                let mut covered = vec![Vec::new(); rows];
                for claim in 0..tiling.claims(rows) {
                    let (range, segments) = tiling.claim(claim, rows);
                    let bytes: usize =
                        segments.iter().map(|segment| segment.len).sum::<usize>() * range.len();
                    assert!(bytes > 0 && bytes <= CLAIM_BYTES, "{bytes} bytes in claim {claim} of {pages:?}");
                    for row in range {
                        covered[row].extend(segments.iter().map(|s| s.row_offset..s.row_offset + s.len));
                    }
                }
                for mut ranges in covered {
                    ranges.sort_unstable_by_key(|range| range.start);
                    assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
                    assert_eq!((ranges[0].start, ranges[ranges.len() - 1].end), (0, row_bytes));
                }
            }
        }
    }

    #[test]
    fn a_single_row_is_work_for_two_threads() {
        assert!(tiling(&[98_304; 30]).0.claims(1) >= 5);
        assert!(tiling(&[1 << 20; 8]).0.claims(1) >= 8);
    }
}
