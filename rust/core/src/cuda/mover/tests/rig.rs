//! What the tests share: a pool and KV in memory of the test, with a model of what they must hold.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::*;
pub(super) use super::shape::*;
use crate::cuda::fake::Fake;
use crate::{GpuLayer, HostPoolConfig};

pub(super) const LONG: Duration = Duration::from_secs(60);

/// What a job will have done when it is told of.
struct Expected {
    rows: Vec<u32>,
    blocks: Vec<u32>,
    stores: bool,
    /// The engine's stream waited for it, and went on.
    joined: bool,
}

/// What the engine reads, later than now.
struct Read {
    scratch: usize,
    expected: Vec<u8>,
    /// The load that brings it.
    job: Option<u64>,
}

pub(super) struct Rig {
    pub(super) fake: Arc<Fake>,
    pub(super) pool: HostPool,
    pub(super) mover: GpuMover,
    /// KV as it is; its `u128`s only align it.
    kv: Vec<Vec<u128>>,
    _staging: Vec<Vec<u128>>,
    layers: Vec<GpuLayer>,
    /// A block's bytes, a row's bytes, as they must be.
    kv_model: Vec<Vec<u8>>,
    row_model: Vec<Vec<u8>>,
    expected: HashMap<u64, Expected>,
    random: u64,
    /// Bytes on their way to or from the compute stream: kept until all is done.
    scratch: Vec<Vec<u8>>,
    reads: Vec<Read>,
}

impl Rig {
    pub(super) fn new(shape: &Shape) -> Self {
        Self::with(shape, Arc::new(Fake::new(shape.seed))).expect("valid")
    }

    pub(super) fn with(shape: &Shape, fake: Arc<Fake>) -> Result<Self> {
        let row_bytes: usize = shape.layers.iter().map(|(page, _)| page).sum();
        let stride = row_bytes.next_multiple_of(4096);
        let config = HostPoolConfig {
            size_bytes: shape.rows * stride,
            row_bytes,
            prefault_threads: 0,
            huge_pages: false,
        };
        let pool = HostPool::in_pieces(&config, shape.piece * stride)?;
        if shape.piece > 0 {
            pool.pin_with(fake.clone());
        }
        let (kv, layers) = lay_out(shape, &fake);
        let staging: Vec<_> = (0..4).map(|_| memory(shape.stage * stride, &fake)).collect();
        let buffer =
            |memory: &Vec<u128>| Staging { address: memory.as_ptr() as u64, bytes: shape.stage * stride };
        let config = GpuMoverConfig {
            layers: layers.clone(),
            blocks: shape.blocks,
            device: 0,
            streams: STREAMS,
            load_staging: staging[..2].iter().map(buffer).collect(),
            store_staging: staging[2..].iter().map(buffer).collect(),
            load_parts: vec![3, 2, 1],
            store_parts: vec![1, 1],
        };
        // SAFETY: all of it is memory of the rig, which outlives the mover.
        let mover = unsafe { GpuMover::start(pool.clone(), &config, fake.clone(), shape.limits)? };
        let mut rig = Self {
            fake,
            pool,
            mover,
            kv,
            _staging: staging,
            layers,
            kv_model: vec![vec![0; row_bytes]; shape.blocks],
            row_model: vec![vec![0; row_bytes]; shape.rows],
            expected: HashMap::new(),
            random: shape.seed.wrapping_add(99),
            scratch: Vec::new(),
            reads: Vec::new(),
        };
        (0..shape.blocks as u32).for_each(|block| rig.scribble(block));
        (0..shape.rows as u32).for_each(|row| rig.scribble_row(row));
        Ok(rig)
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) as usize % limit
    }

    fn bytes(&mut self) -> Vec<u8> {
        (0..self.pool.row_bytes()).map(|_| self.below(256) as u8).collect()
    }

    /// A block's pages: address and bytes.
    fn pages(&self, block: u32) -> Vec<(*mut u8, usize)> {
        let page = |layer: &GpuLayer| {
            ((layer.address as usize + block as usize * layer.block_stride) as *mut u8, layer.page_bytes)
        };
        self.layers.iter().map(page).collect()
    }

    /// Writes a block that nobody uses, as its next owner does.
    pub(super) fn scribble(&mut self, block: u32) {
        let bytes = self.bytes();
        let mut rest = &bytes[..];
        for (page, len) in self.pages(block) {
            // SAFETY: a page of the rig that no operation uses.
            unsafe { page.copy_from(rest.as_ptr(), len) };
            rest = &rest[len..];
        }
        self.kv_model[block as usize] = bytes;
    }

    fn row_at(&self, row: u32) -> *mut u8 {
        self.pool.base().as_ptr().wrapping_add(row as usize * self.pool.row_stride())
    }

    fn scribble_row(&mut self, row: u32) {
        let bytes = self.bytes();
        // SAFETY: a row of the pool that no operation uses.
        unsafe { self.row_at(row).copy_from(bytes.as_ptr(), bytes.len()) };
        self.row_model[row as usize] = bytes;
    }

    /// The engine computes blocks, later than now.
    fn compute(&mut self, blocks: &[u32]) {
        self.compute_layers(0..self.layers.len(), blocks);
    }

    fn compute_layers(&mut self, layers: Range<usize>, blocks: &[u32]) {
        for &block in blocks {
            let (bytes, pages) = (self.bytes(), self.pages(block));
            let mut offset = pages[..layers.start].iter().map(|(_, len)| len).sum();
            for &(page, len) in &pages[layers.clone()] {
                self.fake.compute(COMPUTE, bytes[offset..].as_ptr(), page, len);
                let written = offset..offset + len;
                self.kv_model[block as usize][written.clone()].copy_from_slice(&bytes[written]);
                offset += len;
            }
            self.scratch.push(bytes);
        }
    }

    /// The engine computes blocks layer by layer, and has each part of the layers stored once it is there.
    pub(super) fn store_by_parts(&mut self, rows: &[u32], blocks: &[u32]) {
        let firsts: Vec<usize> = self.mover.store_parts().collect();
        let ends = firsts.iter().skip(1).copied().chain([self.layers.len()]);
        for (part, (first, end)) in firsts.iter().copied().zip(ends).enumerate() {
            self.compute_layers(first..end, blocks);
            let job = part as u64;
            self.mover.submit_store(job, rows.to_vec(), blocks.to_vec(), Some(part), COMPUTE).expect("open");
        }
        assert!(self.mover.drain(LONG).expect("open"));
        let ended = self.mover.poll().expect("open");
        assert_eq!(ended.len(), firsts.len());
        let bytes: u64 = ended.into_iter().map(|end| end.bytes.expect("stored")).sum();
        assert_eq!(bytes as usize, rows.len() * self.pool.row_bytes());
        for (&row, &block) in rows.iter().zip(blocks) {
            self.row_model[row as usize] = self.kv_model[block as usize].clone();
            self.check_row(row);
        }
    }

    /// The engine reads blocks, later than now; `finish` checks that it reads what the model says now.
    fn read(&mut self, blocks: &[u32], job: Option<u64>) {
        (0..self.layers.len()).for_each(|layer| self.read_layer(layer, blocks, job));
    }

    fn read_layer(&mut self, layer: usize, blocks: &[u32], job: Option<u64>) {
        for &block in blocks {
            let pages = self.pages(block);
            let offset: usize = pages[..layer].iter().map(|(_, len)| len).sum();
            let (page, len) = pages[layer];
            let mut bytes = vec![0; len];
            self.fake.compute(COMPUTE, page, bytes.as_mut_ptr(), len);
            let expected = self.kv_model[block as usize][offset..offset + len].to_vec();
            self.reads.push(Read { scratch: self.scratch.len(), expected, job });
            self.scratch.push(bytes);
        }
    }

    /// The engine computes blocks and has them stored.
    pub(super) fn store(&mut self, job: u64, rows: &[u32], blocks: &[u32]) -> Result<()> {
        self.compute(blocks);
        self.mover.submit_store(job, rows.to_vec(), blocks.to_vec(), None, COMPUTE)?;
        self.expect(job, rows, blocks, true);
        Ok(())
    }

    /// A load in the background; with `fence` the engine reads the blocks' old content shortly before.
    pub(super) fn load(&mut self, job: u64, rows: &[u32], blocks: &[u32], fence: bool) -> Result<()> {
        if fence {
            self.read(blocks, None);
        }
        let (order, stream) = (LoadOrder::ByRows, fence.then_some(COMPUTE));
        self.mover.submit_load(job, rows.to_vec(), blocks.to_vec(), order, stream)?;
        self.expect(job, rows, blocks, false);
        Ok(())
    }

    /// A load between two uses of the blocks by the engine, which waits for all of it, or for layer after layer.
    pub(super) fn load_joined(
        &mut self,
        job: u64,
        (rows, blocks): (&[u32], &[u32]),
        order: LoadOrder,
        by_layer: bool,
    ) -> Result<()> {
        self.read(blocks, None);
        self.mover.submit_load(job, rows.to_vec(), blocks.to_vec(), order, Some(COMPUTE))?;
        self.expect(job, rows, blocks, false);
        self.expected.get_mut(&job).expect("just put there").joined = true;
        for (&row, &block) in rows.iter().zip(blocks) {
            self.kv_model[block as usize] = self.row_model[row as usize].clone();
        }
        if by_layer {
            for layer in 0..self.layers.len() {
                self.mover.join_load(job, Some(layer), COMPUTE)?;
                self.read_layer(layer, blocks, Some(job));
            }
        } else {
            self.mover.join_load(job, None, COMPUTE)?;
            self.read(blocks, Some(job));
        }
        Ok(())
    }

    fn expect(&mut self, job: u64, rows: &[u32], blocks: &[u32], stores: bool) {
        let expected = Expected { rows: rows.to_vec(), blocks: blocks.to_vec(), stores, joined: false };
        assert!(self.expected.insert(job, expected).is_none());
    }

    /// Whether a job was taken in and not told of.
    pub(super) fn is_expected(&self, job: u64) -> bool {
        self.expected.contains_key(&job)
    }

    /// Takes in what has ended: checks its bytes, then gives its blocks (and rows that failed) to somebody else.
    pub(super) fn poll(&mut self) -> Vec<(u64, bool)> {
        let ended = self.mover.poll().expect("open");
        let mut told = Vec::new();
        for outcome in ended {
            let Expected { rows, blocks, stores, joined } =
                self.expected.remove(&outcome.job).expect("told once");
            let succeeded = outcome.bytes.is_ok();
            if let Ok(bytes) = outcome.bytes {
                assert_eq!(bytes as usize, rows.len() * self.pool.row_bytes());
            }
            if joined {
                if !succeeded {
                    // The engine went on with garbage: it computes all of it again.
                    self.reads.retain(|read| read.job != Some(outcome.job));
                    self.compute(&blocks);
                }
                told.push((outcome.job, succeeded));
                continue;
            }
            for (&row, &block) in rows.iter().zip(&blocks) {
                let (row_at, block_at) = (row as usize, block as usize);
                if succeeded && stores {
                    self.row_model[row_at] = self.kv_model[block_at].clone();
                } else if succeeded {
                    self.kv_model[block_at] = self.row_model[row_at].clone();
                }
                if succeeded {
                    self.check_row(row);
                    self.check_block(block);
                } else if stores {
                    self.scribble_row(row);
                }
                if succeeded {
                    self.scribble(block);
                } else {
                    // What the engine did with it before may not be done, so that it goes on on its own stream.
                    self.compute(&[block]);
                }
            }
            told.push((outcome.job, succeeded));
        }
        told
    }

    fn check_row(&self, row: u32) {
        // SAFETY: a row of the pool that no operation uses.
        let bytes = unsafe { std::slice::from_raw_parts(self.row_at(row), self.pool.row_bytes()) };
        assert!(bytes == self.row_model[row as usize], "row {row} is wrong");
    }

    fn check_block(&self, block: u32) {
        let mut rest = &self.kv_model[block as usize][..];
        for (number, (page, len)) in self.pages(block).into_iter().enumerate() {
            // SAFETY: a page of the rig that no operation uses.
            let bytes = unsafe { std::slice::from_raw_parts(page, len) };
            assert!(bytes == &rest[..len], "layer {number} of block {block} is wrong");
            rest = &rest[len..];
        }
    }

    /// Polls until `count` jobs were told of.
    pub(super) fn wait(&mut self, count: usize) -> Vec<(u64, bool)> {
        let deadline = Instant::now() + LONG;
        let mut told = Vec::new();
        while told.len() < count {
            assert!(Instant::now() < deadline, "{told:?} of {count} jobs");
            told.extend(self.poll());
            thread::sleep(Duration::from_micros(50));
        }
        told
    }

    /// Everything that was submitted runs; then every byte must be as the model says, but for jobs never told of.
    pub(super) fn finish(&mut self) {
        self.fake.finish();
        assert_eq!(self.fake.violations(), Vec::<String>::new());
        for Read { scratch, expected, job } in mem::take(&mut self.reads) {
            if job.is_none_or(|job| !self.expected.contains_key(&job)) {
                assert!(self.scratch[scratch] == expected, "the engine read something else than it must");
            }
        }
        let lost: Vec<&Expected> = self.expected.values().collect();
        for row in 0..self.row_model.len() as u32 {
            if !lost.iter().any(|expected| expected.rows.contains(&row)) {
                self.check_row(row);
            }
        }
        for block in 0..self.kv_model.len() as u32 {
            if !lost.iter().any(|expected| expected.blocks.contains(&block)) {
                self.check_block(block);
            }
        }
    }

    /// Bytes of KV memory between pages, which nobody writes.
    pub(super) fn gaps(&self) -> usize {
        let pages: usize =
            self.layers.iter().map(|layer| layer.page_bytes).sum::<usize>() * self.kv_model.len();
        self.kv.iter().map(|tensor| tensor.len() * 16).sum::<usize>() - pages
    }

    /// Bytes of KV memory that are zero: gaps, and few others.
    pub(super) fn zeros(&self) -> usize {
        let zeros = |tensor: &Vec<u128>| {
            tensor.iter().flat_map(|word| word.to_ne_bytes()).filter(|&byte| byte == 0).count()
        };
        self.kv.iter().map(zeros).sum()
    }

    /// As many different numbers below `limit`, none of those taken, which they join.
    pub(super) fn draw(&mut self, count: usize, limit: usize, taken: &mut Vec<u32>, runs: bool) -> Vec<u32> {
        let mut free: Vec<u32> = (0..limit as u32).filter(|number| !taken.contains(number)).collect();
        let mut drawn = Vec::new();
        while drawn.len() < count && !free.is_empty() {
            let at = if runs && !drawn.is_empty() { 0 } else { self.below(free.len()) };
            if runs && drawn.is_empty() {
                free.rotate_left(at);
                drawn.push(free.remove(0));
            } else {
                drawn.push(free.remove(at));
            }
        }
        taken.extend(&drawn);
        drawn
    }
}
