//! `KvLayers`: where the blocks of the engine's KV tensors lie, and what keeps them there.

use std::any::Any;
use std::fmt;

use crate::{Error, ErrorKind, Result};

/// One layer's tensor: `blocks` pages of `page_bytes`, one each `block_stride` bytes.
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    /// The first byte of block 0.
    pub base: *mut u8,
    /// Bytes from one block to the next.
    pub block_stride: usize,
    /// Bytes of one block.
    pub page_bytes: usize,
}

/// KV tensors, one a layer, with the same number of blocks. A block's bytes in a row are those of its pages, one
/// after the other.
pub struct KvLayers {
    layers: Vec<Layer>,
    blocks: u32,
    row_bytes: usize,
    /// Keeps the memory; only ever dropped.
    _keep: Box<dyn Any + Send + Sync>,
}

// SAFETY: the pointers are addresses into memory that `_keep` (itself Send) holds; `KvLayers::new` asks its caller
// that it may be used from any thread.
unsafe impl Send for KvLayers {}
// SAFETY: as above; no method touches the memory.
unsafe impl Sync for KvLayers {}

impl KvLayers {
    /// Takes in the tensors that `keep` keeps alive.
    ///
    /// # Safety
    ///
    /// For each layer, `page_bytes` bytes at `base + block * block_stride` are readable and writable from any thread
    /// for every `block < blocks`, as long as `keep` lives. Whoever orders a copy sees to it that nobody else uses
    /// its blocks while it runs (writes them, during a store).
    pub unsafe fn new(layers: Vec<Layer>, blocks: usize, keep: Box<dyn Any + Send + Sync>) -> Result<Self> {
        let invalid = |message: String| Err(Error::new(ErrorKind::InvalidArgument, message));
        let Some(blocks) = u32::try_from(blocks).ok().filter(|&blocks| blocks > 0) else {
            return invalid(format!("KV tensors of {blocks} blocks: give 1 to {}", u32::MAX));
        };
        if layers.is_empty() {
            return invalid("no KV tensor was given: give one a layer".to_owned());
        }
        for (number, layer) in layers.iter().enumerate() {
            if layer.page_bytes == 0 {
                return invalid(format!("the blocks of KV tensor {number} are empty"));
            }
            if blocks > 1 && layer.block_stride < layer.page_bytes {
                return invalid(format!(
                    "the blocks of KV tensor {number} overlap: {} bytes each, {} apart",
                    layer.page_bytes, layer.block_stride
                ));
            }
        }
        let row_bytes = layers.iter().map(|layer| layer.page_bytes).sum();
        Ok(Self { layers, blocks, row_bytes, _keep: keep })
    }

    /// The layers, in the order of their bytes in a row.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Blocks of each layer.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Bytes of one block in all layers.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }
}

impl fmt::Debug for KvLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("KvLayers");
        shown.field("layers", &self.layers.len()).field("blocks", &self.blocks);
        shown.field("row_bytes", &self.row_bytes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(pages: &[(usize, usize)], blocks: usize) -> Result<KvLayers> {
        let base = std::ptr::NonNull::<u8>::dangling().as_ptr();
        let layers = pages
            .iter()
            .map(|&(page_bytes, block_stride)| Layer { base, block_stride, page_bytes })
            .collect();
        // SAFETY: nothing is copied in these tests.
        unsafe { KvLayers::new(layers, blocks, Box::new(())) }
    }

    #[test]
    fn a_row_is_the_sum_of_its_pages() {
        let layers = layers(&[(10, 10), (7, 100)], 3).expect("valid");
        assert_eq!((layers.row_bytes(), layers.blocks(), layers.layers().len()), (17, 3, 2));
    }

    #[test]
    fn tensors_without_blocks_bytes_or_room_are_refused() {
        for (pages, blocks, part) in [
            (&[][..], 1, "one a layer"),
            (&[(8, 8)][..], 0, "0 blocks"),
            (&[(8, 8), (0, 8)][..], 2, "tensor 1 are empty"),
            (&[(8, 7)][..], 2, "overlap"),
            (&[(8, 0)][..], 2, "overlap"),
        ] {
            let error = layers(pages, blocks).expect_err(part);
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().contains(part), "{error}");
        }
        assert!(layers(&[(8, 0)], 1).is_ok());
    }
}
