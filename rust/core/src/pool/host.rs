//! `HostPool`: the host memory that rows live in, shared by everybody who holds a clone.

use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::Owner;
use super::mapping::Mapping;
use super::pin::{PIECE_BYTES_MAX, Pin};
use super::prefault::Prefault;
use crate::cuda::{Driver, LibCuda};
use crate::{Error, ErrorKind, Result};

/// Rows begin at multiples of this: what `O_DIRECT` and page-wise registration ask for.
const ROW_ALIGN_BYTES: usize = 4096;

/// More threads than this only wait for the kernel's locks.
const PREFAULT_THREADS_MAX: usize = 64;

/// How a pool is made.
#[derive(Clone, Copy, Debug)]
pub struct HostPoolConfig {
    /// Most bytes that the pool may take; what does not fill a row is left.
    pub size_bytes: usize,
    /// Bytes of a row that are used.
    pub row_bytes: usize,
    /// Threads that touch pages in the background; with 0 pages are touched on first use.
    pub prefault_threads: usize,
    /// Ask for 2 MiB pages.
    pub huge_pages: bool,
}

/// One private mapping of `rows * row_stride` bytes. Clones share it; the last one unmaps it.
#[derive(Clone, Debug)]
pub struct HostPool {
    inner: Arc<Inner>,
}

/// Fields in the order of their end: threads first, memory last.
#[derive(Debug)]
struct Inner {
    pin: OnceLock<Pin>,
    prefault: Prefault,
    mapping: Arc<Mapping>,
    rows: u32,
    row_bytes: usize,
    row_stride: usize,
    rows_per_piece: usize,
}

impl HostPool {
    /// Maps the memory and starts to touch it.
    pub fn new(config: &HostPoolConfig) -> Result<Self> {
        Self::in_pieces(config, PIECE_BYTES_MAX)
    }

    /// As `new`, to be pinned in pieces of at most `piece_bytes`, if a row is not larger.
    pub(crate) fn in_pieces(config: &HostPoolConfig, piece_bytes: usize) -> Result<Self> {
        let (rows, row_stride) = geometry(config)?;
        let mapping = Arc::new(Mapping::new(rows as usize * row_stride, config.huge_pages)?);
        let prefault = Prefault::start(&mapping, config.prefault_threads);
        Ok(Self {
            inner: Arc::new(Inner {
                pin: OnceLock::new(),
                prefault,
                mapping,
                rows,
                row_bytes: config.row_bytes,
                row_stride,
                rows_per_piece: (piece_bytes / row_stride).max(1),
            }),
        })
    }

    /// Rows of the pool.
    #[must_use]
    pub fn rows(&self) -> u32 {
        self.inner.rows
    }

    /// Bytes of a row that are used.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.inner.row_bytes
    }

    /// Bytes from one row to the next.
    #[must_use]
    pub fn row_stride(&self) -> usize {
        self.inner.row_stride
    }

    /// Bytes mapped: `rows * row_stride`.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.inner.mapping.len()
    }

    /// The first byte of row 0. Valid as long as any clone of the pool lives, in this process only.
    #[must_use]
    pub fn base(&self) -> NonNull<u8> {
        self.inner.mapping.base()
    }

    /// Bytes touched in the background so far.
    #[must_use]
    pub fn prefaulted_bytes(&self) -> usize {
        self.inner.prefault.touched_bytes()
    }

    /// Why touching lacks a thread, if it does. The pool works nevertheless, page by page.
    pub fn prefault_error(&self) -> Result<Option<String>> {
        self.check_process()?;
        Ok(self.inner.prefault.error())
    }

    /// Waits until the background threads are done; whether every page was touched. Returns at once when no thread
    /// is touching.
    pub fn wait_prefaulted(&self, timeout: Duration) -> Result<bool> {
        self.check_process()?;
        Ok(self.inner.prefault.wait(super::deadline(timeout)))
    }

    /// Starts to pin the memory in the background, in the context of GPU number `device` and for all GPUs; again is
    /// harmless. Rows are used as their piece is ready, the first at once.
    pub fn pin(&self, device: usize) -> Result<()> {
        self.check_process()?;
        if self.inner.pin.get().is_none() {
            self.pin_with(Arc::new(LibCuda::open(device)?));
        }
        Ok(())
    }

    pub(crate) fn pin_with(&self, driver: Arc<dyn Driver>) {
        let piece_bytes = self.rows_per_piece() * self.inner.row_stride;
        self.inner.pin.get_or_init(|| Pin::start(&self.inner.mapping, driver, piece_bytes));
    }

    /// Bytes pinned so far, from the pool's beginning.
    #[must_use]
    pub fn pinned_bytes(&self) -> usize {
        self.inner.pin.get().map_or(0, Pin::pinned_bytes)
    }

    /// Why pinning ended early, if it did. What is pinned stays so, the rest works slowly.
    pub fn pin_error(&self) -> Result<Option<String>> {
        self.check_process()?;
        Ok(self.inner.pin.get().and_then(Pin::error))
    }

    /// Rows that are pinned together: no copy of the GPU's may go from one such piece into the next.
    pub(crate) fn rows_per_piece(&self) -> usize {
        self.inner.rows_per_piece
    }

    /// Whether rows are pinned, or will never be.
    pub(crate) fn are_pinned_or_never_will(&self, rows: &[u32]) -> bool {
        let Some(pin) = self.inner.pin.get() else { return true };
        // In this order: pinning that ends between the two has moved the watermark before.
        let running = pin.is_running();
        let end = rows.iter().max().map_or(0, |&row| (row as usize + 1) * self.inner.row_stride);
        !running || end <= pin.pinned_bytes()
    }

    /// Refuses calls from a forked child, which does not have this memory.
    pub fn check_process(&self) -> Result<()> {
        self.owner().check("HostPool")
    }

    pub(crate) fn owner(&self) -> Owner {
        self.inner.mapping.owner()
    }
}

/// Rows of `row_bytes` that a pool of `size_bytes` holds; 0 when it holds none, or a row has no bytes.
#[must_use]
pub fn pool_rows(size_bytes: usize, row_bytes: usize) -> usize {
    match row_bytes.checked_next_multiple_of(ROW_ALIGN_BYTES) {
        Some(row_stride) if row_stride > 0 => size_bytes / row_stride,
        _ => 0,
    }
}

/// Rows and row stride of a pool, or why there can be none.
fn geometry(config: &HostPoolConfig) -> Result<(u32, usize)> {
    let invalid = |message: String| Error::new(ErrorKind::InvalidArgument, message);
    let HostPoolConfig { size_bytes, row_bytes, prefault_threads, .. } = *config;
    if prefault_threads > PREFAULT_THREADS_MAX {
        return Err(invalid(format!(
            "prefault_threads is {prefault_threads}: at most {PREFAULT_THREADS_MAX} are of use"
        )));
    }
    if row_bytes == 0 {
        return Err(invalid("row_bytes is 0: give the bytes of one block in all layers".to_owned()));
    }
    let row_stride = row_bytes.checked_next_multiple_of(ROW_ALIGN_BYTES);
    let Some(row_stride) = row_stride.filter(|&stride| stride <= size_bytes) else {
        return Err(invalid(format!(
            "a pool of {size_bytes} bytes holds no row of {row_bytes} bytes: raise the pool's size to a multiple of \
             the row's"
        )));
    };
    let rows = pool_rows(size_bytes, row_bytes);
    let rows = u32::try_from(rows).map_err(|_| {
        invalid(format!("{size_bytes} bytes are {rows} rows of {row_bytes}: a pool has at most {}", u32::MAX))
    })?;
    Ok((rows, row_stride))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn config(size_bytes: usize, row_bytes: usize) -> HostPoolConfig {
        HostPoolConfig { size_bytes, row_bytes, prefault_threads: 1, huge_pages: true }
    }

    #[test]
    fn rows_are_whole_and_aligned() {
        let pool = HostPool::new(&config(100_000, 5_000)).expect("memory");
        assert_eq!((pool.rows(), pool.row_bytes(), pool.row_stride()), (12, 5_000, 8_192));
        assert_eq!(pool.size_bytes(), 12 * 8_192);
        let exact = HostPool::new(&config(4_096, 4_096)).expect("memory");
        assert_eq!((exact.rows(), exact.row_stride()), (1, 4_096));
    }

    #[test]
    fn wrong_arguments_name_both_numbers_and_the_remedy() {
        for (size, row) in [(0, 1), (4_095, 1), (8_191, 4_097), (usize::MAX, usize::MAX)] {
            let error = HostPool::new(&config(size, row)).expect_err("no row fits");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            let message = error.to_string();
            assert!(message.contains(&size.to_string()) && message.contains(&row.to_string()), "{message}");
            assert!(message.contains("raise"), "{message}");
        }
        assert!(HostPool::new(&config(1 << 20, 0)).is_err());
        assert!(HostPool::new(&config(1 << 60, 1)).is_err());
        assert!(HostPool::new(&HostPoolConfig { prefault_threads: 65, ..config(1 << 20, 1) }).is_err());
    }

    #[test]
    fn without_a_driver_nothing_is_pinned_and_the_remedy_is_named() {
        if crate::cuda_available() {
            return;
        }
        let pool = HostPool::new(&config(1 << 20, 4_096)).expect("memory");
        let error = pool.pin(0).expect_err("no driver");
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().contains("install NVIDIA's driver"), "{error}");
        assert_eq!((pool.pinned_bytes(), pool.pin_error().expect("here")), (0, None));
        assert!(pool.are_pinned_or_never_will(&[0]), "nobody pins it");
    }

    #[test]
    fn prefaulting_ends_and_is_counted() {
        let pool = HostPool::new(&HostPoolConfig { prefault_threads: 3, ..config(50 << 20, 1 << 20) })
            .expect("memory");
        assert!(pool.wait_prefaulted(60 * SECOND).expect("here"));
        assert_eq!(pool.prefaulted_bytes(), pool.size_bytes());
        assert_eq!(pool.prefault_error().expect("here"), None);
    }

    #[test]
    fn without_threads_nothing_is_touched_and_nobody_waits() {
        let pool =
            HostPool::new(&HostPoolConfig { prefault_threads: 0, ..config(1 << 20, 4_096) }).expect("memory");
        let start = Instant::now();
        assert!(!pool.wait_prefaulted(60 * SECOND).expect("here"));
        assert!(start.elapsed() < 10 * SECOND);
        assert_eq!(pool.prefaulted_bytes(), 0);
    }

    #[test]
    fn a_pool_can_be_dropped_while_it_is_prefaulted() {
        for _ in 0..8 {
            let config = HostPoolConfig { prefault_threads: 2, ..config(1 << 30, 1 << 20) };
            let pool = HostPool::new(&config).expect("memory");
            let clone = pool.clone();
            drop(pool);
            assert!(clone.prefaulted_bytes() < clone.size_bytes());
        }
    }

    #[test]
    fn prefaulting_keeps_what_is_written_meanwhile() {
        let pool = HostPool::new(&config(64 << 20, 1 << 20)).expect("memory");
        for row in 0..pool.rows() as usize {
            // SAFETY: each row is inside of the mapping; nobody else writes here.
            unsafe { pool.base().as_ptr().add(row * pool.row_stride()).write(0xA5) };
        }
        assert!(pool.wait_prefaulted(60 * SECOND).expect("here"));
        for row in 0..pool.rows() as usize {
            // SAFETY: as above.
            assert_eq!(unsafe { pool.base().as_ptr().add(row * pool.row_stride()).read() }, 0xA5);
        }
    }
}
