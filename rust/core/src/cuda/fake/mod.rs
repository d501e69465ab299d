//! A driver for tests: streams are queues of operations that run late and in any order that streams and events allow.
//!
//! "GPU memory" is memory of the test. Whatever the mover does not make wait for something runs before it sooner or
//! later, so that a missing wait shows as wrong bytes. What a real driver would refuse or crash on is noted in
//! `violations`.

mod calls;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::thread::{self, ThreadId};

use parking_lot::{Condvar, Mutex};

use super::driver::{Copy, DeviceAddress, DriverResult, Fault, RawEvent, Stream};
use super::kernels::{Arguments, piece_bytes};
use super::layout::{LAYER_BYTES, Width};

/// When calls fail.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failing {
    /// The number of the first call that fails.
    pub(crate) first: usize,
    /// How many fail.
    pub(crate) calls: usize,
    /// Whether they do their work nevertheless.
    pub(crate) in_vain: bool,
}

#[derive(Debug)]
enum Op {
    Copy { from: usize, to: usize, len: usize },
    Kernel { gather: bool, width: Width, grid: [u32; 3], arguments: Box<Arguments> },
    Record { event: RawEvent, version: u64 },
    Wait { event: RawEvent, version: u64 },
}

/// Versions of an event: the last one recorded by a call, those not reached by their streams.
#[derive(Debug, Default)]
struct Versions {
    recorded: u64,
    open: HashSet<u64>,
}

#[derive(Debug, Default)]
struct State {
    random: u64,
    streams: BTreeMap<Stream, VecDeque<Op>>,
    favoured: Option<Stream>,
    frozen: HashSet<Stream>,
    events: HashMap<RawEvent, Versions>,
    handles: u64,
    pinned: BTreeMap<usize, usize>,
    device: Vec<(usize, usize)>,
    uploads: HashMap<DeviceAddress, Vec<u128>>,
    modules: HashMap<u64, Width>,
    kernels: HashMap<u64, (bool, Width)>,
    inside: HashMap<ThreadId, usize>,
    calls: usize,
    failing: Option<Failing>,
    refuse_pins: bool,
    violations: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Fake {
    state: Mutex<State>,
    /// Registrations wait for this.
    gate: Mutex<bool>,
    opened: Condvar,
}

impl Fake {
    pub(crate) fn new(seed: u64) -> Self {
        let state = State { random: seed | 1, ..State::default() };
        Self { state: Mutex::new(state), gate: Mutex::new(true), opened: Condvar::new() }
    }

    /// Takes memory of the test as the GPU's.
    pub(crate) fn add_device_memory(&self, start: *const u8, len: usize) {
        self.state.lock().device.push((start as usize, len));
    }

    pub(crate) fn fail(&self, failing: Failing) {
        self.state.lock().failing = Some(failing);
    }

    pub(crate) fn calls(&self) -> usize {
        self.state.lock().calls
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        self.state.lock().violations.clone()
    }

    /// Pinned pieces: address, bytes.
    pub(crate) fn pinned(&self) -> Vec<(usize, usize)> {
        self.state.lock().pinned.iter().map(|(&start, &len)| (start, len)).collect()
    }

    /// Takes registrations from now on without pinning anything.
    pub(crate) fn refuse_pins_silently(&self) {
        self.state.lock().refuse_pins = true;
    }

    /// Whether a registration goes on.
    pub(crate) fn open_gate(&self, open: bool) {
        *self.gate.lock() = open;
        self.opened.notify_all();
    }

    /// Lets nothing of a stream run, or lets it again.
    pub(crate) fn freeze(&self, stream: Stream, frozen: bool) {
        let mut state = self.state.lock();
        if frozen {
            state.frozen.insert(stream);
        } else {
            state.frozen.remove(&stream);
        }
    }

    /// The engine's own work: a copy of bytes on a stream.
    pub(crate) fn compute(&self, stream: Stream, from: *const u8, to: *mut u8, len: usize) {
        let op = Op::Copy { from: from as usize, to: to as usize, len };
        self.state.lock().streams.entry(stream).or_default().push_back(op);
    }

    /// Runs everything that was submitted.
    pub(crate) fn finish(&self) {
        let mut state = self.state.lock();
        while state.step() {}
        let left: usize = state.streams.values().map(VecDeque::len).sum();
        assert_eq!(left, 0, "operations wait for ever");
    }

    /// Whether everything that was submitted to a stream is done.
    pub(crate) fn is_finished(&self, stream: Stream) -> bool {
        self.state.lock().streams.get(&stream).is_none_or(VecDeque::is_empty)
    }

    /// One call of the driver: time passes, then the call does its work or fails, or both.
    fn call<T>(&self, call: &'static str, steps: u64, work: impl FnOnce(&mut State) -> T) -> DriverResult<T> {
        let mut state = self.state.lock();
        if !matches!(call, "enter" | "adopt") && !state.inside.contains_key(&thread::current().id()) {
            state.violations.push(format!("{call} outside of the context"));
        }
        let number = state.calls;
        state.calls += 1;
        for _ in 0..state.below(steps + 1) {
            state.step();
        }
        let failing = state.failing.filter(|f| (f.first..f.first.saturating_add(f.calls)).contains(&number));
        match failing {
            Some(Failing { in_vain: false, .. }) => Err(fault(call)),
            Some(_) => {
                work(&mut state);
                Err(fault(call))
            }
            None => Ok(work(&mut state)),
        }
    }

    /// Submits copies; of pageable memory they are done when the call returns, as the real driver does it.
    fn copy(&self, copies: &[Copy], load: bool, stream: Stream) -> DriverResult<()> {
        self.call("copy", 2, |state| {
            for copy in copies {
                for row in 0..copy.rows {
                    let host = copy.host as usize + row * copy.host_pitch;
                    state.push_copy(
                        host,
                        copy.device as usize + row * copy.device_pitch,
                        copy.len,
                        load,
                        stream,
                    );
                }
            }
        })
    }
}

fn fault(call: &'static str) -> Fault {
    Fault { call, error: "CUDA_ERROR_ON_PURPOSE".to_owned() }
}

impl State {
    /// A pseudo-random number below `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % limit
    }

    fn handle(&mut self) -> u64 {
        self.handles += 1;
        0x1000 + self.handles
    }

    fn push(&mut self, stream: Stream, op: Op) {
        self.streams.entry(stream).or_default().push_back(op);
    }

    fn push_copy(&mut self, host: usize, device: usize, len: usize, load: bool, stream: Stream) {
        let pieces = [host, host + len - 1].map(|byte| self.piece_of(byte));
        if pieces[0] != pieces[1] {
            self.violations.push("a copy from one registration into another".to_owned());
        }
        self.check_device(device, len);
        let (from, to) = if load { (host, device) } else { (device, host) };
        self.push(stream, Op::Copy { from, to, len });
        if pieces[0].is_none() && !self.frozen.contains(&stream) {
            while !self.streams[&stream].is_empty() && self.step() {}
        }
    }

    fn piece_of(&self, byte: usize) -> Option<usize> {
        let (&start, &len) = self.pinned.range(..=byte).next_back()?;
        (byte < start + len).then_some(start)
    }

    fn check_device(&mut self, start: usize, len: usize) {
        let inside = |&(first, bytes): &(usize, usize)| start >= first && start + len <= first + bytes;
        if !self.device.iter().any(inside) {
            self.violations.push(format!("{len} bytes at {start:#x} are not GPU memory"));
        }
    }

    fn is_runnable(&self, stream: Stream) -> bool {
        match self.streams[&stream].front() {
            _ if self.frozen.contains(&stream) => false,
            None => false,
            Some(&Op::Wait { event, version }) => !self.events[&event].open.contains(&version),
            Some(_) => true,
        }
    }

    /// Runs one operation of some stream; often one stream gets far ahead of the others. False: none can run.
    fn step(&mut self) -> bool {
        let runnable: Vec<Stream> =
            self.streams.keys().copied().filter(|&stream| self.is_runnable(stream)).collect();
        if runnable.is_empty() {
            return false;
        }
        if self.below(8) == 0 || self.favoured.is_none() {
            let number = self.below(self.streams.len() as u64);
            self.favoured = self.streams.keys().nth(number as usize).copied();
        }
        let favoured = self.favoured.filter(|stream| runnable.contains(stream));
        let any = self.below(runnable.len() as u64) as usize;
        let stream = favoured.unwrap_or(runnable[any]);
        let op = self.streams.get_mut(&stream).and_then(VecDeque::pop_front);
        if let Some(op) = op {
            self.run(op);
        }
        true
    }

    fn run(&mut self, op: Op) {
        match op {
            // SAFETY: memory of the test, which keeps it until all is done; nobody else uses it meanwhile, or the
            // test is about to fail.
            Op::Copy { from, to, len } => unsafe {
                std::ptr::copy(from as *const u8, to as *mut u8, len);
            },
            Op::Record { event, version } => {
                self.events.entry(event).or_default().open.remove(&version);
            }
            Op::Wait { .. } => {}
            Op::Kernel { gather, width, grid, arguments } => self.run_kernel(gather, width, grid, &arguments),
        }
    }

    /// As the PTX does it: grid x is pieces of a page, y layers, z blocks.
    fn run_kernel(&mut self, gather: bool, width: Width, grid: [u32; 3], arguments: &Arguments) {
        for (position, &block) in arguments.blocks[..grid[2] as usize].iter().enumerate() {
            for layer in 0..grid[1] as usize {
                let entry = arguments.layers as usize + layer * LAYER_BYTES;
                // SAFETY: the table was uploaded, with an entry for each layer of the grid.
                let [base, stride, offset, page] = unsafe { *(entry as *const [u64; 4]) };
                let page_at = (base + u64::from(block) * stride) as usize;
                let row_at =
                    arguments.staging.wrapping_add(position as u64 * arguments.row_stride + offset) as usize;
                let len = (page as usize).min(grid[0] as usize * piece_bytes(width) as usize);
                if len == 0 {
                    continue;
                }
                if !(page_at | row_at | len).is_multiple_of(width.bytes() as usize) {
                    self.violations.push("a kernel's address is not aligned".to_owned());
                }
                self.check_device(page_at, len);
                self.check_device(row_at, len);
                let (from, to) = if gather { (page_at, row_at) } else { (row_at, page_at) };
                self.run(Op::Copy { from, to, len });
            }
        }
    }
}
