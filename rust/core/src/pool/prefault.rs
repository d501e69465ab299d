//! Threads that give the pool its memory before somebody has to wait for it.

use std::mem;
use std::sync::Arc;
use std::time::Instant;

use super::mapping::Mapping;
use super::{use_every_cpu, yield_to_others};
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Condvar, Mutex, wait_until};

/// What one thread touches at a time: about 15 ms, the longest that a drop of the pool waits for a thread.
pub(super) const PIECE_BYTES: usize = 16 << 20;

/// The threads of one pool. Dropping it stops and joins them.
#[derive(Debug)]
pub(super) struct Prefault {
    progress: Arc<Progress>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Progress {
    mapping: Arc<Mapping>,
    /// Where the next piece begins.
    next: AtomicUsize,
    touched_bytes: AtomicUsize,
    stop: AtomicBool,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    running: usize,
    error: Option<String>,
}

impl Prefault {
    /// Starts `threads` threads; a thread that cannot be started is done without.
    pub(super) fn start(mapping: &Arc<Mapping>, threads: usize) -> Self {
        let progress = Arc::new(Progress {
            mapping: Arc::clone(mapping),
            next: AtomicUsize::new(0),
            touched_bytes: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            state: Mutex::new(State::default()),
            ended: Condvar::new(),
        });
        let mut started = Vec::with_capacity(threads);
        for _ in 0..threads {
            progress.state.lock().running += 1;
            let running = Running(Arc::clone(&progress));
            let name = "lmcache-prefault".to_owned();
            let work = move || {
                let running = running;
                running.0.work();
            };
            match thread::Builder::new().name(name).spawn(work) {
                Ok(thread) => started.push(thread),
                Err(error) => progress.fail(format!("a prefault thread did not start: {error}")),
            }
        }
        Self { progress, threads: started }
    }

    pub(super) fn touched_bytes(&self) -> usize {
        self.progress.touched_bytes.load(Ordering::Acquire)
    }

    pub(super) fn error(&self) -> Option<String> {
        self.progress.state.lock().error.clone()
    }

    /// Waits for the threads; whether every page was touched.
    pub(super) fn wait(&self, deadline: Instant) -> bool {
        let mut state = self.progress.state.lock();
        wait_until(&self.progress.ended, &mut state, deadline, |state| state.running == 0);
        self.touched_bytes() == self.progress.mapping.len()
    }
}

impl Drop for Prefault {
    fn drop(&mut self) {
        let threads = mem::take(&mut self.threads);
        if !self.progress.mapping.owner().is_here() {
            // The threads stayed in the parent: what joining them here does, no standard says.
            mem::forget(threads);
            return;
        }
        self.progress.stop.store(true, Ordering::Relaxed);
        for thread in threads {
            // A panic there was counted as the end of that thread, and its pages are touched on first use.
            let _ = thread.join();
        }
    }
}

/// One running thread: counted down also when it panics or never starts.
struct Running(Arc<Progress>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.state.lock().running -= 1;
        self.0.ended.notify_all();
    }
}

impl Progress {
    fn work(&self) {
        use_every_cpu();
        // On the CPU the model computes on every core, and waits for the slowest.
        yield_to_others();
        while !self.stop.load(Ordering::Relaxed) {
            let start = self.next.fetch_add(PIECE_BYTES, Ordering::Relaxed);
            if start >= self.mapping.len() {
                return;
            }
            let piece = start..self.mapping.len().min(start + PIECE_BYTES);
            self.mapping.touch(&piece);
            self.touched_bytes.fetch_add(piece.len(), Ordering::Release);
        }
    }

    /// Keeps the first error: it explains the others.
    fn fail(&self, message: String) {
        self.state.lock().error.get_or_insert(message);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;

    /// The niceness of each thread of this process that touches a pool.
    fn niceness() -> Vec<String> {
        let tasks = fs::read_dir("/proc/self/task").expect("procfs").flatten();
        let stats = tasks.filter_map(|task| fs::read_to_string(task.path().join("stat")).ok());
        let touching = stats.filter_map(|stat| Some(stat.split_once("(lmcache-prefaul) ")?.1.to_owned()));
        touching.filter_map(|fields| Some(fields.split(' ').nth(16)?.to_owned())).collect()
    }

    #[test]
    fn the_threads_let_all_others_go_first() {
        let mapping = Arc::new(Mapping::new(2 << 30, true).expect("address space"));
        let _prefault = Prefault::start(&mapping, 2);
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let nice = niceness();
            if nice.len() >= 2 && nice.iter().all(|nice| nice == "19") {
                return;
            }
            assert!(Instant::now() < deadline, "{nice:?}");
        }
    }

    #[test]
    fn dropping_stops_the_threads() {
        let mapping = Arc::new(Mapping::new(4 << 30, true).expect("address space"));
        let prefault = Prefault::start(&mapping, 2);
        let progress = Arc::clone(&prefault.progress);
        drop(prefault);
        assert_eq!(progress.state.lock().running, 0);
        assert!(progress.touched_bytes.load(Ordering::Acquire) < mapping.len());
    }
}
