//! A private anonymous mapping: made, advised, touched and unmapped here and nowhere else.

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use super::Owner;
use crate::{Error, ErrorKind, Result};

/// What a huge page covers on x86-64, and on arm64 with 4 KiB pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// The smallest page of any machine: touching this often touches every page.
const PAGE_BYTES: usize = 4096;

/// Writable memory of the process, unmapped on drop. Absent from forked children.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    owner: Owner,
}

// SAFETY: a mapping is an address range; who may read or write which bytes of it when is for its users to agree.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method touches bytes but `touch`, which never changes one.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` zero bytes, on huge pages where asked and allowed.
    pub(super) fn new(len: usize, huge_pages: bool) -> Result<Self> {
        let align = if huge_pages && len >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { 0 };
        let owner = Owner::this_process();
        let base = map_aligned(len, align).map_err(|error| refused(len, &error))?;
        let mapping = Self { base, len, owner };
        // Both are advice: without the first pages are small, without the second a fork costs memory.
        if huge_pages {
            let _ = mapping.advise(&(0..len), libc::MADV_HUGEPAGE);
        }
        let _ = mapping.advise(&(0..len), libc::MADV_DONTFORK);
        Ok(mapping)
    }

    /// The first byte.
    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes mapped.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The process that has this mapping.
    pub(super) fn owner(&self) -> Owner {
        self.owner
    }

    /// Gives every page of `range` memory, without changing a byte. Others may write here meanwhile.
    ///
    /// Page by page, not by `MADV_POPULATE_WRITE`: that keeps the lock on the process's address space while it works, so
    /// that every thread that maps memory waits for it, and an engine's start maps memory thousands of times. A page's
    /// own fault takes no such lock (Linux 6.4), or keeps it for that page. `benches/touching.rs` measures both.
    pub(super) fn touch(&self, range: &Range<usize>) {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} is outside of {} bytes",
            self.len
        );
        for offset in range.clone().step_by(PAGE_BYTES) {
            // SAFETY: `offset` is inside of the mapping, as just asserted.
            let byte = unsafe { AtomicU8::from_ptr(self.base.as_ptr().add(offset)) };
            // Not `fetch_add(0)`: compilers make a plain load of it, which gets no memory.
            let _ = byte.compare_exchange(0, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    fn advise(&self, range: &Range<usize>, advice: libc::c_int) -> io::Result<()> {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} is outside of {} bytes",
            self.len
        );
        // SAFETY: the range is inside of our own mapping, as just asserted; no advice used here changes a byte.
        let failed =
            unsafe { libc::madvise(self.base.as_ptr().add(range.start).cast(), range.len(), advice) } != 0;
        if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // A forked child has something else at this address, or nothing.
        if self.owner.is_here() {
            // SAFETY: `map_aligned` made this range, and nobody borrows from a mapping that is dropped.
            unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
        }
    }
}

/// Maps `len` bytes at a multiple of `align` (0: of the page size).
fn map_aligned(len: usize, align: usize) -> io::Result<NonNull<u8>> {
    let mapped_len = len.checked_add(align).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
    // SAFETY: a new private anonymous mapping at an address of the kernel's choice.
    let mapped = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(std::ptr::null_mut(), mapped_len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let head = if align == 0 { 0 } else { mapped.cast::<u8>().align_offset(align) };
    let tail = align - head;
    // SAFETY: head and tail are the parts of the new mapping outside of the `len` bytes that are kept.
    let base = unsafe {
        let base = mapped.cast::<u8>().add(head);
        if head > 0 {
            libc::munmap(mapped, head);
        }
        if tail > 0 {
            libc::munmap(base.add(len).cast(), tail);
        }
        base
    };
    NonNull::new(base).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}

fn refused(len: usize, error: &io::Error) -> Error {
    Error::new(
        ErrorKind::OutOfMemory,
        format!("the system refused {len} bytes of memory for the pool ({error}): ask for a smaller pool"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of memory behind `mapping`, or more when the kernel merged it with a neighbour.
    fn resident_bytes(mapping: &Mapping) -> usize {
        let start = mapping.base().as_ptr() as usize;
        let smaps = std::fs::read_to_string("/proc/self/smaps").expect("procfs");
        let mut inside = false;
        let mut total = 0;
        for line in smaps.lines() {
            let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
            if let Some((Ok(low), Ok(high))) =
                range.map(|(low, high)| (usize::from_str_radix(low, 16), usize::from_str_radix(high, 16)))
            {
                inside = low < start + mapping.len() && start < high;
            } else if let (true, Some(size)) = (inside, line.strip_prefix("Rss:")) {
                total += size.trim().trim_end_matches(" kB").parse::<usize>().expect("number") * 1024;
            }
        }
        total
    }

    #[test]
    fn touching_gives_memory_to_every_page_and_keeps_what_is_there() {
        let mapping = Mapping::new(9 << 20, false).expect("memory");
        let pages = mapping.len() / PAGE_BYTES;
        // Every second page has content, of every value.
        let content = |page: usize| u8::try_from(page / 2 % 256).expect("a byte");
        for page in (0..pages).step_by(2) {
            // SAFETY: inside of the mapping; nobody else uses it.
            unsafe { mapping.base().as_ptr().add(page * PAGE_BYTES).write(content(page)) };
        }
        mapping.touch(&(0..mapping.len()));
        assert!(resident_bytes(&mapping) >= mapping.len(), "{} bytes", resident_bytes(&mapping));
        for page in 0..pages {
            // SAFETY: as above.
            let byte = unsafe { mapping.base().as_ptr().add(page * PAGE_BYTES).read() };
            assert_eq!(byte, if page % 2 == 0 { content(page) } else { 0 });
        }
    }

    #[test]
    fn touching_takes_huge_pages_where_they_are_allowed() {
        let mapping = Mapping::new(32 << 20, true).expect("memory");
        assert_eq!(mapping.base().as_ptr() as usize % HUGE_PAGE_BYTES, 0);
        // SAFETY: inside of the mapping; nobody else uses it.
        unsafe { mapping.base().as_ptr().write(7) };
        mapping.touch(&(0..mapping.len()));
        assert!(resident_bytes(&mapping) >= mapping.len());
        // SAFETY: as above.
        assert_eq!(unsafe { mapping.base().as_ptr().read() }, 7);
    }

    #[test]
    fn what_cannot_be_mapped_is_an_error_with_a_remedy() {
        for len in [usize::MAX & !4095, 1 << 60] {
            let error = Mapping::new(len, true).expect_err("too large");
            assert_eq!(error.kind(), ErrorKind::OutOfMemory);
            assert!(error.to_string().contains("smaller pool"), "{error}");
        }
    }
}
