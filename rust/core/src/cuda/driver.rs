//! `Driver`: the few calls of the CUDA driver that pinning and moving need; the real one and a fake implement it.

use std::ffi::CStr;
use std::fmt;

use super::kernels::Arguments;
use crate::{Error, ErrorKind};

/// A CUDA stream's handle; 0 is the default stream.
pub(crate) type Stream = u64;

/// A CUDA event's handle.
pub(crate) type RawEvent = u64;

/// An address in GPU memory.
pub(crate) type DeviceAddress = u64;

/// A call that the driver refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// The driver's name of the call.
    pub(crate) call: &'static str,
    /// The driver's name of the error.
    pub(crate) error: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} said {}", self.call, self.error)
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Self::new(ErrorKind::Device, format!("the CUDA driver refused: {fault}"))
    }
}

/// What a call of the driver gives.
pub(crate) type DriverResult<T> = std::result::Result<T, Fault>;

/// Bytes on the host and on the GPU: `rows` pieces of `len` bytes, at a distance of their own on each side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copy {
    pub(crate) host: *mut u8,
    pub(crate) device: DeviceAddress,
    pub(crate) len: usize,
    pub(crate) rows: usize,
    pub(crate) host_pitch: usize,
    pub(crate) device_pitch: usize,
}

// SAFETY: the pointer is used by the driver only, under the promise of `Driver::copy_to_device`.
unsafe impl Send for Copy {}
// SAFETY: as above.
unsafe impl Sync for Copy {}

/// One GPU, in the context that torch uses too. But for `adopt_thread` and `enter`, every call needs the calling
/// thread to have adopted or entered the context.
pub(crate) trait Driver: fmt::Debug + Send + Sync {
    /// Makes the context current on a thread of ours for good, and keeps the thread out of other threads' captures of
    /// CUDA graphs: without that a call beside a capture (the engine captures right after it made its KV cache) fails
    /// and spoils the capture.
    fn adopt_thread(&self) -> DriverResult<()>;

    /// Makes the context current on a thread of somebody else; `leave` restores what this returns.
    fn enter(&self) -> DriverResult<u64>;

    /// Ends an `enter`.
    fn leave(&self, previous: u64);

    /// The NUMA node that is nearest to the GPU, where the machine has several.
    fn numa_node(&self) -> Option<usize>;

    /// Pins host memory for all GPUs.
    ///
    /// # Safety
    ///
    /// `len` mapped bytes begin at `start`, and stay mapped until they are unregistered.
    unsafe fn register(&self, start: *mut u8, len: usize) -> DriverResult<()>;

    /// Ends a registration that began at `start`.
    ///
    /// # Safety
    ///
    /// No copy that was submitted uses the memory any more.
    unsafe fn unregister(&self, start: *mut u8) -> DriverResult<()>;

    /// Whether the driver knows the address as pinned host memory.
    fn is_pinned(&self, address: *const u8) -> DriverResult<bool>;

    /// Whether the address is in a GPU's memory.
    fn is_on_device(&self, address: DeviceAddress) -> DriverResult<bool>;

    /// GPU memory of `bytes`, filled with them.
    fn upload(&self, bytes: &[u8]) -> DriverResult<DeviceAddress>;

    /// Waits until everything submitted to the GPU is done.
    fn synchronize(&self) -> DriverResult<()>;

    /// Frees what `upload` gave.
    ///
    /// # Safety
    ///
    /// Nothing that was submitted uses the memory any more.
    unsafe fn free(&self, address: DeviceAddress) -> DriverResult<()>;

    /// Compiles PTX.
    fn load_module(&self, ptx: &CStr) -> DriverResult<u64>;

    /// A kernel of a module.
    fn kernel(&self, module: u64, name: &CStr) -> DriverResult<u64>;

    /// Unloads a module.
    ///
    /// # Safety
    ///
    /// None of its kernels runs or will run.
    unsafe fn unload_module(&self, module: u64) -> DriverResult<()>;

    /// A new event.
    fn create_event(&self) -> DriverResult<RawEvent>;

    /// Ends an event. What waits for it already still does.
    fn destroy_event(&self, event: RawEvent) -> DriverResult<()>;

    /// Makes the event stand for everything submitted to the stream until now. Waits that were submitted before keep
    /// what they wait for.
    fn record(&self, event: RawEvent, stream: Stream) -> DriverResult<()>;

    /// Whether what the event was last recorded for is done.
    fn query(&self, event: RawEvent) -> DriverResult<bool>;

    /// Makes everything submitted to the stream from now on wait for the event, on the GPU.
    fn wait(&self, stream: Stream, event: RawEvent) -> DriverResult<()>;

    /// Submits copies from host memory into the GPU's, in any order among themselves. Returns late when the memory is
    /// not pinned.
    ///
    /// # Safety
    ///
    /// Both ends of each copy are memory that nobody else uses (writes, on the host) until it is done; the host's are
    /// pinned in one registration, or not at all.
    unsafe fn copy_to_device(&self, copies: &[Copy], stream: Stream) -> DriverResult<()>;

    /// Submits copies from the GPU's memory into host memory. Returns late when the memory is not pinned.
    ///
    /// # Safety
    ///
    /// As of `copy_to_device`, with the roles of the ends exchanged.
    unsafe fn copy_to_host(&self, copies: &[Copy], stream: Stream) -> DriverResult<()>;

    /// Submits a kernel of ours.
    ///
    /// # Safety
    ///
    /// The kernel stays inside of the memory that the arguments name, which nobody else uses (writes, where it only
    /// reads) until the kernel is done.
    unsafe fn launch(
        &self,
        kernel: u64,
        grid: [u32; 3],
        arguments: &Arguments,
        stream: Stream,
    ) -> DriverResult<()>;
}

/// A thread of somebody else inside of our context, until drop.
pub(crate) struct Entered<'a> {
    driver: &'a dyn Driver,
    previous: u64,
}

impl<'a> Entered<'a> {
    pub(crate) fn new(driver: &'a dyn Driver) -> DriverResult<Self> {
        Ok(Self { driver, previous: driver.enter()? })
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.driver.leave(self.previous);
    }
}
