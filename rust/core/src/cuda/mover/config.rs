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
    /// In which parts a load by layers brings them, at most: their shares of the bytes, one or more.
    pub load_parts: Vec<u32>,
    /// In which parts the layers can be stored, as `load_parts`.
    pub store_parts: Vec<u32>,
}

/// In which order a load brings its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadOrder {
    /// Row by row.
    ByRows,
    /// Some layers of all rows, then the next ones: a forward can begin when the first are there.
    ByLayers,
}

/// A part of the rows that a job moves, in stages.
#[derive(Clone, Debug)]
pub(super) struct Slice {
    pub(super) part: Part,
    /// The most rows of a stage.
    rows: usize,
}

/// How the bytes of jobs are cut into stages: one slice after the other.
pub(super) type Cut = Arc<[Slice]>;

/// Those of all kinds of jobs.
#[derive(Debug)]
pub(super) struct Cuts {
    pub(super) load: Cut,
    pub(super) load_by_layers: Cut,
    pub(super) store: Cut,
    /// One for each part of the layers.
    pub(super) store_parts: Vec<Cut>,
}

impl Slice {
    /// Stages that fit into each buffer. `pitch`: bytes from row to row there.
    fn new(part: Part, pitch: usize, staging: &[Staging]) -> Result<Self> {
        let rows = staging.iter().map(|buffer| buffer.bytes / pitch).min().unwrap_or(0);
        if rows == 0
            || staging.iter().any(|buffer| buffer.address == 0 || buffer.address % STAGING_ALIGN != 0)
        {
            let message = format!(
                "staging is one or more buffers each way, at multiples of {STAGING_ALIGN}, of {pitch} bytes or more"
            );
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        Ok(Self { part, rows })
    }

    /// Stages of so many rows.
    pub(super) fn stages(&self, rows: usize) -> usize {
        rows.div_ceil(self.rows)
    }

    /// Rows of each of these stages but the last, so that all are about as large.
    pub(super) fn stage_rows(&self, rows: usize) -> usize {
        rows.div_ceil(self.stages(rows).max(1))
    }
}

impl Cuts {
    pub(super) fn new(config: &GpuMoverConfig, layout: &Layout, stride: usize) -> Result<Self> {
        let (loads, stores) = (&config.load_staging, &config.store_staging);
        let slices = |shares: &[u32], staging: &[Staging]| {
            let parts = layout.parts(shares);
            if parts.is_empty() {
                let message = "layers go in one part or more, none was given";
                return Err(Error::new(ErrorKind::InvalidArgument, message));
            }
            // Whole rows lie in staging as in the pool, parts one after the other.
            let pitch = |part: &Part| if part.bytes == layout.row_bytes() { stride } else { part.bytes };
            let slice = |part: Part| Slice::new(part.clone(), pitch(&part), staging);
            parts.into_iter().map(slice).collect::<Result<Vec<_>>>()
        };
        Ok(Self {
            load: slices(&[1], loads)?.into(),
            load_by_layers: slices(&config.load_parts, loads)?.into(),
            store: slices(&[1], stores)?.into(),
            store_parts: slices(&config.store_parts, stores)?
                .into_iter()
                .map(|slice| [slice].into())
                .collect(),
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
        let part = Part { layers: 0..1, offset: 0, bytes: 64 };
        let slice = Slice::new(part, 64, &staging).expect("valid");
        assert_eq!(slice.rows, 27);
        let rows = [0, 1, 27, 28, 53, 54, 55, 625];
        assert_eq!(rows.map(|rows| slice.stages(rows)), [0, 1, 1, 2, 2, 2, 3, 24]);
        assert_eq!(rows.map(|rows| slice.stage_rows(rows)), [0, 1, 27, 14, 27, 27, 19, 27]);
    }
}
