//! The fake's calls: each does at once what the driver does at once, and submits the rest.

use std::ffi::CStr;
use std::thread;
use std::time::Duration;

use super::super::driver::{Copy, DeviceAddress, Driver, DriverResult, RawEvent, Stream};
use super::super::kernels::Arguments;
use super::super::layout::Width;
use super::{Fake, Op, Versions};

/// The longest that a registration waits at the gate.
const GATE_LIMIT: Duration = Duration::from_secs(20);

impl Driver for Fake {
    fn adopt_thread(&self) -> DriverResult<()> {
        self.call("adopt", 0, |state| {
            state.inside.insert(thread::current().id(), usize::MAX / 2);
        })
    }

    fn enter(&self) -> DriverResult<u64> {
        self.call("enter", 0, |state| *state.inside.entry(thread::current().id()).or_default() += 1)?;
        Ok(7)
    }

    fn leave(&self, previous: u64) {
        assert_eq!(previous, 7);
        let mut state = self.state.lock();
        let thread = thread::current().id();
        let depth = state.inside.get_mut(&thread).expect("entered");
        *depth -= 1;
        if *depth == 0 {
            state.inside.remove(&thread);
        }
    }

    fn numa_node(&self) -> Option<usize> {
        Some(0)
    }

    unsafe fn register(&self, start: *mut u8, len: usize) -> DriverResult<()> {
        let mut open = self.gate.lock();
        // Not for ever: a test that failed before it opened the gate must end.
        while !*open && !self.opened.wait_for(&mut open, GATE_LIMIT).timed_out() {}
        self.call("register", 0, |state| {
            if !state.refuse_pins {
                state.pinned.insert(start as usize, len);
            }
        })
    }

    unsafe fn unregister(&self, start: *mut u8) -> DriverResult<()> {
        self.call("unregister", 0, |state| {
            if state.pinned.remove(&(start as usize)).is_none() && !state.refuse_pins {
                state.violations.push("unregistered what was not registered".to_owned());
            }
        })
    }

    fn is_pinned(&self, address: *const u8) -> DriverResult<bool> {
        self.call("is_pinned", 0, |state| state.piece_of(address as usize).is_some())
    }

    fn is_on_device(&self, address: DeviceAddress) -> DriverResult<bool> {
        let inside = |&(start, len): &(usize, usize)| (start..start + len).contains(&(address as usize));
        self.call("is_on_device", 0, |state| state.device.iter().any(inside))
    }

    fn upload(&self, bytes: &[u8]) -> DriverResult<DeviceAddress> {
        self.call("upload", 0, |state| {
            let mut memory = vec![0_u128; bytes.len().div_ceil(16)];
            // SAFETY: `memory` has room for the bytes.
            unsafe { memory.as_mut_ptr().cast::<u8>().copy_from(bytes.as_ptr(), bytes.len()) };
            let address = memory.as_ptr() as DeviceAddress;
            state.uploads.insert(address, memory);
            address
        })
    }

    fn synchronize(&self) -> DriverResult<()> {
        self.call("synchronize", 0, |state| while state.step() {})
    }

    unsafe fn free(&self, address: DeviceAddress) -> DriverResult<()> {
        self.call("free", 0, |state| {
            if state.uploads.remove(&address).is_none() {
                state.violations.push("freed what was not allocated".to_owned());
            }
        })
    }

    fn load_module(&self, ptx: &CStr) -> DriverResult<u64> {
        let wide = ptx.to_string_lossy().contains(".v4.u32");
        self.call("load_module", 0, |state| {
            let module = state.handle();
            state.modules.insert(module, if wide { Width::Bytes16 } else { Width::Bytes4 });
            module
        })
    }

    fn kernel(&self, module: u64, name: &CStr) -> DriverResult<u64> {
        self.call("kernel", 0, |state| {
            let (kernel, width) = (state.handle(), state.modules[&module]);
            state.kernels.insert(kernel, (name == c"lmcache_gather", width));
            kernel
        })
    }

    unsafe fn unload_module(&self, module: u64) -> DriverResult<()> {
        self.call("unload_module", 0, |state| {
            if state.modules.remove(&module).is_none() {
                state.violations.push("unloaded what was not loaded".to_owned());
            }
        })
    }

    fn create_event(&self) -> DriverResult<RawEvent> {
        self.call("create_event", 0, |state| {
            let event = state.handle();
            state.events.insert(event, Versions::default());
            event
        })
    }

    fn destroy_event(&self, event: RawEvent) -> DriverResult<()> {
        self.call("destroy_event", 0, |state| {
            if !state.events.contains_key(&event) {
                state.violations.push("destroyed what is no event".to_owned());
            }
        })
    }

    fn record(&self, event: RawEvent, stream: Stream) -> DriverResult<()> {
        self.call("record", 2, |state| {
            let versions = state.events.get_mut(&event).expect("an event");
            versions.recorded += 1;
            let version = versions.recorded;
            versions.open.insert(version);
            state.push(stream, Op::Record { event, version });
        })
    }

    fn query(&self, event: RawEvent) -> DriverResult<bool> {
        self.call("query", 3, |state| {
            state.step();
            let versions = &state.events[&event];
            !versions.open.contains(&versions.recorded)
        })
    }

    fn wait(&self, stream: Stream, event: RawEvent) -> DriverResult<()> {
        self.call("wait", 2, |state| {
            let version = state.events[&event].recorded;
            state.push(stream, Op::Wait { event, version });
        })
    }

    unsafe fn copy_to_device(&self, copies: &[Copy], stream: Stream) -> DriverResult<()> {
        self.copy(copies, true, stream)
    }

    unsafe fn copy_to_host(&self, copies: &[Copy], stream: Stream) -> DriverResult<()> {
        self.copy(copies, false, stream)
    }

    unsafe fn launch(
        &self,
        kernel: u64,
        grid: [u32; 3],
        arguments: &Arguments,
        stream: Stream,
    ) -> DriverResult<()> {
        self.call("launch", 2, |state| {
            let (gather, width) = state.kernels[&kernel];
            let arguments = Box::new(arguments.clone());
            state.push(stream, Op::Kernel { gather, width, grid, arguments });
        })
    }
}
