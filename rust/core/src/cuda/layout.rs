//! Where the pages of KV blocks lie on the GPU, and where their bytes go in a row.

use std::ops::Range;

use crate::{Error, ErrorKind, Result};

/// One layer's KV on the GPU: `page_bytes` of every block, one each `block_stride` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuLayer {
    /// The address of block 0's page.
    pub address: u64,
    /// Bytes from one block to the next.
    pub block_stride: usize,
    /// Bytes of one block.
    pub page_bytes: usize,
}

/// Layers that follow each other in a row, and their bytes there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) layers: Range<u32>,
    /// Where the first byte is in a row.
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

/// What a thread of the kernels moves at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    /// Where all addresses and sizes are multiples of 16 bytes.
    Bytes16,
    /// Where they are multiples of 4 bytes.
    Bytes4,
}

impl Width {
    pub(crate) fn bytes(self) -> u32 {
        match self {
            Self::Bytes16 => 16,
            Self::Bytes4 => 4,
        }
    }
}

/// Bytes of a layer in `Layout::table`.
pub(crate) const LAYER_BYTES: usize = 32;

/// More layers than any model has; the kernels' grid could have 65,535.
const LAYERS_MAX: usize = 16_384;

/// The layers of one set of KV tensors, checked.
#[derive(Debug)]
pub(crate) struct Layout {
    layers: Vec<GpuLayer>,
    blocks: u32,
    width: Width,
    row_bytes: usize,
}

impl Layout {
    pub(crate) fn new(layers: Vec<GpuLayer>, blocks: usize) -> Result<Self> {
        let invalid = |message: String| Err(Error::new(ErrorKind::InvalidArgument, message));
        let Some(blocks) = u32::try_from(blocks).ok().filter(|&blocks| blocks > 0) else {
            return invalid(format!("KV tensors of {blocks} blocks: give 1 to {}", u32::MAX));
        };
        if layers.is_empty() || layers.len() > LAYERS_MAX {
            return invalid(format!("{} KV tensors were given: give 1 to {LAYERS_MAX}", layers.len()));
        }
        for (number, layer) in layers.iter().enumerate() {
            if layer.page_bytes == 0 || layer.address == 0 {
                return invalid(format!("the blocks of KV tensor {number} are empty"));
            }
            if blocks > 1 && layer.block_stride < layer.page_bytes {
                return invalid(format!(
                    "the blocks of KV tensor {number} overlap: {} bytes each, {} apart",
                    layer.page_bytes, layer.block_stride
                ));
            }
        }
        let Some(width) = width(&layers) else {
            return invalid(
                "pages of KV tensors begin or end between multiples of 4 bytes: such a layout cannot be moved".to_owned(),
            );
        };
        let sum = layers.iter().try_fold(0_usize, |sum, layer| sum.checked_add(layer.page_bytes));
        match sum.filter(|_| layers.iter().all(|layer| u32::try_from(layer.page_bytes).is_ok())) {
            Some(row_bytes) => Ok(Self { layers, blocks, width, row_bytes }),
            None => invalid("a page of a KV tensor has more than 4 GiB".to_owned()),
        }
    }

    pub(crate) fn layers(&self) -> u32 {
        u32::try_from(self.layers.len()).expect("at most LAYERS_MAX")
    }

    pub(crate) fn blocks(&self) -> u32 {
        self.blocks
    }

    pub(crate) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    pub(crate) fn width(&self) -> Width {
        self.width
    }

    pub(crate) fn page_bytes_max(&self) -> u32 {
        let largest = self.layers.iter().map(|layer| layer.page_bytes).max();
        u32::try_from(largest.unwrap_or(0)).expect("checked when made")
    }

    /// All layers in order, in at most as many parts as there are shares, with about these shares of the bytes.
    pub(crate) fn parts(&self, shares: &[u32]) -> Vec<Part> {
        let total: u128 = shares.iter().map(|&share| u128::from(share)).sum();
        let mut before = 0;
        let mut begins = shares.iter().map(|&share| {
            let begin = self.row_bytes as u128 * before / total.max(1);
            before += u128::from(share);
            begin
        });
        let mut next = begins.next();
        let mut parts: Vec<Part> = Vec::with_capacity(shares.len());
        let mut offset = 0;
        for (number, layer) in (0..).zip(&self.layers) {
            if next.is_some_and(|begin| offset as u128 >= begin) {
                parts.push(Part { layers: number..number, offset, bytes: 0 });
                next = begins.next();
            }
            if let Some(part) = parts.last_mut() {
                part.layers.end = number + 1;
                part.bytes += layer.page_bytes;
            }
            offset += layer.page_bytes;
        }
        parts
    }

    /// First bytes of the layers, to ask the driver about.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = u64> {
        self.layers.iter().map(|layer| layer.address)
    }

    /// As the kernels read it: for each layer address, block stride, offset in a row and page bytes, 8 bytes each.
    pub(crate) fn table(&self) -> Vec<u8> {
        let mut offset = 0_u64;
        let mut table = Vec::with_capacity(self.layers.len() * LAYER_BYTES);
        for layer in &self.layers {
            let page_bytes = layer.page_bytes as u64;
            for number in [layer.address, layer.block_stride as u64, offset, page_bytes] {
                table.extend_from_slice(&number.to_ne_bytes());
            }
            offset += page_bytes;
        }
        table
    }
}

/// The widest vectors that every page consists of; offsets in a row are sums of page sizes.
fn width(layers: &[GpuLayer]) -> Option<Width> {
    let bits = layers
        .iter()
        .fold(0, |bits, layer| bits | layer.address | layer.block_stride as u64 | layer.page_bytes as u64);
    [Width::Bytes16, Width::Bytes4].into_iter().find(|width| bits % u64::from(width.bytes()) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(layers: &[(u64, usize, usize)], blocks: usize) -> Result<Layout> {
        let layer = |&(address, block_stride, page_bytes): &_| GpuLayer { address, block_stride, page_bytes };
        Layout::new(layers.iter().map(layer).collect(), blocks)
    }

    #[test]
    fn the_table_has_the_offsets_in_a_row() {
        let layout = layout(&[(0x1000, 64, 32), (0x2000, 128, 16)], 2).expect("valid");
        assert_eq!((layout.row_bytes(), layout.page_bytes_max(), layout.width()), (48, 32, Width::Bytes16));
        let numbers: Vec<u64> = layout
            .table()
            .chunks_exact(8)
            .map(|bytes| u64::from_ne_bytes(bytes.try_into().expect("8 bytes")))
            .collect();
        assert_eq!(numbers, [0x1000, 64, 0, 32, 0x2000, 128, 32, 16]);
    }

    #[test]
    fn parts_are_all_layers_in_order() {
        for pages in [&[64][..], &[16, 16, 16], &[64, 32, 16, 16, 128], &[16; 36]] {
            let layers: Vec<_> = pages.iter().map(|&page| (0x1000, 256, page)).collect();
            let layout = layout(&layers, 2).expect("valid");
            for shares in
                [&[1][..], &[1, 1], &[1; 3], &[1; 4], &[1; 50], &[12, 3, 1], &[0, 1], &[7, 0, u32::MAX]]
            {
                let parts = layout.parts(shares);
                assert!(
                    (1..=shares.len().min(pages.len())).contains(&parts.len()),
                    "{parts:?} of {shares:?}"
                );
                let (mut layer, mut offset) = (0, 0);
                for part in &parts {
                    assert_eq!((part.layers.start, part.offset), (layer, offset), "{parts:?}");
                    assert!(!part.layers.is_empty() && part.bytes > 0);
                    (layer, offset) = (part.layers.end, offset + part.bytes);
                }
                assert_eq!((layer as usize, offset), (pages.len(), layout.row_bytes()));
            }
        }
        let layers_of = |shares: &[u32]| {
            let parts = layout(&[(16, 64, 64); 36], 2).expect("valid").parts(shares);
            parts.iter().map(|part| part.layers.len()).collect::<Vec<_>>()
        };
        assert_eq!(layers_of(&[1; 4]), [9; 4]);
        assert_eq!(layers_of(&[12, 3, 1]), [27, 7, 2]);
        assert_eq!(layers_of(&[]), [], "no parts, for whoever asks for none");
    }

    #[test]
    fn the_width_fits_every_address_stride_and_size() {
        for odd in [(0x1004, 64, 32), (0x1000, 68, 32), (0x1000, 64, 36)] {
            assert_eq!(layout(&[(0x1000, 64, 32), odd], 2).expect("valid").width(), Width::Bytes4);
        }
        let error = layout(&[(0x1000, 64, 34)], 2).expect_err("half words");
        assert!(error.to_string().contains("multiples of 4"), "{error}");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (layers, blocks, part) in [
            (&[][..], 1, "0 KV tensors"),
            (&[(16, 16, 16)][..], 0, "0 blocks"),
            (&[(16, 16, 0)][..], 1, "tensor 0 are empty"),
            (&[(0, 16, 16)][..], 1, "tensor 0 are empty"),
            (&[(16, 16, 32)][..], 2, "overlap"),
            (&[(16, 1 << 33, 1 << 32)][..], 2, "4 GiB"),
        ] {
            let error = layout(layers, blocks).expect_err(part);
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
