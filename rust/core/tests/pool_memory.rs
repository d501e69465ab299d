//! What a prefaulted pool really takes from the machine; alone in its process, so that the figure is its own.

use std::fs;
use std::time::Duration;

use lmcache_core::{HostPool, HostPoolConfig};

fn resident_bytes() -> usize {
    status_bytes("VmRSS:")
}

fn status_bytes(name: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("the line");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1024
}

fn check_address_space() {
    let before = status_bytes("VmSize:");
    let config =
        HostPoolConfig { size_bytes: 3 << 20, row_bytes: 4_096, prefault_threads: 0, huge_pages: true };
    let pools: Vec<HostPool> = (0..8).map(|_| HostPool::new(&config).expect("memory")).collect();
    assert_eq!(status_bytes("VmSize:") - before, pools.len() * config.size_bytes);
    drop(pools);
    assert_eq!(status_bytes("VmSize:"), before);
}

#[test]
fn a_prefaulted_pool_takes_what_was_asked_and_gives_it_back() {
    check_address_space();
    for huge_pages in [false, true] {
        let before = resident_bytes();
        let config = HostPoolConfig {
            size_bytes: (200 << 20) + 12_345,
            row_bytes: 300_000,
            prefault_threads: 2,
            huge_pages,
        };
        let pool = HostPool::new(&config).expect("memory");
        assert!(pool.wait_prefaulted(Duration::from_secs(60)).expect("here"), "{:?}", pool.prefault_error());
        let taken = resident_bytes() - before;
        let asked = config.size_bytes;
        assert!(taken.abs_diff(asked) * 50 <= asked, "{taken} bytes taken for {asked} asked");
        drop(pool);
        assert!(resident_bytes() < before + asked / 50);
    }
}
