//! What a rig is made of: streams, limits, a shape of the KV, and memory laid out so.

use std::time::Duration;

use super::super::*;
use crate::GpuLayer;
use crate::cuda::fake::Fake;

/// The engine's own stream.
pub(super) const COMPUTE: Stream = 1;

pub(super) const STREAMS: Streams =
    Streams { load_copy: [2, 6], load_scatter: 3, store_gather: 4, store_copy: [5, 7] };

/// Limits under which every wait of the GPU's own matters: more stages in flight than there are buffers.
pub(super) const LIMITS: Limits = Limits {
    load_stages: 6,
    store_stages: 6,
    loads_first: Duration::from_millis(1),
    pinning: Duration::from_secs(30),
};

/// What a rig is made of.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    /// Page bytes of each layer, and the gap after each page.
    pub(super) layers: Vec<(usize, usize)>,
    /// Whether one tensor holds all layers of a block, one after the other.
    pub(super) block_outer: bool,
    pub(super) rows: usize,
    pub(super) blocks: usize,
    /// Rows of a staging buffer.
    pub(super) stage: usize,
    /// Rows of a registration; 0: the pool is not pinned.
    pub(super) piece: usize,
    pub(super) seed: u64,
    pub(super) limits: Limits,
}

impl Shape {
    pub(super) fn small(seed: u64) -> Self {
        Self {
            layers: vec![(64, 16), (32, 0)],
            block_outer: false,
            rows: 24,
            blocks: 24,
            stage: 2,
            piece: 4,
            seed,
            limits: LIMITS,
        }
    }
}

pub(super) fn memory(bytes: usize, fake: &Fake) -> Vec<u128> {
    let memory = vec![0_u128; bytes.div_ceil(16)];
    fake.add_device_memory(memory.as_ptr().cast(), memory.len() * 16);
    memory
}

/// Addresses of the layers, in KV memory of the test.
pub(super) fn lay_out(shape: &Shape, fake: &Fake) -> (Vec<Vec<u128>>, Vec<GpuLayer>) {
    let sizes = shape.layers.iter().map(|(page, gap)| page + gap);
    if shape.block_outer {
        let stride: usize = sizes.sum();
        let tensor = memory(stride * shape.blocks, fake);
        let mut address = tensor.as_ptr() as u64;
        let place = |&(page_bytes, gap): &(usize, usize)| {
            let layer = GpuLayer { address, block_stride: stride, page_bytes };
            address += (page_bytes + gap) as u64;
            layer
        };
        let layers = shape.layers.iter().map(place).collect();
        return (vec![tensor], layers);
    }
    let tensors: Vec<_> = sizes.clone().map(|size| memory(size * shape.blocks, fake)).collect();
    let place = |((&(page_bytes, _), block_stride), tensor): ((&(usize, usize), usize), &Vec<u128>)| {
        GpuLayer { address: tensor.as_ptr() as u64, block_stride, page_bytes }
    };
    let layers = shape.layers.iter().zip(sizes).zip(&tensors).map(place).collect();
    (tensors, layers)
}
