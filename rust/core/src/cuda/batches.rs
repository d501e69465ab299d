//! How copies between host and GPU are given to the real driver: strided ones one by one, many small ones in one call.
//!
//! On an H100 2.25 MiB pieces at scattered places reach 53.5 GB/s in one call and 51 one by one, of 256 KiB 53.1 and 34;
//! the bus gives 54.9.

use std::ffi::c_int;
use std::mem;

use cudarc::driver::sys;

use super::driver::{Copy, DriverResult, Stream};
use super::libcuda::{check, handle};
use crate::copy::Direction;

/// `cuMemcpyBatchAsync_v2` of CUDA 13.
type BatchCall = unsafe extern "C" fn(
    to: *mut sys::CUdeviceptr,
    from: *mut sys::CUdeviceptr,
    sizes: *mut usize,
    count: usize,
    attributes: *mut sys::CUmemcpyAttributes,
    attribute_begins: *mut usize,
    attribute_count: usize,
    stream: sys::CUstream,
) -> sys::CUresult;

/// Fewer copies than this gain nothing from being submitted together.
const BATCH_MIN: usize = 4;

/// Submits copies in the way that is quickest with the driver at hand.
#[derive(Debug)]
pub(super) struct Batches {
    /// Drivers before CUDA 13 have none.
    call: Option<BatchCall>,
}

impl Batches {
    /// Looks for the call, in the library that is loaded.
    pub(super) fn find() -> Self {
        // SAFETY: a function of this name has this signature in every driver that has it.
        let call = unsafe { sys::culib().get::<BatchCall>(b"cuMemcpyBatchAsync_v2\0") };
        Self { call: call.ok().map(|symbol| *symbol) }
    }

    /// # Safety
    ///
    /// As of `Driver::copy_to_device` and `copy_to_host`.
    pub(super) unsafe fn submit(
        &self,
        direction: Direction,
        copies: &[Copy],
        stream: Stream,
    ) -> DriverResult<()> {
        let strided = copies.iter().filter(|copy| copy.rows > 1);
        // SAFETY: the caller's promise, for each of the copies.
        unsafe {
            for copy in strided {
                submit_strided(direction, copy, stream)?;
            }
            let single = copies.iter().filter(|copy| copy.rows == 1);
            match self.call.filter(|_| copies.len() >= BATCH_MIN) {
                Some(call) => submit_batch(call, direction, single, stream),
                None => single.into_iter().try_for_each(|copy| submit_one(direction, copy, stream)),
            }
        }
    }
}

/// # Safety
///
/// As of `Batches::submit`.
unsafe fn submit_one(direction: Direction, copy: &Copy, stream: Stream) -> DriverResult<()> {
    let &Copy { host, device, len, .. } = copy;
    // SAFETY: the caller's promise.
    unsafe {
        match direction {
            Direction::Load => check(
                "cuMemcpyHtoDAsync",
                sys::cuMemcpyHtoDAsync_v2(device, host.cast(), len, handle(stream)),
            ),
            Direction::Store => check(
                "cuMemcpyDtoHAsync",
                sys::cuMemcpyDtoHAsync_v2(host.cast(), device, len, handle(stream)),
            ),
        }
    }
}

/// # Safety
///
/// As of `Batches::submit`.
unsafe fn submit_strided(direction: Direction, copy: &Copy, stream: Stream) -> DriverResult<()> {
    let (on_host, on_device) =
        (sys::CUmemorytype::CU_MEMORYTYPE_HOST, sys::CUmemorytype::CU_MEMORYTYPE_DEVICE);
    // SAFETY: all-zero is valid for this struct: numbers, null pointers, and kinds of memory that are set below.
    let mut place: sys::CUDA_MEMCPY2D = unsafe {
        let mut place = mem::MaybeUninit::<sys::CUDA_MEMCPY2D>::zeroed();
        (&raw mut (*place.as_mut_ptr()).srcMemoryType).write(on_host);
        (&raw mut (*place.as_mut_ptr()).dstMemoryType).write(on_device);
        place.assume_init()
    };
    match direction {
        Direction::Load => {
            (place.srcHost, place.srcPitch) = (copy.host.cast(), copy.host_pitch);
            (place.dstDevice, place.dstPitch) = (copy.device, copy.device_pitch);
        }
        Direction::Store => {
            (place.srcMemoryType, place.dstMemoryType) = (on_device, on_host);
            (place.srcDevice, place.srcPitch) = (copy.device, copy.device_pitch);
            (place.dstHost, place.dstPitch) = (copy.host.cast(), copy.host_pitch);
        }
    }
    (place.WidthInBytes, place.Height) = (copy.len, copy.rows);
    // SAFETY: the caller's promise; the driver reads the struct before the call returns.
    check("cuMemcpy2DAsync", unsafe { sys::cuMemcpy2DAsync_v2(&raw const place, handle(stream)) })
}

/// # Safety
///
/// As of `Batches::submit`.
unsafe fn submit_batch<'a>(
    call: BatchCall,
    direction: Direction,
    copies: impl Iterator<Item = &'a Copy> + Clone,
    stream: Stream,
) -> DriverResult<()> {
    let mut hosts: Vec<u64> = copies.clone().map(|copy| copy.host.expose_provenance() as u64).collect();
    if hosts.is_empty() {
        return Ok(());
    }
    let mut devices: Vec<u64> = copies.clone().map(|copy| copy.device).collect();
    let mut sizes: Vec<usize> = copies.map(|copy| copy.len).collect();
    let place = || sys::CUmemLocation {
        type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID,
        id: c_int::default(),
    };
    let mut attributes = sys::CUmemcpyAttributes {
        srcAccessOrder: sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        srcLocHint: place(),
        dstLocHint: place(),
        flags: 0,
    };
    let (to, from) = match direction {
        Direction::Load => (&mut devices, &mut hosts),
        Direction::Store => (&mut hosts, &mut devices),
    };
    let mut begin = 0;
    // SAFETY: the caller's promise; three arrays of `len` numbers and one attribute for all of them, which the driver
    // reads before the call returns.
    let result = unsafe {
        call(
            to.as_mut_ptr(),
            from.as_mut_ptr(),
            sizes.as_mut_ptr(),
            sizes.len(),
            &raw mut attributes,
            &raw mut begin,
            1,
            handle(stream),
        )
    };
    check("cuMemcpyBatchAsync", result)
}
