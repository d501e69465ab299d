//! The real driver: libcuda, found at run time.

use std::ffi::{CStr, c_int, c_void};
use std::ptr;

use cudarc::driver::sys;

use super::batches::Batches;
use super::driver::{Copy, DeviceAddress, Driver, DriverResult, Fault, RawEvent, Stream};
use super::kernels::{Arguments, THREADS};
use crate::copy::Direction;
use crate::{Error, ErrorKind, Result};

/// Whether libcuda can be found. Does not initialise it: a process that did could not fork children that use it.
#[must_use]
pub fn cuda_available() -> bool {
    // SAFETY: only loads and unloads the library; that runs libcuda's own initialisers, which do nothing unsound.
    unsafe { sys::is_culib_present() }
}

/// The primary context of one GPU: the one that torch works in.
///
/// The context stays retained for the life of the process, as torch keeps it too: giving it back while the process
/// ends would race with the driver's own end.
#[derive(Debug)]
pub(crate) struct LibCuda {
    context: sys::CUcontext,
    numa_node: Option<usize>,
    batches: Batches,
}

// SAFETY: a context's handle may be used from any thread.
unsafe impl Send for LibCuda {}
// SAFETY: as above; the driver's calls are thread-safe.
unsafe impl Sync for LibCuda {}

impl LibCuda {
    /// Finds libcuda and retains the primary context of GPU number `device`.
    pub(crate) fn open(device: usize) -> Result<Self> {
        if !cuda_available() {
            return Err(Error::new(
                ErrorKind::Device,
                "libcuda.so.1 was not found: install NVIDIA's driver, or start the container with GPUs",
            ));
        }
        let ordinal = c_int::try_from(device).map_err(|_| {
            Error::new(ErrorKind::InvalidArgument, format!("there is no GPU number {device}"))
        })?;
        let (mut handle, mut context) = (0, ptr::null_mut());
        // SAFETY: out-pointers are valid; the library is there, as just seen.
        unsafe {
            check("cuInit", sys::cuInit(0))?;
            check("cuDeviceGet", sys::cuDeviceGet(&raw mut handle, ordinal))?;
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&raw mut context, handle))?;
        }
        let mut node = -1;
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID;
        // SAFETY: the out-pointer is valid. Drivers that do not know the attribute refuse it, and the node stays -1.
        let _ = unsafe { sys::cuDeviceGetAttribute(&raw mut node, attribute, handle) };
        let numa_node = usize::try_from(node).ok();
        Ok(Self { context, numa_node, batches: Batches::find() })
    }

    /// What kind of memory an address is in; None for what the driver does not know.
    fn memory_type(address: u64) -> DriverResult<Option<u32>> {
        let mut kind = 0_u32;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        // SAFETY: the attribute is written as an unsigned int.
        let result = unsafe { sys::cuPointerGetAttribute((&raw mut kind).cast(), attribute, address) };
        match result {
            sys::CUresult::CUDA_ERROR_INVALID_VALUE => Ok(None),
            result => check("cuPointerGetAttribute", result).map(|()| Some(kind)),
        }
    }
}

pub(super) fn check(call: &'static str, result: sys::CUresult) -> DriverResult<()> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = ptr::null();
    // SAFETY: the out-pointer is valid.
    let known = unsafe { sys::cuGetErrorName(result, &raw mut name) } == sys::CUresult::CUDA_SUCCESS;
    let error = if known && !name.is_null() {
        // SAFETY: the driver's names are static C strings.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    } else {
        format!("error {}", result as u32)
    };
    Err(Fault { call, error })
}

/// Handles of the driver are pointers that we keep as numbers.
#[expect(clippy::cast_possible_truncation, reason = "it was a pointer before")]
pub(super) fn handle<T>(number: u64) -> *mut T {
    ptr::with_exposed_provenance_mut(number as usize)
}

fn number<T>(handle: *mut T) -> u64 {
    handle.expose_provenance() as u64
}

impl Driver for LibCuda {
    fn adopt_thread(&self) -> DriverResult<()> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the context is retained; `mode` is read and written.
        unsafe {
            check("cuCtxSetCurrent", sys::cuCtxSetCurrent(self.context))?;
            check("cuThreadExchangeStreamCaptureMode", sys::cuThreadExchangeStreamCaptureMode(&raw mut mode))
        }
    }

    fn enter(&self) -> DriverResult<u64> {
        let mut previous = ptr::null_mut();
        // SAFETY: the out-pointer is valid; the context is retained.
        unsafe {
            check("cuCtxGetCurrent", sys::cuCtxGetCurrent(&raw mut previous))?;
            if previous != self.context {
                check("cuCtxSetCurrent", sys::cuCtxSetCurrent(self.context))?;
            }
        }
        Ok(number(previous))
    }

    fn leave(&self, previous: u64) {
        let previous: sys::CUcontext = handle(previous);
        if previous != self.context {
            // SAFETY: it was current before, on this thread; null is none.
            let _ = unsafe { sys::cuCtxSetCurrent(previous) };
        }
    }

    fn numa_node(&self) -> Option<usize> {
        self.numa_node
    }

    unsafe fn register(&self, start: *mut u8, len: usize) -> DriverResult<()> {
        // SAFETY: the caller's promise.
        let result =
            unsafe { sys::cuMemHostRegister_v2(start.cast(), len, sys::CU_MEMHOSTREGISTER_PORTABLE) };
        check("cuMemHostRegister", result)
    }

    unsafe fn unregister(&self, start: *mut u8) -> DriverResult<()> {
        // SAFETY: the caller's promise; the driver refuses what is not registered.
        check("cuMemHostUnregister", unsafe { sys::cuMemHostUnregister(start.cast()) })
    }

    fn is_pinned(&self, address: *const u8) -> DriverResult<bool> {
        let host = sys::CUmemorytype::CU_MEMORYTYPE_HOST as u32;
        Ok(Self::memory_type(address.expose_provenance() as u64)? == Some(host))
    }

    fn is_on_device(&self, address: DeviceAddress) -> DriverResult<bool> {
        Ok(Self::memory_type(address)? == Some(sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32))
    }

    fn upload(&self, bytes: &[u8]) -> DriverResult<DeviceAddress> {
        let mut address = 0;
        // SAFETY: the allocation has exactly `bytes.len()` bytes. A copy from pageable memory may return before the
        // bytes are there: the context is synchronised, once, before anybody can use them.
        unsafe {
            check("cuMemAlloc", sys::cuMemAlloc_v2(&raw mut address, bytes.len()))?;
            let copied =
                check("cuMemcpyHtoD", sys::cuMemcpyHtoD_v2(address, bytes.as_ptr().cast(), bytes.len()))
                    .and_then(|()| self.synchronize());
            if let Err(fault) = copied {
                let _ = sys::cuMemFree_v2(address);
                return Err(fault);
            }
        }
        Ok(address)
    }

    fn synchronize(&self) -> DriverResult<()> {
        // SAFETY: the context is current, as the trait asks.
        check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })
    }

    unsafe fn free(&self, address: DeviceAddress) -> DriverResult<()> {
        // SAFETY: the caller's promise.
        check("cuMemFree", unsafe { sys::cuMemFree_v2(address) })
    }

    fn load_module(&self, ptx: &CStr) -> DriverResult<u64> {
        let mut module = ptr::null_mut();
        // SAFETY: the image is PTX, ended by a zero.
        let result = unsafe { sys::cuModuleLoadData(&raw mut module, ptx.as_ptr().cast()) };
        check("cuModuleLoadData", result)?;
        Ok(number(module))
    }

    fn kernel(&self, module: u64, name: &CStr) -> DriverResult<u64> {
        let mut function = ptr::null_mut();
        // SAFETY: the module is loaded; the name is a C string.
        let result = unsafe { sys::cuModuleGetFunction(&raw mut function, handle(module), name.as_ptr()) };
        check("cuModuleGetFunction", result)?;
        Ok(number(function))
    }

    unsafe fn unload_module(&self, module: u64) -> DriverResult<()> {
        // SAFETY: the caller's promise.
        check("cuModuleUnload", unsafe { sys::cuModuleUnload(handle(module)) })
    }

    fn create_event(&self) -> DriverResult<RawEvent> {
        let mut event = ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the out-pointer is valid.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
        Ok(number(event))
    }

    fn destroy_event(&self, event: RawEvent) -> DriverResult<()> {
        // SAFETY: the driver keeps what is still waited for.
        check("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(handle(event)) })
    }

    fn record(&self, event: RawEvent, stream: Stream) -> DriverResult<()> {
        // SAFETY: handles of the driver; nothing of ours is read or written.
        check("cuEventRecord", unsafe { sys::cuEventRecord(handle(event), handle(stream)) })
    }

    fn query(&self, event: RawEvent) -> DriverResult<bool> {
        // SAFETY: as of `record`.
        match unsafe { sys::cuEventQuery(handle(event)) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuEventQuery", result).map(|()| true),
        }
    }

    fn wait(&self, stream: Stream, event: RawEvent) -> DriverResult<()> {
        // SAFETY: as of `record`.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(handle(stream), handle(event), 0) })
    }

    unsafe fn copy_to_device(&self, copies: &[Copy], stream: Stream) -> DriverResult<()> {
        // SAFETY: the caller's promise.
        unsafe { self.batches.submit(Direction::Load, copies, stream) }
    }

    unsafe fn copy_to_host(&self, copies: &[Copy], stream: Stream) -> DriverResult<()> {
        // SAFETY: the caller's promise.
        unsafe { self.batches.submit(Direction::Store, copies, stream) }
    }

    unsafe fn launch(
        &self,
        kernel: u64,
        grid: [u32; 3],
        arguments: &Arguments,
        stream: Stream,
    ) -> DriverResult<()> {
        // The driver reads each parameter, with the size the kernel declares, before the call returns.
        let mut parameters: [*mut c_void; 4] = [
            (&raw const arguments.layers).cast_mut().cast(),
            (&raw const arguments.staging).cast_mut().cast(),
            (&raw const arguments.row_stride).cast_mut().cast(),
            (&raw const arguments.blocks).cast_mut().cast(),
        ];
        let [x, y, z] = grid;
        // SAFETY: the parameters are those that the kernels declare (`kernels.rs`); the rest is the caller's promise.
        let result = unsafe {
            let parameters = parameters.as_mut_ptr();
            sys::cuLaunchKernel(
                handle(kernel),
                x,
                y,
                z,
                THREADS,
                1,
                1,
                0,
                handle(stream),
                parameters,
                ptr::null_mut(),
            )
        };
        check("cuLaunchKernel", result)
    }
}
