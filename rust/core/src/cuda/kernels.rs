//! The two kernels, in PTX that the driver compiles for its GPU: pages into staging rows, and back.

use std::ffi::{CStr, CString};
use std::mem;
use std::sync::Arc;

use super::driver::{DeviceAddress, Driver, Stream};
use super::layout::{LAYER_BYTES, Layout, Part, Width};
use super::{DriverResult, Entered};
use crate::Result;
use crate::copy::Direction;

/// Threads of one thread block, as the PTX asks for.
pub(crate) const THREADS: u32 = 256;

/// Vectors that each thread moves: enough to keep memory busy while the first is on its way.
const VECTORS: u32 = 4;

/// KV blocks of one launch: their numbers travel in its parameters, of which there are 4 KiB.
pub(crate) const BLOCKS_MAX: usize = 900;

/// The parameters of a launch, each as the PTX declares it.
#[derive(Clone, Debug)]
pub(crate) struct Arguments {
    /// The table of layers (`Layout::table`) in GPU memory.
    pub(crate) layers: DeviceAddress,
    /// Where the first block's row begins in staging.
    pub(crate) staging: DeviceAddress,
    /// Bytes from one row to the next.
    pub(crate) row_stride: u64,
    /// The numbers of the blocks; those beyond the grid are not read.
    pub(crate) blocks: [u32; BLOCKS_MAX],
}

/// One kernel. `{NAME}`, `{BYTES}` (of a vector), `{PIECE}` (bytes of a page that a thread block moves), `{TYPE}`,
/// `{FROM}`, `{TO}` and registers `{V0}` to `{V3}` are filled in. Grid: x pieces of a page, y layers, z blocks.
const KERNEL: &str = "
.visible .entry {NAME}(
    .param .u64 layers, .param .u64 staging, .param .u64 row_stride, .param .align 4 .b8 blocks[{IDS}])
.maxntid {THREADS}, 1, 1
{
    .reg .pred %p<5>;
    .reg .b32 %r<8>;
    .reg .b32 %v<16>;
    .reg .b64 %d<24>;
    // The layer: its base, block stride, offset in a row, page bytes.
    mov.u32 %r1, %ctaid.y;
    ld.param.u64 %d1, [layers];
    cvta.to.global.u64 %d1, %d1;
    mad.wide.u32 %d2, %r1, 32, %d1;
    ld.global.v2.u64 {%d3, %d4}, [%d2];
    ld.global.v2.u64 {%d5, %d6}, [%d2+16];
    // The block's page: base + number * stride.
    mov.u32 %r2, %ctaid.z;
    mov.b64 %d7, blocks;
    mad.wide.u32 %d8, %r2, 4, %d7;
    ld.param.u32 %r3, [%d8];
    cvt.u64.u32 %d9, %r3;
    mad.lo.s64 %d10, %d9, %d4, %d3;
    cvta.to.global.u64 %d10, %d10;
    // Its place in staging: staging + position * row stride + offset.
    ld.param.u64 %d11, [staging];
    cvta.to.global.u64 %d11, %d11;
    ld.param.u64 %d12, [row_stride];
    cvt.u64.u32 %d13, %r2;
    mad.lo.s64 %d14, %d13, %d12, %d11;
    add.s64 %d14, %d14, %d5;
    // The thread's first vector: piece * bytes of a piece + thread * bytes of a vector.
    mov.u32 %r4, %ctaid.x;
    mov.u32 %r5, %tid.x;
    mul.wide.u32 %d15, %r4, {PIECE};
    mad.wide.u32 %d15, %r5, {BYTES}, %d15;
    // Vectors beyond the page's end are left out. Pages are whole vectors.
    add.s64 %d16, %d15, {STEP};
    add.s64 %d17, %d16, {STEP};
    add.s64 %d18, %d17, {STEP};
    setp.lt.u64 %p1, %d15, %d6;
    setp.lt.u64 %p2, %d16, %d6;
    setp.lt.u64 %p3, %d17, %d6;
    setp.lt.u64 %p4, %d18, %d6;
    add.s64 %d19, {FROM}, %d15;
    add.s64 %d20, {TO}, %d15;
    @%p1 ld.global{TYPE} {V0}, [%d19];
    @%p2 ld.global{TYPE} {V1}, [%d19+{STEP}];
    @%p3 ld.global{TYPE} {V2}, [%d19+{STEP2}];
    @%p4 ld.global{TYPE} {V3}, [%d19+{STEP3}];
    @%p1 st.global{TYPE} [%d20], {V0};
    @%p2 st.global{TYPE} [%d20+{STEP}], {V1};
    @%p3 st.global{TYPE} [%d20+{STEP2}], {V2};
    @%p4 st.global{TYPE} [%d20+{STEP3}], {V3};
    ret;
}
";

/// Bytes of a page that one thread block moves.
pub(crate) fn piece_bytes(width: Width) -> u32 {
    THREADS * VECTORS * width.bytes()
}

fn kernel_name(direction: Direction) -> &'static CStr {
    match direction {
        Direction::Store => c"lmcache_gather",
        Direction::Load => c"lmcache_scatter",
    }
}

/// Both kernels for vectors of `width`, as one module that any driver of CUDA 11 and later compiles for its GPU.
pub(crate) fn ptx(width: Width) -> String {
    let mut module = ".version 7.0\n.target sm_70\n.address_size 64\n".to_owned();
    let (page, row) = ("%d10", "%d14");
    for direction in [Direction::Store, Direction::Load] {
        let (from, to) = if direction == Direction::Store { (page, row) } else { (row, page) };
        let name = kernel_name(direction).to_string_lossy();
        module += &fill(&KERNEL.replace("{NAME}", &name).replace("{FROM}", from).replace("{TO}", to), width);
    }
    module
}

/// Fills in what depends on the width.
fn fill(kernel: &str, width: Width) -> String {
    let step = THREADS * width.bytes();
    let vector = |number: usize| match width {
        Width::Bytes16 => {
            let names: Vec<String> = (0..4).map(|part| format!("%v{}", number * 4 + part)).collect();
            format!("{{{}}}", names.join(", "))
        }
        Width::Bytes4 => format!("%v{number}"),
    };
    let numbers = [
        ("{IDS}", BLOCKS_MAX * size_of::<u32>()),
        ("{THREADS}", THREADS as usize),
        ("{PIECE}", piece_bytes(width) as usize),
        ("{BYTES}", width.bytes() as usize),
        ("{STEP}", step as usize),
        ("{STEP2}", 2 * step as usize),
        ("{STEP3}", 3 * step as usize),
    ];
    let kernel = kernel.replace("{TYPE}", if width == Width::Bytes16 { ".v4.u32" } else { ".u32" });
    let kernel =
        numbers.iter().fold(kernel, |kernel, (name, number)| kernel.replace(name, &number.to_string()));
    (0..VECTORS as usize)
        .fold(kernel, |kernel, number| kernel.replace(&format!("{{V{number}}}"), &vector(number)))
}

/// The kernels and the table of one set of KV tensors, on the GPU until drop.
#[derive(Debug)]
pub(crate) struct Kernels {
    driver: Arc<dyn Driver>,
    module: u64,
    gather: u64,
    scatter: u64,
    layers: DeviceAddress,
    grid_x: u32,
}

impl Kernels {
    /// Compiles the kernels, runs each once for nothing, and uploads the table.
    pub(crate) fn new(driver: &Arc<dyn Driver>, layout: &Layout, stream: Stream) -> Result<Self> {
        let ptx = CString::new(ptx(layout.width())).expect("PTX has no zero bytes");
        let module = driver.load_module(&ptx)?;
        let mut kernels = Self {
            driver: Arc::clone(driver),
            module,
            gather: 0,
            scatter: 0,
            layers: 0,
            grid_x: layout.page_bytes_max().div_ceil(piece_bytes(layout.width())),
        };
        kernels.gather = driver.kernel(module, kernel_name(Direction::Store))?;
        kernels.scatter = driver.kernel(module, kernel_name(Direction::Load))?;
        kernels.warm_up(stream)?;
        kernels.layers = driver.upload(&layout.table())?;
        Ok(kernels)
    }

    /// Runs both kernels on a layer without bytes: the driver puts off work on a module until its first launch.
    fn warm_up(&mut self, stream: Stream) -> DriverResult<()> {
        self.layers = self.driver.upload(&[0; LAYER_BYTES])?;
        let arguments = Arguments { layers: self.layers, staging: 0, row_stride: 0, blocks: [0; BLOCKS_MAX] };
        for kernel in [self.gather, self.scatter] {
            // SAFETY: the layer's page has no bytes, so the kernels only read the table.
            unsafe { self.driver.launch(kernel, [1, 1, 1], &arguments, stream)? };
        }
        self.driver.synchronize()?;
        // SAFETY: both launches are done.
        unsafe { self.driver.free(mem::take(&mut self.layers)) }
    }

    /// Submits the move of a part of `blocks` to where `staging` is, `pitch` bytes from one block to the next, or back.
    ///
    /// # Safety
    ///
    /// Blocks and part are those of the layout, and staging has the part's bytes for each block. Nobody else uses them until it is done.
    pub(crate) unsafe fn launch(
        &self,
        direction: Direction,
        part: &Part,
        (staging, pitch): (DeviceAddress, usize),
        blocks: &[u32],
        stream: Stream,
    ) -> DriverResult<()> {
        let kernel = if direction == Direction::Store { self.gather } else { self.scatter };
        let mut arguments = Arguments {
            layers: self.layers + u64::from(part.layers.start) * LAYER_BYTES as u64,
            // Layers add where they are in a whole row.
            staging: staging.wrapping_sub(part.offset as u64),
            row_stride: pitch as u64,
            blocks: [0; BLOCKS_MAX],
        };
        let layers = part.layers.end - part.layers.start;
        for blocks in blocks.chunks(BLOCKS_MAX) {
            arguments.blocks[..blocks.len()].copy_from_slice(blocks);
            let grid = [self.grid_x, layers, u32::try_from(blocks.len()).expect("at most BLOCKS_MAX")];
            // SAFETY: the caller's promise, for these blocks.
            unsafe { self.driver.launch(kernel, grid, &arguments, stream)? };
            arguments.staging = arguments.staging.wrapping_add((blocks.len() * pitch) as u64);
        }
        Ok(())
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let Ok(_entered) = Entered::new(self.driver.as_ref()) else { return };
        // What the driver refuses here it keeps until the process ends.
        // SAFETY: whoever drops the kernels has seen the end of all that was launched.
        unsafe {
            if self.layers != 0 {
                let _ = self.driver.free(self.layers);
            }
            let _ = self.driver.unload_module(self.module);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_filled_in_and_the_parameters_fit() {
        for width in [Width::Bytes16, Width::Bytes4] {
            let ptx = ptx(width);
            assert!(
                !["{N", "{B", "{P", "{T", "{F", "{V", "{S", "{I"].iter().any(|open| ptx.contains(open)),
                "{ptx}"
            );
            assert!(ptx.is_ascii() && ptx.matches(".visible .entry").count() == 2);
        }
        assert!(24 + BLOCKS_MAX * size_of::<u32>() <= 4096);
    }
}
