//! A process that stores is killed at any moment: what it said was stored is found, and nothing else is wrong.
//!
//! The child is this test binary itself, run with a variable that names its directory.

use std::collections::HashSet;
use std::env;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lmcache_core::{
    Chunk, DiskConfig, DiskDirectory, DiskTier, HostPool, HostPoolConfig, Key, Namespace, Reason, RowMemory,
    Seal, Space, Stored, Tier,
};

const DIRECTORY_VARIABLE: &str = "LMCACHE_RS_CRASH_TEST_DIRECTORY";
const KILLS_VARIABLE: &str = "LMCACHE_RS_CRASH_TEST_KILLS";

/// In CI; the long form asks for 500.
const KILLS: usize = 25;

const ROW_BYTES: usize = 1 << 18;
const ROWS: usize = 3;
const VALUE_BYTES: u64 = 4096 + (ROWS * ROW_BYTES) as u64;

/// Names that are used again and again, so that kills hit evictions and stores of what is there too.
const NAMES: u64 = 60;

const QUOTA_VALUES: u64 = 40;

fn tier(directory: &Path) -> DiskTier {
    let space = Space::new(Namespace::new(&[]), 0, 1, Seal::Checksum).expect("valid");
    let directory = DiskDirectory { path: directory.to_owned(), quota_bytes: QUOTA_VALUES * VALUE_BYTES };
    let config = DiskConfig { directories: vec![directory], direct: true, io_uring: true };
    DiskTier::new(space, &config).expect("valid")
}

fn pool() -> HostPool {
    let config = HostPoolConfig {
        size_bytes: ROWS * ROW_BYTES,
        row_bytes: ROW_BYTES,
        prefault_threads: 0,
        huge_pages: false,
    };
    HostPool::new(&config).expect("memory")
}

fn chunk(pool: &HostPool, name: u64) -> Chunk {
    let key = Key::from_bytes(*blake3::hash(&name.to_le_bytes()).as_bytes());
    let memory = RowMemory::new(pool, &[2, 0, 1]).expect("valid");
    Chunk { key, position: 0, memory }
}

#[expect(clippy::mut_from_ref, reason = "used by one thread, one at a time")]
fn bytes(pool: &HostPool) -> &mut [u8] {
    // SAFETY: the whole mapping; nobody uses two of these, or one while a tier works on the pool.
    unsafe { std::slice::from_raw_parts_mut(pool.base().as_ptr(), pool.size_bytes()) }
}

/// Other bytes for each name, and in each page of the value.
fn fill(pool: &HostPool, name: u64) {
    for (number, page) in bytes(pool).chunks_exact_mut(4096).enumerate() {
        page.fill(u8::try_from(name).expect("small"));
        page[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
    }
}

/// The child: stores until it is killed, and says what is stored.
#[test]
fn child() {
    let Ok(directory) = env::var(DIRECTORY_VARIABLE) else { return };
    let (tier, pool) = (tier(Path::new(&directory)), pool());
    let mut output = std::io::stdout();
    let mut tell = |text: String| {
        writeln!(output, "{text}").and_then(|()| output.flush()).expect("a pipe");
    };
    // Ends what the test harness has begun to write.
    tell(String::new());
    for name in (0..NAMES).cycle() {
        fill(&pool, name);
        tell(match tier.put(&chunk(&pool, name)) {
            Ok(Stored::Written(_)) => format!("stored {name}"),
            Ok(Stored::Present) => format!("present {name}"),
            Err(refusal) => format!("refused {refusal}"),
        });
    }
}

fn start(directory: &Path) -> Child {
    Command::new(env::current_exe().expect("known"))
        .args(["--exact", "child", "--nocapture", "--test-threads", "1"])
        .env(DIRECTORY_VARIABLE, directory)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("started")
}

/// Kills a child after `delay`. Returns the names that it said were stored or there, in their order.
fn killed_after(directory: &Path, delay: Duration, seen: &mut Seen) -> Vec<u64> {
    let mut child = start(directory);
    let output = BufReader::new(child.stdout.take().expect("piped"));
    let reader = thread::spawn(move || {
        let lines: Vec<String> = output.lines().map_while(Result::ok).collect();
        lines
    });
    thread::sleep(delay);
    child.kill().expect("running");
    child.wait().expect("ended");
    let lines = reader.join().expect("read");
    let told = lines.iter().filter_map(|line| line.split_once(' '));
    told.filter_map(|(verb, name)| {
        assert_ne!(verb, "refused", "{name}");
        seen.stores += usize::from(verb == "stored");
        if ["stored", "present"].contains(&verb) { name.parse().ok() } else { None }
    })
    .collect()
}

#[derive(Default)]
struct Seen {
    kills: usize,
    stores: usize,
    unfinished: HashSet<PathBuf>,
}

/// Checks each value there is, and that the latest used ones are there. Loading them uses them again.
fn check(directory: &Path, used: &mut Vec<u64>, seen: &mut Seen) {
    let (tier, pool) = (tier(directory), pool());
    let mut found = Vec::new();
    for name in 0..NAMES {
        bytes(&pool).fill(0);
        match tier.get(&chunk(&pool, name)) {
            Ok(()) => {
                found.push(name);
                let read = bytes(&pool).to_vec();
                fill(&pool, name);
                assert!(read == bytes(&pool), "other bytes of {name}");
            }
            Err(refusal) => assert_eq!(refusal.reason, Reason::Absent, "{name}: {refusal}"),
        }
    }
    let mut latest: Vec<u64> = Vec::new();
    for name in used.iter().rev() {
        // What the quota holds for sure, beside what eviction frees in advance and the value that was being written.
        if latest.len() < usize::try_from(QUOTA_VALUES).expect("small") - 3 && !latest.contains(name) {
            latest.push(*name);
        }
    }
    for name in latest {
        assert!(found.contains(&name), "{name} was stored and is not found");
    }
    used.extend(&found);
    let left = files(directory);
    let bytes: u64 = left.iter().map(|path| path.metadata().expect("there").len()).sum();
    seen.unfinished.extend(left.into_iter().filter(|path| path.extension().is_some_and(|end| end == "tmp")));
    assert!(bytes <= (QUOTA_VALUES + 1) * VALUE_BYTES, "{bytes} bytes");
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries =
        std::fs::read_dir(directory).into_iter().flatten().map(|entry| entry.expect("readable").path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn kills_lose_nothing_that_was_stored() {
    let kills = env::var(KILLS_VARIABLE).map_or(KILLS, |kills| kills.parse().expect("a number"));
    let directory = tempfile::tempdir().expect("a directory");
    let (mut seen, mut used) = (Seen::default(), Vec::new());
    let start = Instant::now();
    while seen.kills < kills {
        seen.kills += 1;
        // 0 to 250 ms, all over: starting takes some, a store a few.
        let delay = Duration::from_micros(seen.kills as u64 * 154_321 % 250_000);
        used.extend(killed_after(directory.path(), delay, &mut seen));
        check(directory.path(), &mut used, &mut seen);
    }
    eprintln!(
        "{} kills, {} stores, {} files left unfinished, {:?}",
        seen.kills,
        seen.stores,
        seen.unfinished.len(),
        start.elapsed()
    );
    assert!(seen.stores > kills && !seen.unfinished.is_empty(), "the kills hit nothing");
}
