//! Stores, loads and searches of the Redis tier beside raw commands with values of the same size on one connection.
//!
//! Rounds in which all take turns; medians. Needs `redis-server`, or its path in `LMCACHE_RS_REDIS_SERVER`.

mod chunks;

use std::env;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use lmcache_core::{
    Ended, HostPool, Key, Namespace, RedisConfig, RedisTier, Seal, Space, Tier, TierQueue, TierQueueConfig,
};

use chunks::{CHUNKS, WAIT, key};

const PART_BYTES: usize = 4 << 20;
const ROUNDS: usize = 9;

/// A server of the benchmark's own.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        drop(listener);
        let program = env::var("LMCACHE_RS_REDIS_SERVER").unwrap_or_else(|_| "redis-server".to_owned());
        let mut command = Command::new(program);
        command
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""])
            .stdout(Stdio::null());
        let server = Self { child: command.spawn().expect("redis-server is installed"), port };
        while server.try_connect().is_err() {
            thread::sleep(Duration::from_millis(10));
        }
        server
    }

    fn try_connect(&self) -> std::io::Result<TcpStream> {
        let stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn connect(&self) -> BufReader<TcpStream> {
        BufReader::new(self.try_connect().expect("up"))
    }

    fn flush(&self) {
        let mut stream = self.connect();
        stream.get_mut().write_all(b"FLUSHALL\r\n").expect("up");
        line(&mut stream);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn line(stream: &mut BufReader<TcpStream>) -> String {
    let mut line = String::new();
    stream.read_line(&mut line).expect("up");
    line
}

struct Setup {
    server: Server,
    pool: HostPool,
}

impl Setup {
    fn new() -> Self {
        Self { server: Server::start(), pool: chunks::pool() }
    }

    /// Sets one value a part, the next while the last is not answered.
    fn raw_set(&self) {
        let mut stream = self.server.connect();
        let parts = chunks::bytes(&self.pool).chunks(PART_BYTES).enumerate();
        let mut count = 0;
        for (number, part) in parts {
            let name = format!("part{number}");
            let head = format!("*3\r\n$3\r\nSET\r\n${}\r\n{name}\r\n${}\r\n", name.len(), part.len());
            stream.get_mut().write_all(head.as_bytes()).expect("up");
            stream.get_mut().write_all(part).expect("up");
            stream.get_mut().write_all(b"\r\n").expect("up");
            count += 1;
        }
        (0..count).for_each(|_| assert_eq!(line(&mut stream), "+OK\r\n"));
    }

    /// Gets one value a part, as many asked for in advance as the tier asks for.
    fn raw_get(&self) {
        let mut stream = self.server.connect();
        let parts: Vec<&mut [u8]> = chunks::bytes(&self.pool).chunks_mut(PART_BYTES).collect();
        let count = parts.len();
        let ask = |stream: &mut BufReader<TcpStream>, number: usize| {
            if number < count {
                stream.get_mut().write_all(format!("GET part{number}\r\n").as_bytes()).expect("up");
            }
        };
        (0..3).for_each(|number| ask(&mut stream, number));
        for (number, part) in parts.into_iter().enumerate() {
            assert_eq!(line(&mut stream), format!("${}\r\n", part.len()));
            stream.read_exact(part).expect("up");
            assert_eq!(line(&mut stream), "\r\n");
            ask(&mut stream, number + 3);
        }
    }

    fn tier(&self) -> Arc<RedisTier> {
        let url = format!("redis://127.0.0.1:{}", self.server.port);
        let config = RedisConfig { url, prefix: String::new(), ttl: None, timeout: WAIT };
        let space = Space::new(Namespace::new(&[]), 0, 1, Seal::Checksum).expect("valid");
        Arc::new(RedisTier::new(space, &config).expect("valid"))
    }

    fn queue(&self, threads: usize) -> TierQueue {
        let config = TierQueueConfig { threads, stores_max: CHUNKS, loads_max: CHUNKS, wait: WAIT };
        TierQueue::new(self.tier(), &config).expect("valid")
    }
}

fn wait(queue: &TierQueue) {
    assert!(queue.drain(WAIT).expect("open"));
    for outcome in queue.poll().expect("open") {
        assert!(matches!(outcome.ended, Ended::Stored(Ok(_)) | Ended::Loaded(Ok(_))), "{outcome:?}");
    }
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn table(setup: &Setup) {
    let names =
        ["raw SET, new", "raw SET, overwriting", "raw GET", "store T1", "store T2", "load T1", "load T2"];
    let mut times = vec![Vec::new(); names.len()];
    for _ in 0..ROUNDS {
        setup.server.flush();
        times[0].push(seconds(|| setup.raw_set()));
        times[1].push(seconds(|| setup.raw_set()));
        times[2].push(seconds(|| setup.raw_get()));
        for threads in [1, 2] {
            setup.server.flush();
            let queue = setup.queue(threads);
            times[2 + threads].push(seconds(|| {
                queue.store(0, chunks::chunks(&setup.pool)).expect("open");
                wait(&queue);
            }));
            times[4 + threads].push(seconds(|| {
                queue.load(0, chunks::chunks(&setup.pool)).expect("open");
                wait(&queue);
            }));
        }
    }
    let mib = u32::try_from(setup.pool.size_bytes() >> 20).expect("few");
    let speed = |time: f64| f64::from(mib) * 1_048_576.0 / time / 1e9;
    for (name, times) in names.iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        let [slow, middle, fast] = [ROUNDS - 1, ROUNDS / 2, 0].map(|at| speed(times[at]));
        eprintln!("{name:>22}: {middle:5.2} GB/s ({slow:.2} to {fast:.2})");
    }
}

fn redis(criterion: &mut Criterion) {
    let setup = Setup::new();
    // Not where `cargo test` only tries whether benchmarks run.
    if env::args().any(|argument| argument == "--bench") {
        table(&setup);
    }
    let tier = setup.tier();
    for chunk in chunks::chunks(&setup.pool) {
        tier.put(&chunk).expect("up");
    }
    let keys: Vec<Key> = (0..40).map(|number| key(number % CHUNKS)).collect();
    criterion.bench_function("redis, presence of 40 chunks", |bench| {
        bench.iter(|| black_box(tier.present(&keys).expect("up")));
    });
}

criterion_group!(benches, redis);
criterion_main!(benches);
