//! How a `GpuMover` is made, and what follows from it: checks, and what the stages of its jobs are.

use std::sync::Arc;

use super::super::driver::{Driver, Stream};
use super::super::layout::{GpuLayer, Layout, Part};
use crate::{Error, ErrorKind, HostPool, Result};

/// What staging addresses and the kernels' vectors are multiples of.
const STAGING_ALIGN: u64 = 16;

/// CUDA streams, which do not wait for the default stream by themselves.
#[derive(Clone, Copy, Debug)]
pub struct Streams {
    /// Copies from the pool into staging, in turns.
    pub load_copy: [Stream; 2],
    /// Kernels from staging into KV.
    pub load_scatter: Stream,
    /// Kernels from KV into staging.
    pub store_gather: Stream,
    /// Copies from staging into the pool, in turns.
    pub store_copy: [Stream; 2],
}

/// GPU memory for one stage.
#[derive(Clone, Copy, Debug)]
pub struct Staging {
    /// Its first byte.
    pub address: u64,
    /// Its bytes: at least one row stride of the pool.
    pub bytes: usize,
}

/// How a `GpuMover` is made.
#[derive(Clone, Debug)]
pub struct GpuMoverConfig {
    /// The layers, in the order of their bytes in a row.
    pub layers: Vec<GpuLayer>,
    /// Blocks of each layer.
    pub blocks: usize,
    /// The GPU's number.
    pub device: usize,
    /// Streams of that GPU.
    pub streams: Streams,
    /// Staging buffers for loads, used in turn. Small, since the engine's own small copies of each step wait for the stage
    /// that is on the bus, which fills one.
    pub load_staging: Vec<Staging>,
    /// Staging buffers for stores, used in turn; as small.
    pub store_staging: Vec<Staging>,
    /// In how many parts a load by layers brings them, at most.
    pub load_parts: usize,
    /// In how many parts the layers can be stored, at most.
    pub store_parts: usize,
}

/// In which order a load brings its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadOrder {
    /// Row by row.
    ByRows,
    /// Some layers of all rows, then the next ones: a forward can begin when the first are there.
    ByLayers,
}

/// How the bytes of jobs are cut into stages.
#[derive(Clone, Debug)]
pub(super) struct Cut {
    /// Parts of the rows, one after the other.
    pub(super) parts: Arc<[Part]>,
    /// The most rows of a stage.
    rows: usize,
}

/// Those of all kinds of jobs.
#[derive(Debug)]
pub(super) struct Cuts {
    pub(super) load: Cut,
    pub(super) load_by_layers: Cut,
    pub(super) store: Cut,
    /// One for each part of the layers.
    pub(super) store_parts: Vec<Cut>,
}

impl Cut {
    /// Stages that fit into each buffer. `pitch`: bytes from row to row there.
    fn new(parts: Vec<Part>, pitch: usize, staging: &[Staging]) -> Result<Self> {
        let rows = staging.iter().map(|buffer| buffer.bytes / pitch).min().unwrap_or(0);
        if rows == 0
            || staging.iter().any(|buffer| buffer.address == 0 || buffer.address % STAGING_ALIGN != 0)
        {
            let message = format!(
                "staging is one or more buffers each way, at multiples of {STAGING_ALIGN}, of {pitch} bytes or more"
            );
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        Ok(Self { parts: parts.into(), rows })
    }

    /// Rows of each stage of `rows`, so that they are as few as possible and all about as large.
    pub(super) fn stage_rows(&self, rows: usize) -> usize {
        rows.div_ceil(rows.div_ceil(self.rows).max(1)).max(1)
    }
}

impl Cuts {
    pub(super) fn new(config: &GpuMoverConfig, layout: &Layout, stride: usize) -> Result<Self> {
        let (loads, stores) = (&config.load_staging, &config.store_staging);
        // Whole rows lie in staging as in the pool, parts one after the other.
        let pitch = |parts: &[Part]| match parts {
            [_] => stride,
            parts => parts.iter().map(|part| part.bytes).max().unwrap_or(stride),
        };
        let load_parts = layout.parts(config.load_parts.max(1));
        let store_parts = layout.parts(config.store_parts.max(1));
        let store_pitch = pitch(&store_parts);
        Ok(Self {
            load: Cut::new(layout.parts(1), stride, loads)?,
            store: Cut::new(layout.parts(1), stride, stores)?,
            load_by_layers: Cut::new(load_parts.clone(), pitch(&load_parts), loads)?,
            store_parts: store_parts
                .into_iter()
                .map(|part| Cut::new(vec![part], store_pitch, stores))
                .collect::<Result<_>>()?,
        })
    }
}

pub(super) fn check_row(pool: &HostPool, layout: &Layout) -> Result<()> {
    let (row, block) = (pool.row_bytes(), layout.row_bytes());
    if row == block {
        return Ok(());
    }
    let message = format!(
        "the pool's rows have {row} bytes, a block of the KV tensors has {block}: make the pool with row_bytes={block}"
    );
    Err(Error::new(ErrorKind::InvalidArgument, message))
}

pub(super) fn check_device<'a>(
    driver: &dyn Driver,
    layout: &Layout,
    staging: impl Iterator<Item = &'a Staging>,
) -> Result<()> {
    for address in layout.addresses().chain(staging.map(|buffer| buffer.address)) {
        if !driver.is_on_device(address)? {
            let message = format!("address {address:#x} of KV or staging is not in the GPU's memory");
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_even() {
        let staging = [40 * 64, 27 * 64 + 63].map(|bytes| Staging { address: 16, bytes });
        let cut = Cut::new(Vec::new(), 64, &staging).expect("valid");
        assert_eq!(cut.rows, 27);
        assert_eq!(
            [0, 1, 27, 28, 53, 54, 55, 625].map(|rows| cut.stage_rows(rows)),
            [1, 1, 27, 14, 27, 27, 19, 27]
        );
    }
}
