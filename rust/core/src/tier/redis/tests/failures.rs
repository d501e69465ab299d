//! Servers that are down, die, hang, are full, or are found by sentinels.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::server::{Server, free_port};
use super::{LONG, config, tier};
use crate::tier::fake::{Rows, key, space};
use crate::tier::redis::{RedisConfig, RedisTier};
use crate::tier::{Ended, Reason, Refusal, Stored, Tier, TierQueue, TierQueueConfig};

fn reason<T: std::fmt::Debug>(ended: Result<T, Refusal>) -> Reason {
    ended.expect_err("refused").reason
}

#[test]
fn a_server_that_is_down_costs_misses_and_is_served_again_when_it_is_back() {
    let mut server = Server::start(&[]);
    let rows = Rows::new(2, 4096);
    let (chunk, other) = (rows.chunk(1, &[0]), rows.chunk(1, &[1]));
    server.kill();
    let tier = tier(space("a"), &config(server.url()));
    for _ in 0..10 {
        assert!(matches!(reason(tier.get(&other)), Reason::Io | Reason::Paused));
        assert!(matches!(reason(tier.put(&chunk)), Reason::Io | Reason::Paused));
        assert!(matches!(reason(tier.present(&[key(1)])), Reason::Io | Reason::Paused));
    }
    for _ in 0..3 {
        server.restart();
        assert_eq!(tier.get(&other).expect_err("empty").reason, Reason::Absent);
        assert!(matches!(tier.put(&chunk), Ok(Stored::Written(_))));
        assert_eq!(tier.get(&other), Ok(()));
        server.kill();
        assert!(tier.present(&[key(1)]).is_err());
    }
}

#[test]
fn a_kept_connection_that_died_costs_nothing() {
    let mut server = Server::start(&[]);
    let rows = Rows::new(1, 4096);
    let tier = tier(space("a"), &config(server.url()));
    tier.put(&rows.chunk(1, &[0])).expect("stored");
    server.kill();
    server.restart();
    assert_eq!(tier.present(&[key(1)]), Ok(vec![false]));
    server.kill();
    server.restart();
    assert!(matches!(tier.put(&rows.chunk(1, &[0])), Ok(Stored::Written(_))));
}

#[test]
fn a_server_that_hangs_is_given_up_in_time_and_not_asked_again() {
    let server = Server::start(&[]);
    let rows = Rows::new(1, 4096);
    let chunk = rows.chunk(1, &[0]);
    let config = RedisConfig { timeout: Duration::from_millis(200), ..config(server.url()) };
    let tier = RedisTier::with(space("a"), &config, Duration::from_secs(3600)).expect("valid");
    tier.put(&chunk).expect("stored");
    server.signal(Signal::STOP);
    let start = Instant::now();
    assert_eq!(reason(tier.get(&chunk)), Reason::Late);
    assert!(start.elapsed() < LONG);
    for _ in 0..1000 {
        assert_eq!(reason(tier.present(&[key(1)])), Reason::Paused);
    }
    server.signal(Signal::CONT);
}

#[test]
fn a_unix_socket_whose_queue_is_full_is_given_up_in_time() {
    /// More than wait in the server's queue.
    const ATTEMPTS: usize = 10;
    let server = Server::start(&["--tcp-backlog", "3"]);
    let timeout = Duration::from_millis(200);
    let config = RedisConfig { timeout, ..config(format!("unix://{}", server.socket())) };
    server.signal(Signal::STOP);
    let (sender, ended) = mpsc::channel();
    // Without a limit it hangs, and the test has to end all the same.
    thread::spawn(move || {
        let tier = tier(space("a"), &config);
        let chunk = Rows::new(1, 4096).chunk(1, &[0]);
        (0..ATTEMPTS).try_for_each(|_| sender.send(tier.get(&chunk)))
    });
    for _ in 0..ATTEMPTS {
        assert_eq!(reason(ended.recv_timeout(LONG).expect("it hangs")), Reason::Late);
    }
}

#[test]
fn nobody_waits_for_the_attempt_that_shows_whether_a_server_is_back() {
    let server = Server::start(&[]);
    let timeout = Duration::from_millis(500);
    let tier = Arc::new(tier(space("a"), &RedisConfig { timeout, ..config(server.url()) }));
    let config = TierQueueConfig { threads: 2, stores_max: 1, loads_max: 1, wait: LONG };
    let queue = TierQueue::new(Arc::<RedisTier>::clone(&tier), &config).expect("threads");
    let find = |job| {
        queue.find(job, vec![key(1)]).expect("open");
        queue.wait(LONG).expect("open");
        match queue.poll().expect("open").pop().map(|outcome| outcome.ended) {
            Some(Ended::Found(found)) => found,
            other => panic!("{other:?}"),
        }
    };
    server.signal(Signal::STOP);
    assert_eq!(reason(find(0)), Reason::Late);
    let start = Instant::now();
    for job in 1..=40 {
        assert_eq!(reason(find(job)), Reason::Paused);
    }
    assert!(start.elapsed() < 20 * timeout, "half of what they would take");
    server.signal(Signal::CONT);
    let end = Instant::now() + LONG;
    while find(100).is_err() {
        assert!(Instant::now() < end, "the server is back");
    }
}

#[test]
fn a_reset_that_did_not_reach_the_server_is_done_first() {
    let server = Server::start(&[]);
    let rows = Rows::new(1, 4096);
    let chunk = rows.chunk(1, &[0]);
    let config = RedisConfig { timeout: Duration::from_millis(200), ..config(server.url()) };
    let tier = tier(space("a"), &config);
    tier.put(&chunk).expect("stored");
    server.signal(Signal::STOP);
    assert!(tier.reset().is_err());
    server.signal(Signal::CONT);
    let tier_of_another = super::tier(space("a"), &super::config(server.url()));
    assert!(!tier.present(&[key(1)]).is_ok_and(|found| found == [true]));
    assert!(tier.get(&chunk).is_err());
    // However long the machine takes: what is asked for comes to be.
    let end = Instant::now() + LONG;
    while tier.present(&[key(1)]).is_err() {
        assert!(Instant::now() < end, "the server is back");
    }
    assert_eq!(tier_of_another.present(&[key(1)]), Ok(vec![false]));
}

#[test]
fn the_record_of_who_was_first_stays() {
    let server = Server::start(&[]);
    let rows = Rows::new(1, 4096);
    let (first, second) = (tier(space("a"), &config(server.url())), tier(space("a"), &config(server.url())));
    first.put(&rows.chunk(1, &[0])).expect("stored");
    // As one does who saw none a moment ago.
    second
        .run(&second.record_name(), |connection, _| second.write_record(connection, false))
        .expect("answered");
    assert_eq!(second.present(&[key(1)]), Ok(vec![true]));
}

#[test]
fn a_full_server_drops_stores_and_leaves_no_value_half_there() {
    let server = Server::start(&[]);
    let rows = Rows::new(4, 2 << 20);
    let tier = tier(space("a"), &config(server.url()));
    tier.put(&rows.chunk(1, &[0])).expect("stored");
    server.configure("maxmemory", "4mb");
    server.configure("maxmemory-policy", "noeviction");
    for name in 2..5 {
        assert_eq!(reason(tier.put(&rows.chunk(name, &[0, 1, 2, 3]))), Reason::NoSpace);
        assert_eq!(tier.present(&[key(name)]), Ok(vec![false]));
    }
    assert_eq!(tier.get(&rows.chunk(1, &[1])), Ok(()));
    server.configure("maxmemory", "0");
    assert!(matches!(tier.put(&rows.chunk(2, &[0, 1, 2, 3])), Ok(Stored::Written(_))));
}

#[test]
fn a_server_that_evicts_by_itself_costs_misses() {
    let server = Server::start(&["--maxmemory", "24mb", "--maxmemory-policy", "allkeys-lru"]);
    let rows = Rows::new(6, 3 << 20);
    let tier = tier(space("a"), &config(server.url()));
    let (mut found, mut missed) = (0, 0);
    for round in 0..16 {
        let name = round * 7 % 5;
        rows.fill(&[0, 1, 2], name);
        let expected = rows.read(&[0, 1, 2]);
        // While it evicts it may have no room for a moment.
        let _ = tier.put(&rows.chunk(name, &[0, 1, 2]));
        for name in [name, (name + 2) % 5] {
            match tier.get(&rows.chunk(name, &[3, 4, 5])) {
                Ok(()) => {
                    found += 1;
                    rows.fill(&[0, 1, 2], name);
                    let expected =
                        if name == round * 7 % 5 { expected.clone() } else { rows.read(&[0, 1, 2]) };
                    assert!(rows.read(&[3, 4, 5]) == expected, "other bytes of {name}");
                }
                Err(refusal) => {
                    missed += 1;
                    assert!(matches!(refusal.reason, Reason::Absent | Reason::Truncated), "{refusal}");
                }
            }
        }
    }
    assert!(found > 0 && missed > 0, "{found} found, {missed} missed");
}

#[test]
fn sentinels_lead_to_the_server() {
    let server = Server::start(&[]);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let sentinel = listener.local_addr().expect("bound");
    let answer = {
        let (host, port) = ("127.0.0.1", server.address().rsplit(':').next().expect("one").to_owned());
        format!("*2\r\n${}\r\n{host}\r\n${}\r\n{port}\r\n", host.len(), port.len())
    };
    let asked = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("asked");
        let lines: Vec<String> =
            BufReader::new(&stream).lines().take(7).map(|line| line.expect("a command")).collect();
        stream.write_all(answer.as_bytes()).expect("there");
        lines
    });
    let dead = free_port();
    let url = format!("redis-sentinel://127.0.0.1:{dead},{sentinel}/main");
    let tier = tier(space("a"), &config(url));
    assert!(matches!(tier.put(&Rows::new(1, 4096).chunk(1, &[0])), Ok(Stored::Written(_))));
    let lines = asked.join().expect("asked");
    assert_eq!(lines[2..], ["SENTINEL", "$23", "get-master-addr-by-name", "$4", "main"]);
    assert_eq!(server.names().len(), 3);
}
