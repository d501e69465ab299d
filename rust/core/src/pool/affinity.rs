//! Where our threads run, and where the memory that they touch comes from.
//!
//! vLLM pins its main thread to one core; a thread inherits that, and all of ours would share that core.

use std::fs;

/// CPUs that a `cpu_set_t` can name.
const CPUS_MAX: usize = libc::CPU_SETSIZE as usize;

/// The least of a thread's claims to a CPU.
const NICEST: libc::c_int = 19;

/// NUMA nodes that a mask has room for.
const NODES_MAX: usize = 1024;

/// Widens the calling thread's affinity. Only advice: a failure leaves the thread where it is.
pub(crate) fn use_every_cpu() {
    let Some(cpus) = allowed_to_any_thread() else { return };
    // SAFETY: an all-zero `cpu_set_t` is its valid empty value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for cpu in cpus {
        // SAFETY: `cpu` is below CPU_SETSIZE, as `parse_list` keeps.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: `set` is initialised and its size is given; 0 is the calling thread.
    unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) };
}

/// Has every other thread of this machine go before the calling one, where there are too few CPUs. Only advice.
pub(crate) fn yield_to_others() {
    // SAFETY: no memory is given; 0 is the calling thread, as Linux reads it.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICEST) };
}

/// Has pages that the calling thread touches first come from a NUMA node, while it has any. Only advice.
pub(crate) fn prefer_node(node: usize) {
    let mut nodes = [0_u64; NODES_MAX / 64];
    let Some(word) = nodes.get_mut(node / 64) else { return };
    *word = 1 << (node % 64);
    // SAFETY: the kernel reads NODES_MAX bits of the mask. It may refuse, as in containers that forbid the call.
    unsafe { libc::syscall(libc::SYS_set_mempolicy, libc::MPOL_PREFERRED, nodes.as_ptr(), NODES_MAX) };
}

/// The union over the process's threads; None when there is nothing to read.
fn allowed_to_any_thread() -> Option<Vec<usize>> {
    let mut cpus: Vec<usize> = fs::read_dir("/proc/self/task")
        .ok()?
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok())
        .flat_map(|status| {
            let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            line.map(parse_list).unwrap_or_default()
        })
        .collect();
    cpus.sort_unstable();
    cpus.dedup();
    (!cpus.is_empty()).then_some(cpus)
}

/// The kernel's list format, "0-3,8"; what is not understood is left out.
fn parse_list(cpu_list: &str) -> Vec<usize> {
    let mut cpus = Vec::new();
    for range in cpu_list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        if let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) {
            cpus.extend(first..=last.min(CPUS_MAX - 1));
        }
    }
    cpus.retain(|&cpu| cpu < CPUS_MAX);
    cpus
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_the_kernels_lists() {
        assert_eq!(parse_list("\t0-2,5\n"), [0, 1, 2, 5]);
        assert_eq!(parse_list("7"), [7]);
        assert!(parse_list("").is_empty());
        assert!(parse_list("x-3").is_empty());
        assert_eq!(parse_list("1022-5000").last(), Some(&(CPUS_MAX - 1)));
    }

    #[test]
    fn a_thread_yields_and_the_others_do_not() {
        // SAFETY: no memory is given; 0 is the calling thread.
        let nice = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let before = nice();
        let yielded = std::thread::spawn(move || {
            yield_to_others();
            nice()
        });
        assert_eq!((yielded.join().expect("no panic"), nice()), (NICEST, before));
    }

    #[test]
    fn a_thread_prefers_a_node() {
        std::thread::spawn(|| {
            prefer_node(NODES_MAX);
            prefer_node(0);
            let mut mode: libc::c_int = -1;
            // SAFETY: the out-pointer is valid; no mask and no address are given.
            let told = unsafe { libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, 0, 0, 0, 0) };
            // Containers may forbid both calls.
            assert!(told != 0 || mode == libc::MPOL_PREFERRED, "{mode}");
        })
        .join()
        .expect("no panic");
    }

    #[test]
    fn a_thread_gets_what_any_thread_may_use() {
        let all = allowed_to_any_thread().expect("procfs");
        std::thread::spawn(move || {
            // SAFETY: an all-zero `cpu_set_t` is its valid empty value.
            let mut one: libc::cpu_set_t = unsafe { std::mem::zeroed() };
            // SAFETY: a CPU number of the kernel, below CPU_SETSIZE.
            unsafe { libc::CPU_SET(all[0], &mut one) };
            // SAFETY: `one` is initialised; 0 is the calling thread.
            unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const one) };
            use_every_cpu();
            let status = fs::read_to_string("/proc/thread-self/status").expect("procfs");
            let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).expect("line");
            assert_eq!(parse_list(line), all);
        })
        .join()
        .expect("no panic");
    }
}
